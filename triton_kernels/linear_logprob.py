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

from triton_kernels._common import at_least_fp32
from triton_kernels._register import custom_op

_CHUNKS_ALIVE = 4
"""Tensors of chunk x V that a chunk holds at once, at most."""

_LOG_ZERO = -1e4
"""Stands for log 0 where it is multiplied by 0, so that p log p is 0 and not NaN: exp of it is 0 in fp64 too."""


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
    tp_group: ProcessGroup | None = None,
    reduce_dx: bool = True,
) -> LinearLogprob:
    """Log-probability of `target_T` and entropy of softmax(s), with s as above; logits are fp32 out of the GEMM.

    A bias of -inf removes a token of the vocabulary (softcap, applied after the bias, would bring it back). The
    backward pass computes the logits again, chunk by chunk. A target out of range is an error on the CPU; on a GPU,
    where looking would synchronise, the range is the caller's promise.

    With a `tp_group` of several ranks, `weight_VD` and `bias_V` are this rank's consecutive shard of the vocabulary, in
    rank order and of any size, 0 included; `target_T` holds ids of the whole vocabulary. Every rank gives the same
    hidden states and targets, gets the same result to the bit, and must give the same upstream gradients. The hidden
    states' gradient is summed over the ranks, in fp32, or with `reduce_dx=False` left as this shard's part of the sum.

    Raises `ValueError` for shapes, dtypes, targets, temperature or softcap that do not fit, and on every rank where the
    ranks differ in the number of rows (on a GPU a device-side assertion).
    """
    return chunked_linear_logprob(
        hidden_TD, weight_VD, target_T, temperature, softcap, bias_V, None, tp_group, reduce_dx
    )


def chunked_linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    temperature: float,
    softcap: float | None,
    bias_V: Tensor | None,
    workspace_bytes: int | None,
    tp_group: ProcessGroup | None,
    reduce_dx: bool = True,
) -> LinearLogprob:
    """`linear_logprob` with a bound on the memory of its chunks: None is 64 MiB on the CPU and 2 GiB elsewhere."""
    if workspace_bytes is None:
        workspace_bytes = 2**26 if hidden_TD.device.type == "cpu" else 2**31
    _check(hidden_TD, weight_VD, target_T, bias_V)
    for name, value in (("temperature", temperature), ("softcap", softcap), ("workspace_bytes", workspace_bytes)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0; got {value}")
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    start, V = (0, len(weight_VD)) if group is None else _place(hidden_TD, weight_VD, group)
    _check_range(target_T, V)
    settings = (float(temperature), softcap, workspace_bytes)
    return LinearLogprob(
        *_LinearLogprob.apply(hidden_TD, weight_VD, target_T - start, bias_V, group, reduce_dx, settings)
    )


def _check(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, bias_V: Tensor | None) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_TD [T, D] and weight_VD [V, D] must share D; got {tuple(hidden_TD.shape)}, "
            f"{tuple(weight_VD.shape)}"
        )
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden_TD and weight_VD must share a dtype; got {hidden_TD.dtype} and {weight_VD.dtype}")
    if target_T.shape != hidden_TD.shape[:1] or target_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"target_T must be int32 or int64 [{len(hidden_TD)}], one token id per row; "
            f"got {target_T.dtype} {tuple(target_T.shape)}"
        )
    V = weight_VD.shape[0]
    if bias_V is not None and bias_V.shape != (V,):
        raise ValueError(f"bias_V must have the shape [{V}]; got {tuple(bias_V.shape)}")


def _check_range(target_T: Tensor, V: int | Tensor) -> None:
    look = target_T.device.type == "cpu" and not isinstance(target_T, torch._subclasses.FakeTensor)
    if look and target_T.numel() and not torch.compiler.is_compiling():
        low, high = int(target_T.min()), int(target_T.max())
        if low < 0 or high >= V:
            raise ValueError(f"target_T must lie in 0..{int(V) - 1}; got {low if low < 0 else high}")


