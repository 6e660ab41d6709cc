"""The course of supervised training: which examples each optimizer step takes, and what is said of it at start.

E examples, S examples of a batch, T their tokens from the first learnt one on.
"""

from __future__ import annotations

import sys
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dsm_train.config import ParallelConfig, SftTraining, check_warmup
from dsm_train.configs import GrpoConfig, StageConfig
from dsm_train.data.format import Format, shown
from dsm_train.data.order import Order, order_of
from dsm_train.data.source import Tasks, check_shares
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.examples import Examples, Limit, tokenise
from dsm_train.megatron import parallel
from dsm_train.types import Sequences

DEFAULT_STEPS, DEFAULT_BATCH = 500, 256
"""Optimizer steps, and examples in each, where the configuration leaves them open."""
PATIENCE = 5.0
"""Seconds of tokenisation after which it is said how far it is."""


@dataclass(frozen=True)
class Course:
    """Supervised training as it was prepared: examples, and those that each optimizer step takes.

    Steps take the next examples of one endless line, a shuffled pass after the other; whichever step is asked for, its
    examples are a function of the seed and the step.
    """

    examples: Examples
    heldout: Examples
    """Held-out examples, for the validation loss; there may be none."""
    order: Order
    cuts: Sequence[int]
    """Positions in the line at which steps begin, and the last one ends [steps + 1]."""

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
        return self.examples.take(torch.tensor([self.order(epoch)[index] for epoch, index in places]))


def course_notes(course: Course, tokenizer: Tokenizer) -> list[str]:
    """Say what is trained on: counts, what is left out, and the first example with its loss mask marked."""
    train, heldout = course.examples, course.heldout
    mark = "bold" if sys.stdout.isatty() else "⟦ ⟧"  # as `shown` has it
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
    return [*lines, f"the first example, its loss mask in {mark}:\n{shown(train.first, tokenizer)}"]


def cut_steps(size_E: Tensor, budget: int, order: Order, *, steps: int | None, epochs: float | None) -> Sequence[int]:
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
            index_E = torch.tensor(order((len(ends) - 1) // count))
            ends.extend(accumulate(size_E[index_E].tolist(), initial=ends.pop()))
        end = bisect_right(ends, limit) - 1
        cuts.append(end if total is None else min(end, total))
    return cuts


def plan(config: StageConfig, training: SftTraining, tasks: Tasks, format: Format) -> Course:
    """Tokenise the examples of supervised training, and deal them to optimizer steps.

    Raises `ValueError` where solutions are missing or too long, and for a batch that does not fit examples or replicas.
    """
    section = "warmup" if isinstance(config, GrpoConfig) else "sft"
    limits = [Limit("model.max_length", config.model.max_length), Limit("run.max_tokens", config.run.max_tokens)]
    if training.batch_tokens is not None:
        limits.append(Limit(f"{section}.batch_tokens", training.batch_tokens))
    limit, skip = min(limits, key=lambda limit: limit.tokens), config.data.too_long == "skip"
    train, heldout = (
        tokenise(with_solution(side), format, limit, prompt_loss=training.prompt_loss, skip=skip, count=count)
        for side, count in ((tasks.train, training.examples), (tasks.heldout[: config.eval.tasks], None))
    )
    if not len(train):
        if train.left_out.too_long:
            raise ValueError(f"every example has more tokens than {limit.name} = {limit.tokens}: raise it")
        raise ValueError(
            f"supervised training needs worked solutions, and {tasks.train[0].label} has none, like all others: write "
            "them before '#### answer', or name their field with data.solution_field"
            + (", or leave the warm-up out with warmup.steps=0" if section == "warmup" else "")
        )
    if section == "sft":  # a warm-up may do without files that have no solutions
        check_shares(train.tasks, config.data)
    if training.batch_tokens is None:
        size_E, budget = torch.ones_like(train.given_E), training.batch or DEFAULT_BATCH
    else:
        size_E, budget = train.packed_E, training.batch_tokens
        check_batch_tokens(config.parallel, f"{section}.batch_tokens", budget, int(size_E.max()))
    steps = None if training.epochs else training.steps or DEFAULT_STEPS
    order = order_of([task.file for task in train.tasks], config.run.seed, config.data.weights)
    cuts = cut_steps(size_E, budget, order, steps=steps, epochs=training.epochs)
    check_warmup(training.optim, len(cuts) - 1, "steps", section)
    return Course(train, heldout, order, cuts)


def check_batch_tokens(layout: ParallelConfig, name: str, budget: int, longest: int) -> None:
    """Raise `ValueError` unless every step has an example for each data-parallel replica."""
    replicas = max(1, layout.replicas(parallel.world_size()))
    if budget < replicas * longest:
        raise ValueError(
            f"{name} must be at least data-parallel replicas x tokens of the longest example = {replicas} x {longest} "
            f"= {replicas * longest}; got {budget}"
        )


def with_solution(tasks: Sequence[Task]) -> Iterator[Task]:
    """Yield the tasks with a solution; the main rank says how far it is where that takes long."""
    said = time.perf_counter()
    for done, task in enumerate(tasks):
        if task.solution is not None:
            yield task
        if time.perf_counter() - said > PATIENCE and parallel.rank() == 0:
            said = time.perf_counter()
            print(f"tokenised {done + 1:,} of {len(tasks):,} tasks", file=sys.stderr, flush=True)
