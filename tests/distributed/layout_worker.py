"""One rank of `test_layouts.py`: builds a layout, trains one step and writes what it holds.

python layout_worker.py RANK WORLD_SIZE STORE OUT CASE...
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import replace
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from dsm_train.config import ModelConfig, OptimConfig, ParallelConfig, SamplingConfig
from dsm_train.grpo import token_weights
from dsm_train.megatron import parallel, weights
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import TrainableModel
from dsm_train.packing import pack
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.types import Prompt
from dsm_train.update import optimizer_step, supervised_loss

MODEL = replace(tiny.MODEL, num_layers=4)
SEQUENCES = tiny.sequences([3, 1, 6, 2], [4, 9, 1, 3, 2, 7, 5, 5])
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1)

CASES: dict[str, tuple[ParallelConfig, ModelConfig]] = {
    "one": (ParallelConfig(), MODEL),
    "one_tied": (ParallelConfig(), tiny.tied(MODEL)),
    "tp2": (ParallelConfig(tp=2), MODEL),
    "tp2_sp": (ParallelConfig(tp=2, sp=True), MODEL),
    "pp2": (ParallelConfig(pp=2), MODEL),
    "pp2_tied": (ParallelConfig(pp=2), tiny.tied(MODEL)),
    "pp2_vpp2": (ParallelConfig(pp=2, vpp=2), MODEL),
    "dp2": (ParallelConfig(), MODEL),
    "dp2_overlap": (ParallelConfig(overlap=True), MODEL),
    "dp2_distributed": (ParallelConfig(distributed_optimizer=True), MODEL),
    "dp2_distributed_overlap": (ParallelConfig(distributed_optimizer=True, overlap=True), MODEL),
}
TRAINED = ("one", *(name for name in CASES if name.startswith("dp2")))


def run(name: str, rank: int, world: int, store: dist.Store, out: Path) -> None:
    config, model = CASES[name]
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world)
    layout = parallel.start(config, seed=0)
    policy = tiny.trainable(layout, model, OPTIM, steps=10)
    result: dict[str, object] = {
        "place": (layout.groups.tp.rank(), layout.groups.pp.rank(), layout.dp_rank),
        "sizes": (layout.groups.tp.size(), layout.groups.pp.size(), layout.dp_size),
        "losses": layout.counts_losses,
        "initial": tiny.full_weights(policy.chunks),
        "gathered": layout.gather_over_data(rank),
    }
    if name in TRAINED:
        result["steps"] = [train(policy, layout, max_tokens) for max_tokens in (1000, 12)]
        result["trained"] = tiny.full_weights(policy.chunks)
        # the generator and the log-probabilities read the weights of after the update, on every rank
        rollouts = EmbeddedEngine(policy, [7], seed=0).generate(
            [Prompt(1, [3, 4, 5])], 4, SamplingConfig(max_new_tokens=6), step=0
        )
        result["response"] = rollouts.sequences.response_token_T
        T = SEQUENCES.response_token_T.numel()
        result["logprob"] = policy.logprobs(pack(SEQUENCES, 1000, torch.device("cpu")), T, 1.0)
    else:
        result["refused"] = refusal(policy, layout, out)
    torch.save(result, out / f"{name}-{rank}.pt")
    parallel.stop()


def train(policy: TrainableModel, layout: Parallel, max_tokens: int) -> dict[str, object]:
    """One step on this replica's groups of a batch of four."""
    groups = SEQUENCES.num_prompts // layout.dp_size
    mine, _, _ = SEQUENCES.groups(layout.dp_rank * groups, (layout.dp_rank + 1) * groups)
    weight_T = token_weights(mine.response_cu, "response", SEQUENCES.num_responses, 0, fixed_length=1)
    step = optimizer_step(policy, pack(mine, max_tokens, torch.device("cpu")), supervised_loss(weight_T))
    return {"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr, "sums": step.stats.sums}


def refusal(policy: TrainableModel, layout: Parallel, out: Path) -> list[str]:
    """What a split model says to the things that are not built for it."""
    messages = []
    for attempt in (
        lambda: EmbeddedEngine(policy, [7], seed=0),
        lambda: weights.save_weights(out / "weights", policy.chunks, policy.config, layout),
    ):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


def main() -> None:
    rank, world, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4])
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[3], world)
    for name in sys.argv[5:]:
        run(name, rank, world, store, out)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        # The other rank waits in a collective: end without waiting for it.
        sys.stderr.flush()
        raise SystemExit(1) from None
