"""One optimizer step from packed sequences, shared by all algorithms.

S responses, T loss rows (response tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Head, Loss, TrainableModel
from dsm_train.packing.microbatch import MicroBatch
from triton_kernels import LinearGrpoLoss, LossOutput, LossStats, Objective, linear_grpo_loss, linear_logprob


@dataclass(frozen=True)
class Rows:
    """What the loss needs of each response token, packed like `Sequences.response_token_T`; on the CPU."""

    weight_T: Tensor
    """How the token counts, normalised over the optimizer step; 0: absent."""
    advantage_T: Tensor
    """Advantage of the token."""
    old_logprob_T: Tensor | None = None
    """Log-probability before the update; None: the update is on-policy."""
    ref_logprob_T: Tensor | None = None
    """Log-probability under the reference model; None when kl_coef is 0."""

    def take(self, row_T: Tensor, device: torch.device | None = None) -> Rows:
        """The rows of these numbers, in this order; on `device`, where one is given."""
        return replace(self, **{name: value[row_T].to(device or "cpu") for name, value in self.present().items()})

    def present(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Rows after each other; all parts have the same log-probabilities."""
        return Rows(**{name: torch.cat([part.present()[name] for part in parts]) for name in parts[0].present()})


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    grad_norm: float
    lr: float
    stats: LossStats


def policy_loss(rows: Rows, objective: Objective, temperature: float) -> Callable[[Head, MicroBatch], LinearGrpoLoss]:
    """The GRPO family's objective on the rows of a micro-batch."""

    def loss(head: Head, batch: MicroBatch) -> LinearGrpoLoss:
        r = rows.take(batch.row_T, head.hidden_TD.device)
        return linear_grpo_loss(
            head.hidden_TD,
            head.weight_VD,
            batch.target_T,
            r.old_logprob_T,
            r.ref_logprob_T,
            r.advantage_T,
            r.weight_T,
            batch.response_cu,
            objective,
            temperature=temperature,
            workspace_bytes=head.workspace_bytes,
            tp_group=head.tp_group,
            reduce_dx=head.reduce_dx,
        )

    return loss


def supervised_loss(weight_T: Tensor) -> Loss:
    """Cross-entropy: - sum_t weight_t log p_t."""

    def loss(head: Head, batch: MicroBatch) -> LossOutput:
        weight = weight_T[batch.row_T].to(head.hidden_TD.device)
        logprob_T = linear_logprob(
            head.hidden_TD,
            head.weight_VD,
            batch.target_T,
            workspace_bytes=head.workspace_bytes,
            tp_group=head.tp_group,
            reduce_dx=head.reduce_dx,
        ).logprob_T
        tokens = logprob_T.new_tensor(logprob_T.numel())
        return LossOutput(-(weight * logprob_T).sum(), LossStats.of(tokens=tokens, weight=weight.sum()))

    return loss


def optimizer_step(model: TrainableModel, micro_batches: Sequence[MicroBatch], loss: Loss) -> StepResult:
    """Forward, backward, reduce, clip, update; loss and statistics are of the whole step, on every rank."""
    lr = model.learning_rate
    outputs = model.forward_backward(micro_batches, loss)
    grad_norm = model.optimizer_step()
    total, stats = whole_step(outputs, model.parallel)
    return StepResult(total, grad_norm, lr, stats)


def step_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """The numbers of one exploration stage's optimizer steps: means over them, extremes of the ratio.

    NaN for what was not measured, as no response had anything to teach.
    """
    count = len(results)
    measured = [r.stats for r in results if float(r.stats.sums[0])]
    means = {
        name: sum(float(stats.mean(name)) for stats in measured) / len(measured) if measured else math.nan
        for name in ("kl", "entropy", "ratio", "log_ratio", "clipped_low", "clipped_high")
    }
    return {
        "loss": sum(r.loss for r in results) / count,
        "grad_norm": sum(r.grad_norm for r in results) / count,
        "lr": results[-1].lr,
        **means,
        "ratio_max": max(float(r.stats.maxima) for r in results),
        "ratio_min": min(float(r.stats.minima) for r in results),
    }


def whole_step(outputs: Sequence[LossOutput], parallel: Parallel) -> tuple[float, LossStats]:
    """Loss and statistics of all micro-batches of all ranks; only the last stage has any of its own."""
    nothing = LossOutput(torch.zeros(()), LossStats.of(tokens=torch.zeros(())))
    parts = [nothing, *outputs] if parallel.counts_losses else [nothing]
    sums = torch.stack([torch.cat([p.loss.detach().float().reshape(1), p.stats.sums.float()]).cpu() for p in parts])
    maxima = torch.stack([p.stats.maxima.float().cpu() for p in parts])
    minima = torch.stack([p.stats.minima.float().cpu() for p in parts])
    total = parallel.all_reduce(sums.sum(0), dist.ReduceOp.SUM)
    stats = LossStats(
        total[1:],
        parallel.all_reduce(maxima.amax(0), dist.ReduceOp.MAX),
        parallel.all_reduce(minima.amin(0), dist.ReduceOp.MIN),
    )
    return float(total[0]), stats
