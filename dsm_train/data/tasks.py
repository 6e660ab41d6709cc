"""Tasks: what the model is asked, and the right answer."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """One question with a checkable answer."""

    id: int
    """Stable and unique within its source: random numbers of a rollout are drawn from it."""
    prompt: str
    """The text that the model is given, whole: nothing is added to it but the tokenizer's ids."""
    answer: str
    """The gold answer, a number that `dsm_train.rewards.numeric.parse_number` reads."""
    solution: str | None
    """A text that answers the prompt and ends in the answer, for fine-tuning; None where the source has none."""
    question: str | None = None
    """The question without the template; None where the prompt is the question."""

    @property
    def key(self) -> str:
        """The question as it is compared: two tasks that differ in case, blanks or Unicode form ask the same."""
        text = unicodedata.normalize("NFKC", self.prompt if self.question is None else self.question)
        return " ".join(text.casefold().split())
