"""Configuration of the tasks and the tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsm_train.config import at_least, require

# A backslash and an n, unless they begin one of LaTeX's commands.
_UNREAD_NEWLINE = re.compile(r"\\n(?!(?:abla|e|eq|eg|i|ot|u|ewline)(?![A-Za-z]))")


@dataclass(frozen=True)
class DataConfig:
    """Questions with checkable answers, from the built-in generator or from files, and the tokenizer."""

    source: Literal["generated", "file"] | None = None
    """Source of the questions; none: path where it is given, else the generator. A recipe may insist on one."""
    path: tuple[Path, ...] | None = None
    """Files of training questions, or one: JSON Lines, or Parquet (docs/data.md)."""
    heldout_path: tuple[Path, ...] | None = None
    """Files of held-out questions, none of which is trained on; none: heldout_tasks of path."""
    weights: tuple[float, ...] = ()
    """Share of each file of path in the training questions that are drawn; none: all questions alike."""
    question_field: str | None = None
    """Field of the question, here as below with dots into objects; none: question, or messages in rows without it."""
    messages_field: str | None = None
    """Field of a conversation [{role, content}, ...], whose last user's message is the question; none: messages."""
    answer_field: str | None = "answer"
    """Field of the gold answer, a text or a number; GSM8K's has the solution before "####". null: there is none."""
    solution_field: str | None = None
    """Field of the worked solution; none: the conversation's last answer, or what stands before "####"."""
    id_field: str | None = "id"
    """Field of the row's own id, a text or a number."""
    unreadable: Literal["error", "skip"] = "error"
    """A gold answer that no reward can read is refused, or its task is skipped and counted at start."""
    prompt_template: str | None = None
    """Prompt made from a question, or the user's message of chat; its special tokens count, a question's are text.
    None: "Question: {question}\\nAnswer:" for files, and the question alone for generated tasks and in chat."""
    chat: bool = False
    """Ask through the tokenizer's chat template: the question is a user's message, the solution the assistant's."""
    system: str | None = None
    """System prompt of conversations that have none of their own; none: that of the template, if it has one."""
    too_long: Literal["error", "skip"] = "error"
    """A prompt that leaves no room for its response, or an example of supervised training above model.max_length or
    run.max_tokens, is refused, or skipped and counted at start."""
    kinds: tuple[str, ...] = ("add",)
    """Kinds of generated tasks: add, sub, mul, word."""
    style: Literal["answer", "steps"] = "answer"
    """Solutions of generated tasks: the answer alone, or worked steps."""
    train_tasks: int | None = None
    """Use this many training tasks; none: all there are."""
    heldout_tasks: int | None = None
    """Held-out tasks to evaluate; none: all of heldout_path, else 500 (of path at most a tenth), chosen by a hash."""
    vocab_size: int | None = None
    """Largest vocabulary of the tokenizer that is trained at start when none is given; none: 320."""
    tokenizer: Path | None = None
    """Tokenizer: a folder, or a tokenizer.json; none: that of run.init, or one trained at start on training tasks."""
    seed: int = 0
    """Seed of the generator and of the order of tasks; no task changes sides by it."""

    def __post_init__(self) -> None:
        at_least(1, self, "train_tasks", "heldout_tasks")
        template = self.template
        require("{question}" in template, "prompt_template", "text with {question} in it", repr(template))
        rule = "text whose line breaks are real: $'...\\n...' in a shell, \"...\\n...\" in a recipe"
        require(not _UNREAD_NEWLINE.search(template), "prompt_template", rule, template)
        self._check_files()
        require(self.system is None or self.chat, "system", "left out without chat", repr(self.system))
        rule = f"left out beside tokenizer = {self.tokenizer}, which has its own"
        require(self.vocab_size is None or self.tokenizer is None, "vocab_size", rule, self.vocab_size)

    def _check_files(self) -> None:
        path, heldout = (paths and ", ".join(map(str, paths)) for paths in (self.path, self.heldout_path))
        require(self.path != (), "path", "a file, or a list of files", "an empty list")
        require(self.heldout_path != (), "heldout_path", "a file, or a list of files", "an empty list")
        require(heldout is None or path is not None, "heldout_path", "given with path", heldout)
        require(self.source != "generated" or path is None, "path", "left out when source is generated", path)
        rule = f"one number for each of the {len(self.path or ())} files of path"
        require(len(self.weights) in (0, len(self.path or ())), "weights", rule, list(self.weights))
        require(all(weight > 0 for weight in self.weights), "weights", "above 0", list(self.weights))
        both = self.question_field is not None and self.messages_field is not None
        require(
            not both, "messages_field", f"left out beside question_field = {self.question_field}", self.messages_field
        )

    @property
    def template(self) -> str:
        """The text around a question."""
        from_file = self.path is not None and not self.chat
        return self.prompt_template or ("Question: {question}\nAnswer:" if from_file else "{question}")
