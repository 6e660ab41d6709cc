"""The Triton side of the policy loss, shared by `grpo_loss` and `group_grpo_loss`: one program per response.

T loss rows, S responses, N = 11 partial results of each response: the loss, then `LossStats` in its order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels._common import MAXIMA, MINIMA, SUMS
from triton_kernels._register import Variant
from triton_kernels._triton import LAUNCH_OPTIONS, tl, triton
from triton_kernels.policy.objective import LOG_RATIO_LIMIT, Objective
from triton_kernels.policy.token_kl import clamp, kl_and_slope

NUM_STATS = len(SUMS) + len(MAXIMA) + len(MINIMA)
BLOCK_T = 512
_BLOCK_S = 1024
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


@triton.jit
def surrogate_and_slope(
    log_ratio, ratio, advantage, logprob, ratio_low, ratio_high, dual_clip, delta, SURROGATE: tl.constexpr
):
    """The surrogate of each row and its derivative by the log ratio; for cispo by the log-probability.

    Comparisons are such that NaN, of which each is false, reaches both.
    """
    clipped = clamp(ratio, ratio_low, ratio_high)
    if SURROGATE == "cispo":
        return clipped * advantage * logprob, clipped * advantage
    else:
        unclipped = tl.where(ratio > delta, delta, ratio) * advantage
        outside = (tl.abs(log_ratio) > _LIMIT) | (ratio > delta)
        inactive = unclipped > clipped * advantage
        surrogate = tl.where(inactive, clipped * advantage, unclipped)
        slope = tl.where(inactive | outside, 0.0, ratio * advantage)
        # Not inf * 0 where dual_clip is off and the advantage is 0.
        floor = dual_clip * tl.where(advantage < 0, advantage, -1.0)
        floored = (advantage < 0) & (surrogate < floor)
        return tl.where(floored, floor, surrogate), tl.where(floored, 0.0, slope)


@triton.jit
def is_clipped(ratio, advantage, ratio_low, ratio_high):
    """(1 where the ratio is clipped below, 1 where above), else 0; NaN where ratio or advantage is NaN."""
    product = ratio * advantage
    unknown = product != product
    low = tl.where(unknown, product, tl.where((ratio < ratio_low) & (advantage < 0), 1.0, 0.0))
    high = tl.where(unknown, product, tl.where((ratio > ratio_high) & (advantage > 0), 1.0, 0.0))
    return low, high


@triton.jit
def load_row(logprob_ptr, old_ptr, weight_ptr, t, end):
    """(weight, present, log-probability, log ratio) of rows t. Absent rows are not read: they may hold garbage."""
    weight = tl.load(weight_ptr + t, t < end, other=0.0).to(tl.float32)
    present = weight != 0
    logprob = tl.load(logprob_ptr + t, present, other=0.0).to(tl.float32)
    # On-policy the difference is 0, or NaN, which must stay visible.
    old = logprob
    if old_ptr is not None:
        old = tl.load(old_ptr + t, present, other=0.0).to(tl.float32)
    return weight, present, logprob, logprob - old


@triton.jit
def load_advantage(advantage_ptr, advantage, t, present):
    """Advantage of rows t: their own, or the response's scalar `advantage` where `advantage_ptr` is None."""
    if advantage_ptr is not None:
        return tl.load(advantage_ptr + t, present, other=0.0).to(tl.float32)
    else:
        return tl.where(present, advantage, 0.0)