def _place(hidden_TD: Tensor, weight_VD: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The id of this shard's first token and the size of the whole vocabulary, left on the device: no synchronisation.

    Ranks that differ in the number of rows stop here, before the exchange that would hang or mix rows up.
    """
    sizes = [torch.full((), len(x), device=hidden_TD.device) for x in (hidden_TD, weight_VD)]
    rows_R, shard_R = _gather(torch.stack(sizes), group).unbind(1)
    same, remedy = (rows_R == rows_R[0]).all(), "every rank of tp_group must give the same rows"
    if same.is_cuda:
        torch._assert_async(same, remedy)
    elif not same:
        raise ValueError(f"{remedy}; got {rows_R.tolist()} rows, in rank order")
    return shard_R[: group.rank()].sum(), shard_R.sum()


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` of every rank, in rank order: [R, *x.shape]."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered), x, group=group)
    return gathered


class _LinearLogprob(torch.autograd.Function):
    """This shard's pieces, and what the ranks of `group` tell each other between them; no group is one shard."""

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
        stats_R4T = stats_4T[None] if group is None else _gather(stats_4T, group)
        logprob_T, entropy_T, max_T, log_sum_T = merge(stats_R4T)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_TD, weight_VD, local_target_T, bias_V, entropy_T, max_T, log_sum_T)
        ctx.group, ctx.reduce_dx, ctx.settings = group, reduce_dx, settings
        return logprob_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Any, ...]:
        hidden_TD, weight_VD, _, bias_V, *_ = saved = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        gradients = linear_logprob_bwd(grad_logprob_T, grad_entropy_T, *saved, *ctx.settings, needs)
        if ctx.group is not None and ctx.reduce_dx and needs[0]:
            dist.all_reduce(gradients[0], group=ctx.group)
        dhidden_TD, dweight_VD, dbias_V = (
            gradient.to(x.dtype) if need else None
            for gradient, x, need in zip(gradients, (hidden_TD, weight_VD, bias_V), needs, strict=True)
        )
        return dhidden_TD, dweight_VD, None, dbias_V, None, None, None


def merge(stats_R4T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob_T, entropy_T, max_T, log_sum_T) of the whole vocabulary, with lse = max + log_sum, from its shards'.

    The two halves of lse stay apart: with logits of 1e4 their fp32 sum would lose the digits of log_sum.
    """
    max_RT, sum_RT, target_RT, weighted_RT = stats_R4T.unbind(1)
    max_T = max_RT.amax(0)
    shift_RT = (max_RT - max_T).clamp(min=_LOG_ZERO)  # a shard without tokens has the maximum -inf
    scale_RT = shift_RT.exp()
    sum_T = (scale_RT * sum_RT).sum(0)
    log_sum_T = sum_T.log()
    # On all ranks but the target's owner its logit is -inf.
    logprob_T = target_RT.amax(0) - max_T - log_sum_T
    entropy_T = log_sum_T - (scale_RT * (weighted_RT + shift_RT * sum_RT)).sum(0) / sum_T
    return logprob_T, entropy_T, max_T, log_sum_T


def linear_logprob_fwd_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    local_target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
) -> Tensor:
    """Of this shard, [4, T]: max of s, sum exp(s - max), s[target], sum exp(s - max) (s - max).

    s[target] is -inf where the target is not in the shard. A shard without tokens has the maximum -inf and sums of 0.
    """
    T, V = len(hidden_TD), len(weight_VD)
    stats_4T = _stats_like(hidden_TD)
    if V == 0:
        stats_4T[0::2], stats_4T[1::2] = -torch.inf, 0
        return stats_4T
    weight_VD, (id_T, here_T) = _operand(weight_VD), _in_shard(local_target_T, V)
    for rows in _chunks(T, weight_VD, workspace_bytes):
        max_C, sum_C, target_C, weighted_C = stats_4T[:, rows]
        s_CV = _logits(hidden_TD[rows], weight_VD, bias_V, temperature, softcap)
        torch.amax(s_CV, -1, out=max_C)
        target_C.copy_(s_CV.gather(1, id_T[rows, None]).squeeze(1).masked_fill(~here_T[rows], -torch.inf))
        # A bias can remove the whole shard: -inf - (-inf) would be NaN.
        s_CV.sub_(max_C.masked_fill(max_C == -torch.inf, 0)[:, None])
        p_CV = s_CV.exp()
        torch.sum(p_CV, -1, out=sum_C)
        torch.sum(p_CV.mul_(_finite(s_CV, bias_V)), -1, out=weighted_C)
    return stats_4T


def linear_logprob_bwd_reference(
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

    ds_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy), g and h the gradients of logprob and entropy.
    Entropy, max and log_sum are of the whole vocabulary.
    """
    T, V = len(hidden_TD), len(weight_VD)
    dhidden_TD, dweight_VD, dbias_V = gradients = _gradients_like(hidden_TD, weight_VD, bias_V, needs)
    if V == 0:
        return gradients
    weight_VD, (id_T, here_T) = _operand(weight_VD), _in_shard(local_target_T, V)
    for rows in _chunks(T, weight_VD, workspace_bytes):
        s_CV = _logits(hidden_TD[rows], weight_VD, bias_V, temperature, softcap)
        slope_CV = None if softcap is None else 1 - (s_CV * (temperature / softcap)) ** 2
        log_p_CV = _finite(s_CV.sub_(max_T[rows, None]).sub_(log_sum_T[rows, None]), bias_V)
        p_CV = log_p_CV.exp()
        g_C1 = entropy_T.new_zeros(len(s_CV), 1) if grad_logprob_T is None else grad_logprob_T[rows, None]
        if grad_entropy_T is None:
            ds_CV = p_CV.mul_(-g_C1)
        else:
            ds_CV = log_p_CV.add_(entropy_T[rows, None]).mul_(grad_entropy_T[rows, None]).add_(g_C1).mul_(p_CV).neg_()
        ds_CV.scatter_add_(1, id_T[rows, None], g_C1.masked_fill(~here_T[rows, None], 0))
        if slope_CV is not None:
            ds_CV.mul_(slope_CV)
        dz_CV = ds_CV.div_(temperature)
        if needs[2]:
            dbias_V.add_(dz_CV.sum(0))
        dz_CV = dz_CV.to(weight_VD.dtype)
        if needs[0]:
            dhidden_TD[rows] = _matmul(dz_CV, weight_VD)
        if needs[1]:
            dweight_VD.add_(_matmul(dz_CV.T, _operand(hidden_TD[rows])))
    return gradients


