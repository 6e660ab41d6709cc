"""The tasks and the tokenizer of a stage, and the order in which tasks are drawn."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsm_train.data.arithmetic import arithmetic_tasks, count_tasks
from dsm_train.data.config import DataConfig
from dsm_train.data.format import ChatFormat, Format, PlainFormat
from dsm_train.data.jsonl import read_jsonl
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

HELDOUT_TASKS, VOCAB_SIZE = 500, 320
"""Held-out tasks, and entries of a trained tokenizer, where the configuration leaves them open."""


@dataclass(frozen=True)
class Tasks:
    """Training and held-out tasks, which share no question."""

    train: tuple[Task, ...]
    heldout: tuple[Task, ...]


def load_tasks(config: DataConfig) -> Tasks:
    """Generate or read the tasks; raises `ValueError` with the place and the remedy."""
    if config.path is not None:
        return _from_files(config, config.path)
    if config.source == "file":
        raise ValueError("data.path must be given, since data.source is file: add data.path=FILE.jsonl")
    count = config.heldout_tasks or min(HELDOUT_TASKS, count_tasks(config.kinds, "heldout"))
    options = {"seed": config.seed, "style": config.style}
    train = arithmetic_tasks(config.kinds, "train", count=config.train_tasks, **options)
    return Tasks(tuple(train), tuple(arithmetic_tasks(config.kinds, "heldout", count=count, **options)))


def _from_files(config: DataConfig, path: Path) -> Tasks:
    """Split a file by a hash of the question, or take the held-out tasks from a file of their own."""
    tasks = read_jsonl(path)
    if config.heldout_path is not None:
        heldout = read_jsonl(config.heldout_path)
        kept_out = heldout
    else:
        count = config.heldout_tasks or min(HELDOUT_TASKS, max(1, len(tasks) // 10))
        heldout = kept_out = sorted(tasks, key=_place)[:count]
    asked = {task.key for task in kept_out}  # all of them, evaluated or not
    train = [task for task in tasks if task.key not in asked]
    if not train:
        remedy = (
            "give another" if config.heldout_path else f"{path} has {len(tasks)}: lower data.heldout_tasks, or give"
        )
        raise ValueError(f"the {len(heldout)} held-out tasks leave nothing to train on; {remedy} data.heldout_path")
    if len(train) < (config.train_tasks or 1):
        raise ValueError(
            f"data.train_tasks = {config.train_tasks}, and {path} has {len(train)} that are not held out: lower it"
        )
    random.Random(config.seed).shuffle(train)
    return Tasks(tuple(train[: config.train_tasks]), tuple(heldout[: config.heldout_tasks]))


def _place(task: Task) -> tuple[bytes, int]:
    """Sort key by a hash of the question: the same order for every seed, template and file."""
    return hashlib.sha256(task.key.encode()).digest(), task.id


def without_too_long(tasks: Tasks, format: Format, longest: int, *, answered: bool = True) -> tuple[Tasks, str | None]:
    """Leave out the tasks whose prompt has more than `longest` tokens; returns those left, and the line that says so.

    answered: training tasks are, too; supervised training reads them, and answers held-out ones alone.
    Raises `ValueError` when none is left on one side.
    """

    def fitting(side: Sequence[Task]) -> tuple[Task, ...]:
        return tuple(task for task in side if len(format.prompt(task)) <= longest)

    left = Tasks(fitting(tasks.train) if answered else tasks.train, fitting(tasks.heldout))
    skipped = [len(tasks.train) - len(left.train), len(tasks.heldout) - len(left.heldout)]
    if not left.train or not left.heldout:
        raise ValueError(
            f"every prompt of the {'held-out' if left.train else 'training'} tasks has more than {longest} tokens: "
            "raise model.max_length and run.max_tokens, or lower sampling.max_new_tokens"
        )
    if not any(skipped):
        return tasks, None
    return left, (
        f"data.too_long = skip: {skipped[0]} of {len(tasks.train)} training tasks and {skipped[1]} of "
        f"{len(tasks.heldout)} held-out tasks are left out, whose prompts have more than {longest} tokens"
    )


def make_tokenizer(config: DataConfig, init: Path | None, tasks: Sequence[Task]) -> Tokenizer:
    """Load the tokenizer that was asked for or that of the weights to start from, or train one on the training tasks.

    Raises `ValueError` for a tokenizer that cannot be read, and for data.vocab_size below that of the weights'.
    """
    path = config.tokenizer or init
    if path is None:
        prompts = (config.template.replace("{question}", t.question) for t in tasks)
        texts = (text for prompt, t in zip(prompts, tasks, strict=True) for text in (prompt, t.solution or t.answer))
        return train_tokenizer(texts, config.vocab_size or VOCAB_SIZE)
    tokenizer = load_tokenizer(path)
    if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"data.vocab_size = {config.vocab_size} cannot be heeded: the tokenizer of {path} has "
            f"{tokenizer.vocab_size} tokens; set data.vocab_size=null"
        )
    return tokenizer


def make_format(config: DataConfig, tokenizer: Tokenizer) -> Format:
    """Choose the form in which the model is asked; raises `ValueError` for a chat template that cannot render it."""
    if not config.chat:
        return PlainFormat(tokenizer, config.template)
    chat = ChatFormat(tokenizer, config.template, config.system)
    chat.check()
    return chat


def repetition_note(tasks: Sequence[Task], prompts_per_step: int) -> str | None:
    """Say that a step asks questions more than once, where there are fewer than it needs; None where it does not."""
    if len(tasks) >= prompts_per_step:
        return None
    times = prompts_per_step / len(tasks)
    return (
        f"{len(tasks)} training tasks for algorithm.prompts_per_step = {prompts_per_step}: each is asked {times:.3g} "
        "times a step, in groups of their own"
    )


def solved(tasks: Sequence[Task], count: int | None) -> list[Task]:
    """Select the first `count` tasks with a worked solution, for supervised training; None: all."""
    return [task for task in tasks if task.solution is not None][:count]


def occurrences(tasks: Sequence[Task]) -> list[int]:
    """Count how often each task came before among `tasks`, so that a task drawn twice gets two different groups."""
    seen: Counter[int] = Counter()
    counts = []
    for task in tasks:
        counts.append(seen[task.id])
        seen[task.id] += 1
    return counts


def draw(tasks: Sequence[Task], count: int, step: int, seed: int) -> list[Task]:
    """Draw the tasks of one step: the next `count` of endless shuffled passes, a function of the arguments alone."""
    orders: dict[int, list[int]] = {}
    drawn = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(tasks))
        if epoch not in orders:
            orders[epoch] = list(range(len(tasks)))
            random.Random(f"{seed}/{epoch}").shuffle(orders[epoch])
        drawn.append(tasks[orders[epoch][index]])
    return drawn
