"""Losses: each is written against a head of the model and returns its sum over a micro-batch, with named statistics.

T loss rows (response tokens), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dsm_train.megatron.heads import LanguageHead
from dsm_train.packing.microbatch import MicroBatch
from dsm_train.rows import Rows
from triton_kernels import Objective, linear_grpo_loss, linear_logprob


@dataclass(frozen=True)
class Names:
    """Names of a loss's statistics, the same on every rank: a rank without rows must join the reduction."""

    sums: tuple[str, ...]
    maxima: tuple[str, ...] = ()
    minima: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stats:
    """Named statistics of loss rows: sums, maxima and minima of what the loss measured, detached 0-d tensors."""

    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]
    minima: Mapping[str, Tensor]

    @staticmethod
    def nothing(names: Names) -> Stats:
        """Build the neutral element of the reduction: statistics of no row."""
        return Stats(
            {name: torch.zeros(()) for name in names.sums},
            {name: torch.tensor(-torch.inf) for name in names.maxima},
            {name: torch.tensor(torch.inf) for name in names.minima},
        )

    @property
    def tokens(self) -> float:
        """Number of rows with weight other than 0."""
        return float(self.sums["tokens"])

    def mean(self, name: str) -> float:
        """Average a sum over the rows; 0 when there is none."""
        return float(self.sums[name]) / max(1.0, self.tokens)


@dataclass(frozen=True)
class LossOutput:
    """The share of a micro-batch in the step's loss (a differentiable scalar), and its statistics."""

    loss: Tensor
    stats: Stats


@dataclass(frozen=True)
class PolicyLossOutput(LossOutput):
    """The policy loss with what it computed of each row, detached; 0 where the weight is 0."""

    logprob_T: Tensor
    entropy_T: Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The objective of the GRPO family on the rows of a micro-batch (DeepSeekMath, eq. 3 and 4)."""

    rows: Rows
    """Rows of the whole batch that the micro-batches were packed from."""
    objective: Objective
    temperature: float
    """Temperature at which the responses were sampled: the policy is the distribution at this temperature."""

    names: ClassVar[Names] = Names(
        sums=("tokens", "weight", "kl", "log_ratio", "ratio", "clipped_low", "clipped_high", "entropy"),
        maxima=("ratio",),
        minima=("ratio",),
    )

    def __call__(self, head: LanguageHead, batch: MicroBatch) -> PolicyLossOutput:
        """Compute the micro-batch's loss from hidden states; no logits are kept."""
        rows = self.rows.take(batch.row_T).to(head.hidden_TD.device)
        out = linear_grpo_loss(
            head.hidden_TD,
            head.weight_VD,
            batch.target_T,
            rows.old_logprob_T,
            rows.ref_logprob_T,
            rows.advantage_T,
            rows.weight_T,
            batch.response_cu,
            self.objective,
            temperature=self.temperature,
            workspace_bytes=head.workspace_bytes,
            tp_group=head.tp_group,
            reduce_dx=head.reduce_dx,
        )
        stats = Stats(
            dict(zip(self.names.sums, out.stats.sums, strict=True)),
            dict(zip(self.names.maxima, out.stats.maxima, strict=True)),
            dict(zip(self.names.minima, out.stats.minima, strict=True)),
        )
        return PolicyLossOutput(out.loss, stats, out.logprob_T, out.entropy_T)


@dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy: - sum_t weight_t log p_t. Rows of weight 0 are absent: nothing is computed of them."""

    weight_T: Tensor
    """Weight of each response token of the whole batch, normalised over the optimizer step."""

    names: ClassVar[Names] = Names(sums=("tokens", "weight"))

    def __call__(self, head: LanguageHead, batch: MicroBatch) -> LossOutput:
        """Compute the micro-batch's loss from hidden states; no logits are kept."""
        hidden_TD, target_T, weight_T = head.hidden_TD, batch.target_T, self.weight_T[batch.row_T]
        learnt = weight_T.nonzero().squeeze(1)  # on the CPU: the device is not waited for
        if len(learnt) < len(weight_T):
            weight_T, row = weight_T[learnt], learnt.to(hidden_TD.device)
            hidden_TD, target_T = hidden_TD.index_select(0, row), target_T.index_select(0, row)
        weight_T = weight_T.to(hidden_TD.device)
        logprob_T = linear_logprob(
            hidden_TD,
            head.weight_VD,
            target_T,
            workspace_bytes=head.workspace_bytes,
            tp_group=head.tp_group,
            reduce_dx=head.reduce_dx,
        ).logprob_T
        sums = {"tokens": (weight_T != 0).sum(), "weight": weight_T.sum()}
        return LossOutput(-(weight_T * logprob_T).sum(), Stats(sums, {}, {}))
