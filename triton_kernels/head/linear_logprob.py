"""Log-probability of each target and entropy of each row, from hidden states, without keeping logits.

z = hidden weight' + bias;  z = softcap tanh(z / softcap);  s = z / temperature
log p(target) = s[target] - lse(s);  entropy = lse(s) - sum_v p_v s_v

The vocabulary may be split over ranks. Each computes the statistics of its shard; four numbers per row travel.

T loss rows, C rows of one chunk, V vocabulary or this rank's shard of it, D hidden, R ranks that split it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from triton_kernels._checks import IDS, check_tensor
from triton_kernels._register import custom_op, register_triton
from triton_kernels.head.arguments import (
    autocast,
    check_head,
    check_range,
    check_softmax,
    checked_workspace,
    gather,
    split,
)
from triton_kernels.head.gemm import accumulate, chunk_rows, operand, padded, product, result_dtype
from triton_kernels.head.logits import logit_gradient, logit_stats, logits_held, merge, reinterpreted
from triton_kernels.head.scoring import launch_scoring


@dataclass(frozen=True)
class LinearLogprob:
    """logprob_T, entropy_T: fp32 (fp64 for fp64), both differentiable."""

    logprob_T: Tensor
    entropy_T: Tensor


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias_V: Tensor | None = None,
    workspace_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
    reduce_dx: bool = True,
) -> LinearLogprob:
    """Log-probability of `target_T` and entropy of softmax(s), with s as above; logits are fp32 out of the GEMM.

    A bias of -inf removes a token of the vocabulary (softcap, applied after the bias, would bring it back). The
    backward pass computes the logits again, in chunks that take `workspace_bytes` (None: 64 MiB on the CPU, 2 GiB
    elsewhere); the forward pass needs none on a GPU. A target out of range is an error on the CPU; on a GPU,
    where looking would synchronise, the range is the caller's promise.

    With a `tp_group` of several ranks, `weight_VD` and `bias_V` are this rank's consecutive shard of the vocabulary, in
    rank order and of any size, 0 included; `target_T` holds ids of the whole vocabulary. Every rank gives the same
    hidden states and targets, gets the same result to the bit, and must give the same upstream gradients. The hidden
    states' gradient is summed over the ranks, in fp32, or with `reduce_dx=False` left as this shard's part of the sum.

    Under torch.autocast hidden states and weight are converted as torch.mm's operands would be.

    Raises `ValueError` for shapes, dtypes, devices, targets, temperature or softcap that do not fit, and on every rank
    where the ranks differ in the number of rows.
    """
    hidden_TD, weight_VD = autocast(hidden_TD, weight_VD)
    check_head(hidden_TD, weight_VD, bias_V)
    check_softmax(temperature, softcap)
    check_tensor("target_T", target_T, (len(hidden_TD),), like=hidden_TD, dtypes=IDS)
    settings = (float(temperature), softcap, checked_workspace(workspace_bytes, hidden_TD.device))
    group, shards = split(hidden_TD, weight_VD, tp_group)
    check_range(target_T, sum(shards))
    start = sum(shards[: group.rank()]) if group is not None else 0
    return LinearLogprob(
        *_LinearLogprob.apply(hidden_TD, weight_VD, target_T - start, bias_V, group, reduce_dx, settings)
    )


class _LinearLogprob(torch.autograd.Function):
    """Pieces of this shard, and the exchange of statistics between the ranks of `group`; None: one shard."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        local_target_T: Tensor,
        bias_V: Tensor | None,
        group: ProcessGroup | None,
        reduce_dx: bool,
        settings: tuple[float, float | None, int],
    ) -> tuple[Tensor, Tensor]:
        stats_4T = linear_logprob_fwd(hidden_TD, weight_VD, local_target_T, bias_V, *settings)
        logprob_T, entropy_T, max_T, log_sum_T = merge(gather(stats_4T, group))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_TD, weight_VD, local_target_T, bias_V, entropy_T, max_T, log_sum_T)
        ctx.group, ctx.reduce_dx, ctx.settings = group, reduce_dx, settings
        return logprob_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: each reading unpacks anew, which activation checkpointing refuses
        hidden_TD, weight_VD, _, bias_V, *_ = saved
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        gradients = linear_logprob_bwd(grad_logprob_T, grad_entropy_T, *saved, *ctx.settings, needs)
        if ctx.group is not None and ctx.reduce_dx and needs[0]:
            dist.all_reduce(gradients[0], group=ctx.group)
        dhidden_TD, dweight_VD, dbias_V = (
            gradient.to(x.dtype) if need else None
            for gradient, x, need in zip(gradients, (hidden_TD, weight_VD, bias_V), needs, strict=True)
        )
        return dhidden_TD, dweight_VD, None, dbias_V, None, None, None


