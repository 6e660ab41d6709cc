"""A task: what the model is asked, and what counts as right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """One question with a checkable answer."""

    id: int
    """Stable and unique within its source: random numbers of a rollout are drawn from it."""
    prompt: str
    """The text the model is given, whole: nothing is added to it but the tokenizer's ids."""
    answer: str
    """The gold answer, a number that `dsm_train.rewards.numeric.parse_number` reads."""
    solution: str | None
    """A text that answers the prompt and ends in the answer, for fine-tuning; None where the source has none."""
