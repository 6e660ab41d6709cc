"""Tasks: what the model is asked, and the right answer."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Who speaks: system, user, assistant, or another role that the model's chat template knows."""
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """One question with a checkable answer. Reward functions see it whole."""

    id: int
    """Number that is stable, and unique among training tasks and among held-out ones: random numbers of a rollout are
    drawn from it and the step, and evaluation counts as a step of its own."""
    question: str
    """The question, without prompt template or chat template."""
    answer: str = ""
    """The gold answer, as it is written; empty where the source has none. A reward reads it."""
    solution: str | None = None
    """A text that answers the question, for fine-tuning; None where the source has none."""
    turns: tuple[Message, ...] = ()
    """The conversation before the question."""
    name: str = ""
    """The row's own id; empty where it has none."""
    place: str = ""
    """File and line that the task was read from; empty where it was generated."""
    file: int = 0
    """Index of its file among those of its side: of `data.path`, or of `data.heldout_path` where that is given."""
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of its row (tests, choices, ...), for rewards."""

    @property
    def label(self) -> str:
        """The task as a person finds it: file and line, or its number, and the row's own id."""
        return (self.place or f"task {self.id}") + (f" ({self.name})" if self.name else "")

    @property
    def key(self) -> str:
        """The question as it is compared: two tasks that differ in case, blanks or Unicode form ask the same."""
        said = "\n".join([*(turn.content for turn in self.turns), self.question])
        return " ".join(unicodedata.normalize("NFKC", said).casefold().split())
