"""One rank of `test_kl_parallel.py`: `linear_kl` on its shard of the vocabulary, split over all ranks and over two.

T rows, V vocabulary, D and E hidden sizes of policy and reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from vocabulary import REMOVED, SHARDS, V, each_group, shard

from triton_kernels import linear_kl

D, E = 12, 9


@dataclass(frozen=True)
class Case:
    """The inputs of `linear_kl`. extreme: logits of up to 1e4; in every other row the policy's mass is in other
    shards than the reference's. equal: the reference is the policy. wants: which of the heads' six tensors want a
    gradient."""

    shards: str = "even"
    T: int = 63
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    softcap: float | None = None
    ref_softcap: float | None = None
    bias: bool = False
    extreme: bool = False
    equal: bool = False
    wants: tuple[int, ...] = (0, 1, 2, 3, 4, 5)

    def tensors(self) -> list[Tensor]:
        """[hidden, weight, bias] of the policy, then of the reference, over the whole vocabulary."""
        generator = torch.Generator().manual_seed(self.T)
        tensors: list[Tensor] = []
        for width in (D, E):
            tensors += [torch.randn(n, width, generator=generator) for n in (self.T, V)]
            tensors.append(torch.randn(V, generator=generator))
        tensors[2][REMOVED] = tensors[5][REMOVED] = -torch.inf
        if self.extreme:  # whole numbers, so that the products are exact; rows take turns
            v = torch.arange(V)
            close_V, ref_close_V = 1e4 - v // 8, 1e4 - 2.0 * (v % 7)
            apart_V = 1e4 - 2500.0 * (v // 6)
            for i, columns in ((0, (close_V, apart_V)), (3, (ref_close_V, apart_V.flip(0)))):
                tensors[i] = torch.eye(tensors[i].shape[1])[torch.arange(self.T) % 2]
                tensors[i + 1][:, :2] = torch.stack(columns, 1)
        if self.equal:
            tensors[3:] = [x.clone() for x in tensors[:3]]
        return [x.to(self.dtype) for x in tensors]


CASES = {
    **{shards: Case(shards, bias=True, temperature=0.7) for shards in SHARDS},
    **{f"{shards} extreme": Case(shards, extreme=True) for shards in SHARDS},
    "no rows": Case("uneven", T=0),
    "one row": Case("empty first", T=1),
    "fp64": Case("uneven", dtype=torch.float64, bias=True),
    "softcap": Case("uneven", softcap=2.0, temperature=1.3),
    "two softcaps fp64": Case("empty last", softcap=2.0, ref_softcap=3.0, temperature=0.6, dtype=torch.float64),
    "equal": Case("uneven", bias=True, equal=True),
    "bf16": Case("uneven", bias=True, dtype=torch.bfloat16),
    "frozen reference": Case("uneven", wants=(0, 1)),
    "frozen policy": Case("empty first", bias=True, wants=(3, 4, 5)),
}


def run_once(case: Case, group: ProcessGroup, reduce_dx: bool = True) -> list[Tensor | None]:
    """kl_T and the gradients of a sum with weights of both signs, on this rank's shard; several chunks of rows."""
    mine = shard(case.shards, group)
    heads = [x if i % 3 == 0 else x[mine] for i, x in enumerate(case.tensors())]
    heads = [x.detach().requires_grad_(i in case.wants) for i, x in enumerate(heads)]
    kl_T = linear_kl(
        heads[0], heads[1], heads[3], heads[4],
        bias_V=heads[2] if case.bias else None, ref_bias_V=heads[5] if case.bias else None,
        temperature=case.temperature, softcap=case.softcap, ref_softcap=case.ref_softcap,
        workspace_bytes=2**14, tp_group=group, reduce_dx=reduce_dx,
    )  # fmt: skip
    (torch.linspace(-1, 2, case.T, dtype=torch.float64) * kl_T).sum().backward()
    return [kl_T.detach(), *(x.grad for x in heads)]


def run(case: Case, group: ProcessGroup) -> dict[str, Any]:
    """The op's results, its unreduced parts of the hidden states' gradients, and if a second run gave the same bits."""
    first, second, parts = run_once(case, group), run_once(case, group), run_once(case, group, reduce_dx=False)
    again = all(x is y is None or torch.equal(x, y) for x, y in zip(first, second, strict=True))
    return {"result": first, "parts": [parts[1], parts[4]], "again": again}


def refusal(T: int, group: ProcessGroup) -> str:
    """The error of `linear_kl` on T rows of this rank, or "none"."""
    try:
        linear_kl(torch.zeros(T, D), torch.zeros(2, D), torch.zeros(T, E), torch.zeros(2, E), tp_group=group)
    except ValueError as error:
        return str(error)
    return "none"


def main(rank: int, world: int, store: dist.Store, out: Path) -> None:
    """Write the results of every case in each group."""
    for group in each_group(rank, world, store):
        results: dict[str, Any] = {name: run(case, group) for name, case in CASES.items()}
        results["refusals"] = [refusal(group.rank() + 1, group), refusal(1, group)]
        torch.save(results, out / f"{group.size()}-{group.rank()}.pt")
