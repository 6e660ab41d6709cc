"""Log-probability of each target and entropy of each row, from hidden states, without keeping logits.

z = hidden weight' + bias;  z = softcap tanh(z / softcap);  s = z / temperature
log p(target) = s[target] - lse(s);  entropy = lse(s) - sum_v p_v s_v

T loss rows, C rows of one chunk, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from triton_kernels._common import at_least_fp32
from triton_kernels._register import custom_op

_CHUNKS_ALIVE = 4
"""Tensors of chunk x V that a chunk holds at once, at most."""


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
) -> LinearLogprob:
    """Log-probability of `target_T` and entropy of softmax(s), with s as above; logits are fp32 out of the GEMM.

    A bias of -inf removes a token of the vocabulary (softcap, applied after the bias, would bring it back). The
    backward pass computes the logits again, chunk by chunk. A target out of range is an error on the CPU; on a GPU,
    where looking would synchronise, the range is the caller's promise.

    Raises `ValueError` for shapes, dtypes, targets, temperature or softcap that do not fit, and `NotImplementedError`
    for a `tp_group` of more than one rank.
    """
    return chunked_linear_logprob(hidden_TD, weight_VD, target_T, temperature, softcap, bias_V, None, tp_group)


def chunked_linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    temperature: float,
    softcap: float | None,
    bias_V: Tensor | None,
    workspace_bytes: int | None,
    tp_group: ProcessGroup | None,
) -> LinearLogprob:
    """`linear_logprob` with a bound on the memory of its chunks: None is 64 MiB on the CPU and 2 GiB elsewhere."""
    if tp_group is not None and tp_group.size() > 1:
        raise NotImplementedError(
            f"the vocabulary cannot be split yet: tp_group has {tp_group.size()} ranks; give the whole weight, no group"
        )
    if workspace_bytes is None:
        workspace_bytes = 2**26 if hidden_TD.device.type == "cpu" else 2**31
    _check(hidden_TD, weight_VD, target_T, bias_V)
    for name, value in (("temperature", temperature), ("softcap", softcap), ("workspace_bytes", workspace_bytes)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0; got {value}")
    logprob_T, entropy_T, _, _ = linear_logprob_fwd(
        hidden_TD, weight_VD, target_T, bias_V, float(temperature), softcap, workspace_bytes
    )
    return LinearLogprob(logprob_T, entropy_T)


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
    look = target_T.device.type == "cpu" and not isinstance(target_T, torch._subclasses.FakeTensor)
    if look and target_T.numel() and not torch.compiler.is_compiling():
        low, high = int(target_T.min()), int(target_T.max())
        if low < 0 or high >= V:
            raise ValueError(f"target_T must lie in 0..{V - 1}; got {low if low < 0 else high}")


def linear_logprob_fwd_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob_T, entropy_T, max_T, log_sum_T) with lse = max + log_sum.

    The two halves of lse stay apart: with logits of 1e4 their fp32 sum would lose the digits of log_sum.
    """
    T, weight_VD, target_T = len(hidden_TD), _operand(weight_VD), target_T.long()
    logprob_T, entropy_T, max_T, log_sum_T = _stats_like(hidden_TD)
    for rows in _chunks(T, weight_VD, workspace_bytes):
        s_CV = _logits(hidden_TD[rows], weight_VD, bias_V, temperature, softcap)
        max_T[rows] = s_CV.amax(-1)
        s_CV.sub_(max_T[rows, None])
        target_C = s_CV.gather(1, target_T[rows, None]).squeeze(1)
        p_CV = s_CV.exp()
        sum_C = p_CV.sum(-1)
        log_sum_T[rows] = sum_C.log()
        logprob_T[rows] = target_C - log_sum_T[rows]
        entropy_T[rows] = log_sum_T[rows] - p_CV.mul_(_finite(s_CV, bias_V)).sum(-1) / sum_C
    return logprob_T, entropy_T, max_T, log_sum_T


