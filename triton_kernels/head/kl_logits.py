"""Statistics of the two heads' logits of a chunk of rows, and both gradients in place: the pieces of `linear_kl`.

s, ref_s: logits of policy p = softmax(s) and reference q = softmax(ref_s), with bias, softcap and temperature
d = (s - max s) - (ref_s - max ref_s);  mean = sum_v p_v d_v
KL(p || q) = mean - log sum exp(s - max s) + log sum exp(ref_s - max ref_s);  dKL/ds = p (d - mean);  dKL/dref_s = q - p

d is summed as one number: two equal heads have d = 0, hence a KL and gradients of exactly 0. A token that the policy
does not have adds 0, whatever the reference says of it.

C rows of a chunk, V vocabulary or this rank's shard of it, R ranks that split it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels._register import Variant, custom_op, register_triton
from triton_kernels._triton import tl, triton
from triton_kernels.head.logit_kernels import BLOCK_V, LOG_ZERO, LOGIT_OPTIONS, scaled_logits
from triton_kernels.head.logits import scaled

_LOG_ZERO = tl.constexpr(LOG_ZERO)


def kl_stats_reference(
    logits_CV: Tensor,
    ref_logits_CV: Tensor,
    bias_V: Tensor | None,
    ref_bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> Tensor:
    """[5, C]: max s, sum exp(s - max s), the same two of ref_s, and sum exp(s - max s) d.

    The last is inf where the reference lacks a token that the policy has. A row without tokens (V is 0, or a bias of
    -inf removed all) has the maximum -inf and sums of 0.
    """
    C, V = logits_CV.shape
    if V == 0:
        none = (-torch.inf, 0.0, -torch.inf, 0.0, 0.0)
        return logits_CV.new_tensor(none)[:, None].repeat(1, C)
    s_CV = scaled(logits_CV, bias_V, temperature, softcap)
    ref_s_CV = scaled(ref_logits_CV, ref_bias_V, temperature, ref_softcap)
    max_C, ref_max_C = s_CV.amax(-1), ref_s_CV.amax(-1)
    # A bias can remove the whole shard: -inf - (-inf) would be NaN.
    s_CV.sub_(max_C.masked_fill(max_C == -torch.inf, 0)[:, None])
    ref_s_CV.sub_(ref_max_C.masked_fill(ref_max_C == -torch.inf, 0)[:, None])
    e_CV = s_CV.exp()
    weighted_C = s_CV.sub_(ref_s_CV).mul_(e_CV).masked_fill_(e_CV == 0, 0).sum(-1)
    return torch.stack([max_C, e_CV.sum(-1), ref_max_C, ref_s_CV.exp_().sum(-1), weighted_C])


def kl_gradient_reference(
    logits_CV: Tensor,
    ref_logits_CV: Tensor,
    out_CV: Tensor | None,
    ref_out_CV: Tensor | None,
    bias_V: Tensor | None,
    ref_bias_V: Tensor | None,
    g_C: Tensor,
    rows_5C: Tensor,
    temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> None:
    """out, ref_out = the gradients of sum_c g_c KL_c by `logits_CV` and `ref_logits_CV`; None where not wanted.

    ds = g p (d - mean), dref_s = g (q - p). Each may be the memory of its logits, narrower: see `reinterpreted`.
    rows_5C: max s, log sum exp(s - max s), the same two of ref_s, and mean, all of the whole vocabulary. A row whose g
    is 0 has a gradient of 0 even where its KL is infinite.
    """
    max_C1, log_sum_C1, ref_max_C1, ref_log_sum_C1, mean_C1 = rows_5C[:, :, None]
    s_CV = scaled(logits_CV, bias_V, temperature, softcap)
    ref_s_CV = scaled(ref_logits_CV, ref_bias_V, temperature, ref_softcap)
    p_CV = (s_CV - max_C1).sub_(log_sum_C1).exp_()
    if ref_out_CV is not None:
        ds_CV = (ref_s_CV - ref_max_C1).sub_(ref_log_sum_C1).exp_().sub_(p_CV)
        _write_gradient(ref_out_CV, ds_CV, ref_s_CV, g_C, temperature, ref_softcap)
    if out_CV is not None:
        d_CV = (s_CV - max_C1).sub_(ref_s_CV.sub_(ref_max_C1))
        ds_CV = d_CV.sub_(mean_C1).mul_(p_CV).masked_fill_(p_CV == 0, 0)
        _write_gradient(out_CV, ds_CV, s_CV, g_C, temperature, softcap)


def _write_gradient(
    out_CV: Tensor, ds_CV: Tensor, s_CV: Tensor, g_C: Tensor, temperature: float, softcap: float | None
) -> None:
    ds_CV.mul_(g_C[:, None]).masked_fill_((g_C == 0)[:, None], 0)
    if softcap is not None:
        ds_CV.mul_(1 - (s_CV * (temperature / softcap)) ** 2)
    out_CV.copy_(ds_CV.div_(temperature))


def merge_kl(stats_R5T: Tensor) -> tuple[Tensor, Tensor]:
    """(kl_T, rows_5T) of the whole vocabulary from its shards' `kl_stats`; rows_5T is what `kl_gradient` takes."""
    max_RT, sum_RT, ref_max_RT, ref_sum_RT, weighted_RT = stats_R5T.unbind(1)
    max_T, ref_max_T = max_RT.amax(0), ref_max_RT.amax(0)
    shift_RT = (max_RT - max_T).clamp(min=LOG_ZERO)  # a shard without tokens has the maximum -inf
    # Not clamped: where it is not the policy that is far from its maximum, this multiplies what is not 0.
    ref_shift_RT = (ref_max_RT - ref_max_T).masked_fill(ref_max_RT == -torch.inf, 0)
    scale_RT = shift_RT.exp()
    sum_T = (scale_RT * sum_RT).sum(0)
    ref_sum_T = (ref_shift_RT.exp() * ref_sum_RT).sum(0)
    weighted_RT = (weighted_RT + (shift_RT - ref_shift_RT) * sum_RT) * scale_RT
    mean_T = weighted_RT.masked_fill(scale_RT == 0, 0).sum(0) / sum_T
    log_sum_T, ref_log_sum_T = sum_T.log(), ref_sum_T.log()
    return mean_T - (log_sum_T - ref_log_sum_T), torch.stack([max_T, log_sum_T, ref_max_T, ref_log_sum_T, mean_T])


