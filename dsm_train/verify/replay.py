"""Exploration stages replayed in one layout by the functions of the training loop, and what each optimizer step did.

All that a step did is gathered as full tensors by canonical name on the main rank, so that every layout gives the same
`Step`. S responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsm_train.config import OptimConfig
from dsm_train.explore import with_logprobs
from dsm_train.grpo import Algorithm
from dsm_train.losses import PolicyLoss, SupervisedLoss
from dsm_train.megatron import weights
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, TrainableModel
from dsm_train.megatron.weights import ModelSpec
from dsm_train.packing.microbatch import MicroBatch
from dsm_train.packing.packer import Packer
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.record import SupervisedBatch
from dsm_train.supervise import share
from dsm_train.types import Rollouts, Sequences
from dsm_train.update import StepResult, optimizer_step, update
from dsm_train.verify.comparison import TOLERANCES, Replayed, Step
from triton_kernels import Objective, grpo_loss, token_kl


@dataclass(frozen=True)
class Witnessed:
    """One optimizer step as the model saw it; tensors are full, on the main rank."""

    gradient: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    apart: float
    terms: float
    near_edge: int


class Witness(TrainableModel):
    """A trainable model that keeps what each optimizer step did."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.witnessed: list[Witnessed] = []
        self._step: dict[str, Any] = {}

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss: Any) -> list[Any]:
        """Keep the weights, the gradient, and the terms of the loss."""
        before = weights.gather_full(self.chunks, self.parallel)
        outputs = super().forward_backward(micro_batches, loss)
        edge = TOLERANCES[self.config.dtype].edge
        terms, near_edge = self.parallel.all_reduce(measure(outputs, micro_batches, loss, edge, self.parallel)).tolist()
        self._step = {"before": before, "gradient": self.gradients(), "terms": terms, "near_edge": round(near_edge)}
        self._step["apart"] = weights.difference_of_copies(self.chunks, self.parallel, weights.gradient)
        return outputs

    def optimizer_step(self, loss: float = 0.0) -> float:
        """Keep the updated weights."""
        norm = super().optimizer_step(loss)
        apart = torch.tensor([self._step["apart"], weights.difference_of_copies(self.chunks, self.parallel)])
        after = weights.gather_full(self.chunks, self.parallel)
        self.witnessed.append(Witnessed(**self._step | {"after": after, "apart": float(apart.max())}))
        return norm


