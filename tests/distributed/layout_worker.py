"""One rank of `test_layouts.py`: builds layouts, trains two steps in each, samples, and writes what it holds."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from dsm_train.config import ModelConfig, OptimConfig, ParallelConfig
from dsm_train.data.format import Example
from dsm_train.data.tasks import Task
from dsm_train.examples import Limit, tokenise
from dsm_train.grpo import token_weights
from dsm_train.hf.writer import appearing
from dsm_train.losses import LossOutput, Stats, SupervisedLoss
from dsm_train.megatron import parallel, weights
from dsm_train.megatron.heads import HeadSpec, ValueHead
from dsm_train.megatron.model import build_model
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import TrainableModel
from dsm_train.packing.microbatch import MicroBatch, pack, repeat_prompts
from dsm_train.packing.packer import Packer
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.supervise import mean_loss, share
from dsm_train.types import Prompt, Rollouts, Sequences
from dsm_train.update import optimizer_step

MODEL = replace(tiny.MODEL, num_layers=4)
UNEVEN = replace(tiny.MODEL, num_layers=3)
TIED = tiny.tied(replace(tiny.BIASES, num_layers=4))
RECOMPUTE = replace(MODEL, recompute=True)
SEQUENCES = tiny.sequences([3, 1, 6, 2], [4, 9, 1, 3, 2, 7, 5, 5])
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1)
PROMPTS = [Prompt(1, [3, 4, 5]), Prompt(2, [11]), Prompt(5, [9, 8, 7, 6]), Prompt(7, [1, 2])]
SAMPLING = SamplingConfig(max_new_tokens=12)

CASES: dict[str, tuple[ParallelConfig, ModelConfig]] = {
    "one": (ParallelConfig(), MODEL),
    "one_tied": (ParallelConfig(), TIED),
    "one_uneven": (ParallelConfig(), UNEVEN),
    "tp2": (ParallelConfig(tp=2), MODEL),
    "tp2_sp": (ParallelConfig(tp=2, sp=True), MODEL),
    "tp2_tied": (ParallelConfig(tp=2), TIED),
    "tp2_sp_recompute": (ParallelConfig(tp=2, sp=True), RECOMPUTE),
    "pp2": (ParallelConfig(pp=2), MODEL),
    "pp2_uneven": (ParallelConfig(pp=2), UNEVEN),
    "pp2_tied": (ParallelConfig(pp=2), TIED),
    "pp2_vpp2": (ParallelConfig(pp=2, vpp=2), MODEL),
    "dp2": (ParallelConfig(), MODEL),
    "dp2_overlap": (ParallelConfig(overlap=True), MODEL),
    "dp2_distributed": (ParallelConfig(distributed_optimizer=True), MODEL),
    "dp2_distributed_overlap": (ParallelConfig(distributed_optimizer=True, overlap=True), MODEL),
    "tp2_sp_pp2": (ParallelConfig(tp=2, sp=True, pp=2), MODEL),
    "pp2_vpp2_dp2": (ParallelConfig(pp=2, vpp=2, distributed_optimizer=True, overlap=True), MODEL),
}


def run(name: str, rank: int, world: int, store: dist.Store, out: Path) -> None:
    config, model = CASES[name]
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world)
    layout = parallel.start(config, seed=0)
    policy = tiny.trainable(layout, model, OPTIM, steps=10)
    result: dict[str, object] = {
        "place": (layout.groups.tp.rank(), layout.groups.pp.rank(), layout.dp_rank),
        "sizes": (layout.groups.tp.size(), layout.groups.pp.size(), layout.dp_size),
        "losses": layout.is_replica_main,
        "gathered": layout.gather_over_data(rank),
        "exchanged": layout.exchange_over_data([(rank, to) for to in range(layout.dp_size)]),
        "initial": weights.gather_full(policy.chunks, layout),
        "local": tiny.full_weights(policy.chunks),
        "rollouts": generate(policy, layout),
        "again": generate(policy, layout),
        "logprob": policy.logprobs(packed(SEQUENCES, 30, config), SEQUENCES.response_token_T.numel(), 0.8),
    }
    result["steps"] = [train(policy, layout, max_tokens) for max_tokens in (1000, 16)]
    result["supervised"] = [supervised(policy, layout, step) for step in range(3)]
    result["trained"] = weights.gather_full(policy.chunks, layout)
    result["copies"] = weights.difference_of_copies(policy.chunks, layout)
    result["sampled"] = generate(policy, layout).sequences.response_token_T  # with the weights of after the update
    result["value"] = value_step(layout, model)
    with appearing(out / f"{name}-weights", layout.is_main) as folder:
        weights.save_weights(folder, policy.chunks, model, layout, torch.float32, shard_bytes=20_000)
    dist.barrier()
    policy.restart(OPTIM, 1)
    weights.initialise(policy.chunks, model, 1, layout)
    weights.load_weights(out / f"{name}-weights", policy.chunks, model, layout)
    result["loaded"] = weights.gather_full(policy.chunks, layout)
    torch.save(result, out / f"{name}-{rank}.pt")
    parallel.stop(layout)


def packed(sequences: Sequences, max_tokens: int, config: ParallelConfig) -> list[MicroBatch]:
    """On one rank, which the others are compared with, every response has its own copy of the prompt."""
    if dist.get_world_size() == 1:
        sequences = repeat_prompts(sequences)
    return pack(sequences, max_tokens, torch.device("cpu"), multiple=config.pp if config.vpp > 1 else 1)


def generate(policy: TrainableModel, layout: Parallel) -> Rollouts:
    """This replica's share of the prompts."""
    engine = EmbeddedEngine(policy, [7], seed=0)
    return engine.generate(PROMPTS[layout.dp_rank :: layout.dp_size], 4, SAMPLING, step=0)


