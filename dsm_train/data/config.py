"""Configuration of the tasks and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsm_train.config import require


@dataclass(frozen=True)
class DataConfig:
    """Where questions come from: the built-in generator, or JSONL files of questions and answers."""

    path: Path | None = None
    """JSONL file of training questions (GSM8K's format); none: the built-in generator."""
    heldout_path: Path | None = None
    """JSONL file of held-out questions; none: heldout_tasks of path, drawn by seed."""
    prompt_template: str = "Question: {question}\nAnswer:"
    """Prompt made from a question of a JSONL file."""
    kinds: tuple[str, ...] = ("add",)
    """Kinds of generated tasks: add, sub, mul, word."""
    style: Literal["answer", "steps"] = "answer"
    """Solutions of generated tasks: the answer alone, or worked steps."""
    train_tasks: int | None = None
    """Use this many training tasks; none: all there are."""
    heldout_tasks: int = 500
    """Tasks that are held out for evaluation."""
    vocab_size: int = 320
    """Vocabulary of the tokenizer that is trained at start, when tokenizer is not given."""
    tokenizer: Path | None = None
    """Tokenizer: a folder, or a tokenizer.json; none: one is trained at start on the training tasks."""
    seed: int = 0
    """Seed of the generator and of the split."""

    def __post_init__(self) -> None:
        require(self.heldout_tasks >= 1, "heldout_tasks", "at least 1", self.heldout_tasks)
        require(
            "{question}" in self.prompt_template,
            "prompt_template",
            "text with {question} in it",
            repr(self.prompt_template),
        )
        require(
            self.heldout_path is None or self.path is not None,
            "heldout_path",
            "given with path",
            self.heldout_path,
        )