@dataclass(frozen=True)
class Replay:
    """Exploration stages, or steps of supervised training, to replay in any layout."""

    spec: ModelSpec
    algorithm: Algorithm
    sampling: SamplingConfig
    optim: OptimConfig
    batches: Sequence[Rollouts | SupervisedBatch]
    """The rollouts of each exploration stage, of all data-parallel replicas; old and reference log-probabilities in
    them are taken as distances from the sampled ones. Supervised batches come with an algorithm of one update."""
    shuffle_seed: int | None = None
    """Pack groups, and the responses of each, in another order; None: in the order of the batch."""

    def run(self, parallel: Parallel, packer: Packer, model_type: type[Witness] = Witness) -> Replayed:
        """Score each batch and update the model by it, as training does. Collective."""
        algo, temperature = self.algorithm, self.sampling.temperature
        model = model_type.build(self.spec, parallel, self.optim, len(self.batches) * algo.updates)
        reference = model.frozen_copy() if algo.has_reference else None
        results, logprobs = [], []
        for number, batch in enumerate(self.batches, start=1):
            parallel.watchdog.enter(f"batch {number} of verify-step")
            if isinstance(batch, SupervisedBatch):
                if self.shuffle_seed is not None:
                    batch = batch.take(shuffled(batch.sequences, self.shuffle_seed))
                results.append(optimizer_step(model, *share(batch.sequences, batch.learnt_T, packer, parallel)))
                logprobs.append({})
                continue
            index_S = self._share(batch.sequences, parallel)
            scored, computed = with_distances(batch.take(index_S), model, reference, algo, temperature, packer)
            logprobs.append(whole_batch(computed, batch.sequences, index_S, parallel))
            results += update(model, scored, algo, self.sampling, packer)
        sizes = [(s.num_responses, s.response_token_T.numel()) for s in (batch.sequences for batch in self.batches)]
        steps = [
            _step(result, seen, *sizes[i // algo.updates])
            for i, (result, seen) in enumerate(zip(results, model.witnessed, strict=True))
        ]
        return Replayed(steps, logprobs)

    def _share(self, sequences: Sequences, parallel: Parallel) -> Tensor:
        """Deal groups out to replicas in turn, as exploration does: this replica's responses [S]."""
        index_S = sequences.responses_of(torch.tensor(parallel.share(range(sequences.num_prompts)), dtype=torch.int64))
        if self.shuffle_seed is None:
            return index_S
        return index_S[shuffled(sequences.take(index_S), self.shuffle_seed)]


def _step(result: StepResult, seen: Witnessed, num_responses: int, num_tokens: int) -> Step:
    return Step(
        loss=result.loss,
        terms=seen.terms,
        grad_norm=result.grad_norm,
        lr=result.lr,
        gradient=seen.gradient,
        before=seen.before,
        after=seen.after,
        apart=seen.apart,
        stats=result.stats,
        num_responses=num_responses,
        num_tokens=num_tokens,
        near_edge=seen.near_edge,
    )


def with_distances(
    batch: Rollouts, policy: Model, reference: Model | None, algo: Algorithm, temperature: float, packer: Packer
) -> tuple[Rollouts, dict[str, Tensor]]:
    """Compute log-probabilities as training does, and put the batch's distances on top.

    Policy and reference start equal here: without distances there would be no KL, and no ratio to clip.
    """
    bare = replace(batch, old_logprob_T=None, ref_logprob_T=None)
    needs_old = not algo.on_policy or batch.old_logprob_T is not None
    computed = with_logprobs(bare, policy, reference, packer, temperature, old=needs_old)
    values = {"old": computed.old_logprob_T, "reference": computed.ref_logprob_T}
    scored = replace(
        computed,
        old_logprob_T=_at_distance(computed.old_logprob_T, batch.old_logprob_T, batch.rollout_logprob_T),
        ref_logprob_T=_at_distance(computed.ref_logprob_T, batch.ref_logprob_T, batch.rollout_logprob_T),
    )
    return scored, {name: value for name, value in values.items() if value is not None}


def _at_distance(computed_T: Tensor | None, given_T: Tensor | None, sampled_T: Tensor) -> Tensor | None:
    return computed_T if computed_T is None or given_T is None else computed_T + (given_T - sampled_T)


def whole_batch(
    values: dict[str, Tensor], sequences: Sequences, index_S: Tensor, parallel: Parallel
) -> dict[str, Tensor]:
    """Put the replicas' values of their responses' tokens together, in the order of the batch."""
    parts = parallel.gather_over_data((index_S, values))
    row_T = torch.cat([sequences.rows_of(index_S) for index_S, _ in parts])
    return {name: torch.cat([part[name] for _, part in parts])[row_T.argsort()] for name in values}


def shuffled(sequences: Sequences, seed: int) -> Tensor:
    """Shuffle the groups, and the responses of each [S]: they share their prompt as before."""
    generator = torch.Generator().manual_seed(seed)
    order_S = torch.randperm(sequences.num_responses, generator=generator)
    place_P = torch.randperm(sequences.num_prompts, generator=generator)
    return order_S[torch.argsort(place_P[sequences.prompt_of_response_S[order_S]], stable=True)]


def measure(
    outputs: Sequence[Any],
    micro_batches: Sequence[MicroBatch],
    loss: PolicyLoss | SupervisedLoss,
    edge: float,
    parallel: Parallel,
) -> Tensor:
    """[sum of the absolute terms of the loss, tokens with a ratio within `edge` of where it clips], this rank's share.

    The terms: weight_t times surrogate, KL and entropy, each with its coefficient. Rounding of the loss is relative to
    their sum, for they may cancel; those of the supervised loss have one sign.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    if not parallel.is_replica_main:
        return totals
    if isinstance(loss, SupervisedLoss):
        return totals + torch.tensor([sum(float(out.loss.detach()) for out in outputs), 0.0])
    objective = loss.objective
    bare = replace(objective, kl_coef=0.0, entropy_coef=0.0)
    for out, batch in zip(outputs, micro_batches, strict=True):
        r, cu = loss.rows.take(batch.row_T), batch.response_cu.cpu()
        logprob_T, entropy_T = out.logprob_T.float().cpu(), out.entropy_T.float().cpu()
        # The surrogate has the advantage's sign (cispo's the other), so that weights of that sign add up sizes.
        sign_T = r.weight_T * r.advantage_T.sign()
        surrogate = grpo_loss(logprob_T, r.old_logprob_T, None, r.advantage_T, sign_T, cu, bare).loss.abs()
        terms = surrogate + objective.entropy_coef * (r.weight_T * entropy_T).sum()
        if r.ref_logprob_T is not None:
            kl_T = token_kl(logprob_T, r.ref_logprob_T, objective.kl)
            terms = terms + objective.kl_coef * (r.weight_T * kl_T.abs()).sum()
        near_T = near_edge(logprob_T, r.old_logprob_T, cu, objective, edge)
        totals += torch.stack([terms.double(), (near_T & (r.advantage_T != 0)).sum().double()])
    return totals


def near_edge(
    logprob_T: Tensor, old_logprob_T: Tensor | None, response_cu: Tensor, objective: Objective, edge: float
) -> Tensor:
    """Mark the tokens whose ratio is within `edge` of where it clips."""
    log_ratio_T = torch.zeros_like(logprob_T) if old_logprob_T is None else logprob_T - old_logprob_T
    if objective.ratio == "sequence":
        length_S = response_cu.diff().long()
        log_ratio_T = torch.segment_reduce(log_ratio_T, "mean", lengths=length_S).repeat_interleave(length_S)
    near_T = torch.zeros_like(log_ratio_T, dtype=torch.bool)
    for limit in (1 - objective.clip_low, 1 + objective.clip_high):
        near_T |= (log_ratio_T.exp() - limit).abs() < edge
    return near_T
