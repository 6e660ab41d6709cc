"""The clipped policy-gradient loss of the GRPO family on log-probabilities, with its gradient in the same pass.

DeepSeekMath eq. 3, for row t of a response, with r_t = exp(logprob_t - old_logprob_t):

    loss = - sum_t weight_t * (min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) - kl_coef * KL_t)

`Objective` has the other members of the family. T loss rows, S responses, N statistics (`LossStats`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels._checks import NUMBERS, check_offsets, check_tensor
from triton_kernels._common import LossOutput, LossStats, at_least_fp32, pack_stats, segment_ids, segment_sum
from triton_kernels._register import Variant, autograd_inside_op, custom_op, register_saved_gradient, register_triton
from triton_kernels._triton import tl, triton
from triton_kernels.policy.objective import OBJECTIVE_SCHEMA, Objective, check_objective, objective_arguments
from triton_kernels.policy.policy_kernels import (
    empty_loss,
    launch_policy_loss,
    policy_loss_variants,
    reduction_variant,
    response_loss,
)
from triton_kernels.policy.token_kl import clamped_log_ratio, kl_estimate


def grpo_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    objective: Objective,
) -> LossOutput:
    """Loss, differentiable in `logprob_T` only, and statistics, both fp32 (fp64 for fp64 log-probabilities).

    Response s has rows response_cu[s]:response_cu[s + 1]. Without `old_logprob_T` the policy is its own old policy:
    every ratio is 1 and has a gradient. Without `ref_logprob_T` there is no KL, and `kl_coef` must be 0. A row of
    weight 0 is absent: it is in no mean and no statistic, has gradient 0, and may hold anything. ratio="sequence" takes
    for every row of a response exp of the mean log ratio of its present rows. Log ratios (for "sequence" their mean)
    are clamped to +-20 before `exp`; beyond, the gradient is zero.

    Everything but `logprob_T` is a constant: where it requires a gradient, it gets none. NaN in a row that counts
    reaches loss, gradient and statistics.

    Raises `ValueError` for inputs that do not fit together, and for `tis_clip` or `entropy_coef` in the objective.
    """
    check_loss_arguments(logprob_T, old_logprob_T, ref_logprob_T, weight_T, response_cu, objective)
    check_tensor("advantage_T", advantage_T, (len(logprob_T),), like=logprob_T, dtypes=NUMBERS)
    rows = (old_logprob_T, ref_logprob_T, advantage_T, weight_T)
    loss, _, stats_N = grpo_loss_op(logprob_T, *constants(*rows), response_cu, *objective_arguments(objective))
    return LossOutput(loss, LossStats.from_packed(stats_N))


def constants(*tensors: Tensor | None) -> list[Any]:
    """Detached tensors."""
    return [None if x is None else x.detach() for x in tensors]


def check_loss_arguments(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    weight_T: Tensor,
    response_cu: Tensor,
    objective: Objective,
) -> None:
    """Raise `ValueError` unless log-probabilities, weights, offsets and objective fit together."""
    check_tensor("logprob_T", logprob_T, ("T",))
    check_objective(objective)
    check_rows(logprob_T, old_logprob_T, ref_logprob_T, weight_T, response_cu, objective)
    if objective.tis_clip is not None:
        raise ValueError(
            f"tis_clip is {objective.tis_clip}: linear_grpo_loss takes it; here multiply the advantage by "
            "min(old / rollout probability, tis_clip) and set tis_clip to None"
        )
    if objective.entropy_coef != 0:
        raise ValueError(
            f"entropy_coef is {objective.entropy_coef}: linear_grpo_loss takes it; log-probabilities of sampled tokens "
            "do not hold the entropy, so set it to 0"
        )


def check_rows(
    like: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    weight_T: Tensor,
    response_cu: Tensor,
    objective: Objective,
) -> None:
    """Raise `ValueError` unless there is one value for each row of `like` [T, ...], on its device."""
    T = len(like)
    for name, x_T in (("old_logprob_T", old_logprob_T), ("ref_logprob_T", ref_logprob_T)):
        if x_T is not None:
            check_tensor(name, x_T, (T,), like=like)
    check_tensor("weight_T", weight_T, (T,), like=like, dtypes=NUMBERS)
    check_offsets("response_cu", response_cu, like, total=T)
    if ref_logprob_T is None and objective.kl_coef != 0:
        raise ValueError(f"kl_coef is {objective.kl_coef}: give ref_logprob_T, or set kl_coef to 0")


def policy_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    *objective: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, stats_N) in plain PyTorch, differentiable by autograd in `logprob_T` and `weight_T`.

    Selections by `where` let NaN through to the gradient; `clamp` would give it a gradient of 0.
    """
    o, present_T, dtype = Objective(*objective), weight_T != 0, at_least_fp32(logprob_T).dtype

    def rows(x_T: Tensor) -> Tensor:
        """Garbage in absent rows must go before any arithmetic: 0 * inf is NaN."""
        return torch.where(present_T, x_T, 0).to(dtype)

    logprob_T, advantage_T, weight_T = rows(logprob_T), rows(advantage_T).detach(), rows(weight_T)
    old_logprob_T = logprob_T.detach() if old_logprob_T is None else rows(old_logprob_T).detach()
    row_log_ratio_T = log_ratio_T = logprob_T - old_logprob_T
    if o.ratio == "sequence":
        response_T, S = segment_ids(response_cu, logprob_T.numel()), response_cu.numel() - 1
        rows_S = segment_sum(present_T.to(dtype), response_T, S).clamp(min=1)
        log_ratio_T = (segment_sum(log_ratio_T, response_T, S) / rows_S)[response_T]
    ratio_T = clamped_log_ratio(log_ratio_T).exp()
    clipped_T = ratio_T.clamp(1 - o.clip_low, 1 + o.clip_high)
    if o.surrogate == "cispo":
        surrogate_T = clipped_T.detach() * advantage_T * logprob_T
    else:
        bounded_T = ratio_T if o.delta is None else torch.where(ratio_T > o.delta, o.delta, ratio_T)
        surrogate_T = torch.min(bounded_T * advantage_T, clipped_T * advantage_T)
        if o.dual_clip is not None:
            floor_T = o.dual_clip * advantage_T
            surrogate_T = torch.where((advantage_T < 0) & (surrogate_T < floor_T), floor_T, surrogate_T)
    kl_T = torch.zeros_like(logprob_T)
    if ref_logprob_T is not None:
        kl_T = kl_estimate(logprob_T - rows(ref_logprob_T).detach(), o.kl)
    loss = -(weight_T * (surrogate_T - o.kl_coef * kl_T)).sum()
    low_T = (ratio_T < 1 - o.clip_low) & (advantage_T < 0)
    high_T = (ratio_T > 1 + o.clip_high) & (advantage_T > 0)
    unknown_T = (ratio_T * advantage_T).isnan()
    low_T, high_T = (torch.where(unknown_T, torch.nan, x_T.to(dtype)) for x_T in (low_T, high_T))
    return loss, pack_stats(weight_T, kl_T, -row_log_ratio_T, ratio_T, low_T, high_T, torch.zeros_like(kl_T))


