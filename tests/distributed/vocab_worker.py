"""One rank of `test_vocab_parallel.py`: the ops on its shard of the vocabulary, split over all ranks and over two.

T loss rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from vocabulary import REMOVED, SHARDS, V, each_group, shard

from triton_kernels import Objective, linear_grpo_loss, linear_logprob

D = 12


@dataclass(frozen=True)
class Case:
    """The inputs of `linear_logprob`. extreme: logits of 1e4, 1e4 - 1, 0 and -1e4. wants: which of hidden states,
    weight and bias want a gradient."""

    shards: str = "even"
    T: int = 63
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    softcap: float | None = None
    bias: bool = False
    extreme: bool = False
    entropy: bool = True
    wants: tuple[int, ...] = (0, 1, 2)

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        """[hidden_TD, weight_VD, bias_V] of the whole vocabulary and target_T."""
        generator = torch.Generator().manual_seed(self.T)
        hidden_TD, weight_VD = torch.randn(self.T, D, generator=generator), torch.randn(V, D, generator=generator)
        target_T, bias_V = torch.randint(0, V, (self.T,), generator=generator), torch.randn(V, generator=generator)
        if self.extreme:  # whole numbers, so that the products are exact
            logits = torch.tensor([1e4, 1e4 - 1, 0.0, -1e4])
            weight_VD = logits[torch.randint(0, 4, (V, D), generator=generator)]
            weight_VD[:, 0] = 1e4 - torch.arange(V) // 8  # close ones on top, in several shards
            hidden_TD = torch.eye(D)[torch.arange(self.T) % D]
        bias_V[REMOVED] = -torch.inf
        target_T[torch.isin(target_T, torch.tensor(REMOVED)) & self.bias] = 0
        return [x.to(self.dtype) for x in (hidden_TD, weight_VD, bias_V)], target_T


CASES = {
    **{f"{shards} {T}": Case(shards, T) for shards in SHARDS for T in (0, 1, 63)},
    **{f"{shards} fp64": Case(shards, dtype=torch.float64, bias=True) for shards in SHARDS},
    **{f"{shards} extreme": Case(shards, extreme=True) for shards in SHARDS},
    **{f"{shards} bias": Case(shards, bias=True, temperature=0.7) for shards in SHARDS},
    "softcap": Case("uneven", softcap=2.0, temperature=1.3),
    "softcap fp64": Case("uneven", softcap=2.0, temperature=0.6, dtype=torch.float64),
    "extreme fp64": Case("uneven", extreme=True, dtype=torch.float64),
    "bf16": Case("uneven", bias=True, dtype=torch.bfloat16),
    "no entropy": Case("empty first", entropy=False),
    "hidden states alone": Case("uneven", wants=(0,)),
    "weight alone": Case("uneven", wants=(1,)),
}


@dataclass(frozen=True)
class GrpoCase:
    """The inputs of `linear_grpo_loss`; in every fifth row the weight is 0 and the rest NaN or out of range."""

    objective: Objective
    shards: str = "uneven"
    lengths: tuple[int, ...] = (5, 0, 40, 18)
    dtype: torch.dtype = torch.float32
    on_policy: bool = False

    def tensors(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """[hidden_TD, weight_VD, bias_V], and the rows: target_T, old, reference, advantage_T, weight_T, response_cu"""
        (hidden_TD, weight_VD, bias_V), target_T = Case(T=sum(self.lengths), bias=True, dtype=torch.float64).tensors()
        generator = torch.Generator().manual_seed(0)
        noise_T, other_T, advantage_T = torch.randn(3, len(target_T), generator=generator, dtype=torch.float64)
        logprob_T = linear_logprob(hidden_TD, weight_VD, target_T, bias_V=bias_V).logprob_T
        rows = [logprob_T + 0.3 * noise_T, logprob_T + 0.3 * other_T, advantage_T, advantage_T.abs() + 0.1]
        absent_T = torch.arange(len(target_T)) % 5 == 2
        for x in (hidden_TD, *rows[:3]):
            x[absent_T] = torch.nan
        rows[3][absent_T] = 0
        target_T[absent_T] = -5
        response_cu = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        old_T, *rows = (x.to(self.dtype) for x in rows)
        inputs = [x.to(self.dtype) for x in (hidden_TD, weight_VD, bias_V)]
        return inputs, [target_T, None if self.on_policy else old_T, *rows, response_cu]


GRPO_CASES = {
    "token": GrpoCase(Objective()),
    "sequence": GrpoCase(Objective(ratio="sequence"), "even"),
    "token entropy": GrpoCase(Objective(entropy_coef=0.3), "empty first"),
    "sequence entropy fp64": GrpoCase(Objective(ratio="sequence", entropy_coef=0.3), "empty last", dtype=torch.float64),
    "on-policy": GrpoCase(Objective(entropy_coef=0.1), on_policy=True),
    "no rows": GrpoCase(Objective(entropy_coef=0.1), lengths=(0, 0)),
}


def sharded(inputs: list[Tensor], shards: str, group: ProcessGroup) -> list[Tensor]:
    """[hidden_TD, weight_VD, bias_V] as this rank of the group gives them."""
    return [inputs[0], *(x[shard(shards, group)] for x in inputs[1:])]


def scored(
    case: Case, inputs: list[Tensor], target_T: Tensor, tp_group: ProcessGroup | None = None, reduce_dx: bool = True
) -> list[Tensor | None]:
    """logprob_T, entropy_T and the gradients of a sum with weights of both signs; several chunks of rows."""
    inputs = [x.detach().requires_grad_(i in case.wants) for i, x in enumerate(inputs)]
    bias_V = inputs[2] if case.bias else None
    output = linear_logprob(
        *inputs[:2],
        target_T,
        temperature=case.temperature,
        softcap=case.softcap,
        bias_V=bias_V,
        workspace_bytes=2**13,
        tp_group=tp_group,
        reduce_dx=reduce_dx,
    )
    grad_T = torch.linspace(-1, 2, case.T, dtype=torch.float64)
    total = (grad_T * output.logprob_T).sum() + case.entropy * (grad_T.flip(0) * output.entropy_T).sum()
    return [output.logprob_T, output.entropy_T, *gradients(inputs, total)]


def lost(
    case: GrpoCase, inputs: list[Tensor], rows: list[Any], tp_group: ProcessGroup | None = None, reduce_dx: bool = True
) -> list[Tensor | None]:
    """loss, log-probabilities, entropies, sums of the statistics and gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = linear_grpo_loss(
        *inputs[:2], *rows, case.objective, bias_V=inputs[2], temperature=0.8, tp_group=tp_group, reduce_dx=reduce_dx
    )
    return [output.loss, output.logprob_T, output.entropy_T, output.stats.sums, *gradients(inputs, output.loss)]