def linear_logprob_fwd_chunked(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    local_target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
) -> Tensor:
    """This shard's statistics [4, T]: max of s, sum exp(s - max), s[target], sum exp(s - max) (s - max).

    See `logit_stats_reference`.
    """
    stats_4T, weight_VD = stats_like(hidden_TD), operand(weight_VD)
    for rows, logits_CV in chunks(hidden_TD, weight_VD, workspace_bytes):
        product(operand(hidden_TD[rows]), weight_VD.T, out=logits_CV)
        stats_4T[:, rows] = logit_stats(logits_CV, local_target_T[rows], bias_V, temperature, softcap)
    return stats_4T


def linear_logprob_bwd_chunked(
    grad_logprob_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    local_target_T: Tensor,
    bias_V: Tensor | None,
    entropy_T: Tensor,
    max_T: Tensor,
    log_sum_T: Tensor,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """This shard's (dhidden_TD, dweight_VD, dbias_V) in fp32 (fp64 for fp64); empty where `needs` says no.

    The logits are computed again. Entropy, max and log_sum are of the whole vocabulary.
    """
    dhidden_TD, dweight_VD, dbias_V = gradients = gradients_like(hidden_TD, weight_VD, bias_V, needs)
    weight_VD = operand(weight_VD)
    g_T = torch.zeros_like(entropy_T) if grad_logprob_T is None else grad_logprob_T
    for rows, logits_CV in chunks(hidden_TD, weight_VD, workspace_bytes):
        hidden_CD = operand(hidden_TD[rows])
        product(hidden_CD, weight_VD.T, out=logits_CV)
        dlogits_CV = reinterpreted(logits_CV, weight_VD.dtype)
        h_C = None if grad_entropy_T is None else grad_entropy_T[rows]
        saved = (entropy_T[rows], max_T[rows], log_sum_T[rows])
        logit_gradient(
            dlogits_CV, logits_CV, local_target_T[rows], bias_V, g_T[rows], h_C, *saved, temperature, softcap
        )
        if needs[2]:
            dbias_V.add_(dlogits_CV.sum(0, dtype=dbias_V.dtype))
        if needs[0]:
            product(dlogits_CV, weight_VD, out=dhidden_TD[rows])
        if needs[1]:
            accumulate(dweight_VD, dlogits_CV.T, hidden_CD)
    return gradients


def chunks(hidden_TD: Tensor, weight_VD: Tensor, workspace_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows that fit into the workspace, and memory for their logits [C, V], the same for all."""
    (T, _), V = hidden_TD.shape, len(weight_VD)
    dtype = result_dtype(hidden_TD)
    count = min(T, chunk_rows(V, workspace_bytes, logits_held(hidden_TD), dtype))
    memory = hidden_TD.new_empty(count, padded(V), dtype=dtype)
    for start in range(0, T, max(count, 1)):
        rows = slice(start, min(start + count, T))
        yield rows, memory[: rows.stop - start, :V]


def stats_like(hidden_TD: Tensor, *_: object) -> Tensor:
    """Uninitialised [4, T]."""
    return hidden_TD.new_empty(4, hidden_TD.shape[0], dtype=result_dtype(hidden_TD))


def gradients_like(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for the gradients; empty where `needs` says no."""
    bias_V = weight_VD[:, 0] if bias_V is None else bias_V
    a, b, c = (
        x.new_zeros(x.shape if need else 0, dtype=result_dtype(hidden_TD))
        for x, need in zip((hidden_TD, weight_VD, bias_V), needs, strict=True)
    )
    return a, b, c


def _linear_logprob_fwd_triton(hidden_TD: Tensor, *arguments: Any) -> Tensor:
    if hidden_TD.dtype == torch.float64:
        return linear_logprob_fwd_chunked(hidden_TD, *arguments)
    return launch_scoring(hidden_TD, *arguments)


_CHUNKED = "library GEMM and logit ops"
linear_logprob_fwd = custom_op("linear_logprob_fwd", linear_logprob_fwd_chunked, default=_CHUNKED)
linear_logprob_fwd.register_fake(stats_like)
register_triton(linear_logprob_fwd, _linear_logprob_fwd_triton)
linear_logprob_bwd = custom_op("linear_logprob_bwd", linear_logprob_bwd_chunked, default=_CHUNKED)
linear_logprob_bwd.register_fake(
    lambda _g, _h, hidden, weight, _target, bias, *rest: gradients_like(hidden, weight, bias, rest[-1])
)