def _in_shard(local_target_T: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """An id of the shard for every row, and whether it is the row's target."""
    id_T = local_target_T.long().clamp(0, V - 1)
    return id_T, id_T == local_target_T


def _chunks(T: int, weight_VD: Tensor, workspace_bytes: int) -> Iterator[slice]:
    """Slices of rows such that `_CHUNKS_ALIVE` tensors of rows x V fit into the workspace; at least one row."""
    rows = max(1, workspace_bytes // (_CHUNKS_ALIVE * len(weight_VD) * max(4, weight_VD.element_size())))
    return (slice(start, min(start + rows, T)) for start in range(0, T, rows))


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    s_CV = _matmul(_operand(hidden_CD), weight_VD.T)
    if bias_V is not None:
        s_CV.add_(bias_V)
    if softcap is not None:
        s_CV.div_(softcap).tanh_().mul_(softcap)
    return s_CV.div_(temperature)


def _finite(log_p_CV: Tensor, bias_V: Tensor | None) -> Tensor:
    """In place: log p = -inf, which only a bias makes, becomes finite. No other row changes."""
    return log_p_CV if bias_V is None else log_p_CV.clamp_(min=_LOG_ZERO)


def _operand(x: Tensor) -> Tensor:
    """On the CPU a half-precision GEMM would round its result to half precision, so its operands become fp32."""
    return x if x.is_cuda else at_least_fp32(x)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 (fp64 for fp64), whatever the operands."""
    return torch.mm(a, b) if a.dtype in (torch.float32, torch.float64) else torch.mm(a, b, out_dtype=torch.float32)


def _stats_like(hidden_TD: Tensor, *_: object) -> Tensor:
    """Uninitialised [4, T]."""
    return hidden_TD.new_empty(4, hidden_TD.shape[0], dtype=_result_dtype(hidden_TD))


def _gradients_like(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for the gradients; empty where `needs` says no."""
    bias_V = weight_VD[:, 0] if bias_V is None else bias_V
    a, b, c = (
        x.new_zeros(x.shape if need else 0, dtype=_result_dtype(hidden_TD))
        for x, need in zip((hidden_TD, weight_VD, bias_V), needs, strict=True)
    )
    return a, b, c


def _result_dtype(hidden_TD: Tensor) -> torch.dtype:
    return torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32


linear_logprob_fwd = custom_op("linear_logprob_fwd", linear_logprob_fwd_reference)
linear_logprob_fwd.register_fake(_stats_like)
linear_logprob_bwd = custom_op("linear_logprob_bwd", linear_logprob_bwd_reference)
linear_logprob_bwd.register_fake(
    lambda _g, _h, hidden, weight, _target, bias, *rest: _gradients_like(hidden, weight, bias, rest[-1])
)
