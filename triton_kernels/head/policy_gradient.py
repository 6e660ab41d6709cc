"""The policy loss from hidden states, and its gradients in the same forward pass: the inside of `linear_grpo_loss`.

One pass over chunks of rows: the gradient is taken while a chunk's logits exist, with three GEMMs. Two passes where the
objective needs more rows at once than the workspace holds, or where no gradient is wanted.

T loss rows, C rows of one chunk, S responses, V vocabulary or this rank's shard of it, D hidden, N statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from triton_kernels._common import MAXIMA, MINIMA, SUMS
from triton_kernels.head.arguments import gather
from triton_kernels.head.gemm import accumulate, chunk_rows, operand, padded, product, result_dtype
from triton_kernels.head.linear_logprob import gradients_like, linear_logprob_bwd, linear_logprob_fwd
from triton_kernels.head.logits import logits_held, merge, reinterpreted
from triton_kernels.head.policy_logits import Differentiated, PolicyRows, differentiate, policy_logits, policy_slopes
from triton_kernels.policy.objective import Objective, objective_arguments

_SEGMENT = 512
"""Rows that a program of the loss kernel takes where the objective does not ask which response a row belongs to."""

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss, stats_N, logprob_T, entropy_T, unit, and in that unit the gradients by hidden states, weight and bias.

A gradient that is not wanted is empty.
"""


@dataclass(frozen=True)
class Settings:
    """Settings of the loss. shards: tokens of each rank that splits the vocabulary; group: None for one rank."""

    objective: Objective
    temperature: float
    softcap: float | None
    workspace_bytes: int
    drop_zero_rows: bool
    shards: list[int]
    group: ProcessGroup | None = None
    reduce_dx: bool = True

    @property
    def start(self) -> int:
        """First token of this rank's shard."""
        return 0 if self.group is None else sum(self.shards[: self.group.rank()])


def loss_and_gradients(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: PolicyRows,
    response_cu: Tensor,
    settings: Settings,
    needs: list[bool],
) -> Result:
    """Loss, statistics, log-probabilities, entropies, and the gradients that `needs` names (hidden, weight, bias).

    Absent rows may hold anything. Gradients are those of loss / unit, with the unit 1 but for fp16.
    """
    unit = rows.weight_T.new_ones((), dtype=result_dtype(hidden_TD))
    if hidden_TD.dtype == torch.float16:
        unit = _unit(rows.weight_T)
        rows = replace(rows, weight_T=rows.weight_T / unit)
    compute = _without_absent_rows if settings.drop_zero_rows else _compute
    loss, stats_N, logprob_T, entropy_T, dhidden_TD, dweight_VD, dbias_V = compute(
        hidden_TD, weight_VD, bias_V, rows, response_cu, settings, needs
    )
    stats_N[SUMS.index("weight")] *= unit
    return loss * unit, stats_N, logprob_T, entropy_T, unit, dhidden_TD, dweight_VD, dbias_V


def _unit(weight_T: Tensor) -> Tensor:
    """The power of two below the largest weight: gradients in units of it stay within fp16's range."""
    largest = weight_T.abs().max() if weight_T.numel() else weight_T.new_ones(())
    return torch.where(largest > 0, largest, 1).float().log2().floor().exp2()


