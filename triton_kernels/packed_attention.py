"""Causal grouped-query attention over packed sequences, with a group's prompt stored once.

A token sees its own segment up to itself, and, if the segment is a response, the whole prompt of its group:
s = q k' * scale;  p = exp(s - lse);  o = p v.  The two parts are computed apart and joined by their lse.

T packed tokens, S responses, P prompts (groups), H query heads, J key heads, R = H / J, K head size (of the value too,
where it may differ), B sequences of one bucket, L and M their padded queries and keys, N their queries or keys.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels._common import at_least_fp32
from triton_kernels._register import custom_op
from triton_kernels.packed_layout import Bucket, PackedLayout, buckets_from_tensors

_LEAST = -80.0
"""exp of less is nothing beside 1 in fp64, and slow to compute where it underflows."""


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

    Raises `ValueError` for shapes, dtypes, devices or a window that do not fit.
    """
    _check(q_THK, k, v, layout, window)
    scale = q_THK.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse_TH = packed_attention_fwd(q_THK, k, v, layout.own, layout.shared, scale, window)
    return (out, lse_TH) if return_lse else out


def _check(q_THK: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: int | None) -> None:
    shapes = f"got q {tuple(q_THK.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q_THK.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q, k and v must be [tokens, heads, head size]; {shapes}")
    if not len(q_THK) == len(k) == len(v) == layout.num_tokens:
        raise ValueError(f"the layout has {layout.num_tokens} tokens and so must q, k and v; {shapes}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q_THK.shape[1] % k.shape[1]:
        raise ValueError(f"k and v must have one number of heads, which divides that of q; {shapes}")
    if q_THK.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must share a head size; {shapes}")
    if not q_THK.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype; got {q_THK.dtype}, {k.dtype}, {v.dtype}")
    if not q_THK.device == k.device == v.device == layout.positions_T.device:
        raise ValueError(
            f"q, k, v and the layout must share a device; got {q_THK.device}, {k.device}, {v.device}, "
            f"{layout.positions_T.device}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None for no window; got {window}")


def packed_attention_fwd_reference(
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    own: list[Tensor],
    shared: list[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(out_THK, lse_TH). `own` and `shared` are the tensors of the layout's buckets."""
    q_scaled, k_, v_ = at_least_fp32(q_THK) * scale, at_least_fp32(k), at_least_fp32(v)
    out, lse_TH = _attend(q_scaled, k_, v_, buckets_from_tensors(own), window)
    if shared:
        # softmax over [prompt | own]: each part's output weighs exp(lse of the part - lse of both)
        shared_out, shared_lse_TH = _attend(q_scaled, k_, v_, buckets_from_tensors(shared), window)
        own_lse_TH, lse_TH = lse_TH, torch.logaddexp(lse_TH, shared_lse_TH)
        out.mul_((own_lse_TH - lse_TH).exp()[..., None])
        out.addcmul_(shared_out, (shared_lse_TH - lse_TH).exp()[..., None])
    return out.to(q_THK.dtype), lse_TH


def _attend(q_THK: Tensor, k: Tensor, v: Tensor, buckets: list[Bucket], window: int | None) -> tuple[Tensor, Tensor]:
    """Attention within the buckets; rows in none of them have out = 0 and the least finite lse."""
    (T, H, _), J = q_THK.shape, k.shape[1]
    least = torch.finfo(q_THK.dtype).min
    out, lse_TH = q_THK.new_zeros(T, H, v.shape[2]), q_THK.new_full((T, H), least)
    for bucket in buckets:
        B, L = bucket.q_index_BL.shape
        q = _pad(q_THK, bucket.q_index_BL, J)
        k_pad, v_pad = _pad(k, bucket.k_index_BM, J), _pad(v, bucket.k_index_BM, J)
        visible = bucket.visible(window, q_THK.dtype)
        scores = torch.bmm(q, k_pad.mT)
        scores.view(B, H, L, -1).add_((1 - visible) * least)
        largest = scores.amax(-1, keepdim=True)
        p = _exp(scores, largest, visible)
        # A row that sees nothing (padding, or a prompt beyond the window) has the sum 0; all others at least 1.
        total = p.sum(-1, keepdim=True).clamp_(min=1)
        o = torch.bmm(p, v_pad).div_(total)
        out.index_add_(0, bucket.q_row_N, _unpad(o.view(B, H, L, -1), bucket.q_slot_N))
        lse_TH.index_copy_(0, bucket.q_row_N, _unpad((largest + total.log()).view(B, H, L, 1), bucket.q_slot_N)[..., 0])
    return out, lse_TH


def packed_attention_bwd_reference(
    grad_out: Tensor,
    grad_lse_TH: Tensor | None,
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_TH: Tensor,
    own: list[Tensor],
    shared: list[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THK, dk, dv):  dv = p' do;  ds = p (do v' - delta);  dq = ds k scale;  dk = ds' q scale.

    delta = sum(do out) - dlse. No two sequences of a bucket share a row and buckets follow each other, so that each
    gradient is summed in one order; a prompt's keys are summed over its responses by the matrix product.
    """
    H, J = q_THK.shape[1], k.shape[1]
    q_scaled, k_, v_, do = at_least_fp32(q_THK) * scale, at_least_fp32(k), at_least_fp32(v), at_least_fp32(grad_out)
    delta_TH = (do * out).sum(-1)
    if grad_lse_TH is not None:
        delta_TH = delta_TH - grad_lse_TH
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q_scaled, k_, v_))
    for bucket in buckets_from_tensors(own) + buckets_from_tensors(shared):
        (B, L), M = bucket.q_index_BL.shape, bucket.k_index_BM.shape[1]
        q, do_pad = _pad(q_scaled, bucket.q_index_BL, J), _pad(do, bucket.q_index_BL, J)
        k_pad, v_pad = _pad(k_, bucket.k_index_BM, J), _pad(v_, bucket.k_index_BM, J)
        lse, delta = (_pad(x_TH[..., None], bucket.q_index_BL, J) for x_TH in (lse_TH, delta_TH))
        p = _exp(torch.bmm(q, k_pad.mT), lse, bucket.visible(window, q.dtype))
        dv.index_add_(0, bucket.k_row_N, _unpad(torch.bmm(p.mT, do_pad).view(B, J, M, -1), bucket.k_slot_N))
        ds = torch.bmm(do_pad, v_pad.mT).sub_(delta).mul_(p)
        dq.index_add_(0, bucket.q_row_N, _unpad(torch.bmm(ds, k_pad).view(B, H, L, -1), bucket.q_slot_N))
        dk.index_add_(0, bucket.k_row_N, _unpad(torch.bmm(ds.mT, q).view(B, J, M, -1), bucket.k_slot_N))
    return dq.mul_(scale).to(q_THK.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _exp(scores: Tensor, lse: Tensor, visible: Tensor) -> Tensor:
    """In place: exp(scores - lse) where visible [B, 1, L, M], exactly 0 elsewhere."""
    p = scores.sub_(lse).clamp_(_LEAST, 0).exp_()
    p.view(visible.shape[0], -1, *visible.shape[2:]).mul_(visible)
    return p


def _pad(x_THK: Tensor, index_BL: Tensor, J: int) -> Tensor:
    """Rows of x by index, with the heads of one key head together: [B J, H / J * L, K]."""
    T, H, K = x_THK.shape
    B, L = index_BL.shape
    index = index_BL[:, None] * H + torch.arange(H, device=index_BL.device)[:, None]
    return x_THK.reshape(T * H, K).index_select(0, index.flatten()).view(B * J, H // J * L, K)


def _unpad(x_BHLK: Tensor, slot_N: Tensor) -> Tensor:
    """The slots b * L + l of x: [N, H, K]."""
    _, H, L, K = x_BHLK.shape
    index = (slot_N // L * (H * L) + slot_N % L)[:, None] + torch.arange(H, device=slot_N.device) * L
    return x_BHLK.reshape(-1, K).index_select(0, index.flatten()).view(-1, H, K)


def _outputs_like(q_THK: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q_THK.dtype == torch.float64 else torch.float32
    return q_THK.new_empty(*q_THK.shape[:2], v.shape[2]), q_THK.new_empty(q_THK.shape[:2], dtype=lse_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q_THK, k, v, own, shared, ctx.scale, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.num_own = len(own)
    ctx.save_for_backward(q_THK, k, v, *output, *own, *shared)


@once_differentiable
def _backward(ctx: Any, grad_out: Tensor | None, grad_lse_TH: Tensor | None) -> tuple[Any, ...]:
    q_THK, k, v, out, lse_TH, *tables = ctx.saved_tensors
    own, shared = tables[: ctx.num_own], tables[ctx.num_own :]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    saved = (q_THK, k, v, out, lse_TH, own, shared, ctx.scale, ctx.window)
    return *packed_attention_bwd(grad_out, grad_lse_TH, *saved), [None] * len(own), [None] * len(shared), None, None


packed_attention_fwd = custom_op("packed_attention_fwd", packed_attention_fwd_reference)
packed_attention_fwd.register_fake(_outputs_like)
packed_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
packed_attention_bwd = custom_op("packed_attention_bwd", packed_attention_bwd_reference)
packed_attention_bwd.register_fake(
    lambda grad_out, grad_lse, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
)