def train(policy: TrainableModel, layout: Parallel, max_tokens: int) -> dict[str, object]:
    """One step on this replica's groups of a batch of four."""
    mine = SEQUENCES.take(torch.arange(SEQUENCES.num_responses).chunk(layout.dp_size)[layout.dp_rank])
    weight_T = token_weights(mine.response_cu, "response", SEQUENCES.num_responses, 0, fixed_length=1)
    batches = packed(mine, max_tokens, layout.config)
    shares = any(batch.layout.shares_prompts for batch in batches)
    step = optimizer_step(policy, batches, SupervisedLoss(weight_T))
    return {
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "lr": step.lr,
        "sums": dict(step.stats.sums),
        "shares": shares,
    }


class Conversations:
    """Conversations of random tokens in which every other stretch is learnt."""

    def example(self, task: Task) -> Example:
        rng = random.Random(task.id)
        stretches = [[rng.randrange(tiny.VOCAB) for _ in range(rng.randint(1, 6))] for _ in range(5)]
        learnt = [i % 2 == 0 for i, stretch in enumerate(stretches[1:]) for _ in stretch]
        return Example(stretches[0], [token for stretch in stretches[1:] for token in stretch], learnt)


def supervised(policy: TrainableModel, layout: Parallel, step: int) -> dict[str, float]:
    """Take one step on conversations, every replica its part: cut by cost, dealt in turn, or fewer than replicas."""
    tasks = [Task(number, "") for number in range(9)]
    examples = tokenise(tasks, Conversations(), Limit("", 99), prompt_loss=False, skip=False)  # type: ignore[arg-type]
    layout = replace(layout, config=replace(layout.config, balance=step != 1))
    packer = Packer(policy.config, tiny.VOCAB, layout.config, torch.device("cpu"), max_tokens=48)
    batch, learnt_T = examples.take(torch.arange(9) if step < 2 else torch.tensor([4]))
    result = optimizer_step(policy, *share(batch, learnt_T, packer, layout))
    after = mean_loss(policy, examples, packer, layout)
    return {"loss": result.loss, "grad_norm": result.grad_norm, "learnt": result.stats.tokens, "after": after}


def value_step(layout: Parallel, model: ModelConfig) -> dict[str, object]:
    """Compute one gradient of a loss on values, whose head is not split: this replica's groups of a batch of four."""
    spec = HeadSpec(tiny.VOCAB, "value")
    built = build_model(model, spec, layout)
    weights.initialise(built, model, 0, layout)
    for name, parameter in weights.named_weights(built):
        if name == "value_head.weight":  # at 0, where it starts, no other weight has a gradient
            parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    critic = TrainableModel(model, spec, built, layout, OPTIM, 1)
    mine = SEQUENCES.take(torch.arange(SEQUENCES.num_responses).chunk(layout.dp_size)[layout.dp_rank])

    def loss(head: ValueHead, batch: MicroBatch) -> LossOutput:
        target_T = batch.target_T / tiny.VOCAB
        return LossOutput((head.value_T - target_T).square().sum() / 10, Stats({}, {}, {}))

    outputs = critic.forward_backward(packed(mine, 30, layout.config), loss)
    gradient = critic.gradients()
    return {"gradient": gradient, "losses": [float(out.loss.detach()) for out in outputs]}


def main(rank: int, world: int, store: dist.Store, out: Path, *names: str) -> None:
    """Run one case after the other."""
    for name in names:
        run(name, rank, world, store, out)