def linear_logprob_bwd_reference(
    grad_logprob_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    entropy_T: Tensor,
    max_T: Tensor,
    log_sum_T: Tensor,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden_TD, dweight_VD, dbias_V); empty where `needs` says no. The weight's gradient is summed in fp32.

    ds_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy), g and h the gradients of logprob and entropy.
    """
    T, weight_operand_VD, target_T = len(hidden_TD), _operand(weight_VD), target_T.long()
    dhidden_TD, dweight_VD, dbias_V = _gradients_like(hidden_TD, weight_VD, bias_V, needs, dtype=entropy_T.dtype)
    for rows in _chunks(T, weight_operand_VD, workspace_bytes):
        s_CV = _logits(hidden_TD[rows], weight_operand_VD, bias_V, temperature, softcap)
        slope_CV = None if softcap is None else 1 - (s_CV * (temperature / softcap)) ** 2
        log_p_CV = _finite(s_CV.sub_(max_T[rows, None]).sub_(log_sum_T[rows, None]), bias_V)
        p_CV = log_p_CV.exp()
        g_C1 = entropy_T.new_zeros(1, 1) if grad_logprob_T is None else grad_logprob_T[rows, None]
        if grad_entropy_T is None:
            ds_CV = p_CV.mul_(-g_C1)
        else:
            ds_CV = log_p_CV.add_(entropy_T[rows, None]).mul_(grad_entropy_T[rows, None]).add_(g_C1).mul_(p_CV).neg_()
        ds_CV.scatter_add_(1, target_T[rows, None], g_C1.expand(len(ds_CV), 1))
        if slope_CV is not None:
            ds_CV.mul_(slope_CV)
        dz_CV = ds_CV.div_(temperature)
        if needs[2]:
            dbias_V.add_(dz_CV.sum(0))
        dz_CV = dz_CV.to(weight_operand_VD.dtype)
        if needs[0]:
            dhidden_TD[rows] = _matmul(dz_CV, weight_operand_VD)
        if needs[1]:
            dweight_VD.add_(_matmul(dz_CV.T, _operand(hidden_TD[rows])))
    return (
        dhidden_TD.to(hidden_TD.dtype),
        dweight_VD.to(weight_VD.dtype),
        dbias_V if bias_V is None else dbias_V.to(bias_V.dtype),
    )


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
    """In place: log p = -inf, which only a bias makes, becomes finite, so that p log p is 0 and not NaN.

    exp(-1e4) is 0 in fp64 too, so that no other row changes.
    """
    return log_p_CV if bias_V is None else log_p_CV.clamp_(min=-1e4)


def _operand(x: Tensor) -> Tensor:
    """On the CPU a half-precision GEMM would round its result to half precision, so its operands become fp32."""
    return x if x.is_cuda else at_least_fp32(x)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 (fp64 for fp64), whatever the operands."""
    return torch.mm(a, b) if a.dtype in (torch.float32, torch.float64) else torch.mm(a, b, out_dtype=torch.float32)


def _stats_like(hidden_TD: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised (logprob_T, entropy_T, max_T, log_sum_T)."""
    dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    a, b, c, d = (hidden_TD.new_empty(hidden_TD.shape[0], dtype=dtype) for _ in range(4))
    return a, b, c, d


def _gradients_like(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: list[bool], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for the gradients, in `dtype` or in that of their tensors; empty where `needs` says no."""
    bias_V = weight_VD[:, 0] if bias_V is None else bias_V
    a, b, c = (
        x.new_zeros(x.shape if need else 0, dtype=dtype or x.dtype)
        for x, need in zip((hidden_TD, weight_VD, bias_V), needs, strict=True)
    )
    return a, b, c


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TD, weight_VD, target_T, bias_V, *ctx.settings = inputs
    _, entropy_T, max_T, log_sum_T = output
    ctx.mark_non_differentiable(max_T, log_sum_T)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_TD, weight_VD, target_T, bias_V, entropy_T, max_T, log_sum_T)


@once_differentiable
def _backward(ctx: Any, grad_logprob_T: Tensor | None, grad_entropy_T: Tensor | None, *_: None) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = linear_logprob_bwd(grad_logprob_T, grad_entropy_T, *ctx.saved_tensors, *ctx.settings, needs)
    dhidden_TD, dweight_VD, dbias_V = (x if need else None for x, need in zip(gradients, needs, strict=True))
    return dhidden_TD, dweight_VD, None, dbias_V, None, None, None


linear_logprob_fwd = custom_op("linear_logprob_fwd", linear_logprob_fwd_reference)
linear_logprob_fwd.register_fake(_stats_like)
linear_logprob_fwd.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_bwd = custom_op("linear_logprob_bwd", linear_logprob_bwd_reference)
linear_logprob_bwd.register_fake(
    lambda _g, _h, hidden, weight, _target, bias, *rest: _gradients_like(hidden, weight, bias, rest[-1])
)
