"""Causal grouped-query attention over packed sequences, with a group's prompt stored once.

A token sees its own segment up to itself and, in a response, the whole prompt of its group (see packed_layout.py):

    s = q k' scale;  p = exp(s - lse);  o = p v

The reference is here; attention_kernels.py has the Triton kernels and csrc/attention/packed_attention.cpp the C++.

T packed tokens, H query heads, J key heads, R = H / J, K head size (of the value too, where it may differ), N segments,
t queries and s keys of one segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels._common import at_least_fp32
from triton_kernels._register import custom_op, register_triton
from triton_kernels.attention.launch import launch_backward, launch_forward, tables
from triton_kernels.attention.packed_layout import PackedLayout


@overload
def packed_attention(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def packed_attention(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def packed_attention(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q [T, H, K] to k [T, J, K] and v [T, J, any head size], as `layout` says; [T, H, head size of v].

    J divides H: query heads h R .. h R + R - 1 share key head h. `scale` is 1 / sqrt(K) unless given. With a `window`
    a token sees keys whose position is above its own minus `window`. With `return_lse` also the logarithm of the
    softmax's denominator, [T, H], in fp32 (fp64 for fp64); it is differentiable too. Softmax statistics are fp32.

    Two runs give the same bits. On a GPU there is no limit to lengths, no padding, and no compilation for new lengths.

    Raises `ValueError` for shapes, dtypes, devices, a scale or a window that do not fit.
    """
    _check(q_THK, k, v, layout, scale, window)
    scale = q_THK.shape[2] ** -0.5 if scale is None else float(scale)
    window = (
        None if window is None else min(window, max(1, layout.num_tokens))
    )  # no path is longer, and it fits 32 bits
    work, num_slots = tables(layout, q_THK, k, v, window)
    where = (layout.positions_T, layout.segments_N5, work, num_slots)
    out, lse_HT = packed_attention_fwd(q_THK, k, v, *where, scale, window)
    return (out, lse_HT.T) if return_lse else out


def _check(q_THK: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None, window: int | None) -> None:
    shapes = f"got q {tuple(q_THK.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q_THK.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q, k and v must be [tokens, heads, head size]; {shapes}")
    if not len(q_THK) == len(k) == len(v) == layout.num_tokens:
        raise ValueError(f"the layout has {layout.num_tokens} tokens and so must q, k and v; {shapes}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q_THK.shape[1] % k.shape[1]:
        raise ValueError(f"k and v must have one number of heads, which divides that of q; {shapes}")
    if q_THK.shape[2] != k.shape[2] or 0 in (k.shape[2], v.shape[2]):
        raise ValueError(f"q and k must share a head size, and none may be 0; {shapes}")
    if not q_THK.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype; got {q_THK.dtype}, {k.dtype}, {v.dtype}")
    if not q_THK.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating point; got {q_THK.dtype}")
    if not q_THK.device == k.device == v.device == layout.positions_T.device:
        raise ValueError(
            f"q, k, v and the layout must share a device; got {q_THK.device}, {k.device}, {v.device}, "
            f"{layout.positions_T.device}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None for no window; got {window}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, or None for 1 / sqrt(head size); got {scale}")


def packed_attention_fwd_reference(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    positions_T: Tensor,
    segments_N5: Tensor,
    tables: list[Tensor],
    num_slots: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, head size of v], lse [H, T]). Kernels go through `tables`, which hold the same as the segments."""
    q, k_, v_ = _by_key_head(q_THK, k), at_least_fp32(k), at_least_fp32(v)
    out, lse_HT = _outputs_like(q_THK, k, v)
    for rows, columns, visible in _segments(positions_T, segments_N5, window):
        scores = torch.einsum("tjrk,sjk->jrts", q[rows], k_[columns]).mul_(scale).masked_fill_(~visible, -torch.inf)
        lse_HT[:, rows] = scores.logsumexp(-1).flatten(0, 1)
        o = torch.einsum("jrts,sjk->tjrk", scores.softmax(-1), v_[columns])
        out[rows] = o.flatten(1, 2).to(out.dtype)
    return out, lse_HT


def packed_attention_bwd_reference(
    grad_out: Tensor,
    grad_lse_HT: Tensor | None,
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_HT: Tensor,
    positions_T: Tensor,
    segments_N5: Tensor,
    tables: list[Tensor],
    num_slots: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THK, dk, dv):  dv = p' do;  ds = p (do v' - delta);  dq = ds k scale;  dk = ds' q scale.

    delta = sum(do o) - dlse. A prompt's keys are summed over the segments that see them, in the buffer's order.
    """
    q, do, k_, v_ = _by_key_head(q_THK, k), _by_key_head(grad_out, k), at_least_fp32(k), at_least_fp32(v)
    lse_JRT = lse_HT.unflatten(0, q.shape[1:3])
    delta_JRT = (do * _by_key_head(out, k)).sum(-1).permute(1, 2, 0)
    if grad_lse_HT is not None:
        delta_JRT = delta_JRT - grad_lse_HT.unflatten(0, q.shape[1:3])
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k_, v_))
    for rows, columns, visible in _segments(positions_T, segments_N5, window):
        scores = torch.einsum("tjrk,sjk->jrts", q[rows], k_[columns]).mul_(scale).masked_fill_(~visible, -torch.inf)
        p = (scores - lse_JRT[..., rows, None]).exp_()
        dv[columns] += torch.einsum("jrts,tjrk->sjk", p, do[rows])
        dp = torch.einsum("tjrk,sjk->jrts", do[rows], v_[columns])
        ds = dp.sub_(delta_JRT[..., rows, None]).mul_(p)
        dq[rows] = torch.einsum("jrts,sjk->tjrk", ds, k_[columns])
        dk[columns] += torch.einsum("jrts,tjrk->sjk", ds, q[rows])
    return dq.flatten(1, 2).mul_(scale).to(q_THK.dtype), dk.mul_(scale).to(k.dtype), dv.to(v.dtype)


