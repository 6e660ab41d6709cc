"""Preparation: what a stage works on is read, and what cannot work is refused, before any rank is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from dsm_train.config import ParallelConfig
from dsm_train.configs import EvaluateConfig, GrpoConfig, SftConfig, StageConfig
from dsm_train.course import DEFAULT_BATCH, Course, course_notes, plan
from dsm_train.data.format import Example, Format, shown
from dsm_train.data.source import (
    Tasks,
    load_tasks,
    make_format,
    make_tokenizer,
    readable,
    repetition_note,
    split_note,
    unreadable_note,
    without_too_long,
    without_unreadable,
)
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.hf.folder import Source, with_vocabulary
from dsm_train.megatron import parallel
from dsm_train.megatron.flash import core_attention
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import padded_vocab, uses_transformer_engine
from dsm_train.reporting.metrics import prepare_output
from dsm_train.rewards.grader import Grader
from dsm_train.rollout.config import SamplingConfig

ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class Questions:
    """Tasks, the tokenizer and the form in which the model reads them, and the grader of its answers."""

    tasks: Tasks
    tokenizer: Tokenizer
    format: Format
    grader: Grader
    course: Course | None = None
    """Supervised training; None for a stage without."""
    notes: tuple[str, ...] = ()
    """Lines about them that the user should read at start."""


def prepare(config: ConfigT, sampling: SamplingConfig | None) -> tuple[ConfigT, Questions]:
    """Read and check what the stage works on; raises `ValueError` with the remedy for what cannot work.

    sampling: how the stage answers its tasks; None: it does not. Returns the configuration with the model's shape as
    the initial weights have it.
    """
    source = None if config.run.init is None else Source.of(config.run.init)
    if source is not None:
        config = replace(config, model=source.model(config.model, config.given))
        source.check_weights("language")
    tasks = load_tasks(config.data)
    tokenizer = make_tokenizer(config.data, config.run.init, tasks.train)
    format, grader = make_format(config.data, tokenizer), make_grader(config)
    config = replace(config, model=with_vocabulary(config.model, source, tokenizer.vocab_size, tokenizer.fingerprint()))
    vocab = padded_vocab(HeadSpec.of(config.model).vocab_size, config.model.vocab_multiple, config.parallel.tp)
    parallel.check_layout(config.parallel, config.model, vocab)
    if config.supervised is not None and config.supervised.batch_tokens is None:
        check_batch(config.parallel, "the batch of supervised training", config.supervised.batch or DEFAULT_BATCH)
    # Supervised training reads its tasks, and answers held-out ones alone.
    answered = not isinstance(config, SftConfig)
    notes: list[str | None] = [source.note(config.given) if source is not None else None, *tasks.notes]
    notes.append(split_note(config.data) if isinstance(config, EvaluateConfig) else None)
    tasks, unread = graded(config, tasks, grader)
    notes.append(unread)
    if sampling is not None and config.data.too_long == "skip":
        room = min(config.model.max_length, config.run.max_tokens) - sampling.max_new_tokens
        tasks, left_out = without_too_long(tasks, format, room, answered=answered)
        notes.append(left_out)
    if isinstance(config, GrpoConfig):
        notes += [repetition_note(tasks.train, config.algorithm.prompts_per_step), *config.sampling.notes()]
        notes.append(f"the first prompt:\n{shown(Example(format.prompt(tasks.train[0]), [], []), tokenizer)}")
    asked = (*tasks.train, *tasks.heldout) if answered else readable(tasks.heldout, grader)
    if sampling is not None and asked:
        check_lengths(config, sampling, asked, format)
    uses_transformer_engine(config.model)  # raises where the layers or the attention that were asked for are missing
    core_attention(config.model)
    course = None if config.supervised is None else plan(config, config.supervised, tasks, format)
    notes += [] if course is None else course_notes(course, tokenizer)
    if parallel.rank() == 0 and "rewards" not in config.unheeded:
        every = [*tasks.train, *tasks.heldout]
        grader.try_functions(next((task for task in every if task.solution or task.answer), every[0]))
    told = tuple(note for note in notes if note is not None)
    return config, Questions(tasks, tokenizer, format, grader, course, told)


def make_grader(config: StageConfig) -> Grader:
    """Make the grader; functions of the user's are looked for in the current folder and in those of the recipes.

    Raises `ValueError` when other ranks would not wait for as long as the functions may take.
    """
    calls, limit, patience = config.rewards.calls, config.rewards.timeout_seconds, config.parallel.timeout_minutes
    if parallel.world_size() > 1 and len(calls) * limit > 60 * patience:
        raise ValueError(
            f"rewards.timeout_seconds = {limit:g} for each of {len(calls)} function(s) is longer than the "
            f"parallel.timeout_minutes = {patience:g} that ranks wait for each other: lower the one or raise the other"
        )
    recipes = [Path(place.rsplit(":", 2)[0]) for place in config.given.values() if place]
    folders = [Path.cwd(), *(recipe.absolute().parent for recipe in recipes)]
    return Grader(config.rewards, list(dict.fromkeys(map(str, folders))))


def graded(config: StageConfig, tasks: Tasks, grader: Grader) -> tuple[Tasks, str | None]:
    """Refuse or leave out tasks that the stage would grade and no reward can read, with the line that says so.

    Supervised training leaves none out: it learns from solutions, and grades where it can.
    """
    if isinstance(config, SftConfig):
        return tasks, unreadable_note(tasks.heldout, grader)
    sides = {GrpoConfig: ("train", "heldout"), EvaluateConfig: ("heldout",)}.get(type(config), ())
    return without_unreadable(tasks, grader, sides, skip=config.data.unreadable == "skip")


def check_batch(layout: ParallelConfig, name: str, size: int, minibatches: int = 1) -> None:
    """Raise `ValueError` unless a batch splits evenly over data-parallel replicas and minibatches."""
    replicas = layout.replicas(parallel.world_size())
    if replicas and size % (replicas * minibatches):
        raise ValueError(
            f"{name} must be a multiple of data-parallel replicas x minibatches = {replicas} x {minibatches} "
            f"= {replicas * minibatches}; got {size}"
        )


def check_lengths(config: StageConfig, sampling: SamplingConfig, tasks: Sequence[Task], format: Format) -> None:
    """Raise `ValueError` when a prompt is empty, leaves no room for its response, or exceeds a micro-batch."""
    lengths = [(len(format.prompt(task)), task) for task in tasks]
    shortest, task = min(lengths, key=lambda item: item[0])
    if shortest == 0:
        raise ValueError(f"the prompt of {task.label} has no token: there is nothing to continue")
    longest, task = max(lengths, key=lambda item: item[0])
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
