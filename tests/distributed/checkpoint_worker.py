"""One rank of `test_checkpoints.py`: trains and saves in one layout, or loads what another saved and trains on."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from dsm_train.config import ModelConfig, OptimConfig, ParallelConfig
from dsm_train.hf.architectures import HeadKind
from dsm_train.megatron import parallel, weights
from dsm_train.megatron.checkpoint import Saver, _optimizers, load, load_weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, TrainableModel

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp2_sp_dp2_sharded": (4, ParallelConfig(tp=2, sp=True, distributed_optimizer=True)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2_vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "dp2": (2, ParallelConfig()),
    "dp2_sharded": (2, ParallelConfig(distributed_optimizer=True)),
}
MODELS: dict[str, tuple[ModelConfig, HeadKind]] = {
    "biases": (replace(tiny.BIASES, num_layers=5), "language"),  # five layers: pipelines share them unevenly
    "tied": (replace(tiny.MODEL, tied_head=True, num_layers=4), "language"),
    "bf16": (replace(tiny.MODEL, dtype="bf16", num_layers=4), "language"),
    "value": (replace(tiny.MODEL, num_layers=4), "value"),
}
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, schedule="linear", clip_grad=1.0)
Weights = dict[str, torch.Tensor]


def build(layout: Parallel, name: str, seed: int) -> dict[str, Model]:
    """A model to train and a frozen one, of other weights, beside it."""
    config, kind = MODELS[name]
    head = HeadSpec(tiny.VOCAB, kind)
    trained = TrainableModel(config, head, seeded(layout, config, head, seed), layout, OPTIM, 10)
    frozen = Model(config, head, seeded(layout, config, head, seed + 1), layout)
    return {"policy": trained, "reference": frozen}


def seeded(layout: Parallel, config: ModelConfig, head: HeadSpec, seed: int) -> list:
    built = weights.build_model(config, head, layout)
    weights.initialise(built, config, seed, layout)
    return built


def without_optimizer(folder: Path, name: str, layout: Parallel) -> Model:
    """The trained model's weights alone, in a model that pads the vocabulary otherwise."""
    config, kind = MODELS[name]
    config, head = replace(config, vocab_multiple=1), HeadSpec(tiny.VOCAB, kind)
    model = Model(config, head, seeded(layout, config, head, seed=7), layout)
    load_weights(folder, "policy", model, layout)
    return model


def step(model: TrainableModel, number: int) -> None:
    """An optimizer step by a gradient that is a function of the weight's name and the step."""
    layout = model.parallel
    for module in model.modules:
        module.zero_grad_buffer()
    for name, parameter in weights.named_weights(model.chunks):
        tied = name == "output_layer.weight" and model.config.tied_head
        drawn_as = weights.VOCABULARY_WEIGHTS[0] if tied else name
        generator = torch.Generator().manual_seed(zlib.crc32(f"{drawn_as} {number}".encode()))
        shape = weights._full_shape(parameter, layout.groups.tp.size())
        if name in weights.VOCABULARY_WEIGHTS:
            full = torch.zeros(shape)
            full[: tiny.VOCAB] = torch.randn(tiny.VOCAB, shape[1], generator=generator)
        else:
            full = torch.randn(shape, generator=generator)
        weights.gradient(parameter).copy_(weights.shard(name, full, parameter, layout))
    model.optimizer_step()


def moments(model: TrainableModel) -> list[torch.Tensor]:
    """List the tensors that the optimizer keeps on this rank, in its order."""
    inner = [optimizer.optimizer for optimizer in _optimizers(model)]
    states = [state for optimizer in inner for state in optimizer.state.values()]
    main = [p.detach() for optimizer in inner for group in optimizer.param_groups for p in group["params"]]
    return [value.clone() for value in main + [value for state in states for _, value in sorted(state.items())]]


def full(model: Model, layout: Parallel) -> Weights:
    """Full weights on the main rank, without what pads the vocabulary."""
    whole = weights.gather_full(model.chunks, layout)
    return {name: x[: tiny.VOCAB] if name in weights.VOCABULARY_WEIGHTS else x for name, x in whole.items()}


def save(rank: int, world: int, store: dist.Store, out: Path, layout_name: str) -> None:
    """Save after two steps, then make a third; load again, which must give the same bits, and make it once more."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    layout = parallel.start(LAYOUTS[layout_name][1], seed=0)
    saver = Saver(layout)
    for name in MODELS:
        models, folder = build(layout, name, seed=0), out / f"{layout_name}-{name}"
        policy = models["policy"]
        assert isinstance(policy, TrainableModel)
        step(policy, 1)
        step(policy, 2)
        at_save = moments(policy)
        saved = {part: full(model, layout) for part, model in models.items()}
        if layout.is_main:
            folder.mkdir()
        dist.barrier()
        writing = saver.start(folder, models)
        step(policy, 3)  # while it is written: what is written is the state of before
        sums = writing.finish()
        after, at_end, lr = full(policy, layout), moments(policy), policy.learning_rate
        if layout.is_main:
            assert set(sums) == {path.name for path in folder.iterdir()} and len(sums) >= world
            torch.save({"saved": saved, "after": after}, out / f"{layout_name}-{name}.pt")
        others = build(layout, name, seed=7)
        load(folder, others, layout)
        again = others["policy"]
        assert isinstance(again, TrainableModel) and again.steps == 2 and again.schedule.num_steps == 2
        assert all(torch.equal(a, b) for a, b in zip(at_save, moments(again), strict=True))
        step(again, 3)
        assert all(torch.equal(a, b) for a, b in zip(at_end, moments(again), strict=True)) and again.learning_rate == lr
        for a, b in zip(policy.chunks, again.chunks, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def resume(rank: int, world: int, store: dist.Store, out: Path, layout_name: str, *saved_in: str) -> None:
    """Load what other layouts saved: the same weights; and the next step moves them as it did there."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    layout = parallel.start(LAYOUTS[layout_name][1], seed=0)
    for other in saved_in:
        for name, (config, _) in MODELS.items():
            models = build(layout, name, seed=7)
            load(out / f"{other}-{name}", models, layout)
            policy = models["policy"]
            assert isinstance(policy, TrainableModel)
            held = {part: full(model, layout) for part, model in models.items()}
            alone = full(without_optimizer(out / f"{other}-{name}", name, layout), layout)
            assert all(torch.equal(held["policy"][key], value) for key, value in alone.items())
            assert alone.keys() == held["policy"].keys()
            step(policy, 3)
            after = full(policy, layout)
            if not layout.is_main:
                continue
            there = torch.load(out / f"{other}-{name}.pt")
            for part in models:
                assert held[part].keys() == there["saved"][part].keys()
                assert all(torch.equal(there["saved"][part][key], value) for key, value in held[part].items())
            for key, value in after.items():
                before, expected = held["policy"][key].float(), there["after"][key].float()
                moved, tolerance = expected - before, 1e-5 if config.dtype == "fp32" else 1e-2
                error = (value.float() - expected).norm() / moved.norm()
                assert error <= tolerance, f"{other} to {layout_name}, {name}: {key} by {error:.1e}"
