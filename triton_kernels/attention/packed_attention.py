"""Causal grouped-query attention over packed sequences, with a group's prompt stored once.

A token sees its own segment up to itself and, in a response, the whole prompt of its group (see packed_layout.py):

    s = q k' scale;  p = exp(s - lse);  o = p v

This file holds the reference, kernels.py the Triton kernels and csrc/attention/packed_attention.cpp the C++.

T packed tokens, H query heads, J key heads, R = H / J, K head size (that of v may differ), N segments, t queries and s
keys of one segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from triton_kernels._common import at_least_fp32
from triton_kernels._register import custom_op, register_triton
from triton_kernels.attention.launch import launch_backward, launch_forward, tables
from triton_kernels.attention.packed_layout import PackedLayout

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
    """Attention of q [T, H, K] to k [T, J, K] and v [T, J, head size of v] along `layout`; [T, H, head size of v].

    J divides H: query heads h R .. h R + R - 1 share key head h. `scale` defaults to 1 / sqrt(K). With a `window` a
    token sees only keys whose position is above its own minus `window`. `return_lse` adds the logarithm of the
    softmax's denominator, [T, H], which is differentiable too.

    bf16, fp16, fp32 or fp64. Softmax statistics, and with them lse, are fp32, for fp64 fp64; autocast changes nothing.
    Two runs give the same bits. On a GPU there is no limit to lengths, no padding, and no compilation for new lengths.
    There is no second derivative.

    Raises `ValueError` for tensors, a layout, a scale or a window that do not fit.
    """
    _check(q_THK, k, v, layout, scale, window)
    scale = q_THK.shape[2] ** -0.5 if scale is None else float(scale)
    where = (layout.positions_T, layout.segments_N5, tables(layout, q_THK, k, v, window))
    out, lse_HT = packed_attention_fwd(q_THK, k, v, *where, scale, window)
    return (out, lse_HT.T) if return_lse else out


def _check(q_THK: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: object, window: object) -> None:
    _check_tensors(q_THK, k, v, layout)
    shapes = f"got q {tuple(q_THK.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q_THK.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q, k and v must be [tokens, heads, head size]; {shapes}")
    if not len(q_THK) == len(k) == len(v) == layout.num_tokens:
        raise ValueError(f"q, k and v must have the layout's {layout.num_tokens} tokens; {shapes}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q_THK.shape[1] % k.shape[1]:
        raise ValueError(f"k and v must have one number of heads, which divides that of q; {shapes}")
    if q_THK.shape[2] != k.shape[2] or 0 in (k.shape[2], v.shape[2]):
        raise ValueError(f"q and k must share a head size, and none may be 0; {shapes}")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window must be a whole number of at least 1, or None for no window; got {window!r}")
    if scale is not None and (not isinstance(scale, int | float) or not 0 < scale < math.inf):
        raise ValueError(f"scale must be a number above 0 and finite, or None for 1 / sqrt(head size); got {scale!r}")


def _check_tensors(q_THK: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> None:
    qkv = (q_THK, k, v)
    if not all(isinstance(x, Tensor) and x.layout == torch.strided for x in qkv):
        raise ValueError(f"q, k and v must be dense tensors; got {', '.join(_kind(x) for x in qkv)}")
    if not isinstance(layout, PackedLayout):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"layout must be a PackedLayout, such as from_cu_seqlens makes; got a {type(layout).__name__}")
    dtypes, devices = [x.dtype for x in qkv], [x.device for x in (*qkv, layout.positions_T)]
    if any(dtype != dtypes[0] for dtype in dtypes):
        raise ValueError(f"q, k and v must share a dtype; got {', '.join(map(str, dtypes))}")
    if dtypes[0] not in _DTYPES:
        raise ValueError(f"q, k and v must be bf16, fp16, fp32 or fp64; got {dtypes[0]}")
    if any(device != devices[0] for device in devices):
        raise ValueError(f"q, k, v and the layout must share a device; got {', '.join(map(str, devices))}")


def _kind(x: object) -> str:
    return f"a {x.layout} tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def packed_attention_fwd_reference(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    positions_T: Tensor,
    segments_N5: Tensor,
    tables: list[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, head size of v], lse [H, T]). The `tables` of the kernels hold the same as the segments."""
    q, k_, v_ = _by_key_head(q_THK, k), at_least_fp32(k), at_least_fp32(v)
    out, lse_HT = _outputs_like(q_THK, k, v)
    with torch.autocast(q_THK.device.type, enabled=False):
        for rows, columns, visible in _segments(positions_T, segments_N5, window):
            scores = torch.einsum("tjrk,sjk->jrts", q[rows], k_[columns]).mul_(scale)
            scores.masked_fill_(~visible, -torch.inf)
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
    with torch.autocast(q_THK.device.type, enabled=False):
        for rows, columns, visible in _segments(positions_T, segments_N5, window):
            scores = torch.einsum("tjrk,sjk->jrts", q[rows], k_[columns]).mul_(scale)
            p = scores.masked_fill_(~visible, -torch.inf).sub_(lse_JRT[..., rows, None]).exp_()
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
    """(rows, rows of the keys on their path, visibility [t, s]) of each segment."""
    for start, end, prompt_start, prompt_end, _ in segments_N5.tolist():
        columns = torch.cat([torch.arange(prompt_start, prompt_end), torch.arange(start, end)]).to(positions_T.device)
        distance = positions_T[start:end, None] - positions_T[columns]
        yield slice(start, end), columns, (distance >= 0) & (distance < (window or math.inf))


def _outputs_like(q_THK: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q_THK.dtype == torch.float64 else torch.float32
    T, H = q_THK.shape[:2]
    return q_THK.new_empty(T, H, v.shape[2]), q_THK.new_empty(H, T, dtype=lse_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q_THK, k, v, positions_T, segments_N5, tables, ctx.scale, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_THK, k, v, *output, positions_T, segments_N5, *tables)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse_HT: Tensor | None) -> tuple[Any, ...]:
    q_THK, k, v, out, lse_HT, positions_T, segments_N5, *tables = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    saved = (q_THK, k, v, out, lse_HT, positions_T, segments_N5, tables, ctx.scale, ctx.window)
    return *packed_attention_bwd(grad_out, grad_lse_HT, *saved), None, None, [None] * len(tables), None, None


def _second_backward(*_: object) -> NoReturn:
    raise RuntimeError("packed_attention has no second derivative: call backward without create_graph=True")


def _launch_forward(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    positions_T: Tensor,
    segments_N5: Tensor,
    tables: list[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Run the kernels, or the reference for fp64."""
    if q_THK.dtype == torch.float64:
        return packed_attention_fwd_reference(q_THK, k, v, positions_T, segments_N5, tables, scale, window)
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
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels, or the reference for fp64."""
    saved = (grad_out, grad_lse_HT, q_THK, k, v, out, lse_HT, positions_T)
    if q_THK.dtype == torch.float64:
        return packed_attention_bwd_reference(*saved, segments_N5, tables, scale, window)
    return launch_backward(*saved, tables, scale, window)


packed_attention_fwd = custom_op("packed_attention_fwd", packed_attention_fwd_reference)
packed_attention_fwd.register_fake(_outputs_like)
packed_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
register_triton(packed_attention_fwd, _launch_forward)
packed_attention_bwd = custom_op("packed_attention_bwd", packed_attention_bwd_reference)
packed_attention_bwd.register_fake(
    lambda grad_out, grad_lse, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
)
packed_attention_bwd.register_autograd(_second_backward)
register_triton(packed_attention_bwd, _launch_backward)
