"""The update: from rollouts to optimizer steps.

S responses, T loss rows (response tokens), P prompts (groups).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from dsm_train.balance import balance
from dsm_train.grpo import Algorithm, moves_policy, token_weights
from dsm_train.losses import LossOutput, Names, PolicyLoss, Stats, SupervisedLoss
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import TrainableModel
from dsm_train.packing.microbatch import MicroBatch
from dsm_train.packing.packer import Packer
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rows import Rows
from dsm_train.types import Rollouts, Sequences, offsets
from triton_kernels import group_advantage


@dataclass(frozen=True)
class StepResult:
    """One optimizer step in numbers, over all ranks."""

    loss: float
    grad_norm: float
    lr: float
    stats: Stats

    @property
    def is_finite(self) -> bool:
        """True when loss and gradient norm are finite; the step was not made otherwise."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def update(
    policy: TrainableModel, rollouts: Rollouts, algo: Algorithm, sampling: SamplingConfig, packer: Packer
) -> list[StepResult]:
    """Make mu passes over the rollouts, each in as many optimizer steps as there are minibatches.

    Rollouts without any verdict, over all replicas, make none: momentum and weight decay would move the policy. A step
    whose loss or gradient is not finite is not made, and none after it where the policy gives up.

    The micro-batches of scoring are not reused: balancing moves responses to other replicas.
    """
    assert rollouts.reward_S is not None, "rollouts are graded before they are learnt from"
    if not any(policy.parallel.gather_over_data(not bool(rollouts.reward_S.isnan().all()))):
        return []
    work = []
    for sequences, rows in minibatches(rollouts, algo, sampling.max_new_tokens, policy.parallel):
        sequences, rows = balance(sequences, rows, packer.cost(sequences), policy.parallel)
        work.append((packer.pack(sequences), PolicyLoss(rows, algo.objective, sampling.temperature)))
    results: list[StepResult] = []
    for part in work * algo.epochs:
        results.append(optimizer_step(policy, *part))
        if policy.gives_up:
            break
    return results


