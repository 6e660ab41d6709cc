"""The clipped policy-gradient loss of the GRPO family on log-probabilities, with its gradient in the same pass.

DeepSeekMath eq. 3, for row t of a response, with r_t = exp(logprob_t - old_logprob_t):

    loss = - sum_t weight_t * (min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) - kl_coef * KL_t)

`Objective` has the other members of the family. T loss rows, S responses, N statistics (`LossStats`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels._common import (
    LossOutput,
    LossStats,
    at_least_fp32,
    check_offset_values,
    check_offsets,
    pack_stats,
    segment_ids,
    segment_sum,
)
from triton_kernels._register import Variant, autograd_inside_op, custom_op, register_saved_gradient, register_triton
from triton_kernels._triton import tl, triton
from triton_kernels.policy.objective import LOG_RATIO_LIMIT, Objective
from triton_kernels.policy.policy_kernels import (
    ObjectiveArguments,
    empty_loss,
    launch_policy_loss,
    policy_loss_variants,
    reduction_variant,
    response_loss,
)
from triton_kernels.policy.token_kl import kl_estimate


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

    Raises `ValueError` for inputs that do not fit together, and for `tis_clip` or `entropy_coef` in the objective.
    """
    check_loss_arguments(logprob_T, old_logprob_T, ref_logprob_T, weight_T, response_cu, objective)
    if advantage_T.shape != logprob_T.shape:
        raise ValueError(
            f"advantage_T must have one value per row, {tuple(logprob_T.shape)}; got {tuple(advantage_T.shape)}"
        )
    arguments = objective_arguments(objective)
    loss, _, stats_N = grpo_loss_op(
        logprob_T, old_logprob_T, ref_logprob_T, advantage_T, weight_T, response_cu, *arguments
    )
    return LossOutput(loss, LossStats.from_packed(stats_N))


def check_loss_arguments(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    weight_T: Tensor,
    response_cu: Tensor,
    objective: Objective,
) -> None:
    """Raise `ValueError` unless the rows, offsets and objective fit together."""
    if logprob_T.dim() != 1:
        raise ValueError(f"logprob_T must be 1-D, one value per loss row; got {tuple(logprob_T.shape)}")
    rows = {"old_logprob_T": old_logprob_T, "ref_logprob_T": ref_logprob_T, "weight_T": weight_T}
    for name, x_T in rows.items():
        if x_T is not None and x_T.shape != logprob_T.shape:
            raise ValueError(
                f"{name} must have the shape of logprob_T, {tuple(logprob_T.shape)}; got {tuple(x_T.shape)}"
            )
    if ref_logprob_T is None and objective.kl_coef != 0:
        raise ValueError(f"kl_coef is {objective.kl_coef}: give ref_logprob_T, or set kl_coef to 0")
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
    check_offsets("response_cu", response_cu, logprob_T.device)
    check_offset_values("response_cu", response_cu, logprob_T.numel())


def objective_arguments(objective: Objective) -> ObjectiveArguments:
    """The fields of an objective as the registered ops take them."""
    o = objective
    return o.clip_low, o.clip_high, o.kl_coef, o.kl, o.ratio, o.surrogate, o.dual_clip, o.delta


def policy_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl: str,
    ratio: str,
    surrogate: str,
    dual_clip: float | None,
    delta: float | None,
) -> tuple[Tensor, Tensor]:
    """(loss, stats_N) in plain PyTorch, differentiable by autograd in `logprob_T` and `weight_T`."""
    present_T = weight_T != 0
    dtype = at_least_fp32(logprob_T).dtype

    def rows(x_T: Tensor) -> Tensor:
        """Garbage in absent rows must go before any arithmetic: 0 * inf is NaN."""
        return torch.where(present_T, x_T, 0).to(dtype)

    logprob_T, advantage_T, weight_T = rows(logprob_T), rows(advantage_T).detach(), rows(weight_T)
    old_logprob_T = logprob_T.detach() if old_logprob_T is None else rows(old_logprob_T).detach()
    row_log_ratio_T = log_ratio_T = logprob_T - old_logprob_T
    if ratio == "sequence":
        response_T, S = segment_ids(response_cu, logprob_T.numel()), response_cu.numel() - 1
        rows_S = segment_sum(present_T.to(dtype), response_T, S).clamp(min=1)
        log_ratio_T = (segment_sum(log_ratio_T, response_T, S) / rows_S)[response_T]
    ratio_T = log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    if surrogate == "cispo":
        surrogate_T = clipped_T.detach() * advantage_T * logprob_T
    else:
        bounded_T = ratio_T if delta is None else ratio_T.clamp(max=delta)
        surrogate_T = torch.min(bounded_T * advantage_T, clipped_T * advantage_T)
        if dual_clip is not None:
            surrogate_T = torch.where(advantage_T < 0, surrogate_T.clamp(min=dual_clip * advantage_T), surrogate_T)
    kl_T = torch.zeros_like(logprob_T)
    if ref_logprob_T is not None:
        kl_T = kl_estimate(logprob_T - rows(ref_logprob_T).detach(), kl)
    loss = -(weight_T * (surrogate_T - kl_coef * kl_T)).sum()
    low_T = (ratio_T < 1 - clip_low) & (advantage_T < 0)
    high_T = (ratio_T > 1 + clip_high) & (advantage_T > 0)
    return loss, pack_stats(weight_T, kl_T, -row_log_ratio_T, ratio_T, low_T, high_T, torch.zeros_like(kl_T))


def grpo_loss_reference(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl: str,
    ratio: str,
    surrogate: str,
    dual_clip: float | None,
    delta: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss / dlogprob_T, stats_N): `policy_loss` and its gradient by autograd."""
    objective = (clip_low, clip_high, kl_coef, kl, ratio, surrogate, dual_clip, delta)
    with autograd_inside_op():
        leaf_T = at_least_fp32(logprob_T).detach().clone().requires_grad_()
        loss, stats_N = policy_loss(
            leaf_T, old_logprob_T, ref_logprob_T, advantage_T, weight_T, response_cu, *objective
        )
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


grpo_loss_op = custom_op("grpo_loss", grpo_loss_reference)
grpo_loss_op.register_fake(lambda logprob_T, *_: empty_loss(logprob_T))
register_triton(grpo_loss_op, _grpo_loss_triton)
register_saved_gradient(grpo_loss_op)


def variants() -> list[Variant]:
    """The kernels this op launches."""
    return [*policy_loss_variants(grpo_loss_kernel, {"advantage_ptr": "*fp32"}, {}), reduction_variant()]
