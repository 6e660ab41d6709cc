"""GRPO from hidden states: log-probabilities without logits, the objective on them, and the entropy bonus.

The gradient is computed in the forward pass, while the logits of a chunk of rows exist: three GEMMs, none repeated.

T loss rows, C rows of one chunk, S responses, V vocabulary or this rank's shard of it, D hidden, N statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from triton_kernels._common import MAXIMA, MINIMA, SUMS, LossOutput, LossStats
from triton_kernels.head.gemm import accumulate, chunk_rows, operand, padded, product, result_dtype
from triton_kernels.head.linear_logprob import (
    check_range,
    checked_workspace,
    gather,
    gradients_like,
    linear_logprob,
    split,
)
from triton_kernels.head.logits import logits_alive, narrowed
from triton_kernels.head.policy_logits import Differentiated, differentiate, policy_logits
from triton_kernels.policy.grpo_loss import check_loss_arguments, grpo_loss, objective_arguments
from triton_kernels.policy.objective import Objective

_SEGMENT = 512
"""Rows that a program of the loss kernel takes where the objective does not ask which response a row belongs to."""


@dataclass(frozen=True)
class LinearGrpoLoss(LossOutput):
    """loss: scalar, differentiable in hidden states, weight and bias; everything else is detached.

    logprob_T, entropy_T: of the current policy, 0 where `weight_T` is 0. stats: see `LossStats`.
    """

    logprob_T: Tensor
    entropy_T: Tensor


@dataclass(frozen=True)
class _Rows:
    """What the objective takes of each row."""

    target_T: Tensor
    advantage_T: Tensor
    weight_T: Tensor
    old_logprob_T: Tensor | None
    ref_logprob_T: Tensor | None
    rollout_logprob_T: Tensor | None

    def take(self, rows: slice | Tensor) -> _Rows:
        """Some of the rows."""
        return replace(self, **{f.name: x_T[rows] for f in fields(self) if (x_T := getattr(self, f.name)) is not None})


@dataclass(frozen=True)
class _Settings:
    """Everything but tensors."""

    objective: Objective
    temperature: float
    softcap: float | None
    workspace_bytes: int
    group: ProcessGroup | None
    shards: list[int]
    reduce_dx: bool
    drop_zero_rows: bool


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
    The gradients are those of the inputs that require them; without any, or under `no_grad`, only the loss is computed.
    A ratio per sequence needs all rows of a response at once: where the longest response does not fit the workspace,
    the logits are computed twice. That reads `response_cu` on the host, hence synchronises; so does `drop_zero_rows`,
    which leaves rows without a gradient (weight 0, clipped, advantage 0) out of GEMMs: worth it where they are many.

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
    check_loss_arguments(advantage_T, old_logprob_T, ref_logprob_T, weight_T, response_cu, _on_logprobs(objective))
    workspace = checked_workspace(hidden_TD, weight_VD, target_T, temperature, softcap, bias_V, workspace_bytes)
    group, shards = split(hidden_TD, weight_VD, tp_group)
    settings = _Settings(objective, float(temperature), softcap, workspace, group, shards, reduce_dx, drop_zero_rows)
    present_T = weight_T != 0
    target_T = torch.where(present_T, target_T, 0)
    check_range(target_T, sum(shards))
    rows = _Rows(target_T, advantage_T, weight_T, old_logprob_T, ref_logprob_T, rollout_logprob_T)
    if not drop_zero_rows:
        return _loss(hidden_TD, weight_VD, bias_V, rows, response_cu, settings)
    kept_T = present_T.nonzero().squeeze(1)
    before_T = torch.cat([kept_T.new_zeros(1), present_T.cumsum(0)])
    response_cu = before_T[response_cu.long()].to(torch.int32)
    output = _loss(hidden_TD[kept_T], weight_VD, bias_V, rows.take(kept_T), response_cu, settings)
    logprob_T, entropy_T = (
        x.new_zeros(len(weight_T)).index_copy(0, kept_T, x) for x in (output.logprob_T, output.entropy_T)
    )
    return replace(output, logprob_T=logprob_T, entropy_T=entropy_T)


def _loss(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: _Rows, response_cu: Tensor, settings: _Settings
) -> LinearGrpoLoss:
    """Gradient in the forward where there is one to compute and the objective can be applied chunk by chunk."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden_TD, weight_VD, bias_V))
    spans = _spans(hidden_TD, response_cu, settings) if wanted else None
    if spans is None:
        return _on_kept_logprobs(hidden_TD, weight_VD, bias_V, rows, response_cu, settings, wanted)
    loss, logprob_T, entropy_T, stats_N = _LinearGrpoLoss.apply(hidden_TD, weight_VD, bias_V, rows, spans, settings)
    return LinearGrpoLoss(loss, LossStats.from_packed(stats_N), logprob_T, entropy_T)


