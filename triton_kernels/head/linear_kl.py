"""KL divergence between two heads over the whole vocabulary, per row, from hidden states, without keeping logits.

z = hidden weight' + bias;  z = softcap tanh(z / softcap);  s = z / temperature, of the policy and of the reference
p = softmax(s);  q = softmax(ref_s);  KL(p || q) = sum_v p_v (log p_v - log q_v)

The vocabulary may be split over ranks. Each computes the statistics of its shard; five numbers per row travel.

T rows, C rows of one chunk, V vocabulary or this rank's shard of it, D and E hidden sizes of policy and reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from triton_kernels._register import REFERENCE, custom_op, implementation
from triton_kernels.head.arguments import autocast, check_head, check_softmax, checked_workspace, gather, split
from triton_kernels.head.gemm import accumulate, chunk_rows, operand, padded, product, result_dtype
from triton_kernels.head.kl_logits import kl_gradient, kl_stats, merge_kl
from triton_kernels.head.logits import reinterpreted


def linear_kl(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    ref_hidden_TE: Tensor,
    ref_weight_VE: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias_V: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    ref_softcap: float | None = None,
    workspace_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
    reduce_dx: bool = True,
) -> Tensor:
    """kl_T: KL(policy || reference) of each row in nats, exact over the vocabulary; fp32 (fp64 for fp64).

    Differentiable in everything that requires a gradient, of either head: swap the heads for KL(reference || policy),
    and let the reference be the student to distil. The heads share the vocabulary and the temperature; hidden sizes,
    dtypes (fp64 goes with fp64 alone), softcap and bias are each head's own: `softcap` says nothing of the reference.

    A bias of -inf removes a token (softcap, applied after the bias, would bring it back). Removed by both heads or by
    the policy alone it adds 0. Removed by the reference alone it makes the KL inf and the policy's gradient of that row
    not finite, unless the upstream gradient of the row is 0: then its gradient is 0, always. The sum is accurate to the
    rounding of fp32, in absolute terms: a KL below that may come out negative. Equal heads give exactly 0.

    Logits are fp32 out of the GEMM; `workspace_bytes` (64 MiB on the CPU, 2 GiB elsewhere) bounds what those of both
    heads take at a time, one row at least. The backward pass computes them again; a frozen head costs that GEMM alone.

    With a `tp_group` of several ranks, `weight_VD`, `ref_weight_VE` and the biases are this rank's consecutive shard of
    the vocabulary, the same for both heads, in rank order and of any size, 0 included. Every rank gives the same hidden
    states, gets the same KL to the bit, and must give the same upstream gradients. The gradients of the hidden states
    are summed over the ranks, in fp32, or with `reduce_dx=False` left as this shard's part of the sum.

    Under torch.autocast hidden states and weights are converted as torch.mm's operands would be.

    Raises `ValueError` for shapes, dtypes, devices, temperature, softcap or workspace that do not fit, and on every
    rank where the ranks differ in the number of rows.
    """
    hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE = autocast(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE)
    check_head(hidden_TD, weight_VD, bias_V)
    check_head(ref_hidden_TE, ref_weight_VE, ref_bias_V, "ref_")
    _check_pair(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE)
    check_softmax(temperature, softcap, ref_softcap)
    workspace_bytes = checked_workspace(workspace_bytes, hidden_TD.device)
    settings = (float(temperature), softcap, ref_softcap, workspace_bytes)
    group, _ = split(hidden_TD, weight_VD, tp_group)
    heads = (hidden_TD, weight_VD, bias_V, ref_hidden_TE, ref_weight_VE, ref_bias_V)
    return _LinearKL.apply(*heads, group, reduce_dx, settings)


def _check_pair(hidden_TD: Tensor, weight_VD: Tensor, ref_hidden_TE: Tensor, ref_weight_VE: Tensor) -> None:
    for what, x, ref_x in (("rows", hidden_TD, ref_hidden_TE), ("vocabulary", weight_VD, ref_weight_VE)):
        if len(x) != len(ref_x):
            raise ValueError(f"both heads must have the same {what}; got {len(x)} and {len(ref_x)}")
    if hidden_TD.device != ref_hidden_TE.device:
        raise ValueError(f"both heads must be on one device; got {hidden_TD.device} and {ref_hidden_TE.device}")
    if result_dtype(hidden_TD) != result_dtype(ref_hidden_TE):
        raise ValueError(
            f"fp64 goes with fp64 alone: give both heads in it or neither; got {hidden_TD.dtype} and "
            f"{ref_hidden_TE.dtype}"
        )


class _LinearKL(torch.autograd.Function):
    """Pieces of this shard, and the exchange of statistics between the ranks of `group`; None: one shard."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ref_hidden_TE: Tensor,
        ref_weight_VE: Tensor,
        ref_bias_V: Tensor | None,
        group: ProcessGroup | None,
        reduce_dx: bool,
        settings: tuple[float, float | None, float | None, int],
    ) -> Tensor:
        heads = (hidden_TD, weight_VD, bias_V, ref_hidden_TE, ref_weight_VE, ref_bias_V)
        stats_5T = linear_kl_fwd(*heads, *settings)
        kl_T, rows_5T = merge_kl(gather(stats_5T, group))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*heads, rows_5T)
        ctx.group, ctx.reduce_dx, ctx.settings = group, reduce_dx, settings
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor | None) -> tuple[Any, ...]:
        if grad_T is None:
            return (None,) * 9
        *heads, _ = saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        gradients = linear_kl_bwd(grad_T, *saved, *ctx.settings, needs)
        if ctx.group is not None and ctx.reduce_dx:
            for i in (0, 3):
                if needs[i]:
                    dist.all_reduce(gradients[i], group=ctx.group)
        narrow = [dx.to(x.dtype) if need else None for dx, x, need in zip(gradients, heads, needs, strict=True)]
        return *narrow, None, None, None