@triton.jit
def kl_stats_kernel(
    logits_ptr, ref_logits_ptr, bias_ptr, ref_bias_ptr, stats_ptr, V, stride, ref_stride, stats_stride,
    softcap, ref_softcap, inverse_temperature,
    HAS_SOFTCAP: tl.constexpr, HAS_REF_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Column c of stats [5, C]: see `kl_stats_reference`. Sums so far are moved to each new maximum."""
    c = tl.program_id(0).to(tl.int64)
    row, ref_row = logits_ptr + c * stride, ref_logits_ptr + c * ref_stride
    largest, ref_largest = float("-inf"), float("-inf")
    total, ref_total, weighted = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = scaled_logits(row, bias_ptr, v, V, softcap, inverse_temperature, HAS_SOFTCAP)
        ref_s = scaled_logits(ref_row, ref_bias_ptr, v, V, ref_softcap, inverse_temperature, HAS_REF_SOFTCAP)
        larger, ref_larger = tl.maximum(largest, tl.max(s)), tl.maximum(ref_largest, tl.max(ref_s))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # nothing yet but tokens that a bias removed
        ref_base = tl.where(ref_larger == float("-inf"), 0.0, ref_larger)
        shift = tl.maximum(largest - base, _LOG_ZERO)
        ref_shift = tl.where(ref_largest == float("-inf"), 0.0, ref_largest - ref_base)
        scale = tl.exp(shift)
        s, ref_s = tl.maximum(s - base, _LOG_ZERO, propagate_nan=tl.PropagateNan.ALL), ref_s - ref_base
        e = tl.exp(s)
        carried = tl.where(scale == 0.0, 0.0, scale * (weighted + (shift - ref_shift) * total))
        weighted = carried + tl.sum(e * tl.where(e == 0.0, 0.0, s - ref_s))
        total = scale * total + tl.sum(e)
        ref_total = tl.exp(ref_shift) * ref_total + tl.sum(tl.exp(ref_s))
        largest, ref_largest = larger, ref_larger
    out = stats_ptr + c
    tl.store(out, largest)
    tl.store(out + stats_stride, total)
    tl.store(out + 2 * stats_stride, ref_largest)
    tl.store(out + 3 * stats_stride, ref_total)
    tl.store(out + 4 * stats_stride, weighted)


@triton.jit
def scaled_slope(ds, s, g, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """Gradient by the product hidden weight' from g and a gradient by s; 0 where g is 0, whatever ds is."""
    ds = tl.where(g == 0.0, 0.0, g * ds)
    if HAS_SOFTCAP:
        capped = s * (1.0 / (softcap * inverse_temperature))
        ds *= 1.0 - capped * capped
    return ds * inverse_temperature


@triton.jit
def kl_gradient_kernel(
    logits_ptr, ref_logits_ptr, out_ptr, ref_out_ptr, bias_ptr, ref_bias_ptr, g_ptr, rows_ptr,
    V, stride, ref_stride, out_stride, ref_out_stride, rows_stride, softcap, ref_softcap, inverse_temperature,
    HAS_SOFTCAP: tl.constexpr, HAS_REF_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Row c of both gradients, or of the one whose out_ptr is not None: see `kl_gradient_reference`."""
    c = tl.program_id(0).to(tl.int64)
    row, ref_row = logits_ptr + c * stride, ref_logits_ptr + c * ref_stride
    g, rows = tl.load(g_ptr + c), rows_ptr + c
    largest, log_sum = tl.load(rows), tl.load(rows + rows_stride)
    ref_largest, ref_log_sum = tl.load(rows + 2 * rows_stride), tl.load(rows + 3 * rows_stride)
    mean = tl.load(rows + 4 * rows_stride)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = scaled_logits(row, bias_ptr, v, V, softcap, inverse_temperature, HAS_SOFTCAP)
        ref_s = scaled_logits(ref_row, ref_bias_ptr, v, V, ref_softcap, inverse_temperature, HAS_REF_SOFTCAP)
        below, ref_below = tl.maximum(s - largest, _LOG_ZERO, propagate_nan=tl.PropagateNan.ALL), ref_s - ref_largest
        p = tl.exp(below - log_sum)
        tl.debug_barrier()  # a narrow block lies over wide ones that another warp may still have to read
        if out_ptr is not None:
            ds = p * tl.where(p == 0.0, 0.0, below - ref_below - mean)
            dz = scaled_slope(ds, s, g, softcap, inverse_temperature, HAS_SOFTCAP)
            tl.store(out_ptr + c * out_stride + v, dz.to(out_ptr.dtype.element_ty), v < V)
        if ref_out_ptr is not None:
            ds = tl.exp(ref_below - ref_log_sum) - p
            dz = scaled_slope(ds, ref_s, g, ref_softcap, inverse_temperature, HAS_REF_SOFTCAP)
            tl.store(ref_out_ptr + c * ref_out_stride + v, dz.to(ref_out_ptr.dtype.element_ty), v < V)


def _kl_stats_triton(
    logits_CV: Tensor,
    ref_logits_CV: Tensor,
    bias_V: Tensor | None,
    ref_bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> Tensor:
    biases = (bias_V, ref_bias_V)
    if logits_CV.dtype == torch.float64:
        return kl_stats_reference(logits_CV, ref_logits_CV, *biases, temperature, softcap, ref_softcap)
    C, V = logits_CV.shape
    stats_5C = _stats_like(logits_CV)
    if C:
        kl_stats_kernel[(C,)](
            logits_CV, ref_logits_CV, *(None if x is None else x.contiguous() for x in biases), stats_5C,
            V, logits_CV.stride(0), ref_logits_CV.stride(0), C, softcap or 0.0, ref_softcap or 0.0, 1.0 / temperature,
            HAS_SOFTCAP=softcap is not None, HAS_REF_SOFTCAP=ref_softcap is not None, BLOCK_V=BLOCK_V,
            **LOGIT_OPTIONS,
        )  # fmt: skip
    return stats_5C


def _kl_gradient_triton(
    logits_CV: Tensor,
    ref_logits_CV: Tensor,
    out_CV: Tensor | None,
    ref_out_CV: Tensor | None,
    bias_V: Tensor | None,
    ref_bias_V: Tensor | None,
    g_C: Tensor,
    rows_5C: Tensor,
    temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> None:
    tensors, settings = (logits_CV, ref_logits_CV, out_CV, ref_out_CV), (temperature, softcap, ref_softcap)
    if logits_CV.dtype == torch.float64:
        return kl_gradient_reference(*tensors, bias_V, ref_bias_V, g_C, rows_5C, *settings)
    C, V = logits_CV.shape
    if C and V:
        contiguous = (None if x is None else x.contiguous() for x in (bias_V, ref_bias_V, g_C))
        kl_gradient_kernel[(C,)](
            *tensors, *contiguous, rows_5C, V, *(0 if x is None else x.stride(0) for x in tensors), rows_5C.stride(0),
            softcap or 0.0, ref_softcap or 0.0, 1.0 / temperature,
            HAS_SOFTCAP=softcap is not None, HAS_REF_SOFTCAP=ref_softcap is not None, BLOCK_V=BLOCK_V, **LOGIT_OPTIONS,
        )  # fmt: skip
    return None


def _stats_like(logits_CV: Tensor, *_: object) -> Tensor:
    """Uninitialised [5, C]."""
    return logits_CV.new_empty(5, logits_CV.shape[0])


kl_stats = custom_op("kl_stats", kl_stats_reference)
kl_stats.register_fake(_stats_like)
register_triton(kl_stats, _kl_stats_triton)

kl_gradient = custom_op("kl_gradient", kl_gradient_reference, mutates=("out_CV", "ref_out_CV"))
register_triton(kl_gradient, _kl_gradient_triton)


def variants() -> list[Variant]:
    """The kernels these ops launch."""
    common = dict.fromkeys(("logits_ptr", "ref_logits_ptr"), "*fp32") | {"V": "i32", "inverse_temperature": "fp32"}
    common |= dict.fromkeys(("softcap", "ref_softcap"), "fp32") | dict.fromkeys(("stride", "ref_stride"), "i32")
    stats = common | {"stats_ptr": "*fp32", "stats_stride": "i32"}
    gradient = common | dict.fromkeys(("g_ptr", "rows_ptr"), "*fp32")
    gradient |= dict.fromkeys(("out_stride", "ref_out_stride", "rows_stride"), "i32")
    plain = {"HAS_SOFTCAP": False, "HAS_REF_SOFTCAP": False, "bias_ptr": None, "ref_bias_ptr": None}
    everything = {"HAS_SOFTCAP": True, "HAS_REF_SOFTCAP": True}
    biases = {"bias_ptr": "*fp32", "ref_bias_ptr": "*bf16"}
    block = {"BLOCK_V": BLOCK_V}
    variants = [
        ({"out_ptr": "*bf16"}, plain | {"ref_out_ptr": None}),
        ({"out_ptr": "*bf16", "ref_out_ptr": "*bf16"}, plain),
        ({"out_ptr": "*fp32", "ref_out_ptr": "*fp32"}, everything),
        ({"ref_out_ptr": "*bf16"}, everything | {"out_ptr": None}),
    ]
    read, written = ("stride", "ref_stride"), ("out_stride", "ref_out_stride")
    return [
        Variant(kl_stats_kernel, stats | biases, choice | block, LOGIT_OPTIONS, read) for choice in (plain, everything)
    ] + [
        Variant(kl_gradient_kernel, gradient | biases | outs, choice | block, LOGIT_OPTIONS, read + written)
        for outs, choice in variants
    ]
