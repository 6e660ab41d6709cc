"""The policy loss on the logits of a chunk of rows, and its gradient over them: `differentiate`, and as one kernel.

C rows of a chunk, V vocabulary or this rank's shard of it, S responses, N statistics (`LossStats`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_kernels._common import SUMS
from triton_kernels._register import Variant, custom_op, register_triton
from triton_kernels._triton import tl, triton
from triton_kernels.head.logit_kernels import (
    BLOCK_V,
    LOGIT_OPTIONS,
    row_statistics,
    write_row_gradient,
)
from triton_kernels.head.logits import logit_gradient, logit_stats, merge
from triton_kernels.policy.grpo_loss import grpo_loss_op
from triton_kernels.policy.objective import LOG_RATIO_LIMIT
from triton_kernels.policy.policy_kernels import NUM_STATS, ObjectiveArguments, reduce_partials, surrogate_and_slope
from triton_kernels.policy.token_kl import clamp, kl_and_slope

PolicyRows = tuple[Tensor | None, Tensor | None, Tensor, Tensor]
"""Of each row: old and reference log-probability, advantage, weight."""
Differentiated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss, stats_N, logprob_C, entropy_C (both 0 where the weight is), and moves_C: rows whose gradient is not 0."""
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


def differentiate(
    out_CV: Tensor,
    logits_CV: Tensor,
    target_C: Tensor,
    bias_V: Tensor | None,
    rows: PolicyRows,
    response_cu: Tensor,
    objective: ObjectiveArguments,
    entropy_coef: float,
    temperature: float,
    softcap: float | None,
    gather: Callable[[Tensor], Tensor] = lambda stats_4C: stats_4C[None],
    advantage: Callable[[Tensor], Tensor] | None = None,
) -> Differentiated:
    """Statistics of the rows, merged over the shards that `gather` brings; the objective; its gradient to `out_CV`.

    `advantage` gives the advantage where it depends on the log-probability.
    """
    old_C, ref_C, advantage_C, weight_C = rows
    present_C = weight_C != 0
    stats_4C = logit_stats(logits_CV, target_C, bias_V, temperature, softcap)
    logprob_C, entropy_C, max_C, log_sum_C = merge(gather(stats_4C))
    logprob_C = torch.where(present_C, logprob_C, 0)
    advantage_C = advantage_C if advantage is None else advantage(logprob_C)
    loss, g_C, stats_N = grpo_loss_op(logprob_C, old_C, ref_C, advantage_C, weight_C, response_cu, *objective)
    seen_C, h_C = torch.where(present_C, entropy_C, 0), None
    stats_N[SUMS.index("entropy")] = seen_C.sum()
    moves_C = g_C != 0
    if entropy_coef:
        h_C = torch.where(present_C, weight_C, 0).to(g_C.dtype) * -entropy_coef
        loss, moves_C = loss + (h_C * seen_C).sum(), moves_C | (h_C != 0)
    saved = (entropy_C, max_C, log_sum_C)
    logit_gradient(out_CV, logits_CV, target_C, bias_V, g_C, h_C, *saved, temperature, softcap)
    return loss, stats_N, logprob_C, seen_C, moves_C


def policy_logits_composed(
    out_CV: Tensor,
    logits_CV: Tensor,
    target_C: Tensor,
    bias_V: Tensor | None,
    old_C: Tensor | None,
    ref_C: Tensor | None,
    advantage_C: Tensor,
    weight_C: Tensor,
    response_cu: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl: str,
    ratio: str,
    surrogate: str,
    dual_clip: float | None,
    delta: float | None,
    entropy_coef: float,
    temperature: float,
    softcap: float | None,
) -> Differentiated:
    """`differentiate` on the whole vocabulary."""
    objective = (clip_low, clip_high, kl_coef, kl, ratio, surrogate, dual_clip, delta)
    rows = (old_C, ref_C, advantage_C, weight_C)
    return differentiate(
        out_CV, logits_CV, target_C, bias_V, rows, response_cu, objective, entropy_coef, temperature, softcap
    )