_Computed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""`Result` without the unit."""


def _without_absent_rows(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: PolicyRows,
    response_cu: Tensor,
    settings: Settings,
    needs: list[bool],
) -> _Computed:
    """`_compute` on the rows that are present. Synchronises with the device."""
    present_T = rows.weight_T != 0
    kept_T = present_T.nonzero().squeeze(1)
    before_T = torch.cat([kept_T.new_zeros(1), present_T.cumsum(0)])
    response_cu = before_T[response_cu.long()].to(torch.int32)
    loss, stats_N, logprob_T, entropy_T, dhidden_TD, dweight_VD, dbias_V = _compute(
        hidden_TD[kept_T], weight_VD, bias_V, rows.take(kept_T), response_cu, settings, needs
    )

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(len(hidden_TD), *x.shape[1:]).index_copy(0, kept_T, x)

    dhidden_TD = spread(dhidden_TD) if needs[0] else dhidden_TD
    return loss, stats_N, spread(logprob_T), spread(entropy_T), dhidden_TD, dweight_VD, dbias_V


def _compute(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: PolicyRows,
    response_cu: Tensor,
    settings: Settings,
    needs: list[bool],
) -> _Computed:
    rows = replace(rows, target_T=torch.where(rows.weight_T != 0, rows.target_T - settings.start, 0))
    spans = _spans(hidden_TD, response_cu, settings) if any(needs) else None
    if spans is None:
        return _in_two_passes(hidden_TD, weight_VD, bias_V, rows, response_cu, settings, needs)
    return _in_one_pass(hidden_TD, weight_VD, bias_V, rows, spans, settings, needs)


def _in_two_passes(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: PolicyRows,
    response_cu: Tensor,
    settings: Settings,
    needs: list[bool],
) -> _Computed:
    """The objective on the log-probabilities of all rows; the gradient, where wanted, computes the logits again."""
    s = settings
    if any(needs):  # NaN of an absent row would reach the weight's gradient as 0 * NaN
        hidden_TD = torch.where((rows.weight_T != 0)[:, None], hidden_TD, 0)
    softmax = (s.temperature, s.softcap, s.workspace_bytes)
    stats_4T = linear_logprob_fwd(hidden_TD, weight_VD, rows.target_T, bias_V, *softmax)
    logprob_T, *saved = merge(gather(stats_4T, s.group))
    policy = policy_slopes(logprob_T, saved[0], rows, response_cu, s.objective)
    gradients = gradients_like(hidden_TD, weight_VD, bias_V, [False] * 3)
    if any(needs):
        slopes = (policy.by_logprob_T, policy.by_entropy_T)
        gradients = linear_logprob_bwd(*slopes, hidden_TD, weight_VD, rows.target_T, bias_V, *saved, *softmax, needs)
        if s.group is not None and s.reduce_dx and needs[0]:
            dist.all_reduce(gradients[0], group=s.group)
    dhidden_TD, dweight_VD, dbias_V = gradients
    dhidden_TD = dhidden_TD.to(hidden_TD.dtype)
    return policy.loss, policy.stats_N, policy.logprob_T, policy.entropy_T, dhidden_TD, dweight_VD, dbias_V


Span = tuple[int, int, Tensor]
"""First and last row of a chunk, and the offsets [S + 1] of its responses."""


def _spans(hidden_TD: Tensor, response_cu: Tensor, settings: Settings) -> list[Span] | None:
    """The chunks; None where one cannot hold a whole response that the objective needs.

    The same on all ranks that split the vocabulary: the largest shard decides.
    """
    T, D = hidden_TD.shape
    held = logits_held(hidden_TD) + settings.drop_zero_rows
    # Beside the logits a row has its hidden state and the state's gradient.
    most = chunk_rows(max(settings.shards), settings.workspace_bytes, held, result_dtype(hidden_TD), 2 * D)
    if settings.group is not None:  # a rank may have been given a smaller workspace: the smallest decides
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


def _in_one_pass(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: PolicyRows,
    spans: list[Span],
    settings: Settings,
    needs: list[bool],
) -> _Computed:
    """Loss and gradient of one chunk after another, in the same memory."""
    dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape) if needs[0] else hidden_TD.new_empty(0)
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
        dlogits_CV = reinterpreted(logits_CV, weight.dtype)
        loss, stats_N, logprob_C, entropy_C, has_gradient_C = _differentiate(
            dlogits_CV, logits_CV, bias_V, part, response_cu, settings
        )
        losses.append(loss)
        stats.append(stats_N)
        logprob_T[first:last], entropy_T[first:last] = logprob_C, entropy_C
        if needs[2]:
            dbias_V.add_(dlogits_CV.sum(0, dtype=dbias_V.dtype))
        dhidden_CD = dhidden_TD[first:last]
        _propagate(dlogits_CV, hidden_CD, weight, dhidden_CD, dweight_VD, has_gradient_C, needs, settings)
    stats_N = _merged_stats(torch.stack(stats))
    return torch.stack(losses).sum(), stats_N, logprob_T, entropy_T, dhidden_TD, dweight_VD, dbias_V


def _differentiate(
    out_CV: Tensor, logits_CV: Tensor, bias_V: Tensor | None, rows: PolicyRows, response_cu: Tensor, settings: Settings
) -> Differentiated:
    """The objective on a chunk; its gradient by the logits goes to `out_CV`, which is their memory."""
    s, r = settings, rows
    if s.group is None and s.objective.tis_clip is None:
        tensors = (r.target_T, bias_V, r.old_logprob_T, r.ref_logprob_T, r.advantage_T, r.weight_T)
        objective = objective_arguments(s.objective)
        return policy_logits(out_CV, logits_CV, *tensors, response_cu, s.temperature, s.softcap, *objective)
    return differentiate(
        out_CV, logits_CV, bias_V, rows, response_cu, s.objective, s.temperature, s.softcap,
        gather=lambda stats_4C: gather(stats_4C, s.group),
    )  # fmt: skip


def _propagate(
    dlogits_CV: Tensor,
    hidden_CD: Tensor,
    weight_VD: Tensor,
    dhidden_CD: Tensor,
    dweight_VD: Tensor,
    has_gradient_C: Tensor,
    needs: list[bool],
    settings: Settings,
) -> None:
    """Write the gradient of hidden states, and add the weight's, from the logits' gradient."""
    if settings.drop_zero_rows:
        kept = has_gradient_C.nonzero().squeeze(1)
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


def _merged_stats(stats_PN: Tensor) -> Tensor:
    """Statistics of the parts P as those of all: see `LossStats`."""
    sums_PN, maxima_PN, minima_PN = stats_PN.split([len(SUMS), len(MAXIMA), len(MINIMA)], dim=1)
    return torch.cat([sums_PN.sum(0), maxima_PN.amax(0), minima_PN.amin(0)])
