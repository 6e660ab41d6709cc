"""Preparation: what a stage works on is read, and what cannot work is refused, before any rank is started."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from dsm_train.config import ParallelConfig, SftTraining, check_warmup
from dsm_train.configs import GrpoConfig, SftConfig, StageConfig
from dsm_train.data.format import Format
from dsm_train.data.source import (
    Tasks,
    load_tasks,
    make_format,
    make_tokenizer,
    repetition_note,
    without_too_long,
)
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.examples import Course, Limit, course_notes, cut_steps, tokenise
from dsm_train.hf.folder import Source, with_vocabulary
from dsm_train.megatron import parallel
from dsm_train.megatron.flash import core_attention
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import padded_vocab, uses_transformer_engine
from dsm_train.reporting.metrics import prepare_output
from dsm_train.rewards.grader import Grader
from dsm_train.rollout.config import SamplingConfig

ConfigT = TypeVar("ConfigT", bound=StageConfig)
DEFAULT_STEPS, DEFAULT_BATCH = 500, 256
"""Optimizer steps, and examples in each, of supervised training that leaves them open."""
PATIENCE = 5.0
"""Seconds of tokenisation after which it is said how far it is."""


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
    format, grader = make_format(config.data, tokenizer), Grader(config.rewards)
    config = replace(config, model=with_vocabulary(config.model, source, tokenizer.vocab_size, tokenizer.fingerprint()))
    vocab = padded_vocab(HeadSpec.of(config.model).vocab_size, config.model.vocab_multiple, config.parallel.tp)
    parallel.check_layout(config.parallel, config.model, vocab)
    # Supervised training reads its tasks, and answers held-out ones alone.
    answered = not isinstance(config, SftConfig)
    notes: list[str | None] = [source.note(config.given) if source is not None else None]
    if sampling is not None and config.data.too_long == "skip":
        room = min(config.model.max_length, config.run.max_tokens) - sampling.max_new_tokens
        tasks, left_out = without_too_long(tasks, format, room, answered=answered)
        notes.append(left_out)
    if isinstance(config, GrpoConfig):
        notes += [repetition_note(tasks.train, config.algorithm.prompts_per_step), *config.sampling.notes()]
    if sampling is not None:
        check_lengths(config, sampling, (*(tasks.train if answered else ()), *tasks.heldout), format)
    uses_transformer_engine(config.model)  # raises where the layers or the attention that were asked for are missing
    core_attention(config.model)
    course = None
    if config.supervised is not None:
        course = plan(config, config.supervised, tasks, format)
        notes += course_notes(course, tokenizer)
        if not any(task.answer for task in tasks.heldout):
            notes.append("no held-out task has an answer: heldout_accuracy is not measured")
    told = tuple(note for note in notes if note is not None)
    return config, Questions(tasks, tokenizer, format, grader, course, told)


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
        raise ValueError(f"the prompt of task {task.id} has no token: there is nothing to continue")
    longest, task = max(lengths, key=lambda item: item[0])
    total, limit = longest + sampling.max_new_tokens, config.model.max_length
    if total > limit:
        raise ValueError(
            f"the prompt of task {task.id} has {longest} tokens, and with sampling.max_new_tokens = "
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
            f"supervised training needs worked solutions, and {config.data.path} has answers alone: write "
            "them before '#### answer', or set steps=0"
        )
    if training.batch_tokens is None:
        size_E, budget = torch.ones_like(train.given_E), training.batch or DEFAULT_BATCH
        check_batch(config.parallel, f"{section}.batch", budget)
    else:
        size_E, budget = train.packed_E, training.batch_tokens
        check_batch_tokens(config.parallel, f"{section}.batch_tokens", budget, int(size_E.max()))
    steps = None if training.epochs else training.steps or DEFAULT_STEPS
    cuts = cut_steps(size_E, budget, config.run.seed, steps=steps, epochs=training.epochs)
    check_warmup(training.optim, len(cuts) - 1, "steps", section)
    return Course(train, heldout, cuts, config.run.seed)


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
