"""GRPO from hidden states: log-probabilities without logits, the objective on them, and the entropy bonus.

T loss rows, S responses, V vocabulary or this rank's shard of it, D hidden, N statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from triton_kernels._checks import IDS, NUMBERS, check_tensor
from triton_kernels._common import LossOutput, LossStats
from triton_kernels._register import custom_op
from triton_kernels.head.arguments import (
    autocast,
    check_group,
    check_head,
    check_range,
    check_softmax,
    checked_workspace,
    split,
)
from triton_kernels.head.gemm import result_dtype
from triton_kernels.head.linear_logprob import gradients_like
from triton_kernels.head.policy_gradient import Result, Settings, loss_and_gradients
from triton_kernels.head.policy_logits import PolicyRows
from triton_kernels.policy.grpo_loss import check_rows, constants
from triton_kernels.policy.objective import OBJECTIVE_SCHEMA, Objective, check_objective, objective_arguments
from triton_kernels.policy.policy_kernels import NUM_STATS


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
    drop_zero_rows: bool = False,
) -> LinearGrpoLoss:
    """`grpo_loss` on the `linear_logprob` of the targets, minus sum_t weight_t * entropy_coef * entropy_t.

    Rows whose weight is 0 may hold anything, NaN and token ids out of range included. `old_logprob_T=None` means
    on-policy, `ref_logprob_T=None` needs kl_coef = 0, and `objective.tis_clip` needs `rollout_logprob_T`: the advantage
    is multiplied by min(exp(old - rollout), tis_clip).

    Memory beside the gradients: `workspace_bytes` (None: 64 MiB on the CPU, 2 GiB elsewhere) and some numbers per row.
    The gradients are those of the inputs that require them, computed here and multiplied in the backward pass; without
    any, or under `no_grad`, only the loss is computed. Everything but hidden states, weight and bias is a constant:
    where it requires a gradient, it gets none. A ratio per sequence needs all rows of a response at once: where the
    longest does not fit the workspace, logits are computed twice. That reads `response_cu` on the host, hence
    synchronises; so does `drop_zero_rows`, which keeps rows without a gradient (weight 0, clipped, advantage 0) out of
    GEMMs. Under torch.autocast hidden states and weight are converted as torch.mm's operands would be.

    With a `tp_group` of several ranks `weight_VD` and `bias_V` are this rank's shard, as in `linear_logprob`, and
    `reduce_dx` says whether the hidden states' gradient is summed over the group here. Everything else is the same on
    all its ranks, and so is the loss, to the bit: it is not a part of a sum over them. torch.compile traces the op as
    one node without a group; with one, its collectives break the graph.

    Raises `ValueError` for inputs that do not fit, and `NotImplementedError` for a `cp_group` of more than one rank.
    """
    _check_whole_responses(cp_group)
    hidden_TD, weight_VD = autocast(hidden_TD, weight_VD)
    check_head(hidden_TD, weight_VD, bias_V)
    check_softmax(temperature, softcap)
    workspace = checked_workspace(workspace_bytes, hidden_TD.device)
    check_objective(objective)
    check_rows(hidden_TD, old_logprob_T, ref_logprob_T, weight_T, response_cu, objective)
    _check_more_rows(hidden_TD, target_T, advantage_T, rollout_logprob_T, objective)
    group, shards = split(hidden_TD, weight_VD, tp_group)
    check_range(torch.where(weight_T != 0, target_T, 0), sum(shards))
    rows = constants(target_T, old_logprob_T, ref_logprob_T, rollout_logprob_T, advantage_T, weight_T, response_cu)
    heads = (hidden_TD, weight_VD, bias_V)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads]
    settings = (float(temperature), softcap, workspace, drop_zero_rows)
    loss, logprob_T, entropy_T, stats_N = _LinearGrpoLoss.apply(
        *heads, rows, settings, objective_arguments(objective), needs, group, shards, reduce_dx
    )
    return LinearGrpoLoss(loss, LossStats.from_packed(stats_N), logprob_T, entropy_T)


def _check_whole_responses(cp_group: ProcessGroup | None) -> None:
    check_group("cp_group", cp_group)
    if cp_group is not None and cp_group.size() > 1:
        raise NotImplementedError(
            f"a response cannot be split over ranks yet: cp_group has {cp_group.size()} ranks; give whole responses"
        )


def _check_more_rows(
    hidden_TD: Tensor, target_T: Tensor, advantage_T: Tensor, rollout_logprob_T: Tensor | None, objective: Objective
) -> None:
    T = len(hidden_TD)
    check_tensor("target_T", target_T, (T,), like=hidden_TD, dtypes=IDS)
    check_tensor("advantage_T", advantage_T, (T,), like=hidden_TD, dtypes=NUMBERS)
    if rollout_logprob_T is not None:
        check_tensor("rollout_logprob_T", rollout_logprob_T, (T,), like=hidden_TD)
    elif objective.tis_clip is not None:
        raise ValueError(f"tis_clip={objective.tis_clip} needs rollout_logprob_T; give it, or set tis_clip=None")


class _LinearGrpoLoss(torch.autograd.Function):
    """The loss, and in the same pass its gradients, which the backward pass multiplies by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows: list[Any],
        settings: tuple[float, float | None, int, bool],
        objective: tuple[Any, ...],
        needs: list[bool],
        group: ProcessGroup | None,
        shards: list[int],
        reduce_dx: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads = (hidden_TD, weight_VD, bias_V)
        if group is None:
            result = linear_grpo_loss_op(*heads, *rows, *settings, needs, *objective)
        else:
            *of_rows, response_cu = rows
            of_ranks = Settings(Objective(*objective), *settings, shards, group, reduce_dx)
            result = loss_and_gradients(*heads, PolicyRows(*of_rows), response_cu, of_ranks, needs)
        loss, stats_N, logprob_T, entropy_T, unit, *gradients = result
        ctx.save_for_backward(unit, *gradients)
        ctx.needs, ctx.dtypes = needs, [None if x is None else x.dtype for x in heads]
        ctx.mark_non_differentiable(logprob_T, entropy_T, stats_N)
        ctx.set_materialize_grads(False)
        return loss, logprob_T, entropy_T, stats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        gradients: list[Tensor | None] = [None, None, None]
        if grad is not None:
            unit, *saved = ctx.saved_tensors
            factor = grad.reshape(1) * unit  # a scalar would be rounded to the type of what is saved
            for i, (x, dtype) in enumerate(zip(saved, ctx.dtypes, strict=True)):
                if ctx.needs[i]:
                    gradients[i] = torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))
        return *gradients, *[None] * 7