def _on_kept_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: _Rows,
    response_cu: Tensor,
    settings: _Settings,
    wanted: bool,
) -> LinearGrpoLoss:
    """The objective on the log-probabilities of all rows. Its gradient, where wanted, computes the logits again."""
    s, present_T = settings, rows.weight_T != 0
    if wanted:  # NaN of an absent row would reach the weight's gradient as 0 * NaN
        hidden_TD = torch.where(present_T[:, None], hidden_TD, 0)
    output = linear_logprob(
        hidden_TD,
        weight_VD,
        rows.target_T,
        temperature=s.temperature,
        softcap=s.softcap,
        bias_V=bias_V,
        workspace_bytes=s.workspace_bytes,
        tp_group=s.group,
        reduce_dx=s.reduce_dx,
    )
    logprob_T = torch.where(present_T, output.logprob_T, 0)
    entropy_T = torch.where(present_T, output.entropy_T, 0)
    policy = grpo_loss(
        logprob_T,
        rows.old_logprob_T,
        rows.ref_logprob_T,
        _advantages(rows, logprob_T, s.objective),
        rows.weight_T,
        response_cu,
        _on_logprobs(s.objective),
    )
    loss = policy.loss
    if s.objective.entropy_coef:
        loss = loss - s.objective.entropy_coef * torch.where(present_T, rows.weight_T * entropy_T, 0).sum()
    sums = policy.stats.sums.clone()
    sums[SUMS.index("entropy")] = entropy_T.detach().sum()
    return LinearGrpoLoss(loss, replace(policy.stats, sums=sums), logprob_T.detach(), entropy_T.detach())


def _on_logprobs(objective: Objective) -> Objective:
    """What is asked of `grpo_loss`, which has neither entropy nor rollout log-probabilities."""
    return replace(objective, tis_clip=None, entropy_coef=0.0)


def _advantages(rows: _Rows, logprob_T: Tensor, objective: Objective) -> Tensor:
    """The advantage, times the truncated importance weight of trainer over rollout engine where one is asked for."""
    if objective.tis_clip is None or rows.rollout_logprob_T is None:
        return rows.advantage_T
    old_T = logprob_T.detach() if rows.old_logprob_T is None else rows.old_logprob_T
    return rows.advantage_T * torch.exp(old_T - rows.rollout_logprob_T).clamp(max=objective.tis_clip)


Span = tuple[int, int, Tensor]
"""First and last row of a chunk, and the offsets [S + 1] of its responses."""


def _spans(hidden_TD: Tensor, response_cu: Tensor, settings: _Settings) -> list[Span] | None:
    """The chunks; None where one cannot hold a whole response that the objective needs.

    The same on all ranks that split the vocabulary: the largest shard decides.
    """
    T, D = hidden_TD.shape
    alive = logits_alive(hidden_TD) + settings.drop_zero_rows
    # Beside the logits a row has its hidden state and the state's gradient.
    most = chunk_rows(max(settings.shards), settings.workspace_bytes, alive, result_dtype(hidden_TD), 2 * D)
    if settings.group is not None:  # where a rank was given less, all take as much
        agreed = torch.tensor(most, device=hidden_TD.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=settings.group)
        most = int(agreed)
    if settings.objective.ratio == "token":  # no row asks which response it belongs to
        starts = range(0, max(T, 1), most)
        return [(first, min(first + most, T), _segments(min(most, T - first), response_cu)) for first in starts]
    ends = response_cu.tolist()
    spans, begin = [], 0
    for s in range(1, len(ends)):
        if ends[s] - ends[s - 1] > most:
            return None
        if s + 1 == len(ends) or ends[s + 1] - ends[begin] > most:
            spans.append((ends[begin], ends[s], response_cu[begin : s + 1] - ends[begin]))
            begin = s
    return spans or [(0, 0, response_cu)]


def _segments(rows: int, response_cu: Tensor) -> Tensor:
    """Offsets of segments of equal length, for as many programs of the loss kernel."""
    ends = torch.arange(0, rows + _SEGMENT, _SEGMENT, dtype=torch.int32, device=response_cu.device)
    return ends.clamp(max=rows)


