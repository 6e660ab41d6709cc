"""Examples of supervised training: tokenised once, kept in flat arrays, and dealt to optimizer steps.

E examples, N tokens of all examples, S examples of a batch, T their tokens from the first learnt one on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsm_train.data.format import Example, Format
from dsm_train.data.tasks import Task
from dsm_train.types import Sequences, offsets, spans


@dataclass(frozen=True)
class Limit:
    """Longest example, in packed tokens, and the key that says so."""

    name: str
    tokens: int


@dataclass
class LeftOut:
    """Counts of the examples that are not trained on."""

    too_long: int = 0
    longest: int = 0
    """Packed tokens of the longest of them."""
    where: str = ""
    """The longest one's task."""
    unlearnt: int = 0
    """Examples without a token to learn."""


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, packed one after the other; on the CPU."""

    tasks: Sequence[Task]
    """Task of each example."""
    token_N: Tensor
    """Tokens, int32."""
    learnt_N: Tensor
    """Loss mask: True where a token is learnt; the last token of an example always is."""
    cu: Tensor
    """Offsets of the examples [E + 1], int64."""
    given_E: Tensor
    """Number of tokens before the first learnt one, at least 1."""
    left_out: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def first(self) -> Example:
        """The first example."""
        token, learnt, given = (x[: int(self.cu[1])].tolist() for x in (self.token_N, self.learnt_N, self.given_E))
        return Example(token[: given[0]], token[given[0] :], learnt[given[0] :])

    @property
    def packed_E(self) -> Tensor:
        """Packed tokens of each example: its last token predicts nothing."""
        return self.cu.diff() - 1

    def take(self, index_E: Tensor) -> tuple[Sequences, Tensor]:
        """Select these examples, in this order, as groups of one; and learnt_T, their loss mask."""
        begin_S, given_S = self.cu[index_E], self.given_E[index_E]
        rest_S = self.cu[index_E + 1] - begin_S - given_S
        row_T = spans(begin_S + given_S, rest_S)
        sequences = Sequences(
            self.token_N[spans(begin_S, given_S)].long(),
            offsets(given_S.tolist()),
            self.token_N[row_T].long(),
            offsets(rest_S.tolist()),
            torch.arange(len(index_E) + 1, dtype=torch.int32),
        )
        return sequences, self.learnt_N[row_T]


def tokenise(
    tasks: Iterable[Task], format: Format, limit: Limit, *, prompt_loss: bool, skip: bool, count: int | None = None
) -> Examples:
    """Tokenise the first `count` tasks that have something to learn (None: all), tokens in flat arrays.

    Raises `ValueError` with the first example that is longer than the limit, unless `skip`: such ones are left out.
    """
    token, learnt, cu, given = array("i"), bytearray(), array("q", [0]), array("q")
    kept: list[Task] = []
    left_out = LeftOut()
    for task in tasks:
        example = learnable(format.example(task), prompt_loss)
        if example is None:
            left_out.unlearnt += 1
            continue
        if (packed := len(example.prompt) + len(example.response) - 1) > limit.tokens:
            if not skip:
                raise ValueError(_too_long(task, packed, limit))
            left_out.too_long += 1
            if packed > left_out.longest:
                left_out.longest, left_out.where = packed, task.label
            continue
        token.extend(example.prompt + example.response)
        learnt.extend([False] * len(example.prompt) + example.learnt)
        cu.append(len(token))
        given.append(len(example.prompt))
        kept.append(task)
        if len(kept) == count:
            break
    return Examples(
        kept,
        _tensor(token, torch.int32),
        _tensor(learnt, torch.bool),
        _tensor(cu, torch.int64),
        _tensor(given, torch.int64),
        left_out,
    )


def learnable(example: Example, prompt_loss: bool) -> Example | None:
    """Split an example at its first learnt token, and end it with its last; None where no token is learnt.

    prompt_loss: all tokens are learnt. The first one never is: nothing predicts it.
    """
    token = example.prompt + example.response
    learnt = [False] * len(example.prompt) + example.learnt
    learnt = [False, *([True] * len(token) if prompt_loss else learnt)[1 : len(token)]]
    if True not in learnt:
        return None
    first, end = learnt.index(True), len(learnt) - learnt[::-1].index(True)
    return Example(token[:first], token[first:end], learnt[first:end])


def _too_long(task: Task, packed: int, limit: Limit) -> str:
    return (
        f"{limit.name} = {limit.tokens} is less than prompt and solution of {task.label}, {packed} tokens: raise it, "
        f"or leave such examples out with data.too_long=skip: {task.question[:60]!r}..."
    )


def _tensor(values: array[int] | bytearray, dtype: torch.dtype) -> Tensor:
    """Make a tensor of the same memory."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