def linear_kl_fwd_chunked(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ref_hidden_TE: Tensor,
    ref_weight_VE: Tensor,
    ref_bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    workspace_bytes: int,
) -> Tensor:
    """This shard's `kl_stats`, [5, T]."""
    stats_5T = _stats_like(hidden_TD)
    heads = (hidden_TD, operand(weight_VD), ref_hidden_TE, operand(ref_weight_VE))
    for rows, logits_CV, ref_logits_CV in _chunks(*heads, workspace_bytes):
        stats_5T[:, rows] = kl_stats(logits_CV, ref_logits_CV, bias_V, ref_bias_V, temperature, softcap, ref_softcap)
    return stats_5T


def linear_kl_bwd_chunked(
    grad_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ref_hidden_TE: Tensor,
    ref_weight_VE: Tensor,
    ref_bias_V: Tensor | None,
    rows_5T: Tensor,
    temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    workspace_bytes: int,
    needs: list[bool],
) -> list[Tensor]:
    """This shard's gradients by the six tensors of the heads, in fp32 (fp64 for fp64); empty where `needs` says no.

    rows_5T is of the whole vocabulary: see `kl_gradient`.
    """
    gradients = _gradients_like(hidden_TD, weight_VD, bias_V, ref_hidden_TE, ref_weight_VE, ref_bias_V, needs)
    weight_VD, ref_weight_VE = operand(weight_VD), operand(ref_weight_VE)
    wanted, ref_wanted = any(needs[:3]), any(needs[3:])
    for rows, logits_CV, ref_logits_CV in _chunks(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE, workspace_bytes):
        dlogits_CV = reinterpreted(logits_CV, weight_VD.dtype) if wanted else None
        ref_dlogits_CV = reinterpreted(ref_logits_CV, ref_weight_VE.dtype) if ref_wanted else None
        kl_gradient(
            logits_CV, ref_logits_CV, dlogits_CV, ref_dlogits_CV, bias_V, ref_bias_V, grad_T[rows], rows_5T[:, rows],
            temperature, softcap, ref_softcap,
        )  # fmt: skip
        _accumulate_head(gradients[:3], dlogits_CV, hidden_TD, weight_VD, rows, needs[:3])
        _accumulate_head(gradients[3:], ref_dlogits_CV, ref_hidden_TE, ref_weight_VE, rows, needs[3:])
    return gradients


def _accumulate_head(
    gradients: list[Tensor],
    dlogits_CV: Tensor | None,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    rows: slice,
    needs: list[bool],
) -> None:
    """Add a chunk's part to one head's (dhidden_TD, dweight_VD, dbias_V)."""
    if dlogits_CV is None:
        return
    dhidden_TD, dweight_VD, dbias_V = gradients
    if needs[0]:
        product(dlogits_CV, weight_VD, out=dhidden_TD[rows])
    if needs[1]:
        accumulate(dweight_VD, dlogits_CV.T, operand(hidden_TD[rows]))
    if needs[2]:
        dbias_V.add_(dlogits_CV.sum(0, dtype=dbias_V.dtype))


def _chunks(
    hidden_TD: Tensor, weight_VD: Tensor, ref_hidden_TE: Tensor, ref_weight_VE: Tensor, workspace_bytes: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of rows with the logits of both heads: as many as fit into the workspace, in the same memory each time."""
    (T, _), V, dtype = hidden_TD.shape, len(weight_VD), result_dtype(hidden_TD)
    count = min(T, chunk_rows(V, workspace_bytes, _logits_held(hidden_TD), dtype))
    memory_2CV = hidden_TD.new_empty(2, count, padded(V), dtype=dtype)[:, :, :V]
    for start in range(0, T, max(count, 1)):
        rows = slice(start, min(start + count, T))
        logits_CV, ref_logits_CV = memory_2CV[:, : rows.stop - start]
        product(operand(hidden_TD[rows]), weight_VD.T, out=logits_CV)
        product(operand(ref_hidden_TE[rows]), ref_weight_VE.T, out=ref_logits_CV)
        yield rows, logits_CV, ref_logits_CV


def _logits_held(hidden_TD: Tensor) -> int:
    """Number of tensors of the logits' size that their ops hold at once, the logits of both heads included."""
    kernels = implementation("kl_stats", hidden_TD.device.type) != REFERENCE
    return 2 if kernels and hidden_TD.dtype != torch.float64 else 8


def _stats_like(hidden_TD: Tensor, *_: object) -> Tensor:
    """Uninitialised [5, T]."""
    return hidden_TD.new_empty(5, len(hidden_TD), dtype=result_dtype(hidden_TD))


def _gradients_like(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ref_hidden_TE: Tensor,
    ref_weight_VE: Tensor,
    ref_bias_V: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Zeros for the gradients; empty where `needs` says no."""
    heads = (hidden_TD, weight_VD, bias_V, ref_hidden_TE, ref_weight_VE, ref_bias_V)
    return [
        hidden_TD.new_zeros(x.shape if need and x is not None else 0, dtype=result_dtype(hidden_TD))
        for x, need in zip(heads, needs, strict=True)
    ]


_CHUNKED = "library GEMM and KL ops"
linear_kl_fwd = custom_op("linear_kl_fwd", linear_kl_fwd_chunked, default=_CHUNKED)
linear_kl_fwd.register_fake(_stats_like)
linear_kl_bwd = custom_op("linear_kl_bwd", linear_kl_bwd_chunked, default=_CHUNKED)
linear_kl_bwd.register_fake(
    lambda _g, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *rest: _gradients_like(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rest[-1]
    )
)
