"""The order in which tasks are drawn: endless passes, each shuffled anew, over all files or by weights."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from dsm_train.data.tasks import Task

Order = Callable[[int], Sequence[int]]
"""Indices that a pass draws, in their order, by the number of the pass; every pass is as long as there are tasks."""


def draw(tasks: Sequence[Task], order: Order, count: int, step: int) -> list[Task]:
    """Draw the tasks of one step: the next `count` of the endless passes, a function of the arguments alone."""
    places = (divmod(position, len(tasks)) for position in range(step * count, (step + 1) * count))
    return [tasks[order(number)[index]] for number, index in places]


def order_of(files: Sequence[int], seed: int, weights: Sequence[float] = ()) -> Order:
    """Order the passes over items of these files.

    weights: share of each file; none: a pass draws every item once. With weights a pass is shared out among the files
    (largest remainder), and each file goes on in endless shuffled passes of its own.
    """
    members: dict[int, list[int]] = {}
    for index, file in enumerate(files):
        members.setdefault(file, []).append(index)
    mixed = bool(weights) and len(members) > 1
    present = sorted(members)
    parts = shares(len(files), [weights[file] for file in present]) if mixed else []

    @lru_cache(maxsize=4)
    def order(number: int) -> Sequence[int]:
        indices = list(range(len(files)))
        if mixed:
            indices = [
                index
                for file, part in zip(present, parts, strict=True)
                for index in _stretch(members[file], range(number * part, (number + 1) * part), f"{seed}/{file}")
            ]
        random.Random(f"{seed}/{number}").shuffle(indices)
        return array("i", indices)

    return order


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Share a total out by weight, in whole numbers: the largest remainders get what rounding down leaves."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (parts[index] - exact[index], index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def occurrences(tasks: Sequence[Task]) -> list[int]:
    """Count how often each task came before among `tasks`, so that a task drawn twice gets two different groups."""
    seen: Counter[int] = Counter()
    counts = []
    for task in tasks:
        counts.append(seen[task.id])
        seen[task.id] += 1
    return counts


def _stretch(members: Sequence[int], positions: range, seed: str) -> list[int]:
    """Cut a stretch out of the endless shuffled passes of a file."""
    passes: dict[int, list[int]] = {}
    for number in {position // len(members) for position in positions}:
        passes[number] = list(members)
        random.Random(f"{seed}/{number}").shuffle(passes[number])
    return [passes[position // len(members)][position % len(members)] for position in positions]
