"""Greedy accuracy, mean reward and pass@k on held-out tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import comb

import torch

from dsm_train.data.format import Format
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.megatron.parallel import Parallel
from dsm_train.rewards.grader import Grader, Verdict
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.engine import RolloutEngine
from dsm_train.rollout.grading import verdicts
from dsm_train.types import Prompt

BATCH = 256
"""Most responses that reward functions are asked about at once: a batch of training's size meets its time limit."""


@dataclass(frozen=True)
class Greedy:
    """Outcome of the greedy responses to some tasks."""

    accuracy: float
    """Share of tasks whose response is correct."""
    reward: float
    """Mean reward of the responses with a verdict; NaN where none has one."""
    no_verdict: float
    """Share of the responses without one; they count as wrong where the first reward function gave none."""


@dataclass(frozen=True)
class Evaluator:
    """Asks an engine for answers to tasks, and counts those that the grader finds correct."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    format: Format
    parallel: Parallel
    sampling: SamplingConfig
    grader: Grader

    def greedy(self, tasks: Sequence[Task], say: Callable[[str], None]) -> Greedy:
        """Judge the greedy response to each task, of all replicas; say how many cannot be judged. Collective."""
        graded = self._graded(tasks, 1, replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0))
        judged = [verdict.reward for _, verdict in graded if not math.isnan(verdict.reward)]
        counted = [i for i, function in enumerate(self.grader.config.functions) if function.weight]
        failed = [float(any(math.isnan(verdict.parts[i]) for i in counted)) for _, verdict in graded]
        greedy = Greedy(self._mean([float(v.correct) for _, v in graded]), self._mean(judged), self._mean(failed))
        if greedy.no_verdict:
            trouble = self.trouble()
            say(
                f"evaluation: {greedy.no_verdict:.1%} of the responses got no verdict, and count as wrong where the "
                "first reward function gave none" + (f"; the last failure: {trouble}" if trouble else "")
            )
        return greedy

    def greedy_accuracy(self, tasks: Sequence[Task], say: Callable[[str], None]) -> float:
        """Measure the share of tasks whose greedy response is correct. Collective."""
        return self.greedy(tasks, say).accuracy

    def trouble(self) -> str | None:
        """Take a rank's last reason, since this was asked, why a function gave a batch no verdict. Collective."""
        troubles = self.parallel.gather_over_ranks(self.grader.trouble)
        self.grader.trouble = None
        return next((trouble for trouble in troubles if trouble is not None), None)

    def pass_at_k(self, tasks: Sequence[Task], num_samples: int) -> dict[int, float]:
        """Estimate pass@k for k = 1, 2, 4, ... up to num_samples, unbiased (Chen et al., arXiv:2107.03374)."""
        mine = tasks[self.parallel.dp_rank :: self.parallel.dp_size]
        correct = [0] * len(mine)
        for p, verdict in self._graded(tasks, num_samples, self.sampling):
            correct[p] += verdict.correct
        ks = [k for k in (2**i for i in range(20)) if k <= num_samples]
        return {k: self._mean([pass_at_k(num_samples, c, k) for c in correct]) for k in ks}

    def _graded(self, tasks: Sequence[Task], num_samples: int, sampling: SamplingConfig) -> list[tuple[int, Verdict]]:
        """Answer this replica's tasks; judge each response, with the index of its task among them."""
        self.parallel.watchdog.enter("evaluation")
        mine = tasks[self.parallel.dp_rank :: self.parallel.dp_size]
        prompts = [Prompt(task.id, self.format.prompt(task)) for task in mine]
        # No training step has this number, so evaluation never shares its random numbers with training.
        rollouts = self.engine.generate(prompts, num_samples, sampling, step=-1)
        rows = BATCH // num_samples * num_samples or num_samples  # the samples of a task stay side by side
        most = -(-len(tasks) // self.parallel.dp_size) * num_samples  # a replica may have a task less than another
        graded: list[Verdict] = []
        for first in range(0, most, rows):
            batch = range(min(first, len(mine) * num_samples), min(first + rows, len(mine) * num_samples))
            graded += verdicts(rollouts, mine, self.tokenizer, self.grader, self.parallel, batch)
            self.parallel.gather_over_data(None)  # replicas wait for each other's batch, never for all batches
        return list(zip(rollouts.sequences.prompt_of_response_S.tolist(), graded, strict=True))

    def _mean(self, values: Sequence[float]) -> float:
        total = self.parallel.all_reduce(torch.tensor([sum(values), len(values)], dtype=torch.float64))
        return float(total[0] / total[1])  # NaN of nothing


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement, is right: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)