def _linear_grpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    old_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    rollout_logprob_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    response_cu: Tensor,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
    drop_zero_rows: bool,
    needs: list[bool],
    *objective: Any,
) -> Result:
    """`loss_and_gradients` on the whole vocabulary."""
    rows = PolicyRows(target_T, old_logprob_T, ref_logprob_T, rollout_logprob_T, advantage_T, weight_T)
    shards = [len(weight_VD)]
    settings = Settings(Objective(*objective), temperature, softcap, workspace_bytes, drop_zero_rows, shards)
    return loss_and_gradients(hidden_TD, weight_VD, bias_V, rows, response_cu, settings, needs)


def _empty(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *rest: Any) -> Result:
    """Uninitialised results."""
    needs, dtype = rest[11], result_dtype(hidden_TD)
    shapes = ((), (NUM_STATS,), hidden_TD.shape[:1], hidden_TD.shape[:1])
    loss, stats_N, logprob_T, entropy_T = (hidden_TD.new_empty(shape, dtype=dtype) for shape in shapes)
    unit = hidden_TD.new_empty((), dtype=dtype)
    dhidden_TD, dweight_VD, dbias_V = gradients_like(hidden_TD, weight_VD, bias_V, needs)
    return loss, stats_N, logprob_T, entropy_T, unit, dhidden_TD.to(hidden_TD.dtype), dweight_VD, dbias_V


linear_grpo_loss_op = custom_op(
    "linear_grpo_loss",
    _linear_grpo_loss,
    schema="(Tensor hidden_TD, Tensor weight_VD, Tensor? bias_V, Tensor target_T, Tensor? old_logprob_T, "
    "Tensor? ref_logprob_T, Tensor? rollout_logprob_T, Tensor advantage_T, Tensor weight_T, Tensor response_cu, "
    f"float temperature, float? softcap, int workspace_bytes, bool drop_zero_rows, bool[] needs, {OBJECTIVE_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    default="library GEMM and logit ops",
)
linear_grpo_loss_op.register_fake(_empty)