@triton.jit
def policy_logits_kernel(
    out_ptr, logits_ptr, target_ptr, bias_ptr, old_ptr, ref_ptr, advantage_ptr, weight_ptr,
    logprob_ptr, entropy_ptr, moves_ptr, partial_ptr, C, V, out_stride, stride, softcap, inverse_temperature,
    ratio_low, ratio_high, kl_coef, dual_clip, delta, entropy_coef,
    HAS_SOFTCAP: tl.constexpr, KL: tl.constexpr, SURROGATE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row of a ratio per token: statistics, objective, gradient. Partial results [1 + N, C] as in
    `response_loss`: the loss, then the statistics."""
    c = tl.program_id(0).to(tl.int64)
    row_ptr, target = logits_ptr + c * stride, tl.load(target_ptr + c).to(tl.int64)
    weight = tl.load(weight_ptr + c).to(tl.float32)
    present = weight != 0
    largest, total, at_target, weighted = row_statistics(
        row_ptr, bias_ptr, target, V, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_V
    )
    log_sum = tl.log(total)
    logprob = tl.where(present, at_target - largest - log_sum, 0.0)
    row_entropy = log_sum - weighted / total
    entropy = tl.where(present, row_entropy, 0.0)
    advantage = tl.load(advantage_ptr + c, present, other=0.0).to(tl.float32)
    old = logprob
    if old_ptr is not None:
        old = tl.load(old_ptr + c, present, other=0.0).to(tl.float32)
    log_ratio = logprob - old
    ratio = tl.exp(clamp(log_ratio, -_LIMIT, _LIMIT))
    surrogate, slope = surrogate_and_slope(
        log_ratio, ratio, advantage, logprob, ratio_low, ratio_high, dual_clip, delta, SURROGATE
    )
    g = -weight * slope
    kl = 0.0
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + c, present, other=0.0).to(tl.float32)
        kl, kl_slope = kl_and_slope(logprob - ref, KL)
        surrogate -= kl_coef * kl
        g += weight * kl_coef * kl_slope
    h = -entropy_coef * weight
    tl.store(logprob_ptr + c, logprob)
    tl.store(entropy_ptr + c, entropy)
    tl.store(moves_ptr + c, (g != 0) | (h != 0))
    one = tl.where(present, 1.0, 0.0)
    out = partial_ptr + c
    tl.store(out, h * entropy - weight * surrogate)
    tl.store(out + C, one)
    tl.store(out + 2 * C, weight)
    tl.store(out + 3 * C, kl)
    tl.store(out + 4 * C, -log_ratio)
    tl.store(out + 5 * C, one * ratio)
    tl.store(out + 6 * C, tl.where((ratio < ratio_low) & (advantage < 0), 1.0, 0.0))
    tl.store(out + 7 * C, tl.where((ratio > ratio_high) & (advantage > 0), 1.0, 0.0))
    tl.store(out + 8 * C, entropy)
    tl.store(out + 9 * C, tl.where(present, ratio, float("-inf")))
    tl.store(out + 10 * C, tl.where(present, ratio, float("inf")))
    write_row_gradient(
        row_ptr, out_ptr + c * out_stride, bias_ptr, target, g, h, row_entropy, largest, log_sum, V,
        softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip


def _policy_logits_triton(out_CV: Tensor, logits_CV: Tensor, target_C: Tensor, *arguments: Any) -> Differentiated:
    bias_V, old_C, ref_C, advantage_C, weight_C, _, *objective, entropy_coef, temperature, softcap = arguments
    clip_low, clip_high, kl_coef, kl, ratio, surrogate, dual_clip, delta = objective
    if logits_CV.dtype == torch.float64 or ratio == "sequence":
        return policy_logits_composed(out_CV, logits_CV, target_C, *arguments)
    C, V = logits_CV.shape
    logprob_C, entropy_C = logits_CV.new_empty(C), logits_CV.new_empty(C)
    moves_C = torch.empty(C, dtype=torch.bool, device=logits_CV.device)
    partial_NC = logits_CV.new_empty(1 + NUM_STATS, C)
    tensors = (target_C, bias_V, old_C, ref_C, advantage_C, weight_C)
    # An infinite bound is off.
    dual_clip, delta = (float("inf") if bound is None else bound for bound in (dual_clip, delta))
    if C:
        policy_logits_kernel[(C,)](
            out_CV, logits_CV, *(None if x is None else x.contiguous() for x in tensors),
            logprob_C, entropy_C, moves_C, partial_NC, C, V, out_CV.stride(0), logits_CV.stride(0),
            softcap or 0.0, 1.0 / temperature, 1 - clip_low, 1 + clip_high, kl_coef, dual_clip, delta, entropy_coef,
            HAS_SOFTCAP=softcap is not None, KL=kl, SURROGATE=surrogate, BLOCK_V=BLOCK_V, **LOGIT_OPTIONS,
        )  # fmt: skip
    loss, stats_N = reduce_partials(partial_NC)
    return loss, stats_N, logprob_C, entropy_C, moves_C


policy_logits = custom_op(
    "policy_logits", policy_logits_composed, mutates=("out_CV",), default="logit ops and grpo_loss"
)
policy_logits.register_fake(
    lambda _out, logits_CV, *_: (
        *(logits_CV.new_empty(shape) for shape in ((), NUM_STATS, len(logits_CV), len(logits_CV))),
        logits_CV.new_empty(len(logits_CV), dtype=torch.bool),
    )
)
register_triton(policy_logits, _policy_logits_triton)


def variants() -> list[Variant]:
    """The kernel this op launches."""
    pointers = ("logits", "bias", "old", "ref", "advantage", "weight", "logprob", "entropy", "partial")
    scalars = ("softcap", "inverse_temperature", "ratio_low", "ratio_high", "kl_coef", "dual_clip", "delta")
    signature = {f"{name}_ptr": "*fp32" for name in pointers} | dict.fromkeys((*scalars, "entropy_coef"), "fp32")
    signature |= {"out_ptr": "*bf16", "target_ptr": "*i64", "moves_ptr": "*i1"}
    signature |= {"C": "i32", "V": "i32", "out_stride": "i32", "stride": "i32"}
    plain = {"HAS_SOFTCAP": False, "KL": "k3", "SURROGATE": "clip", "BLOCK_V": BLOCK_V}
    branches = [
        {"bias_ptr": None},
        {"bias_ptr": None, "old_ptr": None, "ref_ptr": None},
        {"HAS_SOFTCAP": True, "KL": "k1+", "SURROGATE": "cispo"},
    ]
    strides = ("stride", "out_stride")
    return [Variant(policy_logits_kernel, signature, plain | branch, LOGIT_OPTIONS, strides) for branch in branches]
