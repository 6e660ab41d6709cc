"""Preparation: what a stage works on is read, and what cannot work is refused, before any rank is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from dsm_train.config import ParallelConfig
from dsm_train.configs import EvaluateConfig, GrpoConfig, StageConfig
from dsm_train.course import DEFAULT_BATCH, Course, course_notes, plan
from dsm_train.data.format import Example, Format, shown
from dsm_train.data.order import Order, order_of
from dsm_train.data.source import (
    Tasks,
    check_shares,
    load_tasks,
    make_format,
    make_tokenizer,
    readable,
    repetition_note,
    split_note,
    unreadable_note,
    without_unreadable,
)
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.hf.folder import Pretrained, with_vocabulary
from dsm_train.megatron import parallel
from dsm_train.megatron.flash import core_attention
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import padded_vocab, uses_transformer_engine
from dsm_train.reporting.metrics import prepare_output
from dsm_train.rewards.grader import Grader
from dsm_train.rewards.worker import IMPORT_SECONDS
from dsm_train.rollout.config import SamplingConfig

ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class Questions:
    """Tasks, the tokenizer and the form in which the model reads them, and the grader of its answers."""

    tasks: Tasks
    tokenizer: Tokenizer
    format: Format
    grader: Grader
    order: Order
    """Passes over the training tasks."""
    source: Pretrained | None = None
    """Folder that the initial weights come from, as it was at the start."""
    course: Course | None = None
    """Supervised training; None for a stage without."""
    notes: tuple[str, ...] = ()
    """Lines about them that the user should read at start."""


def prepare(config: ConfigT, sampling: SamplingConfig | None) -> tuple[ConfigT, Questions]:
    """Read and check what the stage works on; raises `ValueError` with the remedy for what cannot work.

    sampling: how the stage answers its tasks; None: it does not. Returns the configuration with the model's shape as
    the initial weights have it.
    """
    source = None if config.run.init is None else Pretrained.of(config.run.init)
    if source is not None:
        config = replace(config, model=source.model(config.model, config.given))
        source.check_weights("language")
    tasks = load_tasks(config.data) if config.reads_tasks else Tasks((), ())
    tokenizer = make_tokenizer(config.data, config.run.init, tasks.train)
    format, grader = make_format(config.data, tokenizer), make_grader(config)
    config = replace(config, model=with_vocabulary(config.model, source, tokenizer.vocab_size, tokenizer.fingerprint()))
    check_layout(config)
    notes = [*try_rewards(config, tasks, grader), *tasks.notes]
    if source is not None:
        notes += [source.note(config.given), source.stops_note(tokenizer.stop_ids)]
    tasks, said = usable(config, sampling, tasks, format, grader)
    order = order_of([task.file for task in tasks.train], config.run.seed, config.data.weights)
    course = None if config.supervised is None else plan(config, config.supervised, tasks, format)
    notes += [*said, *stage_notes(config, tasks, format, tokenizer)]
    notes += [] if course is None else course_notes(course, tokenizer)
    told = tuple(note for note in notes if note is not None)
    return config, Questions(tasks, tokenizer, format, grader, order, source, course, told)


def check_layout(config: StageConfig) -> None:
    """Raise `ValueError` for a layout that does not fit ranks, model or batch, and for layers that are missing."""
    vocab = padded_vocab(HeadSpec.of(config.model).vocab_size, config.model.vocab_multiple, config.parallel.tp)
    parallel.check_layout(config.parallel, config.model, vocab)
    if config.supervised is not None and config.supervised.batch_tokens is None:
        check_batch(config.parallel, "the batch of supervised training", config.supervised.batch or DEFAULT_BATCH)
    uses_transformer_engine(config.model)
    core_attention(config.model)


def try_rewards(config: StageConfig, tasks: Tasks, grader: Grader) -> list[str]:
    """Try the user's reward functions on one task, on one rank of each machine; `ValueError` for one that fails.

    Returns notes about what they gave.
    """
    if not config.answers or parallel.local_rank() != 0:
        return []
    known = (*tasks.train, *tasks.heldout)
    return grader.try_functions(next((task for task in known if task.solution or task.answer), known[0]))


def usable(
    config: StageConfig, sampling: SamplingConfig | None, tasks: Tasks, format: Format, grader: Grader
) -> tuple[Tasks, list[str | None]]:
    """Refuse or leave out, as the configuration says, the tasks that cannot be graded or answered, with the lines."""
    if config.supervised is not None and "train" not in config.answers:
        # Supervised training learns from solutions, and grades where it can.
        unread = unreadable_note(tasks.heldout, grader)
        sampling = sampling if readable(tasks.heldout, grader) else None
    else:
        tasks, unread = without_unreadable(tasks, grader, config.answers, skip=config.data.unreadable == "skip")
    too_long = None
    if sampling is not None:
        tasks, too_long = without_too_long(config, sampling, tasks, format)
    if "train" in config.answers:
        check_shares(tasks.train, config.data)
    return tasks, [unread, too_long]


def without_too_long(
    config: StageConfig, sampling: SamplingConfig, tasks: Tasks, format: Format
) -> tuple[Tasks, str | None]:
    """Refuse the tasks to be answered whose prompt leaves no room, or leave them out with the line that counts them.

    Raises `ValueError` where none is left.
    """
    skipped = []
    room = min(config.model.max_length, config.run.max_tokens) - sampling.max_new_tokens
    if room < 1:
        limit, most = min(
            (("model.max_length", config.model.max_length), ("run.max_tokens", config.run.max_tokens)),
            key=lambda item: item[1],
        )
        raise ValueError(
            f"sampling.max_new_tokens = {sampling.max_new_tokens} leaves no room for a prompt in {limit} = {most}: "
            "lower the one or raise the other"
        )
    for side in config.answers:
        asked: Sequence[Task] = getattr(tasks, side)
        lengths = [len(format.prompt(task)) for task in asked]
        if config.data.too_long == "skip":
            name = "training" if side == "train" else "held-out"
            fitting = [(task, length) for task, length in zip(asked, lengths, strict=True) if length <= room]
            if asked and not fitting:
                raise ValueError(
                    f"every prompt of the {name} tasks has more than {room} tokens: raise model.max_length and "
                    "run.max_tokens, or lower sampling.max_new_tokens"
                )
            if len(fitting) < len(asked):
                skipped.append(f"{len(asked) - len(fitting)} of {len(asked)} {name} tasks")
            asked, lengths = [task for task, _ in fitting], [length for _, length in fitting]
            tasks = replace(tasks, **{side: tuple(asked)})
        check_lengths(config, sampling, asked, lengths)
    if not skipped:
        return tasks, None
    return tasks, (
        f"data.too_long = skip: {' and '.join(skipped)} are left out, whose prompts have more than {room} tokens"
    )


def stage_notes(config: StageConfig, tasks: Tasks, format: Format, tokenizer: Tokenizer) -> list[str | None]:
    """List what the user of this stage should know at start."""
    unused = None
    if tokenizer.has_chat_template and not config.data.chat:
        unused = (
            "the tokenizer has a chat template, and data.chat = false does not use it: the model is asked in plain text"
        )
    if isinstance(config, EvaluateConfig):
        return [unused, split_note(config.data)]
    if not isinstance(config, GrpoConfig):
        return [unused]
    first = shown(Example(format.prompt(tasks.train[0]), [], []), tokenizer)
    repetition = repetition_note(tasks.train, config.algorithm.prompts_per_step)
    counts = f"{len(tasks.train):,} training and {len(tasks.heldout):,} held-out tasks"
    return [unused, counts, repetition, *config.sampling.notes(), f"the first prompt:\n{first}"]


def make_grader(config: StageConfig) -> Grader:
    """Make the grader; functions of the user's are looked for in the current folder and in those of the recipes.

    Raises `ValueError` when other ranks would not wait for as long as the functions may take.
    """
    calls, limit, patience = config.rewards.calls, config.rewards.timeout_seconds, config.parallel.timeout_minutes
    longest = len(calls) * (limit + IMPORT_SECONDS) / 60
    if parallel.world_size() > 1 and longest > patience:
        raise ValueError(
            f"rewards.timeout_seconds = {limit:g} for each of {len(calls)} function(s), and {IMPORT_SECONDS:g} s to "
            "import them again after each that was stopped, are longer than the parallel.timeout_minutes = "
            f"{patience:g} that ranks wait for each other: raise parallel.timeout_minutes to {math.ceil(longest)}, "
            "or lower rewards.timeout_seconds"
        )
    recipes = [Path(place.rsplit(":", 2)[0]) for place in config.given.values() if place]
    folders = [Path.cwd(), *(recipe.absolute().parent for recipe in recipes)]
    return Grader(config.rewards, list(dict.fromkeys(map(str, folders))))


def check_batch(layout: ParallelConfig, name: str, size: int, minibatches: int = 1) -> None:
    """Raise `ValueError` unless a batch splits evenly over data-parallel replicas and minibatches."""
    replicas = layout.replicas(parallel.world_size())
    if replicas and size % (replicas * minibatches):
        raise ValueError(
            f"{name} must be a multiple of data-parallel replicas x minibatches = {replicas} x {minibatches} "
            f"= {replicas * minibatches}; got {size}"
        )


def check_lengths(config: StageConfig, sampling: SamplingConfig, tasks: Sequence[Task], lengths: Sequence[int]) -> None:
    """Raise `ValueError` when a prompt is empty, leaves no room for its response, or exceeds a micro-batch.

    lengths: tokens of each task's prompt.
    """
    if not tasks:
        return
    shortest, task = min(zip(lengths, tasks, strict=True), key=lambda item: item[0])
    if shortest == 0:
        raise ValueError(f"the prompt of {task.label} has no token: there is nothing to continue")
    longest, task = max(zip(lengths, tasks, strict=True), key=lambda item: item[0])
    total, limit = longest + sampling.max_new_tokens, config.model.max_length
    if total > limit:
        raise ValueError(
            f"the prompt of {task.label} has {longest} tokens, and with sampling.max_new_tokens = "
            f"{sampling.max_new_tokens} exceeds model.max_length = {limit}: lower the one or raise the other, "
            f"or leave such prompts out with data.too_long=skip: {task.question[:60]!r}..."
        )
    if total > config.run.max_tokens:
        raise ValueError(
            f"run.max_tokens = {config.run.max_tokens} is less than the longest prompt ({longest} tokens) "
            f"plus sampling.max_new_tokens = {sampling.max_new_tokens}: raise the one or lower the other"
        )


def check_record(path: Path | None) -> None:
    """Prove that rollouts can be recorded in this file; raises `ValueError` with the remedy."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"record = {path} is a folder: name a file, such as {path / 'step.parquet'}")
    prepare_output(path.parent)