def gradients(inputs: list[Tensor], total: Tensor) -> list[Tensor | None]:
    """Gradients of `total` by hidden states, weight and bias; None for those that want none."""
    total.backward()
    return [x.grad for x in inputs]


def run(case: Case | GrpoCase, group: ProcessGroup) -> dict[str, Any]:
    """The op's results, its unreduced part of the hidden states' gradient, and if a second run gave the same bits."""
    inputs, rows = case.tensors()
    op = partial(scored if isinstance(case, Case) else lost, case, sharded(inputs, case.shards, group), rows, group)
    first, second, part = op(), op(), op(reduce_dx=False)
    again = all(x is y is None or torch.equal(x, y) for x, y in zip(first, second, strict=True))
    return {"result": [None if x is None else x.detach() for x in first], "part": part[-3], "again": again}


def removed_target(group: ProcessGroup) -> list[Tensor]:
    """logprob_T and entropy_T where the bias has removed the target."""
    inputs, _ = Case(T=1).tensors()
    hidden_TD, weight_VD, bias_V = sharded(inputs, "even", group)
    output = linear_logprob(hidden_TD, weight_VD, torch.tensor(REMOVED[:1]), bias_V=bias_V, tp_group=group)
    return [output.logprob_T, output.entropy_T]


def refusal(targets: list[int], group: ProcessGroup) -> str:
    """The error of `linear_logprob` on these targets, or "none"."""
    inputs = sharded([torch.zeros(len(targets), D), torch.zeros(V, D), torch.zeros(V)], "uneven", group)
    try:
        linear_logprob(*inputs[:2], torch.tensor(targets), tp_group=group)
    except ValueError as error:
        return str(error)
    return "none"


def main(rank: int, world: int, store: dist.Store, out: Path) -> None:
    """Write the results of every case in each group."""
    for group in each_group(rank, world, store):
        results: dict[str, Any] = {name: run(case, group) for name, case in (CASES | GRPO_CASES).items()}
        results["removed target"] = removed_target(group)
        targets = {"rows": [1] * (group.rank() + 1), "high": [0, V], "low": [0, -1], "fine": [0, V - 1]}
        results["refusals"] = {name: refusal(target, group) for name, target in targets.items()}
        torch.save(results, out / f"{group.size()}-{group.rank()}.pt")