@triton.jit
def sequence_statistics(
    logprob_ptr, old_ptr, advantage_ptr, advantage, weight_ptr, begin, end,
    ratio_low, ratio_high, dual_clip, delta, SURROGATE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(mean log ratio of a response's present rows, derivative of the loss by each of them through that mean)."""
    tokens = tl.zeros([BLOCK_T], tl.float32)
    log_ratios = tl.zeros([BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        _weight, present, _logprob, log_ratio = load_row(logprob_ptr, old_ptr, weight_ptr, t, end)
        tokens += tl.where(present, 1.0, 0.0)
        log_ratios += log_ratio
    num_tokens = tl.maximum(tl.sum(tokens), 1.0)
    mean = tl.sum(log_ratios) / num_tokens
    slopes = tl.zeros([BLOCK_T], tl.float32)
    if SURROGATE == "clip":
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            weight, present, logprob, _log_ratio = load_row(logprob_ptr, old_ptr, weight_ptr, t, end)
            a = load_advantage(advantage_ptr, advantage, t, present)
            log_ratio = tl.where(present, mean, 0.0)
            ratio = tl.exp(clamp(log_ratio, -_LIMIT, _LIMIT))
            _surrogate, slope = surrogate_and_slope(
                log_ratio, ratio, a, logprob, ratio_low, ratio_high, dual_clip, delta, SURROGATE
            )
            slopes += weight * slope
    return mean, tl.sum(slopes) / num_tokens


@triton.jit
def response_loss(
    logprob_ptr, old_ptr, ref_ptr, advantage_ptr, advantage, weight_ptr, dlogprob_ptr, partial_ptr, s, S, begin, end,
    ratio_low, ratio_high, kl_coef, dual_clip, delta,
    KL: tl.constexpr, RATIO: tl.constexpr, SURROGATE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows begin..end of response s, and its column of partial_ptr: loss, then the statistics."""
    mean, shared_slope = 0.0, 0.0
    if RATIO == "sequence":
        mean, shared_slope = sequence_statistics(
            logprob_ptr, old_ptr, advantage_ptr, advantage, weight_ptr, begin, end,
            ratio_low, ratio_high, dual_clip, delta, SURROGATE, BLOCK_T,
        )  # fmt: skip
    loss = tl.zeros([BLOCK_T], tl.float32)
    tokens = tl.zeros([BLOCK_T], tl.float32)
    weights = tl.zeros([BLOCK_T], tl.float32)
    kls = tl.zeros([BLOCK_T], tl.float32)
    log_ratios = tl.zeros([BLOCK_T], tl.float32)
    ratios = tl.zeros([BLOCK_T], tl.float32)
    lows = tl.zeros([BLOCK_T], tl.float32)
    highs = tl.zeros([BLOCK_T], tl.float32)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    smallest = tl.full([BLOCK_T], float("inf"), tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        weight, present, logprob, log_ratio = load_row(logprob_ptr, old_ptr, weight_ptr, t, end)
        a = load_advantage(advantage_ptr, advantage, t, present)
        log_ratios -= log_ratio
        if RATIO == "sequence":
            log_ratio = tl.where(present, mean, 0.0)
        ratio = tl.exp(clamp(log_ratio, -_LIMIT, _LIMIT))
        surrogate, slope = surrogate_and_slope(
            log_ratio, ratio, a, logprob, ratio_low, ratio_high, dual_clip, delta, SURROGATE
        )
        dlogprob = -weight * slope
        if RATIO == "sequence" and SURROGATE == "clip":
            dlogprob = tl.where(present, -shared_slope, 0.0)
        if ref_ptr is not None:
            ref = tl.load(ref_ptr + t, present, other=0.0).to(tl.float32)
            kl, kl_slope = kl_and_slope(logprob - ref, KL)
            surrogate -= kl_coef * kl
            dlogprob += weight * kl_coef * kl_slope
            kls += kl
        tl.store(dlogprob_ptr + t, dlogprob, t < end)
        loss -= weight * surrogate
        tokens += tl.where(present, 1.0, 0.0)
        weights += weight
        ratios += tl.where(present, ratio, 0.0)
        low, high = is_clipped(ratio, a, ratio_low, ratio_high)
        lows += low
        highs += high
        largest = tl.maximum(largest, tl.where(present, ratio, float("-inf")))
        smallest = tl.minimum(smallest, tl.where(present, ratio, float("inf")))
    out = partial_ptr + s
    ratio_sum = tl.sum(ratios)
    seen = ratio_sum == ratio_sum  # max and min skip NaN
    tl.store(out, tl.sum(loss))
    tl.store(out + S, tl.sum(tokens))
    tl.store(out + 2 * S, tl.sum(weights))
    tl.store(out + 3 * S, tl.sum(kls))
    tl.store(out + 4 * S, tl.sum(log_ratios))
    tl.store(out + 5 * S, ratio_sum)
    tl.store(out + 6 * S, tl.sum(lows))
    tl.store(out + 7 * S, tl.sum(highs))
    tl.store(out + 8 * S, 0.0)
    tl.store(out + 9 * S, tl.where(seen, tl.max(largest), ratio_sum))
    tl.store(out + 10 * S, tl.where(seen, tl.min(smallest), ratio_sum))


@triton.jit
def reduce_partials_kernel(partial_ptr, loss_ptr, stats_ptr, S, BLOCK_S: tl.constexpr):
    """Program q reduces row q of partial [N, S] in a fixed order: 0 is the loss, 9 a maximum, 10 a minimum."""
    q = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_S], tl.float32)
    largest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    smallest = tl.full([BLOCK_S], float("inf"), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        x = tl.load(partial_ptr + q * S + s, s < S, other=0.0)
        total += x
        largest = tl.maximum(largest, tl.where(s < S, x, float("-inf")))
        smallest = tl.minimum(smallest, tl.where(s < S, x, float("inf")))
    whole = tl.sum(total)  # NaN where any part is: a maximum is never inf, a minimum never -inf
    result = tl.where(q == 9, tl.max(largest), tl.where(q == 10, tl.min(smallest), whole))
    result = tl.where(whole == whole, result, whole)
    tl.store(loss_ptr, result, q == 0)
    tl.store(stats_ptr + q - 1, result, q > 0)


def launch_policy_loss(
    kernel: Any,
    logprob_T: Tensor,
    tensors: tuple[Tensor | None, ...],
    response_cu: Tensor,
    objective: tuple[Any, ...],
    **constants: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `kernel`, one program per response, and reduce its partial results; `tensors` precede the offsets."""
    o = Objective(*objective)
    contiguous = (None if x is None else x.contiguous() for x in (logprob_T, *tensors, response_cu))
    S = response_cu.numel() - 1
    dlogprob_T = logprob_T.new_empty(logprob_T.shape, dtype=torch.float32)
    partial_NS = dlogprob_T.new_empty((1 + NUM_STATS, S))
    if S:
        kernel[(S,)](
            *contiguous, dlogprob_T, partial_NS, S,
            *kernel_scalars(o), KL=o.kl, RATIO=o.ratio, SURROGATE=o.surrogate, BLOCK_T=BLOCK_T,
            **constants, **LAUNCH_OPTIONS,
        )  # fmt: skip
    loss, stats_N = reduce_partials(partial_NS)
    return loss, dlogprob_T, stats_N


def kernel_scalars(o: Objective) -> tuple[float, ...]:
    """Convert to ratio_low, ratio_high, kl_coef, dual_clip, delta; the last two are infinite where they are off."""
    dual_clip, delta = (float("inf") if bound is None else bound for bound in (o.dual_clip, o.delta))
    return 1 - o.clip_low, 1 + o.clip_high, o.kl_coef, dual_clip, delta


def reduce_partials(partial_NS: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, stats_N) from their parts [1 + N, S]."""
    loss, stats_N = partial_NS.new_empty(()), partial_NS.new_empty(NUM_STATS)
    reduce_partials_kernel[(1 + NUM_STATS,)](
        partial_NS, loss, stats_N, partial_NS.shape[1], BLOCK_S=_BLOCK_S, **LAUNCH_OPTIONS
    )
    return loss, stats_N


def empty_loss(logprob_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (loss, dlogprob_T, stats_N)."""
    dtype = torch.float64 if logprob_T.dtype == torch.float64 else torch.float32
    shapes = ((), logprob_T.shape, (NUM_STATS,))
    loss, dlogprob_T, stats_N = (logprob_T.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, dlogprob_T, stats_N


def policy_loss_variants(kernel: Any, signature: dict[str, str], constants: dict[str, object]) -> list[Variant]:
    """`kernel` in every branch of the objective, with `signature` and `constants` for what is its own."""
    pointers = ("logprob_ptr", "old_ptr", "ref_ptr", "weight_ptr", "dlogprob_ptr", "partial_ptr")
    scalars = ("ratio_low", "ratio_high", "kl_coef", "dual_clip", "delta")
    signature = (
        {name: "*fp32" for name in pointers}
        | {"response_cu_ptr": "*i32", "S": "i32"}
        | {name: "fp32" for name in scalars}
        | signature
    )
    branches = [
        {"KL": "k3", "RATIO": "token", "SURROGATE": "clip"},
        {"KL": "k3+", "RATIO": "sequence", "SURROGATE": "clip"},
        {"KL": "k2", "RATIO": "sequence", "SURROGATE": "cispo"},
        {"KL": "k1+", "RATIO": "token", "SURROGATE": "clip", "old_ptr": None},
        {"KL": "k3", "RATIO": "sequence", "SURROGATE": "clip", "old_ptr": None, "ref_ptr": None},
    ]
    return [Variant(kernel, signature, branch | constants | {"BLOCK_T": BLOCK_T}) for branch in branches]


def reduction_variant() -> Variant:
    """Variant of the kernel that ends every `launch_policy_loss`."""
    signature = {"partial_ptr": "*fp32", "loss_ptr": "*fp32", "stats_ptr": "*fp32", "S": "i32"}
    return Variant(reduce_partials_kernel, signature, {"BLOCK_S": _BLOCK_S})
