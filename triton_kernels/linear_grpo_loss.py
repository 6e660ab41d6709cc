"""GRPO from hidden states: log-probabilities without logits, the objective on them, and the entropy bonus.

T loss rows, S responses, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from triton_kernels._common import SUMS, LossOutput
from triton_kernels.grpo_loss import grpo_loss
from triton_kernels.linear_logprob import chunked_linear_logprob
from triton_kernels.objective import Objective


@dataclass(frozen=True)
class LinearGrpoLoss(LossOutput):
    """loss: scalar, differentiable in hidden states, weight and bias; everything else is detached.

    logprob_T, entropy_T: of the current policy, 0 where `weight_T` is 0. stats: see `LossStats`.
    """

    logprob_T: Tensor
    entropy_T: Tensor


def linear_grpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    objective: Objective,
    *,
    rollout_logprob_T: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias_V: Tensor | None = None,
    workspace_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
    cp_group: ProcessGroup | None = None,
    reduce_dx: bool = True,
) -> LinearGrpoLoss:
    """`grpo_loss` on the `linear_logprob` of the targets, minus sum_t weight_t * entropy_coef * entropy_t.

    Rows whose weight is 0 may hold anything, NaN and token ids out of range included. `old_logprob_T=None` means
    on-policy, `ref_logprob_T=None` needs kl_coef = 0, and `objective.tis_clip` needs `rollout_logprob_T`: the advantage
    is multiplied by min(exp(old - rollout), tis_clip). `workspace_bytes` bounds what the logits of a chunk take.

    With a `tp_group` of several ranks `weight_VD` and `bias_V` are this rank's shard, as in `linear_logprob`, and
    `reduce_dx` says whether the hidden states' gradient is summed over the group here. Everything else is the same on
    all its ranks, and so is the loss, to the bit: it is not a part of a sum over them.

    Raises `ValueError` for inputs that do not fit, and `NotImplementedError` for a `cp_group` of more than one rank.
    """
    if cp_group is not None and cp_group.size() > 1:
        raise NotImplementedError(
            f"a response cannot be split over ranks yet: cp_group has {cp_group.size()} ranks; give whole responses"
        )
    if objective.tis_clip is not None and rollout_logprob_T is None:
        raise ValueError(f"tis_clip={objective.tis_clip} needs rollout_logprob_T; give it, or set tis_clip=None")
    for name, row_T in (("weight_T", weight_T), ("advantage_T", advantage_T), ("rollout_logprob_T", rollout_logprob_T)):
        if row_T is not None and row_T.shape != hidden_TD.shape[:1]:
            raise ValueError(f"{name} must have one value per row, [{len(hidden_TD)}]; got {tuple(row_T.shape)}")
    present_T = weight_T != 0
    output = chunked_linear_logprob(
        torch.where(present_T[:, None], hidden_TD, 0),
        weight_VD,
        torch.where(present_T, target_T, 0),
        temperature,
        softcap,
        bias_V,
        workspace_bytes,
        tp_group,
        reduce_dx,
    )
    logprob_T = torch.where(present_T, output.logprob_T, 0)
    entropy_T = torch.where(present_T, output.entropy_T, 0)
    if objective.tis_clip is not None and rollout_logprob_T is not None:
        old_T = logprob_T.detach() if old_logprob_T is None else old_logprob_T
        advantage_T = advantage_T * torch.exp(old_T - rollout_logprob_T).clamp(max=objective.tis_clip)
    # What is applied here is not asked of `grpo_loss`, which has neither entropy nor rollout log-probabilities.
    on_logprobs = replace(objective, tis_clip=None, entropy_coef=0.0)
    policy = grpo_loss(logprob_T, old_logprob_T, ref_logprob_T, advantage_T, weight_T, response_cu, on_logprobs)
    loss = policy.loss
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * torch.where(present_T, weight_T * entropy_T, 0).sum()
    sums = policy.stats.sums.clone()
    sums[SUMS.index("entropy")] = entropy_T.detach().sum()
    return LinearGrpoLoss(loss, replace(policy.stats, sums=sums), logprob_T.detach(), entropy_T.detach())
