"""Examples of supervised training: tokenised once, kept in flat arrays, and dealt to optimizer steps.

E examples, N tokens of all examples, S examples of a batch, T their tokens from the first learnt one on.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from dsm_train.data.format import Example, Format
from dsm_train.data.source import draw
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
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
    """True where a token is learnt; the last token of an example always is."""
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
        """Select these examples, in this order, as groups of one; and learnt_T, True where a token is learnt."""
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
                left_out.longest, left_out.where = packed, _place(task)
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
        f"{limit.name} = {limit.tokens} is less than prompt and solution of {_place(task)}, {packed} tokens: raise it, "
        f"or leave such examples out with data.too_long=skip: {task.question[:60]!r}..."
    )


def _place(task: Task) -> str:
    return f"task {task.id}, {task.place}" if task.place else f"task {task.id}"


def _tensor(values: array[int] | bytearray, dtype: torch.dtype) -> Tensor:
    """Make a tensor of the same memory."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


@dataclass(frozen=True)
class Course:
    """Supervised training as it was prepared: examples, and those that each optimizer step takes.

    Steps take the next examples of one endless line, a shuffled pass after the other; whichever step is asked for, its
    examples are a function of the seed and the step.
    """

    examples: Examples
    heldout: Examples
    """Held-out examples, for the validation loss; there may be none."""
    cuts: Sequence[int]
    """Positions in the line at which steps begin, and the last one ends [steps + 1]."""
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.cuts) - 1

    @property
    def epochs(self) -> float:
        """Passes over the examples."""
        return self.cuts[-1] / len(self.examples)

    def batch(self, step: int) -> tuple[Sequences, Tensor]:
        """Look up the examples of a step (from 0), of all data-parallel ranks, as `Examples.take` gives them."""
        count = len(self.examples)
        places = (divmod(position, count) for position in range(self.cuts[step], self.cuts[step + 1]))
        index_E = torch.tensor([_order(count, epoch, self.seed)[index] for epoch, index in places])
        return self.examples.take(index_E)


def course_notes(course: Course, tokenizer: Tokenizer) -> list[str]:
    """Say what is trained on: counts, what is left out, and the first example with its learnt tokens marked."""
    train, heldout = course.examples, course.heldout
    lines = [
        f"supervised training: {len(train):,} examples of {len(train.token_N):,} tokens, {int(train.learnt_N.sum()):,} "
        f"of them learnt; {course.steps:,} steps, {course.epochs:.3g} epochs; {len(heldout):,} held-out examples"
    ]
    for name, side in (("training", train.left_out), ("held-out", heldout.left_out)):
        if side.too_long:
            among = side.too_long + side.unlearnt + len(train if name == "training" else heldout)
            lines.append(
                f"data.too_long = skip: {side.too_long:,} of {among:,} {name} examples are left out; the longest "
                f"has {side.longest:,} tokens ({side.where})"
            )
        if side.unlearnt:
            lines.append(f"{side.unlearnt:,} {name} examples without a token to learn are left out")
    return [*lines, f"the first example, what is learnt in [[ ]]:\n{_shown(train.first, tokenizer)}"]


def _shown(example: Example, tokenizer: Tokenizer) -> str:
    """Decode an example, with the runs of learnt tokens in double brackets."""
    runs = [tokenizer.decode(example.prompt)]
    for learnt, run in groupby(zip(example.learnt, example.response, strict=True), key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in run])
        runs.append(f"[[{text}]]" if learnt else text)
    return "".join(runs)


def cut_steps(size_E: Tensor, budget: int, seed: int, *, steps: int | None, epochs: float | None) -> Sequence[int]:
    """Cut the line of examples into optimizer steps of at most `budget` in size, for so many steps or so many epochs.

    size_E: what each example takes of the budget, at most all of it. A part of an epoch is rounded to examples. The
    last step of `epochs` takes what is left.
    """
    count = len(size_E)
    total = None if epochs is None else max(1, round(epochs * count))
    ends = array("q", [0])  # ends[i] is the size of the line's first i examples
    cuts = array("q", [0])
    while len(cuts) - 1 != steps and cuts[-1] != total:
        limit = ends[cuts[-1]] + budget
        while ends[-1] <= limit and (total is None or len(ends) <= total):
            order = torch.tensor(_order(count, (len(ends) - 1) // count, seed))
            ends.extend(accumulate(size_E[order].tolist(), initial=ends.pop()))
        end = bisect_right(ends, limit) - 1
        cuts.append(end if total is None else min(end, total))
    return cuts


@lru_cache(maxsize=4)
def _order(count: int, epoch: int, seed: int) -> array[int]:
    """Order of the examples in a pass: that of `draw`."""
    return array("i", draw(range(count), count, epoch, seed))
