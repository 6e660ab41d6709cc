"""Grading of responses: the one notion of reward and of "right", for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsm_train.data.tasks import Task
from dsm_train.rewards.config import RewardConfig
from dsm_train.rewards.format import format_reward
from dsm_train.rewards.numeric import numeric_reward


@dataclass(frozen=True)
class Verdict:
    """Judgement of one response."""

    reward: float
    """The weighted sum of the configuration's parts, each 0.0 or 1.0: what training maximises."""
    correct: bool
    """True when the response states the gold answer: what evaluation counts."""


@dataclass(frozen=True)
class Grader:
    """Judges responses by rule, as the configuration of rewards says."""

    config: RewardConfig

    def grade(self, responses: Sequence[str], tasks: Sequence[Task], finished: Sequence[bool]) -> list[Verdict]:
        """Judge each response to the task beside it; finished: False where the length limit cut it off.

        Never raises for a response; `ValueError` for a task whose gold answer is no number.
        """
        return [self._verdict(*row) for row in zip(responses, tasks, finished, strict=True)]

    def _verdict(self, response: str, task: Task, finished: bool) -> Verdict:
        if not finished and self.config.unfinished != "keep":
            return Verdict(reward=0.0, correct=False)
        stated = numeric_reward(response, task.answer)
        reward = self.config.numeric * stated
        if self.config.format:
            reward += self.config.format * format_reward(response)
        return Verdict(reward, correct=stated == 1.0)