def grpo_loss_reference(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    *objective: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss / dlogprob_T, stats_N): `policy_loss` and its gradient by autograd."""
    rows = (old_logprob_T, ref_logprob_T, advantage_T, weight_T)
    with autograd_inside_op():
        leaf_T = at_least_fp32(logprob_T).detach().clone().requires_grad_()
        loss, stats_N = policy_loss(leaf_T, *rows, response_cu, *objective)
        (dlogprob_T,) = torch.autograd.grad(loss, leaf_T)
    return loss.detach(), dlogprob_T, stats_N


@triton.jit
def grpo_loss_kernel(
    logprob_ptr, old_ptr, ref_ptr, advantage_ptr, weight_ptr, response_cu_ptr, dlogprob_ptr, partial_ptr, S,
    ratio_low, ratio_high, kl_coef, dual_clip, delta,
    KL: tl.constexpr, RATIO: tl.constexpr, SURROGATE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per response. old_ptr and ref_ptr may be None; an infinite dual_clip or delta is off."""
    s = tl.program_id(0).to(tl.int64)
    begin = tl.load(response_cu_ptr + s).to(tl.int64)
    end = tl.load(response_cu_ptr + s + 1).to(tl.int64)
    response_loss(
        logprob_ptr, old_ptr, ref_ptr, advantage_ptr, 0.0, weight_ptr, dlogprob_ptr, partial_ptr, s, S, begin, end,
        ratio_low, ratio_high, kl_coef, dual_clip, delta, KL, RATIO, SURROGATE, BLOCK_T,
    )  # fmt: skip


def _grpo_loss_triton(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    *objective: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (old_logprob_T, ref_logprob_T, advantage_T, weight_T)
    if logprob_T.dtype == torch.float64:
        return grpo_loss_reference(logprob_T, *tensors, response_cu, *objective)
    return launch_policy_loss(grpo_loss_kernel, logprob_T, tensors, response_cu, objective)


grpo_loss_op = custom_op(
    "grpo_loss",
    grpo_loss_reference,
    schema="(Tensor logprob_T, Tensor? old_logprob_T, Tensor? ref_logprob_T, Tensor advantage_T, Tensor weight_T, "
    f"Tensor response_cu, {OBJECTIVE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
grpo_loss_op.register_fake(lambda logprob_T, *_: empty_loss(logprob_T))
register_triton(grpo_loss_op, _grpo_loss_triton)
register_saved_gradient(grpo_loss_op)


def variants() -> list[Variant]:
    """The kernels this op launches."""
    return [*policy_loss_variants(grpo_loss_kernel, {"advantage_ptr": "*fp32"}, {}), reduction_variant()]
