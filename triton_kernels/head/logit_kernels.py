"""Triton kernels on the logits of a chunk of rows: one program per row, fp32, whatever the vocabulary's size.

They take the product hidden weight' as the GEMM left it, and read it twice at most. C rows, V vocabulary (shard).
"""

from __future__ import annotations

from triton_kernels._triton import tl, triton

BLOCK_V = 4096
LOGIT_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
LOG_ZERO = -1e4
"""Stands for log 0 where it is multiplied by 0, so that p log p is 0 and not NaN: exp of it is 0."""
_LOG_ZERO = tl.constexpr(LOG_ZERO)


@triton.jit
def tanh(x):
    """Approximate tanh within 1e-7: a series near 0, where the quotient would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def scaled_logits(row_ptr, bias_ptr, v, V, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """s of the tokens v: (softcap of) (product + bias) / temperature; -inf beyond V."""
    z = tl.load(row_ptr + v, v < V, other=float("-inf"))
    if bias_ptr is not None:
        z += tl.load(bias_ptr + v, v < V, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
        z = tl.where(v < V, z, float("-inf"))
    return z * inverse_temperature


@triton.jit
def row_statistics(
    row_ptr, bias_ptr, target, V, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """(max of s, sum exp(s - max), s[target], sum exp(s - max) (s - max)); s[target] is -inf outside of 0..V - 1."""
    largest = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = scaled_logits(row_ptr, bias_ptr, v, V, softcap, inverse_temperature, HAS_SOFTCAP)
        larger = tl.maximum(largest, tl.max(s))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # nothing yet but tokens that a bias removed
        shift = tl.maximum(largest - base, _LOG_ZERO)
        scale = tl.exp(shift)
        e = tl.exp(s - base)
        weighted = scale * (weighted + shift * total) + tl.sum(e * tl.maximum(s - base, _LOG_ZERO))
        total = scale * total + tl.sum(e)
        largest = larger
    inside = (target >= 0) & (target < V)
    one = tl.where(inside, target, 0) + tl.arange(0, 1)
    s = scaled_logits(row_ptr, bias_ptr, one, V, softcap, inverse_temperature, HAS_SOFTCAP)
    return largest, total, tl.where(inside, tl.sum(s), float("-inf")), weighted


@triton.jit
def scaled_gradient(
    s, is_target, g, h, entropy, largest, log_sum, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr
):
    """d (g log p(target) + h entropy) by the product: ds_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy)."""
    log_p = tl.maximum(s - largest - log_sum, _LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp(log_p)
    ds = tl.where(is_target, g, 0.0) - p * (g + h * (log_p + entropy))
    if HAS_SOFTCAP:
        capped = s * (1.0 / (softcap * inverse_temperature))
        ds *= 1.0 - capped * capped
    return ds * inverse_temperature


@triton.jit
def write_row_gradient(
    row_ptr, out_ptr, bias_ptr, target, g, h, entropy, largest, log_sum, V, softcap,
    inverse_temperature, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The row's gradient over its logits. out_ptr is the same memory, in the operands' type: narrower, never wider."""
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = scaled_logits(row_ptr, bias_ptr, v, V, softcap, inverse_temperature, HAS_SOFTCAP)
        dz = scaled_gradient(s, v == target, g, h, entropy, largest, log_sum, softcap, inverse_temperature, HAS_SOFTCAP)
        tl.debug_barrier()  # a narrow block lies over wide ones that another warp may still have to read
        tl.store(out_ptr + v, dz.to(out_ptr.dtype.element_ty), v < V)


@triton.jit
def logit_stats_kernel(
    logits_ptr, target_ptr, bias_ptr, stats_ptr, V, stride, stats_stride, softcap, inverse_temperature,
    HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Column c of stats [4, C]: see `row_statistics`."""
    c = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + c).to(tl.int64)
    largest, total, at_target, weighted = row_statistics(
        logits_ptr + c * stride, bias_ptr, target, V, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_V
    )
    tl.store(stats_ptr + c, largest)
    tl.store(stats_ptr + stats_stride + c, total)
    tl.store(stats_ptr + 2 * stats_stride + c, at_target)
    tl.store(stats_ptr + 3 * stats_stride + c, weighted)


@triton.jit
def logit_gradient_kernel(
    out_ptr, logits_ptr, target_ptr, bias_ptr, g_ptr, h_ptr, entropy_ptr, max_ptr, log_sum_ptr,
    V, out_stride, stride, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Row c of the gradient; h_ptr may be None. See `write_row_gradient`."""
    c = tl.program_id(0).to(tl.int64)
    h = 0.0
    if h_ptr is not None:
        h = tl.load(h_ptr + c)
    write_row_gradient(
        logits_ptr + c * stride, out_ptr + c * out_stride, bias_ptr, tl.load(target_ptr + c).to(tl.int64),
        tl.load(g_ptr + c), h, tl.load(entropy_ptr + c), tl.load(max_ptr + c), tl.load(log_sum_ptr + c),
        V, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip
