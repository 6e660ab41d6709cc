"""Triton kernels of packed attention: forward, dQ, and dK with dV, over the work tables of packed_layout.py.

A program of forward or dQ takes one tile of queries and one head, and walks the path of the tile's segment a block of
columns at a time. A path is the prompt's rows and then the segment's own without a gap, so a shared prompt is only
another address. A program of dK and dV takes one tile of keys and one key head, and walks the query rows that see it,
for all query heads of that key head. No two programs add to the same address: partial sums have slots of their own,
which are added in order.

A tile that overhangs its range loads the range's last row again and masks it, so that nothing beyond, not even
NaN, reaches a result.

T packed tokens, H query heads, J key heads, R = H / J, K head size, I work items, M tiles of keys with slots to add.
A head's columns come in two parts, because products need powers of two: 96 = 64 + 32. The second may be absent.
"""

from __future__ import annotations

import functools
from typing import Any

from triton_kernels._triton import HAS_TRITON, tl, triton

_LOG2_E = tl.constexpr(1.4426950408889634)

_VARYING = ["T", "H", "R", "J", "window"]
_jit: Any = functools.partial(triton.jit, do_not_specialize=_VARYING) if HAS_TRITON else triton.jit
"""One binary for all numbers of tokens and heads and all windows; strides and head sizes tell what is aligned."""


