"""One rank of `test_balance.py`: a data-parallel replica with responses of its own, balanced with the others."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from dsm_train.balance import balance
from dsm_train.config import ParallelConfig
from dsm_train.grpo import PRESETS
from dsm_train.megatron import parallel
from dsm_train.packing.cost import estimated_cost
from dsm_train.rows import Rows
from dsm_train.types import Rollouts, Sequences
from dsm_train.update import minibatches

VOCAB = 2**30  # tokens by which a response is known wherever it goes

# Response lengths of each replica's prompts, by case; all replicas of a case, and a prompt's responses in a row.
CASES: dict[str, list[list[list[int]]]] = {
    "uneven": [[[30, 40, 35], [25, 50, 45], [60, 20, 33]], [[3, 2, 5], [1, 4, 2]]],
    "uneven3": [[[3, 2]], [[30, 40, 35], [25, 50, 45], [60, 20, 33]], [[5, 5, 1]]],
    "nothing": [[], [[9, 9, 9, 9], [8, 0, 8]]],
    "nothing3": [[[7, 7, 7, 7, 7]], [], []],
    "nothing_at_all": [[], []],
    "giant": [[[3, 2, 4]], [[1, 400, 2], [3, 3]]],
    "fewer_than_replicas3": [[], [[5]], [[6]]],
    "off": [[[30, 40, 35], [25, 50, 45]], [[3, 2, 5]]],
}


def of_replica(lengths_PG: list[list[int]], rank: int) -> Rollouts:
    """A replica's rollouts; every number in them tells whose it is."""
    rng = random.Random(rank)
    prompts = [[rng.randrange(VOCAB) for _ in range(2 + p)] for p in range(len(lengths_PG))]
    responses = [[rng.randrange(VOCAB) for _ in range(n)] for lengths in lengths_PG for n in lengths]
    group_cu = torch.tensor([0, *(len(lengths) for lengths in lengths_PG)]).cumsum(0).to(torch.int32)
    sequences = replace(Sequences.from_lists(prompts, responses), group_cu=group_cu)
    generator = torch.Generator().manual_seed(rank)
    T, S = sequences.response_token_T.numel(), len(responses)
    return Rollouts(
        sequences=sequences,
        prompt_id_P=torch.arange(len(prompts)),
        rollout_logprob_T=torch.zeros(T),
        margin_T=torch.zeros(T),
        finished_S=torch.ones(S, dtype=torch.bool),
        weight_version=0,
        reward_S=torch.randn(S, generator=generator),
        ref_logprob_T=torch.randn(T, generator=generator),
        old_logprob_T=torch.randn(T, generator=generator),
    )


def main(rank: int, world: int, store: dist.Store, out: Path, *names: str) -> None:
    """Write what each case was before and after."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    layout = parallel.start(ParallelConfig(), seed=0)
    off = replace(layout, config=replace(layout.config, balance=False))
    for name in names:
        rollouts = of_replica(CASES[name][rank], rank)
        work = {}
        for average in ("response", "token", "fixed"):
            algo = replace(PRESETS["grpo"], average=average, scale="batch")
            ((sequences, rows),) = minibatches(rollouts, algo, 64, layout)
            work[average] = float(rows.weight_T.sum())
        cost = estimated_cost(sequences, tiny.MODEL, tiny.VOCAB)
        shared: tuple[Sequences, Rows] = balance(sequences, rows, cost, off if name == "off" else layout)
        after = estimated_cost(shared[0], tiny.MODEL, tiny.VOCAB)
        torch.save(
            {
                "before": (sequences, rows),
                "after": shared,
                "cost": (cost.total, after.total),
                "own": (int(cost.own_S.sum()), int(after.own_S.sum())),
                "weight": work,
                "advantage_T": rows.advantage_T,
                "rollouts": rollouts,
            },
            out / f"{name}-{rank}.pt",
        )
    parallel.stop(layout)