def minibatches(
    rollouts: Rollouts, algo: Algorithm, fixed_length: int, parallel: Parallel
) -> list[tuple[Sequences, Rows]]:
    """Cut this replica's groups into minibatches: the sequences of each, and the loss's inputs of their tokens.

    The advantage of every token is its response's group-relative reward (outcome supervision, section 4.1.2). Weights
    are normalised over the minibatch of all data-parallel replicas, before responses that cannot move the policy are
    left out. Responses that the algorithm masks, and those without a verdict (a reward of NaN), are absent: they are in
    no group's statistics and in no weight's. Collective; a replica may have none.
    """
    assert rollouts.reward_S is not None, "rollouts are graded before they are learnt from"
    sequences, cu = rollouts.sequences, rollouts.sequences.response_cu
    present_S = ~rollouts.reward_S.isnan()
    if algo.finished_only:
        present_S &= rollouts.finished_S
    length_S = cu.diff().long()
    bounds = [sequences.num_prompts * i // algo.minibatches for i in range(algo.minibatches + 1)]
    cuts = list(pairwise(sequences.group_cu[bounds].tolist()))
    present = [present_S[first:last] for first, last in cuts]
    lengths = [length_S[first:last] for first, last in cuts]
    mine = torch.tensor([(int(p.sum()), int(n[p].sum())) for p, n in zip(present, lengths, strict=True)])
    counts = torch.stack(parallel.gather_over_data(mine)).sum(0).tolist()
    weights = [
        token_weights(cu[first : last + 1], algo.average, num_responses, num_tokens, fixed_length)
        for (first, last), (num_responses, num_tokens) in zip(cuts, counts, strict=True)
    ]
    sizes = [int(group.sum()) for group in present_S.split(sequences.group_cu.diff().tolist())]
    advantage_S = torch.zeros_like(rollouts.reward_S)
    advantage_S[present_S] = advantages(rollouts.reward_S[present_S], offsets(sizes), algo, parallel)
    advantage_T = advantage_S.repeat_interleave(length_S)
    weight_T = torch.cat(weights) * present_S.repeat_interleave(length_S)
    rows = Rows(weight_T, advantage_T, rollouts.old_logprob_T, rollouts.ref_logprob_T)
    moves_S = moves_policy(advantage_S, algo.objective) & present_S
    kept = [first + moves_S[first:last].nonzero().squeeze(1) for first, last in cuts]
    return [(sequences.take(index_S), rows.take(sequences.rows_of(index_S))) for index_S in kept]


def advantages(reward_S: Tensor, group_cu: Tensor, algo: Algorithm, parallel: Parallel) -> Tensor:
    """Group-relative advantage of this replica's responses; the scale "batch" needs the rewards of all replicas."""
    replicas = parallel.gather_over_data((reward_S, group_cu.diff()))
    all_cu = offsets(torch.cat([size_P for _, size_P in replicas]).tolist())
    advantage_S = group_advantage(torch.cat([reward for reward, _ in replicas]), all_cu, algo.scale)
    return advantage_S.split([len(reward) for reward, _ in replicas])[parallel.dp_rank]


def optimizer_step(
    model: TrainableModel, micro_batches: Sequence[MicroBatch], loss: PolicyLoss | SupervisedLoss
) -> StepResult:
    """Run forward, backward, reduction, clipping and update; the result covers the whole step, on every rank.

    No update is made where loss or gradient norm, over all ranks, is not finite.
    """
    lr = model.learning_rate
    outputs = model.forward_backward(micro_batches, loss)
    total, stats = whole_step(outputs, loss.names, model.parallel)
    return StepResult(total, model.optimizer_step(total), lr, stats)


def whole_step(outputs: Sequence[LossOutput], names: Names, parallel: Parallel) -> tuple[float, Stats]:
    """Reduce loss and statistics over the micro-batches of all ranks; only ranks with the head have any."""
    table = _numbers(torch.zeros(()), Stats.nothing(names), names)[None]
    if outputs and parallel.is_replica_main:  # one transfer from the device for all of them
        counted = torch.stack([_numbers(out.loss.detach(), out.stats, names) for out in outputs])
        table = torch.cat([table, counted.cpu()])
    sums, maxima, minima = table.split([1 + len(names.sums), len(names.maxima), len(names.minima)], dim=1)
    total = parallel.all_reduce(sums.sum(0), dist.ReduceOp.SUM)
    highest = parallel.all_reduce(maxima.amax(0), dist.ReduceOp.MAX) if names.maxima else ()
    lowest = parallel.all_reduce(minima.amin(0), dist.ReduceOp.MIN) if names.minima else ()
    stats = Stats(
        dict(zip(names.sums, total[1:], strict=True)),
        dict(zip(names.maxima, highest, strict=True)),
        dict(zip(names.minima, lowest, strict=True)),
    )
    return float(total[0]), stats


def _numbers(loss: Tensor, stats: Stats, names: Names) -> Tensor:
    """Lay loss, sums, maxima and minima out in one row, in the order of the names."""
    values = [loss, *(stats.sums[name] for name in names.sums)]
    values += [stats.maxima[name] for name in names.maxima] + [stats.minima[name] for name in names.minima]
    return torch.stack([value.detach().float() for value in values])


def skipped_metric(results: Sequence[StepResult]) -> dict[str, float]:
    """Count the optimizer steps that were not made, as loss or gradient was not finite; {} where all were."""
    skipped = sum(not result.is_finite for result in results)
    return {"skipped": float(skipped)} if skipped else {}


def step_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """Average one exploration stage's optimizer steps, those that were made; extremes of the ratio.

    NaN for what was not measured, as no response had anything to teach.
    """
    made = [r for r in results if r.is_finite]
    measured = [r.stats for r in made if r.stats.tokens]
    means = {
        name: sum(stats.mean(name) for stats in measured) / len(measured) if measured else math.nan
        for name in ("kl", "entropy", "ratio", "log_ratio", "clipped_low", "clipped_high")
    }
    return {
        "loss": sum(r.loss for r in made) / len(made) if made else math.nan,
        "grad_norm": sum(r.grad_norm for r in made) / len(made) if made else math.nan,
        "lr": results[-1].lr if results else math.nan,
        **means,
        "ratio_max": max((float(stats.maxima["ratio"]) for stats in measured), default=math.nan),
        "ratio_min": min((float(stats.minima["ratio"]) for stats in measured), default=math.nan),
        **skipped_metric(results),
    }