@triton.jit
def load_parts(ptr, offset, WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Load the first FIRST and the next SECOND columns of the rows at these offsets; 0 beyond WIDTH."""
    column = tl.arange(0, FIRST)
    if FIRST > WIDTH:
        first = tl.load(ptr + (offset[:, None] + column), column[None, :] < WIDTH, other=0.0)
    else:
        first = tl.load(ptr + (offset[:, None] + column))
    second = first
    if SECOND > 0:
        column = FIRST + tl.arange(0, SECOND)
        if FIRST + SECOND > WIDTH:
            second = tl.load(ptr + (offset[:, None] + column), column[None, :] < WIDTH, other=0.0)
        else:
            second = tl.load(ptr + (offset[:, None] + column))
    return first, second


@triton.jit
def store_parts(ptr, offset, first, second, inside, WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Store the two parts of rows, see `load_parts`."""
    column = tl.arange(0, FIRST)
    tl.store(ptr + (offset[:, None] + column), first.to(ptr.dtype.element_ty), inside[:, None] & (column < WIDTH))
    if SECOND > 0:
        column = FIRST + tl.arange(0, SECOND)
        tl.store(ptr + (offset[:, None] + column), second.to(ptr.dtype.element_ty), inside[:, None] & (column < WIDTH))


@triton.jit
def product(a, a_second, b, b_second, SECOND: tl.constexpr):
    """a b' in fp32; rows of a and b are in two parts."""
    # "ieee" keeps fp32 operands exact: TF32 has 10 bits.
    out = tl.dot(a, b.T, input_precision="ieee")
    if SECOND > 0:
        out = tl.dot(a_second, b_second.T, out, input_precision="ieee")
    return out


@triton.jit
def add_product(acc, acc_second, a, b, b_second, SECOND: tl.constexpr):
    """acc + a b; rows of b and acc are in two parts."""
    a = a.to(b.dtype)
    acc = tl.dot(a, b, acc, input_precision="ieee")
    if SECOND > 0:
        acc_second = tl.dot(a, b_second, acc_second, input_precision="ieee")
    return acc, acc_second


@triton.jit
def tile_of_queries(tiles_ptr, item, window, BLOCK_Q: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """(first row, end of the segment, its start, first column, end of the columns, shift) of a work item."""
    tile_ptr = tiles_ptr + item * 5
    first = tl.load(tile_ptr)
    end = tl.load(tile_ptr + 1)
    start = tl.load(tile_ptr + 2)
    low = tl.load(tile_ptr + 3)
    shift = tl.load(tile_ptr + 4)
    if HAS_WINDOW:
        low = tl.maximum(low, first - window + 1)
    return first, end, start, low, tl.minimum(first + BLOCK_Q, end), shift


@triton.jit
def key_rows(column, start, shift, high):
    """Rows of a path's columns, relative to the segment's start, so that offsets fit 32 bits."""
    column = tl.minimum(column, high - 1)
    return column - tl.where(column < start, shift, 0) - start


@triton.jit
def is_visible(row, column, window, HAS_WINDOW: tl.constexpr):
    """Visibility [rows, columns] on one path."""
    visible = column[None, :] <= row[:, None]
    if HAS_WINDOW:
        visible &= column[None, :] > row[:, None] - window
    return visible


@triton.jit
def attend(
    largest, total, acc, acc_second, q, q_second, k_ptr, v_ptr, row, column, start, shift, high, k_stride, v_stride,
    scale_log2, window, K: tl.constexpr, K_FIRST: tl.constexpr, K_SECOND: tl.constexpr,
    V: tl.constexpr, V_FIRST: tl.constexpr, V_SECOND: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Add a block of columns to the running softmax; `largest` is before the scale."""
    key = key_rows(column, start, shift, high)
    k, k_second = load_parts(k_ptr, key * k_stride, K, K_FIRST, K_SECOND)
    scores = product(q, q_second, k, k_second, K_SECOND)
    if MASKED:
        scores = tl.where(is_visible(row, column, window, HAS_WINDOW), scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(larger == float("-inf"), 0.0, larger) * scale_log2  # a window may hide the whole block from a row
    p = tl.exp2(scores * scale_log2 - base[:, None])
    shrink = tl.exp2(largest * scale_log2 - base)
    total = total * shrink + tl.sum(p, 1)
    acc *= shrink[:, None]
    if V_SECOND > 0:
        acc_second *= shrink[:, None]
    v, v_second = load_parts(v_ptr, key * v_stride, V, V_FIRST, V_SECOND)
    acc, acc_second = add_product(acc, acc_second, p, v, v_second, V_SECOND)
    return larger, total, acc, acc_second


@_jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, T, H, R, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    scale, window, K: tl.constexpr, K_FIRST: tl.constexpr, K_SECOND: tl.constexpr,
    V: tl.constexpr, V_FIRST: tl.constexpr, V_SECOND: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """out [T, H, V] and lse [H, T] of one tile of queries. Programs of neighbouring heads share keys."""
    head = tl.program_id(0) % H
    first, end, start, low, high, shift = tile_of_queries(tiles_ptr, tl.program_id(0) // H, window, BLOCK_Q, HAS_WINDOW)
    k_ptr += start.to(tl.int64) * k_stride + (head // R).to(tl.int64) * k_head
    v_ptr += start.to(tl.int64) * v_stride + (head // R).to(tl.int64) * v_head
    q_ptr += first.to(tl.int64) * q_stride + head.to(tl.int64) * q_head
    i = tl.arange(0, BLOCK_Q)
    row = first + i
    q, q_second = load_parts(q_ptr, tl.minimum(i, end - first - 1) * q_stride, K, K_FIRST, K_SECOND)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, V_FIRST), tl.float32)
    acc_second = tl.zeros((BLOCK_Q, V_SECOND if V_SECOND > 0 else 1), tl.float32)
    scale_log2 = scale * _LOG2_E
    whole = low
    if not HAS_WINDOW:  # all rows see these blocks in full
        whole += (first + 1 - low) // BLOCK_K * BLOCK_K
        for c in range(low, whole, BLOCK_K):
            largest, total, acc, acc_second = attend(
                largest, total, acc, acc_second, q, q_second, k_ptr, v_ptr, row, c + tl.arange(0, BLOCK_K),
                start, shift, high, k_stride, v_stride, scale_log2, window,
                K, K_FIRST, K_SECOND, V, V_FIRST, V_SECOND, False, False,
            )  # fmt: skip
    for c in range(whole, high, BLOCK_K):
        largest, total, acc, acc_second = attend(
            largest, total, acc, acc_second, q, q_second, k_ptr, v_ptr, row, c + tl.arange(0, BLOCK_K),
            start, shift, high, k_stride, v_stride, scale_log2, window,
            K, K_FIRST, K_SECOND, V, V_FIRST, V_SECOND, True, HAS_WINDOW,
        )  # fmt: skip
    acc = acc / total[:, None]
    if V_SECOND > 0:
        acc_second = acc_second / total[:, None]
    out_ptr += (first.to(tl.int64) * H + head) * V
    store_parts(out_ptr, i * (H * V), acc, acc_second, row < end, V, V_FIRST, V_SECOND)
    tl.store(lse_ptr + head.to(tl.int64) * T + row, largest * scale + tl.log(total), row < end)


@triton.jit
def differentiate(
    dq, dq_second, q, q_second, g, g_second, lse, delta, k_ptr, v_ptr, row, column, start, shift, high,
    k_stride, v_stride, scale_log2, window, K: tl.constexpr, K_FIRST: tl.constexpr, K_SECOND: tl.constexpr,
    V: tl.constexpr, V_FIRST: tl.constexpr, V_SECOND: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Add a block of columns to dq / scale; lse is in powers of two."""
    key = key_rows(column, start, shift, high)
    k, k_second = load_parts(k_ptr, key * k_stride, K, K_FIRST, K_SECOND)
    v, v_second = load_parts(v_ptr, key * v_stride, V, V_FIRST, V_SECOND)
    p = tl.exp2(product(q, q_second, k, k_second, K_SECOND) * scale_log2 - lse[:, None])
    if MASKED:
        p = tl.where(is_visible(row, column, window, HAS_WINDOW), p, 0.0)
    ds = p * (product(g, g_second, v, v_second, V_SECOND) - delta[:, None])
    return add_product(dq, dq_second, ds, k, k_second, K_SECOND)


@_jit
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, delta_ptr, dq_ptr, tiles_ptr,
    T, H, R, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    scale, window, K: tl.constexpr, K_FIRST: tl.constexpr, K_SECOND: tl.constexpr,
    V: tl.constexpr, V_FIRST: tl.constexpr, V_SECOND: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """dq [T, H, K] of one tile of queries, and delta [H, T] = sum(do o) - dlse for dK and dV."""
    head = tl.program_id(0) % H
    first, end, start, low, high, shift = tile_of_queries(tiles_ptr, tl.program_id(0) // H, window, BLOCK_Q, HAS_WINDOW)
    k_ptr += start.to(tl.int64) * k_stride + (head // R).to(tl.int64) * k_head
    v_ptr += start.to(tl.int64) * v_stride + (head // R).to(tl.int64) * v_head
    q_ptr += first.to(tl.int64) * q_stride + head.to(tl.int64) * q_head
    i = tl.arange(0, BLOCK_Q)
    row = first + i
    inside = row < end
    offset = tl.minimum(i, end - first - 1)
    q, q_second = load_parts(q_ptr, offset * q_stride, K, K_FIRST, K_SECOND)
    out_row = (first.to(tl.int64) * H + head) * V
    g, g_second = load_parts(grad_ptr + out_row, offset * (H * V), V, V_FIRST, V_SECOND)
    o, o_second = load_parts(out_ptr + out_row, offset * (H * V), V, V_FIRST, V_SECOND)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if V_SECOND > 0:
        delta += tl.sum(g_second.to(tl.float32) * o_second.to(tl.float32), 1)
    at = head.to(tl.int64) * T + row
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + at, inside, other=0.0)
    tl.store(delta_ptr + at, delta, inside)
    lse = tl.load(lse_ptr + at, inside, other=float("inf")) * _LOG2_E

    dq = tl.zeros((BLOCK_Q, K_FIRST), tl.float32)
    dq_second = tl.zeros((BLOCK_Q, K_SECOND if K_SECOND > 0 else 1), tl.float32)
    scale_log2 = scale * _LOG2_E
    whole = low
    if not HAS_WINDOW:
        whole += (first + 1 - low) // BLOCK_K * BLOCK_K
        for c in range(low, whole, BLOCK_K):
            dq, dq_second = differentiate(
                dq, dq_second, q, q_second, g, g_second, lse, delta, k_ptr, v_ptr, row, c + tl.arange(0, BLOCK_K),
                start, shift, high, k_stride, v_stride, scale_log2, window,
                K, K_FIRST, K_SECOND, V, V_FIRST, V_SECOND, False, False,
            )  # fmt: skip
    for c in range(whole, high, BLOCK_K):
        dq, dq_second = differentiate(
            dq, dq_second, q, q_second, g, g_second, lse, delta, k_ptr, v_ptr, row, c + tl.arange(0, BLOCK_K),
            start, shift, high, k_stride, v_stride, scale_log2, window,
            K, K_FIRST, K_SECOND, V, V_FIRST, V_SECOND, True, HAS_WINDOW,
        )  # fmt: skip
    dq_ptr += (first.to(tl.int64) * H + head) * K
    store_parts(dq_ptr, i * (H * K), dq * scale, dq_second * scale, inside, K, K_FIRST, K_SECOND)


@_jit
def attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, position_ptr, items_ptr,
    dk_ptr, dv_ptr, dk_slots_ptr, dv_slots_ptr,
    T, H, R, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    scale, window, K: tl.constexpr, K_FIRST: tl.constexpr, K_SECOND: tl.constexpr,
    V: tl.constexpr, V_FIRST: tl.constexpr, V_SECOND: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """dk [T, J, K] and dv [T, J, V] of one tile of keys, or partial sums in slots [Z, J, BLOCK_K, K or V] of fp32."""
    J = H // R
    key_head = tl.program_id(0) % J
    item_ptr = items_ptr + tl.program_id(0) // J * 5
    first = tl.load(item_ptr)
    end = tl.load(item_ptr + 1)
    first_query = tl.load(item_ptr + 2)
    end_query = tl.load(item_ptr + 3)
    slot = tl.load(item_ptr + 4).to(tl.int64)

    j = tl.arange(0, BLOCK_K)
    key = first + j
    inside = key < end
    k_ptr += first.to(tl.int64) * k_stride + key_head.to(tl.int64) * k_head
    v_ptr += first.to(tl.int64) * v_stride + key_head.to(tl.int64) * v_head
    key_offset = tl.minimum(j, end - first - 1)
    k, k_second = load_parts(k_ptr, key_offset * k_stride, K, K_FIRST, K_SECOND)
    v, v_second = load_parts(v_ptr, key_offset * v_stride, V, V_FIRST, V_SECOND)
    if HAS_WINDOW:
        key_position = tl.load(position_ptr + key, inside, other=0).to(tl.int32)
    dk = tl.zeros((BLOCK_K, K_FIRST), tl.float32)
    dk_second = tl.zeros((BLOCK_K, K_SECOND if K_SECOND > 0 else 1), tl.float32)
    dv = tl.zeros((BLOCK_K, V_FIRST), tl.float32)
    dv_second = tl.zeros((BLOCK_K, V_SECOND if V_SECOND > 0 else 1), tl.float32)
    scale_log2 = scale * _LOG2_E
    num_blocks = tl.cdiv(end_query - first_query, BLOCK_Q)
    for i in range(0, R * num_blocks):
        head = key_head * R + i // num_blocks
        first_row = first_query + i % num_blocks * BLOCK_Q
        row = first_row + tl.arange(0, BLOCK_Q)
        offset = tl.minimum(row, end_query - 1) - first_row
        long_row = first_row.to(tl.int64)
        q, q_second = load_parts(
            q_ptr + (long_row * q_stride + head.to(tl.int64) * q_head), offset * q_stride, K, K_FIRST, K_SECOND
        )
        at = head.to(tl.int64) * T + long_row
        lse = tl.where(row < end_query, tl.load(lse_ptr + at + offset) * _LOG2_E, float("inf"))
        p = tl.exp2(product(k, k_second, q, q_second, K_SECOND) * scale_log2 - lse[None, :])  # [keys, queries]
        # A prompt lies before its responses: on every path, the order of columns is that of rows.
        visible = (key - first_row)[:, None] <= tl.arange(0, BLOCK_Q)[None, :]
        if HAS_WINDOW:
            position = tl.load(position_ptr + long_row + offset).to(tl.int32)
            visible &= position[None, :] - key_position[:, None] < window
        p = tl.where(visible, p, 0.0)
        g, g_second = load_parts(grad_ptr + (long_row * H + head) * V, offset * (H * V), V, V_FIRST, V_SECOND)
        dv, dv_second = add_product(dv, dv_second, p, g, g_second, V_SECOND)
        delta = tl.load(delta_ptr + at + offset)
        ds = p * (product(v, v_second, g, g_second, V_SECOND) - delta[None, :])
        dk, dk_second = add_product(dk, dk_second, ds, q, q_second, K_SECOND)

    dk *= scale
    dk_second *= scale
    if slot < 0:
        at = first.to(tl.int64) * J + key_head
        store_parts(dk_ptr + at * K, j * (J * K), dk, dk_second, inside, K, K_FIRST, K_SECOND)
        store_parts(dv_ptr + at * V, j * (J * V), dv, dv_second, inside, V, V_FIRST, V_SECOND)
    else:
        at = (slot * J + key_head) * BLOCK_K
        store_parts(dk_slots_ptr + at * K, j * K, dk, dk_second, inside, K, K_FIRST, K_SECOND)
        store_parts(dv_slots_ptr + at * V, j * V, dv, dv_second, inside, V, V_FIRST, V_SECOND)


@_jit
def add_slots_kernel(slots_ptr, out_ptr, sums_ptr, J, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Add the slots [Z, J, BLOCK_K, WIDTH] of one tile and key head in their order, into out [T, J, WIDTH]."""
    part = tl.program_id(0) % tl.cdiv(BLOCK_K * WIDTH, BLOCK)
    tile = tl.program_id(0) // tl.cdiv(BLOCK_K * WIDTH, BLOCK)
    sum_ptr = sums_ptr + tile // J * 4
    first = tl.load(sum_ptr)
    end = tl.load(sum_ptr + 1)
    first_slot = tl.load(sum_ptr + 2).to(tl.int64)
    num_slots = tl.load(sum_ptr + 3)
    at = part * BLOCK + tl.arange(0, BLOCK)
    key = first + at // WIDTH
    inside = (key < end) & (at < BLOCK_K * WIDTH)
    total = tl.zeros((BLOCK,), tl.float32)
    slot_ptr = slots_ptr + (first_slot * J + tile % J) * (BLOCK_K * WIDTH)
    for _ in range(0, num_slots):
        total += tl.load(slot_ptr + at, inside, other=0.0)
        slot_ptr += J * (BLOCK_K * WIDTH)
    out_ptrs = out_ptr + (key.to(tl.int64) * J + tile % J) * WIDTH + at % WIDTH
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), inside)
