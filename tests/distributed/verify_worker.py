"""One rank of `test_verify.py`: replays the made-up batch in every layout, with and without something wrong.

A world of one rank writes the rollouts and the reference steps; larger ones compare with them, and the main rank writes
the lines of each comparison to CASE.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist

from dsm_train.config import AlgorithmConfig, OptimConfig, ParallelConfig, RunConfig
from dsm_train.configs import VerifyStepConfig
from dsm_train.grpo import algorithm
from dsm_train.megatron import parallel, weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.step import TrainableModel
from dsm_train.megatron.weights import ModelSpec
from dsm_train.packing.microbatch import MicroBatch
from dsm_train.rollout.config import SamplingConfig
from dsm_train.stages.verify_step import Plan
from dsm_train.verify.comparison import TOLERANCES, Replayed, compare
from dsm_train.verify.replay import Replay, Witness
from dsm_train.verify.synthetic import synthetic_rollouts

MODEL = replace(tiny.MODEL, num_layers=4, max_length=80)
MODELS = {
    "plain": MODEL,
    "tied": replace(MODEL, tied_head=True),
    "recompute": replace(MODEL, recompute=True),
    # Every bias and norm that a layer may have, and heads for tp 4.
    "biases": replace(tiny.BIASES, num_layers=4, max_length=80, num_heads=8, num_kv_heads=4),
}
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1)
ALL_TERMS = AlgorithmConfig(entropy_coef=0.01)
ALGORITHMS = {
    "response": ALL_TERMS,
    "token": replace(ALL_TERMS, average="token"),
    "fixed": replace(ALL_TERMS, average="fixed", scale="none"),
    "sequence": replace(ALL_TERMS, preset="gspo", kl_coef=0.04),
    "cispo": replace(ALL_TERMS, preset="cispo", scale="batch"),
    # The second optimizer step of each stage is off-policy by itself; each minibatch is half of every replica's groups.
    "passes": replace(ALL_TERMS, minibatches=2, epochs=2),
    # Neither KL nor entropy: groups without spread are left out, and a replica may be left with nothing.
    "idle": AlgorithmConfig(preset="dapo"),
}
WHOLE = 10_000
"""A token budget that holds the whole batch in one micro-batch."""


@dataclass(frozen=True)
class Case:
    """A layout, and the work in it."""

    layout: ParallelConfig = field(default_factory=ParallelConfig)
    model: str = "plain"
    algorithm: str = "response"
    max_tokens: int = 70
    steps: int = 1
    """Exploration stages."""
    shares: bool = True
    shuffle: bool = False
    fault: str = ""

    @property
    def reference(self) -> str:
        """The name of the step to compare with."""
        # A loss divided by the number of micro-batches would be so in the reference layout as well.
        stages = [str(self.steps)] if self.steps > 1 else []
        return "-".join([self.model, self.algorithm, *stages, *(["divided"] if self.fault == "divided" else [])])


TP, SP = ParallelConfig(tp=2), ParallelConfig(tp=2, sp=True)
PP, VPP = ParallelConfig(pp=2), ParallelConfig(pp=2, vpp=2)
DP, UNBALANCED = ParallelConfig(), ParallelConfig(balance=False)
DISTRIBUTED = ParallelConfig(distributed_optimizer=True)
TP_PP, SP_VPP = replace(TP, pp=2), replace(SP, pp=2, vpp=2)
TWO_RANKS = {
    **{name: Case(layout, "biases") for name, layout in (("tp", TP), ("sp", SP), ("pp", PP), ("vpp", VPP), ("dp", DP))},
    "dp_silent": Case(UNBALANCED),  # the second replica's groups have no token
    "dp_overlap": Case(replace(DP, overlap=True)),
    "dp_distributed": Case(DISTRIBUTED, "biases"),
    "dp_distributed_overlap_silent": Case(replace(DISTRIBUTED, overlap=True, balance=False)),
    **{f"{name}_repeated": Case(layout, shares=False) for name, layout in (("sp", SP), ("dp_silent", UNBALANCED))},
    "tp_tied": Case(SP, "tied"),
    "pp_tied": Case(PP, "tied"),
    "dp_tied": Case(DISTRIBUTED, "tied"),
    "sp_recompute": Case(SP, "recompute"),
    "vpp_recompute": Case(VPP, "recompute"),
    **{
        f"{name}_{algorithm}": Case(layout, algorithm=algorithm)
        for name, layout in (("sp", SP), ("dp_silent", UNBALANCED))
        for algorithm in ALGORITHMS
        if algorithm not in ("response", "passes")
    },
    **{
        f"{name}_stages": Case(layout, algorithm="passes", steps=2)
        for name, layout in (("sp", SP), ("pp", PP), ("dp_distributed", DISTRIBUTED))
    },
    **{f"dp_{algorithm}": Case(DP, algorithm=algorithm) for algorithm in ("idle", "sequence")},
    **{
        f"{name}_{what}": Case(layout, max_tokens=max_tokens, shuffle=what == "shuffled")
        for name, layout in (("tp", TP), ("vpp", VPP), ("dp", DP))
        for what, max_tokens in (("whole", WHOLE), ("shuffled", 66))
    },
}
FOUR_RANKS = {
    "tp_pp": Case(TP_PP),
    "sp_vpp": Case(SP_VPP, "biases"),
    "sp_vpp_sequence": Case(SP_VPP, "recompute", "sequence", shuffle=True),
    "sp_dp": Case(replace(SP, distributed_optimizer=True, overlap=True), "biases"),
    "pp_dp_silent": Case(replace(VPP, distributed_optimizer=True, balance=False), "tied", "token"),
    "tp4_sp": Case(ParallelConfig(tp=4, sp=True), "biases"),  # the last shard of the vocabulary is padding alone
    "dp4_silent": Case(replace(DISTRIBUTED, balance=False), algorithm="idle"),
}
CLASSES = {
    "norm": "norm",
    "embedding": "embedding",
    "head": "output_layer",
    "projection": "decoder.layers.1.self_attention.linear_proj.weight",
}
REPLICATED = {
    "norm_parts": ("self_attention.q_layernorm", "self_attention.k_layernorm"),
    "bias_parts": ("self_attention.linear_proj.bias", "mlp.linear_fc2.bias"),
}
"""Gradients of weights that tensor-parallel ranks hold alike, and each computes a part of."""
ANYWHERE = ("divided", "idle", "rate")
"""Faults of the whole step, in any layout alike."""
LATER = ("moments", "schedule")
"""Faults that show from the second optimizer step on."""
FAULTY: dict[int, dict[str, tuple[ParallelConfig, tuple[str, ...]]]] = {
    2: {
        "tp": (TP, ("rank", "positions", "norm_parts", *CLASSES)),
        "sp": (SP, ("rank", "bias_parts")),
        "pp": (PP, ("rank", *CLASSES, *ANYWHERE)),
        "vpp": (VPP, ("rank",)),
        "dp": (DP, ("rank", "share")),
        "dp_silent": (UNBALANCED, ("rank",)),
        "dp_distributed": (DISTRIBUTED, ("rank", "share", *CLASSES, *ANYWHERE)),
    },
    4: {"tp_pp": (TP_PP, ("rank", *CLASSES))},
}


def cases(world: int) -> dict[str, Case]:
    """List what is to pass on this many ranks, and what is not."""
    sound = {2: TWO_RANKS, 4: FOUR_RANKS}[world]
    faulty = {
        f"{name}!{fault}": Case(layout, "biases" if fault in REPLICATED else "plain", fault=fault, max_tokens=WHOLE)
        for name, (layout, faults) in FAULTY[world].items()
        for fault in faults
    }
    if world == 2:
        faulty |= {f"pp!{fault}": Case(PP, fault=fault, steps=2) for fault in LATER}
    return sound | faulty


class Tampering(TrainableModel):
    """A model with something wrong in its step: the case's fault."""

    fault = ""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss: Any) -> list[Any]:
        """Put the fault into the gradient.

        `divided`: the mean over micro-batches. `positions`: a token's place in the buffer, which is right up to a
        constant unless a prompt is shared. `norm_parts`, `bias_parts`: Megatron is not told to sum these gradients of
        `REPLICATED`. Otherwise something of the gradient is 1 % too large: `share`, rank 1's own, before it is summed
        over replicas; `rank`, rank 1's, afterwards; or that of a class of weights.
        """
        second = self.parallel.rank == 1
        if self.fault == "norm_parts":
            self.chunks[0].config.qk_layernorm = False
        if self.fault == "bias_parts":
            for name, parameter in weights.named_weights(self.chunks):
                if name.endswith(".bias"):
                    parameter.sequence_parallel = False
        if self.fault == "positions":
            micro_batches = [replace(batch, position_N=torch.arange(len(batch.token_N))) for batch in micro_batches]

        def wrong(head: Any, batch: MicroBatch) -> Any:
            out = loss(head, batch)
            if self.fault == "divided":
                return replace(out, loss=out.loss / len(micro_batches))
            extra = 0.01 * (out.loss - out.loss.detach()) if self.fault == "share" and second else 0.0
            return replace(out, loss=out.loss + extra)

        outputs = super().forward_backward(micro_batches, wrong)
        for name, parameter in weights.named_weights(self.chunks):
            if (self.fault == "rank" and second) or (self.fault in CLASSES and CLASSES[self.fault] in name):
                weights.gradient(parameter).mul_(1.01)
        return outputs

    def optimizer_step(self, loss: float = 0.0) -> float:
        """Put the fault into the update.

        `idle`: nothing is updated. `moments`: another decay of the second moment. `schedule`: two steps at once.
        """
        if self.fault == "idle":
            self.optimizer.prepare_grads()
            return float(self.optimizer.get_grad_norm())
        if self.fault == "moments":
            for group in self.optimizer.param_groups:
                group["betas"] = (group["betas"][0], 0.5)
        norm = super().optimizer_step(loss)
        if self.fault == "schedule":
            self.schedule.step(increment=1)
        return norm


