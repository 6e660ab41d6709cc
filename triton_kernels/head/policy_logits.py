"""The policy loss on the logits of a chunk of rows, and its gradient over them: `differentiate`, and as one kernel.

T loss rows, C rows of a chunk, V vocabulary or this rank's shard of it, S responses, N statistics (`LossStats`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from triton_kernels._common import SUMS
from triton_kernels._register import Variant, custom_op, register_triton
from triton_kernels._triton import tl, triton
from triton_kernels.head.logit_kernels import BLOCK_V, LOGIT_OPTIONS, row_statistics, write_row_gradient
from triton_kernels.head.logits import logit_gradient, logit_stats, merge
from triton_kernels.policy.grpo_loss import grpo_loss_op
from triton_kernels.policy.objective import LOG_RATIO_LIMIT, OBJECTIVE_SCHEMA, Objective, objective_arguments
from triton_kernels.policy.policy_kernels import (
    NUM_STATS,
    is_clipped,
    kernel_scalars,
    reduce_partials,
    surrogate_and_slope,
)
from triton_kernels.policy.token_kl import clamp, kl_and_slope

_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)

Differentiated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss, stats_N, logprob_C, entropy_C (both 0 where the weight is), has_gradient_C (False where the gradient is 0)."""


@dataclass(frozen=True)
class PolicyRows:
    """Inputs of the objective for each row, beside its log-probability."""

    target_T: Tensor
    old_logprob_T: Tensor | None
    ref_logprob_T: Tensor | None
    rollout_logprob_T: Tensor | None
    advantage_T: Tensor
    weight_T: Tensor

    def take(self, rows: slice | Tensor) -> PolicyRows:
        """A selection of the rows."""
        return replace(self, **{f.name: x_T[rows] for f in fields(self) if (x_T := getattr(self, f.name)) is not None})

    def advantages(self, logprob_T: Tensor, objective: Objective) -> Tensor:
        """Advantage times the truncated importance weight of trainer over rollout engine, where one is asked for."""
        if objective.tis_clip is None or self.rollout_logprob_T is None:
            return self.advantage_T
        old_T = logprob_T if self.old_logprob_T is None else self.old_logprob_T
        return self.advantage_T * torch.exp(old_T - self.rollout_logprob_T).clamp(max=objective.tis_clip)


@dataclass(frozen=True)
class PolicySlopes:
    """Loss, statistics, and the loss's derivatives by a row's log-probability and entropy (None without a bonus).

    logprob_T and entropy_T are 0 in absent rows.
    """

    loss: Tensor
    stats_N: Tensor
    logprob_T: Tensor
    entropy_T: Tensor
    by_logprob_T: Tensor
    by_entropy_T: Tensor | None


def policy_slopes(
    logprob_T: Tensor, entropy_T: Tensor, rows: PolicyRows, response_cu: Tensor, objective: Objective
) -> PolicySlopes:
    """The objective on log-probabilities and entropies; absent rows may hold anything."""
    present_T = rows.weight_T != 0
    logprob_T, entropy_T = torch.where(present_T, logprob_T, 0), torch.where(present_T, entropy_T, 0)
    advantage_T = rows.advantages(logprob_T, objective)
    loss, g_T, stats_N = grpo_loss_op(
        logprob_T,
        rows.old_logprob_T,
        rows.ref_logprob_T,
        advantage_T,
        rows.weight_T,
        response_cu,
        *objective_arguments(objective),
    )
    stats_N[SUMS.index("entropy")] = entropy_T.sum()
    h_T = None
    if objective.entropy_coef:
        h_T = torch.where(present_T, rows.weight_T, 0).to(g_T.dtype) * -objective.entropy_coef
        loss = loss + (h_T * entropy_T).sum()
    return PolicySlopes(loss, stats_N, logprob_T, entropy_T, g_T, h_T)


def differentiate(
    out_CV: Tensor,
    logits_CV: Tensor,
    bias_V: Tensor | None,
    rows: PolicyRows,
    response_cu: Tensor,
    objective: Objective,
    temperature: float,
    softcap: float | None,
    gather: Callable[[Tensor], Tensor] = lambda stats_4C: stats_4C[None],
) -> Differentiated:
    """Apply the objective to a chunk's logits and write its gradient by them to `out_CV`.

    `gather` collects the statistics of all shards of the vocabulary.
    """
    stats_4C = logit_stats(logits_CV, rows.target_T, bias_V, temperature, softcap)
    logprob_C, entropy_C, max_C, log_sum_C = merge(gather(stats_4C))
    policy = policy_slopes(logprob_C, entropy_C, rows, response_cu, objective)
    g_C, h_C = policy.by_logprob_T, policy.by_entropy_T
    saved = (entropy_C, max_C, log_sum_C)
    logit_gradient(out_CV, logits_CV, rows.target_T, bias_V, g_C, h_C, *saved, temperature, softcap)
    has_gradient_C = g_C != 0 if h_C is None else (g_C != 0) | (h_C != 0)
    return policy.loss, policy.stats_N, policy.logprob_T, policy.entropy_T, has_gradient_C


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
    temperature: float,
    softcap: float | None,
    *objective: Any,
) -> Differentiated:
    """`differentiate` on the whole vocabulary."""
    rows = PolicyRows(target_C, old_C, ref_C, None, advantage_C, weight_C)
    return differentiate(out_CV, logits_CV, bias_V, rows, response_cu, Objective(*objective), temperature, softcap)


