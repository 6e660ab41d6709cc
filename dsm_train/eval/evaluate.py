"""Greedy accuracy and pass@k on held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb

import torch

from dsm_train.data.format import Format
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.megatron.parallel import Parallel
from dsm_train.rewards.grader import Grader
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.engine import RolloutEngine
from dsm_train.rollout.grading import verdicts
from dsm_train.types import Prompt


@dataclass(frozen=True)
class Evaluator:
    """Asks an engine for answers to tasks, and counts those that the grader finds correct."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    format: Format
    parallel: Parallel
    sampling: SamplingConfig
    grader: Grader

    def greedy_accuracy(self, tasks: Sequence[Task]) -> float:
        """Measure the share of tasks, over all data-parallel replicas, whose greedy response is correct. Collective."""
        sampling = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0)
        correct = self._correct(tasks, 1, sampling)
        return self._mean([float(c) for c in correct])

    def pass_at_k(self, tasks: Sequence[Task], num_samples: int) -> dict[int, float]:
        """Estimate pass@k for k = 1, 2, 4, ... up to num_samples, unbiased (Chen et al., arXiv:2107.03374)."""
        correct = self._correct(tasks, num_samples, self.sampling)
        ks = [k for k in (2**i for i in range(20)) if k <= num_samples]
        return {k: self._mean([pass_at_k(num_samples, c, k) for c in correct]) for k in ks}

    def _correct(self, tasks: Sequence[Task], num_samples: int, sampling: SamplingConfig) -> list[int]:
        """Count the correct responses to each of this replica's tasks."""
        self.parallel.watchdog.enter("evaluation")
        mine = tasks[self.parallel.dp_rank :: self.parallel.dp_size]
        prompts = [Prompt(task.id, self.format.prompt(task)) for task in mine]
        # No training step has this number, so evaluation never shares its random numbers with training.
        rollouts = self.engine.generate(prompts, num_samples, sampling, step=-1)
        correct = [0] * len(mine)
        graded = verdicts(rollouts, mine, self.tokenizer, self.grader)
        for p, verdict in zip(rollouts.sequences.prompt_of_response_S.tolist(), graded, strict=True):
            correct[p] += verdict.correct
        return correct

    def _mean(self, values: Sequence[float]) -> float:
        total = self.parallel.all_reduce(torch.tensor([sum(values), len(values)], dtype=torch.float64))
        return float(total[0] / total[1])


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement, is right: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)