class Tampered(Witness, Tampering):
    """Witness of a model with a fault."""


def plan_of(case: Case) -> Plan:
    """Plan the case as `verify-step` would."""
    config = VerifyStepConfig(
        run=RunConfig(max_tokens=case.max_tokens, share_prompts=case.shares),
        model=MODELS[case.model],
        parallel=case.layout,
        synthetic=True,
        algorithm=ALGORITHMS[case.algorithm],
        sampling=SamplingConfig(temperature=0.9, max_new_tokens=60),
        optim=replace(OPTIM, lr=OPTIM.lr * 1.01) if case.fault == "rate" else OPTIM,
    )
    if case.steps > 1:
        config = replace(config, optim=replace(config.optim, warmup_steps=2, schedule="cosine"))
    algo = algorithm(config.algorithm)
    # 258 tokens: a vocabulary that is padded in every layout, and differently.
    spec = ModelSpec(config.model, HeadSpec(258), None, 0)
    batches = [synthetic_rollouts(258, MODEL.max_length, seed) for seed in range(case.steps)]
    seed = 0 if case.shuffle else None
    return Plan(config, Replay(spec, algo, config.sampling, config.optim, batches, seed), None)


def replay(case: Case, layout: parallel.Parallel, *, reference: bool = False) -> Replayed:
    """Replay the case in this layout."""
    plan = plan_of(case)
    packer = plan.reference_packer(layout) if reference else plan.packer(layout)
    return plan.replay.run(layout, packer, type("Faulty", (Tampered,), {"fault": case.fault}))