@triton.jit
def policy_logits_kernel(
    out_ptr, logits_ptr, target_ptr, bias_ptr, old_ptr, ref_ptr, advantage_ptr, weight_ptr,
    logprob_ptr, entropy_ptr, has_gradient_ptr, partial_ptr, C, V, out_stride, stride, softcap, inverse_temperature,
    ratio_low, ratio_high, kl_coef, dual_clip, delta, entropy_coef,
    HAS_SOFTCAP: tl.constexpr, KL: tl.constexpr, SURROGATE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row, for a ratio per token: statistics, objective, gradient.

    Partial results [1 + N, C] as in `response_loss`: the loss, then the statistics.
    """
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
    tl.store(has_gradient_ptr + c, (g != 0) | (h != 0))
    one = tl.where(present, 1.0, 0.0)
    out = partial_ptr + c
    tl.store(out, h * entropy - weight * surrogate)
    tl.store(out + C, one)
    tl.store(out + 2 * C, weight)
    tl.store(out + 3 * C, kl)
    tl.store(out + 4 * C, -log_ratio)
    tl.store(out + 5 * C, one * ratio)
    low, high = is_clipped(ratio, advantage, ratio_low, ratio_high)
    tl.store(out + 6 * C, low)
    tl.store(out + 7 * C, high)
    tl.store(out + 8 * C, entropy)
    tl.store(out + 9 * C, tl.where(present, ratio, float("-inf")))
    tl.store(out + 10 * C, tl.where(present, ratio, float("inf")))
    write_row_gradient(
        row_ptr, out_ptr + c * out_stride, bias_ptr, target, g, h, row_entropy, largest, log_sum, V,
        softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip


def _policy_logits_triton(
    out_CV: Tensor,
    logits_CV: Tensor,
    target_C: Tensor,
    bias_V: Tensor | None,
    old_C: Tensor | None,
    ref_C: Tensor | None,
    advantage_C: Tensor,
    weight_C: Tensor,
    response_cu: Tensor,
    temperature: float,
    softcap: float | None,
    *objective: Any,
) -> Differentiated:
    o, tensors = Objective(*objective), (target_C, bias_V, old_C, ref_C, advantage_C, weight_C)
    if logits_CV.dtype == torch.float64 or o.ratio == "sequence":
        return policy_logits_composed(out_CV, logits_CV, *tensors, response_cu, temperature, softcap, *objective)
    C, V = logits_CV.shape
    logprob_C, entropy_C = logits_CV.new_empty(C), logits_CV.new_empty(C)
    has_gradient_C = torch.empty(C, dtype=torch.bool, device=logits_CV.device)
    partial_NC = logits_CV.new_empty(1 + NUM_STATS, C)
    if C:
        policy_logits_kernel[(C,)](
            out_CV, logits_CV, *(None if x is None else x.contiguous() for x in tensors),
            logprob_C, entropy_C, has_gradient_C, partial_NC, C, V, out_CV.stride(0), logits_CV.stride(0),
            softcap or 0.0, 1.0 / temperature, *kernel_scalars(o), o.entropy_coef,
            HAS_SOFTCAP=softcap is not None, KL=o.kl, SURROGATE=o.surrogate, BLOCK_V=BLOCK_V, **LOGIT_OPTIONS,
        )  # fmt: skip
    loss, stats_N = reduce_partials(partial_NC)
    return loss, stats_N, logprob_C, entropy_C, has_gradient_C


policy_logits = custom_op(
    "policy_logits",
    policy_logits_composed,
    mutates=("out_CV",),
    schema="(Tensor(a!) out_CV, Tensor logits_CV, Tensor target_C, Tensor? bias_V, Tensor? old_C, Tensor? ref_C, "
    "Tensor advantage_C, Tensor weight_C, Tensor response_cu, float temperature, float? softcap, "
    f"{OBJECTIVE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    default="logit ops and grpo_loss",
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
    signature |= {"out_ptr": "*bf16", "target_ptr": "*i64", "has_gradient_ptr": "*i1"}
    signature |= {"C": "i32", "V": "i32", "out_stride": "i32", "stride": "i32"}
    plain = {"HAS_SOFTCAP": False, "KL": "k3", "SURROGATE": "clip", "BLOCK_V": BLOCK_V}
    branches = [
        {"bias_ptr": None},
        {"bias_ptr": None, "old_ptr": None, "ref_ptr": None},
        {"HAS_SOFTCAP": True, "KL": "k1+", "SURROGATE": "cispo"},
    ]
    strides = ("stride", "out_stride")
    return [Variant(policy_logits_kernel, signature, plain | branch, LOGIT_OPTIONS, strides) for branch in branches]
