"""Formats of tasks: the prompt that a model reads, and the example of supervised training."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from dsm_train.data.special import Escape
from dsm_train.data.tasks import Message, Task
from dsm_train.data.tokenizer import Tokenizer

_ROLE = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Example:
    """A task with its solution, as supervised training reads it."""

    prompt: list[int]
    """Tokens that are given."""
    response: list[int]
    """Tokens that follow."""
    learnt: list[bool]
    """Loss mask: True where a token of `response` is learnt."""


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
    """Text with {question} in it; it may hold braces of its own, as in "\\boxed{}", and special tokens."""

    def prompt(self, task: Task) -> list[int]:
        """Tokens of the prompt, which a response continues."""
        rendered, _, escape = self._rendered(task)
        return self._begun(escape.encode(rendered).ids)

    def text(self, task: Task) -> str:
        """Text of the prompt, for people."""
        if task.turns:
            raise ValueError(f"{task.label} has earlier turns, and a plain prompt holds none: set data.chat=true")
        return self.template.replace("{question}", task.question)

    def example(self, task: Task) -> Example:
        """Prompt and solution."""
        prompt, response = self.tokenizer.encode_pair(*self._rendered(task))
        response.append(self.tokenizer.eos_id)
        return Example(self._begun(prompt), response, [True] * len(response))

    def _rendered(self, task: Task) -> tuple[str, str, Escape]:
        self.text(task)  # raises for earlier turns
        solution = task.solution or ""
        escape = self.tokenizer.escape([self.template, task.question, solution])
        return self.template.replace("{question}", escape.hide(task.question)), escape.hide(solution), escape

    def _begun(self, ids: list[int]) -> list[int]:
        """Begin as the model expects, unless the template does."""
        begin = self.tokenizer.bos_ids
        return ids if ids[: len(begin)] == begin else begin + ids


@dataclass(frozen=True)
class ChatFormat:
    """A conversation in the model's own chat template: question and solution are messages of user and assistant."""

    tokenizer: Tokenizer
    template: str
    """The user's message, with {question} in it."""
    system: str | None = None
    """System prompt of conversations that have none."""

    def prompt(self, task: Task) -> list[int]:
        """Tokens of the prompt, which a response continues."""
        messages, escape = self._conversation(task)
        return escape.encode(self._render(messages, task, ask=True)).ids

    def text(self, task: Task) -> str:
        """Text of the prompt, for people."""
        messages, escape = self._conversation(task)
        return escape.shown(self._render(messages, task, ask=True))

    def example(self, task: Task) -> Example:
        """Conversation up to its first answer, and the rest, in which the assistant's turns are learnt.

        A turn is learnt from the end of its prompt to its first stop token. The last one may close with none, and then
        the end token follows.
        """
        messages, escape = self._conversation(task)
        messages.append(Message("assistant", escape.hide(task.solution or "")))
        whole = self._render(messages, task, ask=False)
        starts = [
            self._start(messages[:i], whole, task, escape) for i, m in enumerate(messages) if m.role == "assistant"
        ]
        before, heads, response, learnt = whole[: starts[0]], [], [], []
        for start, limit in zip(starts, [*starts[1:], len(whole)], strict=True):
            end, closing = self._end(whole, start, limit, escape)
            if start != starts[-1] and not (closing and self._closes_turns):
                raise ValueError(
                    f"{task.label} has several answers, and the chat template closes an earlier one with no stop "
                    f"token ({', '.join(self._stop_tokens)}): add the token that it writes there to eos_token_id of "
                    "generation_config.json"
                )
            head, answer = self.tokenizer.encode_pair(before, whole[start:end], escape)
            if not closing:
                answer.append(self.tokenizer.eos_id)
            _, rest = self.tokenizer.encode_pair(closing, whole[end:limit], escape)
            heads.append(head)
            response += answer + rest
            learnt += [True] * len(answer) + [False] * len(rest)
            before = closing + whole[end:limit]
        return Example(heads[0], response, learnt)

    def check(self) -> None:
        """Raise `ValueError` for a template that cannot render a question and its answer."""
        if not self.tokenizer.has_chat_template:
            raise ValueError(
                "data.chat needs a chat template, and the tokenizer has none: give the Hugging Face folder of a model "
                "that chats (data.tokenizer), put chat_template.jinja into it, or set data.chat=false"
            )
        task = Task(0, "How much is 3 + 4?", solution="Three and four make seven.", place="data.chat")
        messages, _ = self._conversation(task)
        answer = Message("assistant", task.solution or "")
        if answer.content not in self._render([*messages, answer], task, ask=False):
            raise ValueError(
                "the chat template leaves the assistant's turns out: add a branch for the role 'assistant' to it"
            )

    def _conversation(self, task: Task) -> tuple[list[Message], Escape]:
        """Collect the messages up to the question, without special tokens in their texts."""
        turns = list(task.turns)
        if self.system is not None and not (turns and turns[0].role in ("system", "developer")):
            turns.insert(0, Message("system", self.system))
        for turn in turns:
            if not _ROLE.fullmatch(turn.role):
                raise ValueError(f"{task.label} has a turn of role {turn.role!r}: write user, assistant, ...")
        texts = [self.template, task.question, task.solution or "", *(turn.content for turn in turns)]
        escape = self.tokenizer.escape(texts)
        messages = [Message(turn.role, escape.hide(turn.content)) for turn in turns]
        question = self.template.replace("{question}", escape.hide(task.question))
        return [*messages, Message("user", question)], escape

    def _render(self, messages: Sequence[Message], task: Task, *, ask: bool) -> str:
        try:
            return self.tokenizer.render(messages, ask=ask)
        except ValueError as error:
            raise ValueError(f"{task.label}: {error}") from error

    def _start(self, messages: Sequence[Message], whole: str, task: Task, escape: Escape) -> int:
        """Find where the answer to these messages begins in the rendered conversation."""
        asked = self._render(messages, task, ask=True)
        if whole.startswith(asked):
            return len(asked)
        common = len(os.path.commonprefix([asked, whole]))
        prompt, trained = (escape.shown(text[max(0, common - 20) : common + 20]) for text in (asked, whole))
        raise ValueError(
            f"{task.label}: the chat template asks with ...{prompt!r}... and writes ...{trained!r}... once the "
            "answer follows: the model would train on a prompt that it is never given; correct the template"
        )

    def _end(self, whole: str, start: int, limit: int, escape: Escape) -> tuple[int, str]:
        """Find the end of an answer, and the stop token that closes it; the limit and "" where none does."""
        found = (match for match in escape.special(whole, start, limit) if match[0] in self._stop_tokens)
        closing = next(found, None)
        return (limit, "") if closing is None else (closing.end(), closing[0])

    @cached_property
    def _stop_tokens(self) -> list[str]:
        return [self.tokenizer.token(id_) for id_ in self.tokenizer.stop_ids]

    @cached_property
    def _closes_turns(self) -> bool:
        """Tell whether a stop token stands between an answer and the next question."""
        answer = "Three and four make seven."
        task = Task(0, "And 5 + 6?", turns=(Message("user", "How much is 3 + 4?"), Message("assistant", answer)))
        messages, escape = self._conversation(task)
        rendered = self._render(messages, task, ask=True)
        start = rendered.find(answer) + len(answer)
        return self._end(rendered, start, rendered.rfind(task.question), escape)[1] != ""


def shown(example: Example, tokenizer: Tokenizer) -> str:
    """Write an example for people: special tokens in sight, control characters escaped, and its loss mask marked.

    The mark is bold type on a terminal, and the brackets ⟦ ⟧ elsewhere.
    """
    begin, end = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    ids, learnt = example.prompt + example.response, [False] * len(example.prompt) + example.learnt
    edges = [i for i in range(1, len(ids)) if learnt[i] != learnt[i - 1]]
    parts, text = [], ""
    for first, last in zip([0, *edges], [*edges, len(ids)], strict=True):
        # The text of a part alone would lack the blank before its first word, with some tokenizers.
        whole = tokenizer.decode_all(ids[:last])
        part = whole.removeprefix(text) if whole.startswith(text) else tokenizer.decode_all(ids[first:last])
        parts.append(f"{begin}{_readable(part)}{end}" if learnt[first] else _readable(part))
        text = whole
    return "".join(parts)


def _readable(text: str) -> str:
    """Escape what cannot be seen; a line break is written out, and stays."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join("\\n\n" if c == "\\n" else c for c in escaped)