def make_references(layout: parallel.Parallel, out: Path) -> None:
    """Replay each reference on one rank."""
    every = [*cases(2).values(), *cases(4).values()]
    for case in {case.reference: case for case in every}.values():
        fault = "divided" if case.fault == "divided" else ""
        alone = replace(case, layout=ParallelConfig(), fault=fault, shuffle=False, max_tokens=WHOLE)
        torch.save(replay(alone, layout, reference=True), out / f"reference-{case.reference}.pt")


def check(name: str, case: Case, layout: parallel.Parallel, out: Path) -> None:
    """Compare the case with its reference; the main rank writes the lines."""
    here = replay(case, layout)
    if layout.is_main:
        there = torch.load(out / f"reference-{case.reference}.pt", weights_only=False)
        lines = compare(here, there, TOLERANCES["fp32"])
        (out / f"{name}.json").write_text(json.dumps([asdict(line) | {"holds": line.holds} for line in lines]))


def shared_store(files: dist.Store, rank: int, world: int) -> dist.Store:
    """A TCP store, whose port the first rank tells in a file: the ranks ask it often, which a file store is slow at."""
    if rank > 0:
        return dist.TCPStore("127.0.0.1", int(files.get("port")), world, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    files.set("port", str(store.port))
    return store


def main(rank: int, world: int, store: dist.Store, out: Path) -> None:
    """Make the references, or compare every case of this number of ranks with them."""
    if world == 1:
        layout = parallel.start(ParallelConfig(), seed=0, alone=True)
        make_references(layout, out)
        return
    store = shared_store(store, rank, world)
    layouts: dict[ParallelConfig, list[str]] = {}
    for name, case in cases(world).items():
        layouts.setdefault(case.layout, []).append(name)
    for number, (config, names) in enumerate(layouts.items()):
        place = dist.PrefixStore(str(number), store)
        dist.init_process_group("gloo", store=place, rank=rank, world_size=world)
        layout = parallel.start(config, seed=0)
        for name in names:
            check(name, cases(world)[name], layout, out)
        parallel.stop(layout)
    store.set(f"done{rank}", "")
    if rank == 0:  # the store ends with the first rank: the last to leave
        store.wait([f"done{other}" for other in range(world)])
