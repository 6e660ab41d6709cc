"""The tasks and the tokenizer of a run, and the order in which tasks are drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsm_train.data.arithmetic import arithmetic_tasks
from dsm_train.data.config import DataConfig
from dsm_train.data.jsonl import read_jsonl
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Tasks:
    """Training and held-out tasks, which share no question."""

    train: tuple[Task, ...]
    heldout: tuple[Task, ...]


def load_tasks(config: DataConfig) -> Tasks:
    """Generate or read the tasks; raises `ValueError` with the place and the remedy."""
    if config.path is None:
        train = arithmetic_tasks(config.kinds, "train", count=config.train_tasks, seed=config.seed, style=config.style)
        heldout = arithmetic_tasks(
            config.kinds, "heldout", count=config.heldout_tasks, seed=config.seed, style=config.style
        )
        return Tasks(tuple(train), tuple(heldout))
    tasks = read_jsonl(config.path, prompt_template=config.prompt_template)
    random.Random(config.seed).shuffle(tasks)
    if config.heldout_path is not None:
        heldout = read_jsonl(config.heldout_path, prompt_template=config.prompt_template)[: config.heldout_tasks]
    else:
        if len(tasks) <= config.heldout_tasks:
            raise ValueError(
                f"data.heldout_tasks = {config.heldout_tasks} leaves nothing to train on: {config.path} has "
                f"{len(tasks)} tasks; lower it or give data.heldout_path"
            )
        tasks, heldout = tasks[config.heldout_tasks :], tasks[: config.heldout_tasks]
    asked = {task.prompt for task in heldout}
    train = [task for task in tasks if task.prompt not in asked][: config.train_tasks]
    if not train:
        raise ValueError(f"every task of {config.path} is held out as well; give another data.heldout_path")
    return Tasks(tuple(train), tuple(heldout))


def make_tokenizer(config: DataConfig, init: Path | None, tasks: Sequence[Task]) -> Tokenizer:
    """The tokenizer that was asked for, that of the weights to start from, or one trained on the training tasks."""
    path = config.tokenizer or init
    if path is not None:
        return load_tokenizer(path)
    return train_tokenizer((text for t in tasks for text in (t.prompt, t.solution or t.answer)), config.vocab_size)


def solved(tasks: Sequence[Task], count: int | None) -> list[Task]:
    """The first `count` tasks with a worked solution, which supervised training learns from; None: all."""
    return [task for task in tasks if task.solution is not None][:count]


def occurrences(tasks: Sequence[Task]) -> list[int]:
    """How often each task came before among `tasks`: what tells apart the groups of a task that a stage draws twice."""
    seen: Counter[int] = Counter()
    counts = []
    for task in tasks:
        counts.append(seen[task.id])
        seen[task.id] += 1
    return counts


def draw(tasks: Sequence[Task], count: int, step: int, seed: int) -> list[Task]:
    """The tasks of one step: the next `count` of endless shuffled passes, a function of its arguments."""
    orders: dict[int, list[int]] = {}
    drawn = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(tasks))
        if epoch not in orders:
            orders[epoch] = list(range(len(tasks)))
            random.Random(f"{seed}/{epoch}").shuffle(orders[epoch])
        drawn.append(tasks[orders[epoch][index]])
    return drawn
