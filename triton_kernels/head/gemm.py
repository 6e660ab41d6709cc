"""Library GEMMs with fp32 results from operands of any type, and the number of rows that a workspace holds.

T loss rows, V vocabulary (shard).
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels._common import at_least_fp32

_ALIGNED = 64
"""Rows of logits begin at multiples of so many numbers: library GEMMs are fast there, and V is rarely a multiple."""


def result_dtype(x: Tensor) -> torch.dtype:
    """Dtype of results: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operand(x: Tensor) -> Tensor:
    """Operand of a GEMM with an fp32 result: on the CPU, where a half-precision GEMM rounds its result, in fp32."""
    return x if x.is_cuda else at_least_fp32(x)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Product a b in fp32 (fp64 for fp64), whatever the operands."""
    if out is None:  # explicit, because autocast would take its own dtype for the result
        out = a.new_empty(a.shape[0], b.shape[1], dtype=result_dtype(a))
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def accumulate(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `into` in fp32 (fp64 for fp64), without a second tensor of its size."""
    if a.dtype in (torch.float32, torch.float64):
        torch.addmm(into, a, b, out=into)
    else:
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)


def chunk_rows(V: int, workspace_bytes: int, held: int, dtype: torch.dtype, others: int = 0) -> int:
    """Rows that fit into the workspace, at least one: each with `held` rows of logits and `others` more numbers."""
    return max(1, workspace_bytes // ((held * padded(V) + others) * dtype.itemsize))


def padded(V: int) -> int:
    """Length of a row of logits in memory."""
    return -(-max(V, 1) // _ALIGNED) * _ALIGNED