class _LinearGrpoLoss(torch.autograd.Function):
    """The loss, and in the same pass its gradients, which the backward pass multiplies by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows: _Rows,
        spans: list[Span],
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = list(ctx.needs_input_grad[:3])
        unit = _unit(rows.weight_T) if hidden_TD.dtype == torch.float16 else 1.0
        rows = replace(rows, weight_T=rows.weight_T / unit)
        dhidden_TD = torch.zeros_like(hidden_TD) if needs[0] else hidden_TD.new_empty(0)
        _, dweight_VD, dbias_V = gradients_like(hidden_TD, weight_VD, bias_V, [False, *needs[1:]])
        weight, dtype = operand(weight_VD), result_dtype(hidden_TD)
        longest = max(last - first for first, last, _ in spans)
        memory = hidden_TD.new_empty(longest, padded(len(weight)), dtype=dtype)
        logprob_T, entropy_T = (hidden_TD.new_empty(len(hidden_TD), dtype=dtype) for _ in range(2))
        losses, stats = [], []
        for first, last, response_cu in spans:
            part = rows.take(slice(first, last))
            # NaN of an absent row would reach the weight's gradient as 0 * NaN.
            hidden_CD = operand(torch.where((part.weight_T != 0)[:, None], hidden_TD[first:last], 0))
            logits_CV = product(hidden_CD, weight.T, out=memory[: last - first, : len(weight)])
            dlogits_CV = narrowed(logits_CV, weight.dtype)
            loss, stats_N, logprob_C, entropy_C, moves_C = _differentiate(
                dlogits_CV, logits_CV, bias_V, part, response_cu, settings
            )
            losses.append(loss)
            stats.append(stats_N)
            logprob_T[first:last], entropy_T[first:last] = logprob_C, entropy_C
            if needs[2]:
                dbias_V.add_(dlogits_CV.sum(0, dtype=dbias_V.dtype))
            dhidden_CD = dhidden_TD[first:last]
            _propagate(dlogits_CV, hidden_CD, weight, dhidden_CD, dweight_VD, moves_C, needs, settings)
        ctx.save_for_backward(dhidden_TD, dweight_VD, dbias_V)
        ctx.unit, ctx.needs = unit, needs
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_TD, weight_VD, bias_V)]
        stats_N = _sum_up(torch.stack(stats))
        stats_N[SUMS.index("weight")] *= unit
        ctx.mark_non_differentiable(logprob_T, entropy_T, stats_N)
        ctx.set_materialize_grads(False)
        return torch.stack(losses).sum() * unit, logprob_T, entropy_T, stats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        gradients: list[Tensor | None] = [None, None, None]
        if grad is not None:
            factor = grad.reshape(1) * ctx.unit  # a scalar would be rounded to the type of what is saved
            for i, (saved, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
                if ctx.needs[i]:
                    gradients[i] = torch.mul(saved, factor, out=torch.empty_like(saved, dtype=dtype))
        return *gradients, None, None, None


def _differentiate(
    out_CV: Tensor,
    logits_CV: Tensor,
    bias_V: Tensor | None,
    part: _Rows,
    response_cu: Tensor,
    settings: _Settings,
) -> Differentiated:
    """The objective on a chunk; its gradient by the logits goes to `out_CV`, which is their memory."""
    s, group = settings, settings.group
    objective = objective_arguments(_on_logprobs(s.objective))
    rows = (part.old_logprob_T, part.ref_logprob_T, part.advantage_T, part.weight_T)
    options = (s.objective.entropy_coef, s.temperature, s.softcap)
    if group is None and s.objective.tis_clip is None:
        return policy_logits(out_CV, logits_CV, part.target_T, bias_V, *rows, response_cu, *objective, *options)
    start = 0 if group is None else sum(s.shards[: group.rank()])
    return differentiate(
        out_CV,
        logits_CV,
        part.target_T - start,
        bias_V,
        rows,
        response_cu,
        objective,
        *options,
        gather=lambda stats_4C: stats_4C[None] if group is None else gather(stats_4C, group),
        advantage=lambda logprob_C: _advantages(part, logprob_C, s.objective),
    )


def _propagate(
    dlogits_CV: Tensor,
    hidden_CD: Tensor,
    weight_VD: Tensor,
    dhidden_CD: Tensor,
    dweight_VD: Tensor,
    moves_C: Tensor,
    needs: list[bool],
    settings: _Settings,
) -> None:
    """From the logits' gradient to those of hidden states (written) and weight (added to)."""
    if settings.drop_zero_rows:
        kept = moves_C.nonzero().squeeze(1)
        dlogits_CV, hidden_CD = dlogits_CV[kept], hidden_CD[kept]
    else:
        kept = slice(None)
    partial_CD, waiting = None, None
    if needs[0]:
        partial_CD = product(dlogits_CV, weight_VD)
        if settings.group is not None and settings.reduce_dx:  # while the next product is computed
            waiting = dist.all_reduce(partial_CD, group=settings.group, async_op=True)
    if needs[1]:
        accumulate(dweight_VD, dlogits_CV.T, hidden_CD)
    if waiting is not None:
        waiting.wait()
    if partial_CD is not None:
        dhidden_CD[kept] = partial_CD.to(dhidden_CD.dtype)


def _unit(weight_T: Tensor) -> Tensor:
    """The power of two below the largest weight: gradients in units of it stay within fp16's range."""
    largest = weight_T.abs().max() if weight_T.numel() else weight_T.new_ones(())
    return torch.where(largest > 0, largest, 1).float().log2().floor().exp2()


def _sum_up(stats_PN: Tensor) -> Tensor:
    """Statistics of the parts P as those of all: see `LossStats`."""
    sums_PN, maxima_PN, minima_PN = stats_PN.split([len(SUMS), len(MAXIMA), len(MINIMA)], dim=1)
    return torch.cat([sums_PN.sum(0), maxima_PN.amax(0), minima_PN.amin(0)])
