"""The GRPO loss and its gradient from rewards in one op: group-normalised advantage, ratio, clip, KL, sum.

T loss rows, S responses, P prompts (groups), N statistics (`LossStats`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels._checks import NUMBERS, check_tensor
from triton_kernels._common import LossOutput, LossStats, segment_ids
from triton_kernels._register import Variant, custom_op, register_saved_gradient, register_triton
from triton_kernels._triton import tl, triton
from triton_kernels.policy.group_advantage import (
    BLOCK_S,
    Scale,
    batch_scale_triton,
    check_group_arguments,
    group_advantage_reference,
    mean_and_scale,
    normalise,
)
from triton_kernels.policy.grpo_loss import check_loss_arguments, constants, grpo_loss_reference
from triton_kernels.policy.objective import OBJECTIVE_SCHEMA, Objective, objective_arguments
from triton_kernels.policy.policy_kernels import empty_loss, launch_policy_loss, policy_loss_variants, response_loss


def group_grpo_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    reward_S: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    group_cu: Tensor,
    objective: Objective,
    scale: Scale = "std",
) -> LossOutput:
    """`grpo_loss` with the `group_advantage` of each row's response.

    Response s has rows response_cu[s]:response_cu[s + 1] and reward reward_S[s]; group p has responses
    group_cu[p]:group_cu[p + 1]. Raises `ValueError` as those two do.
    """
    check_loss_arguments(logprob_T, old_logprob_T, ref_logprob_T, weight_T, response_cu, objective)
    check_group_arguments(reward_S, group_cu, scale)
    if len(reward_S) != len(response_cu) - 1:
        raise ValueError(
            f"reward_S must have one reward per response of response_cu, {len(response_cu) - 1}; got {len(reward_S)}"
        )
    check_tensor("reward_S", reward_S, ("S",), like=logprob_T, dtypes=NUMBERS)
    rows = (old_logprob_T, ref_logprob_T, reward_S, weight_T)
    loss, _, stats_N = _group_grpo_loss(
        logprob_T, *constants(*rows), response_cu, group_cu, scale, *objective_arguments(objective)
    )
    return LossOutput(loss, LossStats.from_packed(stats_N))


def group_grpo_loss_reference(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    reward_S: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    group_cu: Tensor,
    scale: str,
    *objective: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss / dlogprob_T, stats_N) in plain PyTorch."""
    advantage_T = group_advantage_reference(reward_S, group_cu, scale)[segment_ids(response_cu, logprob_T.numel())]
    return grpo_loss_reference(logprob_T, old_logprob_T, ref_logprob_T, advantage_T, weight_T, response_cu, *objective)


@triton.jit
def group_of(group_cu_ptr, s, P):
    """The group p with group_cu[p] <= s < group_cu[p + 1], by binary search."""
    low = tl.zeros([], tl.int64)
    high = low + P - 1
    while low < high:
        middle = (low + high) // 2
        after = tl.load(group_cu_ptr + middle + 1) <= s
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    return low


@triton.jit
def group_grpo_loss_kernel(
    logprob_ptr, old_ptr, ref_ptr, reward_ptr, weight_ptr, group_cu_ptr, batch_scale_ptr, response_cu_ptr,
    dlogprob_ptr, partial_ptr, S, ratio_low, ratio_high, kl_coef, dual_clip, delta, P,
    KL: tl.constexpr, RATIO: tl.constexpr, SURROGATE: tl.constexpr, BLOCK_T: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per response, which computes its group's statistics for itself: a group is far smaller than its rows.

    batch_scale_ptr is None unless SCALE is "batch"; the rest is as in grpo_loss_kernel.
    """
    s = tl.program_id(0).to(tl.int64)
    p = group_of(group_cu_ptr, s, P)
    first_response = tl.load(group_cu_ptr + p).to(tl.int64)
    last_response = tl.load(group_cu_ptr + p + 1).to(tl.int64)
    first, mean, flat, scale = mean_and_scale(reward_ptr, first_response, last_response, BLOCK_S)
    if batch_scale_ptr is not None:
        scale = tl.load(batch_scale_ptr)
    reward = tl.load(reward_ptr + s).to(tl.float32)
    advantage = normalise(reward, first, mean, flat, scale, last_response - first_response, SCALE)
    begin = tl.load(response_cu_ptr + s).to(tl.int64)
    end = tl.load(response_cu_ptr + s + 1).to(tl.int64)
    response_loss(
        logprob_ptr, old_ptr, ref_ptr, None, advantage, weight_ptr, dlogprob_ptr, partial_ptr, s, S, begin, end,
        ratio_low, ratio_high, kl_coef, dual_clip, delta, KL, RATIO, SURROGATE, BLOCK_T,
    )  # fmt: skip


def _group_grpo_loss_triton(
    logprob_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    reward_S: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    group_cu: Tensor,
    scale: str,
    *objective: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if logprob_T.dtype == torch.float64:
        rows = (logprob_T, old_logprob_T, ref_logprob_T)
        return group_grpo_loss_reference(*rows, reward_S, weight_T, response_cu, group_cu, scale, *objective)
    reward_S = reward_S.contiguous()
    tensors = (old_logprob_T, ref_logprob_T, reward_S, weight_T, group_cu, batch_scale_triton(reward_S, scale))
    extra = {"P": group_cu.numel() - 1, "SCALE": scale, "BLOCK_S": BLOCK_S}
    return launch_policy_loss(group_grpo_loss_kernel, logprob_T, tensors, response_cu, objective, **extra)


_group_grpo_loss = custom_op(
    "group_grpo_loss",
    group_grpo_loss_reference,
    schema="(Tensor logprob_T, Tensor? old_logprob_T, Tensor? ref_logprob_T, Tensor reward_S, Tensor weight_T, "
    f"Tensor response_cu, Tensor group_cu, str scale, {OBJECTIVE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
_group_grpo_loss.register_fake(lambda logprob_T, *_: empty_loss(logprob_T))
register_triton(_group_grpo_loss, _group_grpo_loss_triton)
register_saved_gradient(_group_grpo_loss)


def variants() -> list[Variant]:
    """The kernels this op launches, beside those of `grpo_loss` and `group_advantage`."""
    signature = {"reward_ptr": "*fp32", "group_cu_ptr": "*i32", "batch_scale_ptr": "*fp32", "P": "i32"}
    group_std = {"SCALE": "std", "BLOCK_S": BLOCK_S, "batch_scale_ptr": None}
    group_batch = {"SCALE": "batch", "BLOCK_S": BLOCK_S}
    return [
        policy_loss_variants(group_grpo_loss_kernel, signature, group_std)[0],
        policy_loss_variants(group_grpo_loss_kernel, signature, group_batch)[1],
    ]
