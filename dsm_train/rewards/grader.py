"""Grading of responses: the one notion of reward and of "right", for training and for evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsm_train.data.tasks import Task
from dsm_train.rewards.built_in import BUILT_IN
from dsm_train.rewards.config import RewardConfig, RewardFunction
from dsm_train.rewards.outcome import Failed, Returned
from dsm_train.rewards.worker import Worker, find_source


@dataclass(frozen=True)
class Verdict:
    """Judgement of one response."""

    reward: float
    """Weighted sum of the functions' values, which training maximises; NaN: no verdict, to be left out."""
    correct: bool
    """True when the first function gives at least 1: what evaluation counts."""
    parts: tuple[float, ...]
    """Value of each function, NaN where it gave no verdict; 0 for a truncated response, which no function sees."""


class Grader:
    """Judges responses as the configuration of rewards says; functions of the user's run in a process of their own."""

    def __init__(self, config: RewardConfig, folders: Sequence[str] = ()) -> None:
        """folders: where the modules of the user's functions are looked for first."""
        self.config = config
        self.trouble: str | None = None
        """Reason why a function gave a whole batch no verdict, the last time that one did."""
        self._folders = list(folders)
        self._worker = Worker(config.calls, folders, config.timeout_seconds)

    def grade(self, responses: Sequence[str], tasks: Sequence[Task], finished: Sequence[bool]) -> list[Verdict]:
        """Judge each response to the task beside it; finished: False where the length limit cut it off.

        Never raises for a response, nor for a function of the user's; `ValueError` for a task that `unreadable` names.
        """
        rows = list(zip(responses, tasks, finished, strict=True))
        asked = [row for row, (_, _, ended) in enumerate(rows) if ended or self.config.unfinished == "keep"]
        completions, their_tasks = [responses[row] for row in asked], [tasks[row] for row in asked]
        columns = [self._values(function, completions, their_tasks) for function in self.config.functions]
        judged = dict(zip(asked, (self._verdict(parts) for parts in zip(*columns, strict=True)), strict=True))
        cut_off = Verdict(0.0, False, (0.0,) * len(columns))
        return [judged.get(row, cut_off) for row in range(len(rows))]

    def unreadable(self, task: Task) -> str | None:
        """Say why a built-in reward cannot read this task's gold answer; None where all can."""
        reasons = (BUILT_IN[f.name].unreadable(task) for f in self.config.functions if f.name is not None)
        return next((reason for reason in reasons if reason is not None), None)

    def try_functions(self, task: Task) -> list[str]:
        """Import the user's functions and call each with a right completion of a task.

        It is given twice, so that one value for all is noticed. Raises ValueError with what is wrong, and where;
        returns notes about functions that gave no verdict, which may be right.
        """
        notes = []
        example = task.solution or task.answer
        for number, function in enumerate(self.config.functions, start=1):
            if function.call is None:
                continue
            outcome = self._call(function.call, [example] * 2, [task] * 2)
            if isinstance(outcome, Failed):
                self.close()
                raise ValueError(f"item {number} of rewards.functions, {function.call}: {outcome.reason}")
            if all(value is None or math.isnan(_within_fp32(value)) for value in outcome.values):
                where = f"item {number} of rewards.functions, {function.call}"
                notes.append(f"{where}: no verdict on the answer it was tried with")
        return notes

    def sources(self) -> list[str]:
        """Read the modules of the user's functions; those that they import are not among them."""
        files = [find_source(call.partition(":")[0], self._folders) for call in self.config.calls]
        return [file.read_text(encoding="utf-8", errors="replace") for file in files if file is not None]

    def close(self) -> None:
        """End the process of the user's functions. A later batch starts another."""
        self._worker.close()

    def _values(self, function: RewardFunction, completions: list[str], tasks: list[Task]) -> Sequence[float]:
        """Ask one function; NaN for no verdict."""
        if function.name is not None:
            judge = BUILT_IN[function.name].judge
            values: Sequence[float | None] = [judge(*pair) for pair in zip(completions, tasks, strict=True)]
        else:
            outcome = self._call(function.call, completions, tasks) if completions else Returned(())
            if isinstance(outcome, Failed):
                self.trouble = f"{function.call}: {outcome.reason}"
                return [math.nan] * len(completions)
            values = outcome.values
        return [math.nan if value is None else _within_fp32(value) for value in values]

    def _call(self, call: str | None, completions: list[str], tasks: list[Task]) -> Returned | Failed:
        assert call is not None
        return self._worker.call(self.config.calls.index(call), completions, tasks)

    def _verdict(self, parts: tuple[float, ...]) -> Verdict:
        pairs = zip(self.config.functions, parts, strict=True)
        # A function of weight 0 only measures: 0 * NaN would be NaN.
        reward = _within_fp32(sum(function.weight * part for function, part in pairs if function.weight))
        if math.isnan(reward) and self.config.no_verdict == "zero":
            reward = 0.0
        return Verdict(reward, parts[0] >= 1.0, parts)


def _within_fp32(value: float) -> float:
    """Return the value, or NaN where it is infinite or would be in a tensor."""
    return value if abs(value) < 3.4e38 else math.nan
