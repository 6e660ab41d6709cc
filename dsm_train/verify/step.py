"""Stage `verify-step`: one optimizer step of a batch in this layout, compared with the same step in another.

What a step did is gathered as full tensors by canonical name on the main rank, so that every layout gives the same
`Step`. S responses, T response tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor

from dsm_train.balance import balance
from dsm_train.cli import parse_section, user_errors
from dsm_train.config import ModelConfig, ParallelConfig, RunConfig
from dsm_train.configs import VerifyStepConfig
from dsm_train.grpo import Algorithm, algorithm, token_rows
from dsm_train.megatron import parallel, weights
from dsm_train.megatron.model import padded_vocab
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import TrainableModel
from dsm_train.packing.microbatch import MicroBatch, sequence_lengths
from dsm_train.reporting.metrics import Metrics, Samples
from dsm_train.rollout.record import read_rollouts
from dsm_train.run import Prepared, Run, prepare
from dsm_train.types import Rollouts, Sequences
from dsm_train.update import Rows, policy_loss, whole_step
from dsm_train.verify.comparison import TOLERANCES, Step, Tolerance, compare, table
from dsm_train.verify.synthetic import offset_logprobs, synthetic_rollouts
from triton_kernels import LinearGrpoLoss, Objective, grpo_loss, token_kl

PROG = "dsm-train verify-step"
SYNTHETIC_ENTROPY = 0.01


def verify_step(config: VerifyStepConfig) -> None:
    """Run the step in the layout asked for and in the reference layout; exit with status 1 where they differ."""
    with user_errors(PROG):
        job, rollouts = plan(config)
        parallel.set_threads(config.run.threads)
        layout = parallel.start(config.parallel, config.run.seed)
    with layout.watchdog.failures():
        here, rollouts = step_here(job.run(layout), job.algorithm, rollouts)
    there = step_there(job, layout, rollouts)
    if here is None or there is None:
        return
    lines = compare(here, there, job.tolerance)
    print(table(lines, here, there, *job.titles(layout)), flush=True)
    if not all(line.holds for line in lines):
        raise SystemExit(1)


@dataclass(frozen=True)
class Job:
    """What is verified, found to be in order."""

    prepared: Prepared
    config: VerifyStepConfig
    algorithm: Algorithm
    reference: ParallelConfig | None
    """The layout to compare with, of all ranks; None: one rank alone."""

    @property
    def tolerance(self) -> Tolerance:
        """How far two layouts may be apart, by the type of weights and activations."""
        return TOLERANCES[self.config.model.dtype]

    def run(self, layout: Parallel) -> Run:
        """The run that is verified."""
        return self._run(layout, self.config.run)

    def reference_run(self, layout: Parallel, rollouts: Rollouts) -> Run:
        """The run to compare with: prompts repeated, and micro-batches half as large.

        So whatever depends on their number, or goes wrong where responses share a prompt, shows.
        """
        budget = half_budget(rollouts, self.config.run.max_tokens)
        return self._run(layout, replace(self.config.run, max_tokens=budget, share_prompts=False))

    def _run(self, layout: Parallel, how: RunConfig) -> Run:
        config = replace(self.config, parallel=layout.config, run=how)
        return Run(config, self.prepared.tasks, self.prepared.tokenizer, layout, Metrics(None), Samples(None))

    def titles(self, layout: Parallel) -> tuple[str, str]:
        """What the two layouts are called."""
        reference = _name(ParallelConfig(), 1) if self.reference is None else _name(self.reference, layout.world_size)
        return _name(layout.config, layout.world_size), reference


def plan(config: VerifyStepConfig) -> tuple[Job, Rollouts]:
    """Read and check everything that was asked for; raises `ValueError` with the remedy."""
    if config.synthetic == (config.batch is not None):
        raise ValueError("give one of batch=FILE, which dsm-train grpo record=FILE writes, and --synthetic")
    if config.synthetic and config.algorithm.entropy_coef is None:
        config = replace(config, algorithm=replace(config.algorithm, entropy_coef=SYNTHETIC_ENTROPY))
    algo = algorithm(config.algorithm)
    prepared = prepare(config, None)
    config = replace(config, model=_first_layers(prepared.config.model, config.layers))
    reference = None
    if config.reference_layout is not None:
        reference = parse_section(ParallelConfig, config.reference_layout, "reference_layout")
    vocab_size = prepared.tokenizer.vocab_size
    for layout in (config.parallel, reference or ParallelConfig()):
        padded = padded_vocab(vocab_size, config.model.vocab_multiple, layout.tp)
        parallel.check_layout(layout, config.model, padded)
    if config.batch is None:
        rollouts = synthetic_rollouts(vocab_size, min(config.model.max_length, config.run.max_tokens), config.run.seed)
    else:
        rollouts = read_rollouts(config.batch)
        check_batch_fits(rollouts, config, algo.objective, vocab_size)
    return Job(prepared, config, algo, reference), rollouts


def check_batch_fits(rollouts: Rollouts, config: VerifyStepConfig, objective: Objective, vocab_size: int) -> None:
    """Raise `ValueError` when a recorded batch lacks what the loss needs, or is not for this model."""
    sequences, name = rollouts.sequences, f"batch {config.batch}"
    if rollouts.reward_S.numel() != sequences.num_responses:
        raise ValueError(f"{name} holds no rewards: record it with dsm-train grpo ... record=FILE")
    rewards = rollouts.reward_S.split(sequences.group_cu.diff().tolist())
    if all(bool((reward_G == reward_G[0]).all()) for reward_G in rewards):
        raise ValueError(
            f"{name} teaches nothing, as the rewards of each group are all equal, and there is nothing but rounding to "
            "compare: record another step, with record_step=N"
        )
    if objective.kl_coef > 0 and rollouts.ref_logprob_T is None:
        raise ValueError(f"{name} was recorded without a reference model: set algorithm.kl_coef=0")
    tokens = torch.cat([sequences.prompt_token, sequences.response_token_T])
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"{name} has tokens from {int(tokens.min())} to {int(tokens.max())}, and the tokenizer {vocab_size}: "
            "give the configuration and run.init that it was recorded with"
        )
    prompt_S = sequences.prompt_cu.diff()[sequences.prompt_of_response_S]
    longest = int((prompt_S + sequences.response_cu.diff()).max())
    for limit, most in (("model.max_length", config.model.max_length), ("run.max_tokens", config.run.max_tokens)):
        if longest > most:
            raise ValueError(f"{name} has a sequence of {longest} tokens: raise {limit} = {most}")


def step_here(run: Run, algo: Algorithm, rollouts: Rollouts) -> tuple[Step | None, Rollouts]:
    """The step in the layout that is verified, and the rollouts with all log-probabilities."""
    config = cast(VerifyStepConfig, run.config)
    model = run.trainable(config.optim, 1)
    if config.synthetic:
        num_rows = rollouts.sequences.response_token_T.numel()
        logprob_T = model.logprobs(run.pack(rollouts.sequences), num_rows, config.sampling.temperature)
        rollouts = offset_logprobs(rollouts, cast(Tensor, run.parallel.from_main(logprob_T)), config.run.seed)
    return replay(run, model, algo, rollouts, shuffle=config.shuffle), rollouts


def step_there(job: Job, here: Parallel, rollouts: Rollouts) -> Step | None:
    """The step in the reference layout, which takes the place of `here`; None but on the main rank."""
    seed = job.config.run.seed
    parallel.stop(here, keep_ranks=job.reference is not None)
    if job.reference is None and not here.is_main:
        return None
    gc.collect()  # the first model, which its configuration and its optimizer hold in a cycle
    layout = parallel.start(job.reference or ParallelConfig(), seed, alone=job.reference is None)
    run = job.reference_run(layout, rollouts)
    with layout.watchdog.failures():
        step = replay(run, run.trainable(job.config.optim, 1), job.algorithm, rollouts)
    parallel.stop(layout)
    return step


def half_budget(rollouts: Rollouts, max_tokens: int) -> int:
    """Half the tokens of a micro-batch, or those of the longest sequence: never all of the batch, repeated, in one."""
    length_S = sequence_lengths(rollouts.sequences)
    return max(min(max_tokens, int(length_S.sum())) // 2, int(length_S.max()))


def replay(
    run: Run, model: TrainableModel, algo: Algorithm, rollouts: Rollouts, *, shuffle: bool = False
) -> Step | None:
    """One optimizer step on all of the rollouts, as training does it; what it did, on the main rank.

    rollouts: of all data-parallel replicas, among which their groups are shared out in order.
    """
    config, layout = cast(VerifyStepConfig, run.config), run.parallel
    layout.watchdog.enter("the step that is verified")
    mine = share(rollouts, layout.dp_rank, layout.dp_size)
    sequences, rows = token_rows(mine, algo, 1, config.sampling.max_new_tokens, layout)[0]
    sequences, rows = balance(sequences, rows, run.cost(sequences), layout)
    if shuffle:
        order_S = shuffled(sequences, config.run.seed)
        sequences, rows = sequences.take(order_S), rows.take(sequences.rows_of(order_S))
    micro_batches = run.pack(sequences)
    before = weights.gather_full(model.chunks, layout)
    loss = policy_loss(rows, algo.objective, config.sampling.temperature)
    outputs = model.forward_backward(micro_batches, loss)
    gradient = model.gradients()
    apart = [weights.difference_of_copies(model.chunks, layout, weights.gradient)]
    grad_norm = model.optimizer_step()
    apart.append(weights.difference_of_copies(model.chunks, layout))
    after = weights.gather_full(model.chunks, layout)
    total, stats = whole_step(outputs, layout)
    measured = measure(outputs, micro_batches, rows, algo.objective, TOLERANCES[config.model.dtype].edge, layout)
    terms, near_edge = layout.all_reduce(measured).tolist()
    step = Step(
        loss=total,
        terms=terms,
        grad_norm=grad_norm,
        gradient=gradient,
        before=before,
        after=after,
        apart=float(torch.tensor(apart).max()),
        stats=stats,
        num_responses=rollouts.sequences.num_responses,
        num_tokens=rollouts.sequences.response_token_T.numel(),
        near_edge=round(near_edge),
    )
    return step if layout.is_main else None


def shuffled(sequences: Sequences, seed: int) -> Tensor:
    """Groups in another order, and in each its responses [S]: they share their prompt as before."""
    generator = torch.Generator().manual_seed(seed)
    order_S = torch.randperm(sequences.num_responses, generator=generator)
    place_P = torch.randperm(sequences.num_prompts, generator=generator)
    return order_S[torch.argsort(place_P[sequences.prompt_of_response_S[order_S]], stable=True)]


def share(rollouts: Rollouts, rank: int, size: int) -> Rollouts:
    """The rank-th of `size` shares of consecutive groups."""
    groups = rollouts.sequences.num_prompts
    first, last = groups * rank // size, groups * (rank + 1) // size
    sequences, span_S, span_T = rollouts.sequences.groups(first, last)
    spans = {"P": slice(first, last), "S": span_S, "T": span_T}
    named = {f.name: getattr(rollouts, f.name) for f in fields(rollouts) if f.name[-2:] in ("_P", "_S", "_T")}
    return replace(
        rollouts,
        sequences=sequences,
        **{name: value[spans[name[-1]]] for name, value in named.items() if value is not None},
    )


def measure(
    outputs: Sequence[object],
    micro_batches: Sequence[MicroBatch],
    rows: Rows,
    objective: Objective,
    edge: float,
    layout: Parallel,
) -> Tensor:
    """[sum of the absolute terms of the loss, tokens with a ratio within `edge` of where it clips], this rank's share.

    The terms: weight_t times surrogate, KL and entropy, each with its coefficient. The sum is what rounding of the loss
    is relative to, for they may cancel.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    bare = replace(objective, kl_coef=0.0, entropy_coef=0.0)
    for output, batch in zip(outputs if layout.counts_losses else (), micro_batches, strict=False):
        out = cast(LinearGrpoLoss, output)
        r, cu = rows.take(batch.row_T), batch.response_cu.cpu()
        logprob_T, entropy_T = out.logprob_T.float().cpu(), out.entropy_T.float().cpu()
        # The surrogate has the advantage's sign (cispo's the other), so that weights of that sign add up sizes.
        sign_T = r.weight_T * r.advantage_T.sign()
        surrogate = grpo_loss(logprob_T, r.old_logprob_T, None, r.advantage_T, sign_T, cu, bare).loss.abs()
        terms = surrogate + objective.entropy_coef * (r.weight_T * entropy_T).sum()
        if r.ref_logprob_T is not None:
            kl_T = token_kl(logprob_T, r.ref_logprob_T, objective.kl)
            terms = terms + objective.kl_coef * (r.weight_T * kl_T.abs()).sum()
        log_ratio_T = torch.zeros_like(logprob_T) if r.old_logprob_T is None else logprob_T - r.old_logprob_T
        if objective.ratio == "sequence":
            length_S = cu.diff().long()
            log_ratio_T = torch.segment_reduce(log_ratio_T, "mean", lengths=length_S).repeat_interleave(length_S)
        near_T = torch.zeros_like(log_ratio_T, dtype=torch.bool)
        for limit in (1 - objective.clip_low, 1 + objective.clip_high):
            near_T |= (log_ratio_T.exp() - limit).abs() < edge
        totals += torch.stack([terms.double(), (near_T & (r.advantage_T != 0)).sum().double()])
    return totals


def _first_layers(model: ModelConfig, layers: int | None) -> ModelConfig:
    if layers is not None and layers > model.num_layers:
        raise ValueError(f"layers = {layers} is more than the model's {model.num_layers}: give at most those")
    return replace(model, num_layers=layers or model.num_layers)


def _name(layout: ParallelConfig, world_size: int) -> str:
    """A layout in a few characters, such as tp2-dp2-sp."""
    dp = world_size // (layout.tp * layout.pp)
    sizes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "dp": dp}
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["one rank"]
    flags = {"sp": layout.sp, "distributed_optimizer": layout.distributed_optimizer, "overlap": layout.overlap}
    return "-".join([*parts, *(name for name, on in flags.items() if on)])