def _by_key_head(x_THK: Tensor, k: Tensor) -> Tensor:
    """[T, J, R, K], at least fp32: query heads h R .. h R + R - 1 share key head h."""
    return at_least_fp32(x_THK).unflatten(1, (k.shape[1], -1))


def _segments(positions_T: Tensor, segments_N5: Tensor, window: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of each segment, rows of the keys they may see, and which of them they do [t, s]."""
    for start, end, prompt_start, prompt_end, _ in segments_N5.tolist():
        columns = torch.cat([torch.arange(prompt_start, prompt_end), torch.arange(start, end)]).to(positions_T.device)
        distance = positions_T[start:end, None] - positions_T[columns]
        yield slice(start, end), columns, (distance >= 0) & (distance < (window or math.inf))


def _outputs_like(q_THK: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q_THK.dtype == torch.float64 else torch.float32
    T, H = q_THK.shape[:2]
    return q_THK.new_empty(T, H, v.shape[2]), q_THK.new_empty(H, T, dtype=lse_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q_THK, k, v, positions_T, segments_N5, tables, ctx.num_slots, ctx.scale, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_THK, k, v, *output, positions_T, segments_N5, *tables)


@once_differentiable
def _backward(ctx: Any, grad_out: Tensor | None, grad_lse_HT: Tensor | None) -> tuple[Any, ...]:
    q_THK, k, v, out, lse_HT, positions_T, segments_N5, *tables = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    saved = (q_THK, k, v, out, lse_HT, positions_T, segments_N5, tables, ctx.num_slots, ctx.scale, ctx.window)
    gradients = packed_attention_bwd(grad_out, grad_lse_HT, *saved)
    return *gradients, None, None, [None] * len(tables), None, None, None


def _launch_forward(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    positions_T: Tensor,
    segments_N5: Tensor,
    tables: list[Tensor],
    num_slots: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """As the reference, which serves fp64."""
    if q_THK.dtype == torch.float64:
        where = (positions_T, segments_N5, tables, num_slots)
        return packed_attention_fwd_reference(q_THK, k, v, *where, scale, window)
    return launch_forward(q_THK, k, v, tables, scale, window)


def _launch_backward(
    grad_out: Tensor,
    grad_lse_HT: Tensor | None,
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_HT: Tensor,
    positions_T: Tensor,
    segments_N5: Tensor,
    tables: list[Tensor],
    num_slots: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, which serves fp64."""
    saved = (grad_out, grad_lse_HT, q_THK, k, v, out, lse_HT, positions_T)
    if q_THK.dtype == torch.float64:
        return packed_attention_bwd_reference(*saved, segments_N5, tables, num_slots, scale, window)
    return launch_backward(*saved, tables, num_slots, scale, window)


packed_attention_fwd = custom_op("packed_attention_fwd", packed_attention_fwd_reference)
packed_attention_fwd.register_fake(_outputs_like)
packed_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
register_triton(packed_attention_fwd, _launch_forward)
packed_attention_bwd = custom_op("packed_attention_bwd", packed_attention_bwd_reference)
packed_attention_bwd.register_fake(
    lambda grad_out, grad_lse, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
)
register_triton(packed_attention_bwd, _launch_backward)
