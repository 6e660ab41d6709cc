"""The journal of reinforcement learning: metrics, samples, evaluations and records of each step, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.eval.evaluate import Evaluator
from dsm_train.loop import Loop
from dsm_train.megatron.parallel import Parallel
from dsm_train.packing.microbatch import sequence_lengths
from dsm_train.reporting.metrics import Samples
from dsm_train.rollout.grading import read_samples, reward_metrics, rollout_metrics
from dsm_train.rollout.record import write_rollouts
from dsm_train.types import Rollouts
from dsm_train.update import StepResult, step_metrics

PATIENCE = 5
"""Steps of the same trouble in a row after which it is said, once."""
SHOWN = {name: name for name in ("reward", "heldout_accuracy", "kl", "response_tokens", "tokens_per_second")}


@dataclass
class Counts:
    """Troubles so far; a checkpoint holds them."""

    flat: int = 0
    """Steps in a row in which no group had a spread of rewards."""
    cut_off: int = 0
    """Steps in a row in which most responses were cut off."""
    unjudged: int = 0
    """Steps in a row in which most responses got no verdict."""
    trouble: str | None = None
    """The last failure of a reward function in training."""
    shares: float = 0.0
    """Sum over the steps of the share of responses without a verdict."""


@dataclass
class Journal:
    """Writes down each step of a run, and says once what a person should look into."""

    parallel: Parallel
    samples: Samples
    tokenizer: Tokenizer
    evaluator: Evaluator
    heldout: Sequence[Task]
    """Tasks that are evaluated while training."""
    steps: int
    every: int
    """Evaluate every so many steps; 0: never while training."""
    max_new_tokens: int
    has_reference: bool
    record: Path | None = None
    """File for the scored rollouts of a step, for verify-step."""
    record_step: int = 1
    """The step to record, from 1; 0: every step, in files of its own."""
    counts: Counts = field(default_factory=Counts, init=False)

    def log(
        self, loop: Loop, step: int, tasks: Sequence[Task], rollouts: Rollouts, results: Sequence[StepResult]
    ) -> None:
        """Write down step `step` (from 0) of the loop. Collective."""
        number = step + 1
        assert rollouts.reward_S is not None and rollouts.reward_SF is not None
        config = self.evaluator.grader.config
        rewards = self.parallel.gather_over_data((rollouts.reward_S, rollouts.reward_SF))
        reward_S, reward_SF = (torch.cat(parts) for parts in zip(*rewards, strict=True))
        logprob_T = rollouts.rollout_logprob_T  # replicas differ in tokens: their means may not be averaged
        sums = self.parallel.gather_over_data((float(logprob_T.double().sum()), len(logprob_T)))
        values = reward_metrics(reward_S, reward_SF, config.functions)
        values |= self.parallel.average(rollout_metrics(rollouts)) | step_metrics(results)
        values["rollout_logprob"] = sum(total for total, _ in sums) / max(1, sum(count for _, count in sums))
        if not self.has_reference:
            del values["kl"]  # there is nothing to measure it against
        if self.record is not None and self.record_step in (0, number):
            write_rollouts(self._record_of(number), rollouts, self.parallel)
        if self.every and number % self.every == 0 and number < self.steps:
            values["heldout_accuracy"] = self.evaluator.greedy_accuracy(self.heldout, loop.say)
        loop.log(values, tokens=int(sequence_lengths(rollouts.sequences).sum()), shown=SHOWN)
        samples = read_samples(rollouts, tasks, self.tokenizer, self.evaluator.format, config.labels, count=4)
        self.samples.log(number, samples)
        self._tell_failures(loop, number, values)
        self._warn(loop, number, values)

    def _record_of(self, number: int) -> Path:
        assert self.record is not None
        return self.record if self.record_step else self.record.with_stem(f"{self.record.stem}-{number}")

    def _tell_failures(self, loop: Loop, number: int, values: dict[str, float]) -> None:
        """Say the first failure of a function at once, and the share of no verdict at the end. Collective."""
        counts = self.counts
        counts.shares += values["no_verdict"]
        failed = any(name.startswith("no_verdict_") for name in values)
        if failed and (trouble := self.evaluator.trouble()) is not None:
            if counts.trouble is None:
                loop.say(
                    f"step {number}: a reward function failed, and {values['no_verdict']:.0%} of the responses "
                    f"got no verdict: {trouble}"
                )
            counts.trouble = trouble
        if number == self.steps and counts.shares:
            loop.say(f"{counts.shares / number:.1%} of the responses of {number} steps got no verdict")

    def _warn(self, loop: Loop, number: int, values: dict[str, float]) -> None:
        """Say once what has gone on for some steps."""
        counts, unjudged = self.counts, values["no_verdict"] > 0.5
        counts.flat = counts.flat + 1 if values["groups_without_spread"] == 1.0 and not unjudged else 0
        unfinished = self.evaluator.grader.config.unfinished  # a response that is kept may well have no end
        counts.cut_off = counts.cut_off + 1 if values["finished"] < 0.5 and unfinished != "keep" else 0
        counts.unjudged = counts.unjudged + 1 if unjudged else 0
        if counts.unjudged == PATIENCE:
            functions = self.evaluator.grader.config.functions
            silent = [f.label for f in functions if f.weight and f"no_verdict_{f.label}" in values]
            loop.say(
                f"{PATIENCE} steps to step {number}: {values['no_verdict']:.0%} of the responses got no verdict of "
                f"{' or '.join(silent)}" + (f"; the last failure: {counts.trouble}" if counts.trouble else "")
            )
        if counts.flat == PATIENCE:
            loop.say(
                f"{PATIENCE} steps to step {number}: all responses to a question earned the same reward (mean "
                f"{values['reward']:.3g}), so that nothing is learnt; read samples.jsonl: does the model ever answer "
                "in the form that rewards.* read?"
            )
        if counts.cut_off == PATIENCE:
            loop.say(
                f"{PATIENCE} steps to step {number}: {1 - values['finished']:.0%} of the responses were cut off "
                f"at sampling.max_new_tokens = {self.max_new_tokens}, and rewards.unfinished = {unfinished}: raise "
                "sampling.max_new_tokens, or set rewards.unfinished=keep for a model that has no end token"
            )
