"""From a task to what the model reads: the prompt, and the example of supervised training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """A task with its solution, as supervised training reads it."""

    prompt: list[int]
    """Tokens that are given."""
    response: list[int]
    """Tokens that follow."""
    learnt: list[bool]
    """True where a token of `response` is learnt."""


class Format(Protocol):
    """The form in which the model is asked."""

    def prompt(self, task: Task) -> list[int]:
        """Tokens of the prompt, which a response continues."""
        ...

    def text(self, task: Task) -> str:
        """Text of the prompt, for people."""
        ...

    def example(self, task: Task) -> Example:
        """Prompt and solution. They are tokenised apart, as in rollouts."""
        ...


@dataclass(frozen=True)
class PlainFormat:
    """The question in a template, and the solution with the end token behind it."""

    tokenizer: Tokenizer
    template: str
    """Text with {question} in it; it may hold braces of its own, as in "\\boxed{}"."""

    def prompt(self, task: Task) -> list[int]:
        """Tokens of the prompt, which a response continues."""
        return self.tokenizer.encode(self.text(task))

    def text(self, task: Task) -> str:
        """Text of the prompt, for people."""
        return self.template.replace("{question}", task.question)

    def example(self, task: Task) -> Example:
        """Prompt and solution."""
        response = [*self.tokenizer.encode(task.solution or ""), self.tokenizer.eos_id]
        return Example(self.prompt(task), response, [True] * len(response))
