"""The tasks and the tokenizer of a stage."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsm_train.config import require
from dsm_train.data.arithmetic import arithmetic_tasks, count_tasks
from dsm_train.data.config import DataConfig
from dsm_train.data.files import read_tasks
from dsm_train.data.format import ChatFormat, Format, PlainFormat
from dsm_train.data.order import shares
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from dsm_train.rewards.grader import Grader

HELDOUT_TASKS, VOCAB_SIZE = 500, 320
"""Held-out tasks, and entries of a trained tokenizer, where the configuration leaves them open."""


@dataclass(frozen=True)
class Tasks:
    """Training and held-out tasks, which share no question."""

    train: tuple[Task, ...]
    heldout: tuple[Task, ...]
    notes: tuple[str, ...] = ()
    """Lines about them that the user should read at start."""


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


def _from_files(config: DataConfig, paths: Sequence[Path]) -> Tasks:
    """Split the files by a hash of the question, or take the held-out tasks from files of their own."""
    tasks = _read(paths, config, "data.path")
    if config.heldout_path is not None:
        heldout = kept_out = _read(config.heldout_path, config, "data.heldout_path")
        require(
            len(heldout) >= (config.heldout_tasks or 1),
            "data.heldout_tasks",
            f"at most {len(heldout)}, the number of tasks in {_names(config.heldout_path)}",
            config.heldout_tasks,
        )
    else:
        count = config.heldout_tasks or min(HELDOUT_TASKS, max(1, len(tasks) // 10))
        heldout = kept_out = sorted(tasks, key=_place)[:count]
    asked = {task.key for task in kept_out}  # all of them, evaluated or not
    train = [task for task in tasks if task.key not in asked]
    if not train:
        remedy = (
            "give another"
            if config.heldout_path
            else f"{_names(paths)} has {len(tasks)}: lower data.heldout_tasks, or give"
        )
        raise ValueError(f"the {len(heldout)} held-out tasks leave nothing to train on; {remedy} data.heldout_path")
    if len(train) < (config.train_tasks or 1):
        raise ValueError(
            f"data.train_tasks = {config.train_tasks}, and {_names(paths)} has {len(train)} that are not held out: "
            "lower it"
        )
    random.Random(config.seed).shuffle(train)
    train = train[: config.train_tasks]
    repeated = _repeated(train)
    notes = (f"{repeated} training tasks ask a question of another file as well; all are kept",) if repeated else ()
    return Tasks(tuple(train), tuple(heldout[: config.heldout_tasks]), notes)


def _read(paths: Sequence[Path], config: DataConfig, key: str) -> list[Task]:
    """Read all tasks of the files that the configuration names under `key`."""
    try:
        return [task for file, path in enumerate(paths) for task in read_tasks(path, config, file)]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def check_shares(train: Sequence[Task], config: DataConfig) -> None:
    """Raise `ValueError` for a file with a weight of which nothing would be drawn.

    train: what is left to train on, once tasks are held out and left out.
    """
    sizes = Counter(task.file for task in train)
    for file, path in enumerate(config.path if config.path and config.weights else ()):
        if not sizes[file]:
            raise ValueError(
                f"data.weights: no task of {path} is left to train on, all are held out or left out: leave the file out"
            )
        if not shares(len(train), config.weights)[file]:
            raise ValueError(
                f"data.weights = {list(config.weights)} draw less than one task of {path} in {len(train)}: "
                "raise its weight"
            )


def _repeated(tasks: Sequence[Task]) -> int:
    """Count the tasks whose question stands in an earlier file."""
    first: dict[str, int] = {}
    for task in tasks:
        first[task.key] = min(task.file, first.get(task.key, task.file))
    return sum(task.file != first[task.key] for task in tasks)


def _place(task: Task) -> tuple[bytes, int]:
    """Sort key by a hash of the question: the same order for every seed, template and file."""
    return hashlib.sha256(task.key.encode()).digest(), task.id


def readable(tasks: Sequence[Task], grader: Grader) -> list[Task]:
    """Select the tasks whose gold answer a reward can read."""
    return [task for task in tasks if grader.unreadable(task) is None]


def unreadable_note(tasks: Sequence[Task], grader: Grader) -> str | None:
    """Say on how many held-out tasks accuracy is measured, where no reward can read the gold answers of all."""
    kept = len(readable(tasks, grader))
    if kept == len(tasks):
        return None
    return f"accuracy is measured on {kept} of {len(tasks)} held-out tasks: no reward can read the others' gold answer"


def without_unreadable(tasks: Tasks, grader: Grader, sides: Sequence[str], skip: bool) -> tuple[Tasks, str | None]:
    """Leave out the tasks of these sides (train, heldout) whose gold answer no reward can read, and say so in a line.

    Raises `ValueError` with the first one unless `skip`, and where none is left.
    """
    left, said = tasks, []
    for side in sides:
        asked: tuple[Task, ...] = getattr(tasks, side)
        kept = tuple(readable(asked, grader))
        if len(kept) == len(asked):
            continue
        # in the order of the files, not in that of drawing
        first = min((task for task in asked if grader.unreadable(task) is not None), key=lambda task: task.id)
        name = "training" if side == "train" else "held-out"
        count = f"{len(asked) - len(kept)} of {len(asked)} {name} tasks"
        if not skip or not kept:
            remedy = (
                "correct them, or leave them out with data.unreadable=skip"
                if kept
                else "choose rewards.functions that read them"
            )
            raise ValueError(f"{first.label}: {grader.unreadable(first)}; no reward can read {count}: {remedy}")
        left = replace(left, **{side: kept})
        said.append(f"{count}, the first at {first.label}: {grader.unreadable(first)}")
    if not said:
        return tasks, None
    return left, f"data.unreadable = skip: left out are {'; and '.join(said)}"


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


def split_note(config: DataConfig) -> str | None:
    """Say that held-out tasks cut from the training file are unseen only where training cut off as many."""
    if config.path is None or config.heldout_path is not None:
        return None
    return (
        f"the held-out tasks are a part of {_names(config.path)}: training on it must have held out as many "
        "(data.heldout_tasks), or it has seen some of them"
    )


def repetition_note(tasks: Sequence[Task], prompts_per_step: int) -> str | None:
    """Say that a step asks questions more than once, where there are fewer than it needs; None where it does not."""
    if len(tasks) >= prompts_per_step:
        return None
    times = prompts_per_step / len(tasks)
    return (
        f"{len(tasks)} training tasks for algorithm.prompts_per_step = {prompts_per_step}: each is asked {times:.3g} "
        "times a step, in groups of their own"
    )
