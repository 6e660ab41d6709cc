"""A run: everything a stage works with, built from its configuration, with what can be wrong found first."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from dsm_train.cli import to_yaml, user_errors
from dsm_train.config import OptimConfig, ParallelConfig
from dsm_train.configs import StageConfig
from dsm_train.data.source import Tasks, load_tasks, make_tokenizer, solved
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.eval.evaluate import Evaluator
from dsm_train.megatron import parallel, platform, weights
from dsm_train.megatron.flash import core_attention
from dsm_train.megatron.model import HiddenGPTModel, build_model, padded_vocab, uses_transformer_engine
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, TrainableModel, adam_implementation
from dsm_train.packing.cost import Load, estimated_cost
from dsm_train.packing.microbatch import MicroBatch, pack, repeat_prompts
from dsm_train.reporting.metrics import Metrics, Progress, Samples, prepare_output
from dsm_train.reporting.report import startup_table
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.types import Sequences
from triton_kernels import implementations


@dataclass(frozen=True)
class Run:
    """What every stage has at hand."""

    config: StageConfig
    tasks: Tasks
    tokenizer: Tokenizer
    parallel: Parallel
    metrics: Metrics
    samples: Samples
    started: float = field(default_factory=time.perf_counter)

    def chunks(self) -> list[HiddenGPTModel]:
        """This rank's part of the model, with the run's initial weights."""
        return initial_chunks(self.config, self.tokenizer.vocab_size, self.parallel)

    def model(self) -> Model:
        """A model that is not trained."""
        return Model(self.config.model, self.tokenizer.vocab_size, self.chunks(), self.parallel)

    def trainable(self, optim: OptimConfig, steps: int) -> TrainableModel:
        """A model with its optimizer, for `steps` optimizer steps."""
        return TrainableModel(self.config.model, self.tokenizer.vocab_size, self.chunks(), self.parallel, optim, steps)

    def copy_of(self, model: Model) -> Model:
        """A frozen copy: the reference model."""
        copy = self.model()
        weights.copy_weights(model.chunks, copy.chunks)
        return copy

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return platform.device()

    def seconds(self) -> float:
        """Time since the run started."""
        return time.perf_counter() - self.started

    def mine(self, tasks: Sequence[Task]) -> list[Task]:
        """This data-parallel replica's share of a batch."""
        return list(tasks[self.parallel.dp_rank :: self.parallel.dp_size])

    def total(self, count: int) -> int:
        """Sum of a replica's count over data-parallel replicas."""
        return sum(n for n in self.parallel.gather_over_data(count) if isinstance(n, int))

    def average(self, values: dict[str, float]) -> dict[str, float]:
        """Mean of numbers over all ranks."""
        total = self.parallel.all_reduce(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, (total / self.parallel.world_size).tolist(), strict=True))

    def cost(self, sequences: Sequences) -> Load:
        """Estimated cost of a training step on the responses."""
        return estimated_cost(self._grouped(sequences), self.config.model, self.tokenizer.vocab_size)

    def pack(self, sequences: Sequences) -> list[MicroBatch]:
        """Micro-batches of this replica, of even cost, in a number that the pipeline's schedule takes."""
        layout, max_tokens = self.config.parallel, self.config.run.max_tokens
        rounds = layout.pp if layout.vpp > 1 else 1  # the interleaved schedule works in rounds of as many as stages
        grouped, cost = self._grouped(sequences), self.cost(sequences)
        return pack(grouped, max_tokens, self.device, cost=cost, multiple=rounds)

    def _grouped(self, sequences: Sequences) -> Sequences:
        """The sequences in the groups that share a prompt."""
        return sequences if self.config.run.share_prompts else repeat_prompts(sequences)

    def engine(self, model: Model) -> EmbeddedEngine:
        """The embedded generator on the model's live weights."""
        return EmbeddedEngine(model, [self.tokenizer.eos_id], self.config.run.seed)

    def evaluator(self, model: Model, sampling: SamplingConfig) -> Evaluator:
        """Evaluation with the model's live weights."""
        return Evaluator(self.engine(model), self.tokenizer, self.parallel, sampling)

    def eval_tasks(self) -> Sequence[Task]:
        """The held-out tasks that are evaluated while training."""
        return self.tasks.heldout[: self.config.eval.tasks]

    def progress(self, label: str, total: int) -> Progress:
        """Live progress, on the main rank."""
        return Progress(label, total, sys.stderr if self.parallel.is_main else None)

    @property
    def is_terminal(self) -> bool:
        """Whether the user reads on a terminal."""
        return sys.stdout.isatty()

    def say(self, text: str) -> None:
        """Tell the user, from the main rank."""
        if self.parallel.is_main:
            print(text, flush=True)

    def save(self, model: Model) -> None:
        """Write the weights and the tokenizer to the output folder, from which `run.init` starts another stage."""
        folder = self.config.run.out / "weights"
        self.parallel.watchdog.enter("saving of weights")
        with self.parallel.watchdog.paused():
            weights.save_weights(folder, model.chunks, self.config.model, self.parallel)
            if self.parallel.is_main:
                self.tokenizer.save(folder)


def initial_chunks(config: StageConfig, vocab_size: int, layout: Parallel) -> list[HiddenGPTModel]:
    """A rank's part of the model, with the weights that the stage starts from."""
    chunks = build_model(config.model, padded_vocab(vocab_size, config.model.vocab_multiple, layout.config.tp), layout)
    if config.run.init is not None:
        weights.load_weights(config.run.init, chunks, layout)
    else:
        weights.initialise(chunks, config.model, config.run.seed, layout)
    return chunks


@dataclass(frozen=True)
class Prepared:
    """What a stage was asked for, found to be in order; no process group exists yet."""

    config: StageConfig
    """The configuration, with the model's shape as the initial weights have it."""
    tasks: Tasks
    tokenizer: Tokenizer


def prepare(config: StageConfig, sampling: SamplingConfig | None) -> Prepared:
    """Read what the stage works on and raise `ValueError` for what cannot work, before anything is started.

    sampling: how it answers the tasks; None: it does not.
    """
    if config.run.init is not None:
        config = replace(config, model=weights.saved_model(config.run.init, config.model))
    tasks = load_tasks(config.data)
    tokenizer = make_tokenizer(config.data, config.run.init, tasks.train)
    vocab = padded_vocab(tokenizer.vocab_size, config.model.vocab_multiple, config.parallel.tp)
    parallel.check_layout(config.parallel, config.model, vocab)
    if config.supervised is not None:
        check_batch(config.parallel, "the batch of supervised training", config.supervised.batch)
    if sampling is not None:
        check_lengths(config, sampling, (*tasks.train, *tasks.heldout), tokenizer)
    check_solutions(config, tasks, tokenizer)
    if config.run.init is not None:
        weights.check_vocabulary(config.run.init, tokenizer.vocab_size)
    uses_transformer_engine(config.model)
    core_attention(config.model)
    return Prepared(config, tasks, tokenizer)


@contextmanager
def start(config: StageConfig, sampling: SamplingConfig, prog: str, *, trains: bool = True) -> Iterator[Run]:
    """Prepare a run; an error in what the user gave is one line and exit status 2, before anything is trained.

    A stage that does not train keeps no records, and leaves those of the stage that did as they are.
    """
    with user_errors(prog):
        prepared = prepare(config, sampling)
        config = prepared.config
        prepare_output(config.run.out)
        threads = parallel.set_threads(config.run.threads)
        layout = parallel.start(config.parallel, config.run.seed)
    out = config.run.out if layout.is_main and trains else None
    if out is not None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (out / name).exists():
                (out / name).replace(out / f"{name}.old")
        (out / "config.yaml").write_text(to_yaml(config))
    run = Run(config, prepared.tasks, prepared.tokenizer, layout, Metrics(out), Samples(out))
    run.say(startup_table(served_by(config, layout, threads)))
    try:
        with layout.watchdog.failures():
            yield run
    finally:
        run.metrics.close()
        run.samples.close()
        parallel.stop(layout)


def check_batch(layout: ParallelConfig, name: str, size: int, minibatches: int = 1) -> None:
    """Raise `ValueError` unless a batch splits evenly over data-parallel replicas and minibatches."""
    replicas = parallel.world_size() // (layout.tp * layout.pp)
    if replicas and size % (replicas * minibatches):
        raise ValueError(
            f"{name} must be a multiple of data-parallel replicas x minibatches = {replicas} x {minibatches} "
            f"= {replicas * minibatches}; got {size}"
        )


def check_lengths(config: StageConfig, sampling: SamplingConfig, tasks: Sequence[Task], tokenizer: Tokenizer) -> None:
    """Raise `ValueError` when a prompt is empty, leaves no room for its response, or exceeds a micro-batch."""
    lengths = [(len(tokenizer.encode(task.prompt)), task) for task in tasks]
    shortest, task = min(lengths, key=lambda item: item[0])
    if shortest == 0:
        raise ValueError(f"the prompt of task {task.id} has no token: there is nothing to continue")
    longest, task = max(lengths, key=lambda item: item[0])
    total, limit = longest + sampling.max_new_tokens, config.model.max_length
    if total > limit:
        raise ValueError(
            f"the prompt of task {task.id} has {longest} tokens, and with sampling.max_new_tokens = "
            f"{sampling.max_new_tokens} exceeds model.max_length = {limit}: {task.prompt[:60]!r}..."
        )
    if total > config.run.max_tokens:
        raise ValueError(
            f"run.max_tokens = {config.run.max_tokens} is less than the longest prompt ({longest} tokens) "
            f"plus sampling.max_new_tokens = {sampling.max_new_tokens}"
        )


def check_solutions(config: StageConfig, tasks: Tasks, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` when supervised training is asked for and lacks solutions, or has one too long to pack."""
    training = config.supervised
    if training is None:
        return
    examples = solved(tasks.train, training.examples)
    if not examples:
        raise ValueError(
            f"supervised training needs worked solutions, and {config.data.path} has answers alone: write "
            "them before '#### answer', or set steps=0"
        )
    lengths = [
        (len(tokenizer.encode(task.prompt)) + len(tokenizer.encode(task.solution or "")), task) for task in examples
    ]
    longest, task = max(lengths, key=lambda item: item[0])
    if longest > config.run.max_tokens:
        raise ValueError(
            f"run.max_tokens = {config.run.max_tokens} is less than prompt and solution of task {task.id}, "
            f"{longest} tokens: {task.prompt[:60]!r}..."
        )


def served_by(config: StageConfig, layout: Parallel, threads: int) -> list[tuple[str, str]]:
    """What serves each op and layer in this run."""
    device = platform.device()
    ops = [(op, by[device.type]) for op, by in implementations().items()]
    engine = uses_transformer_engine(config.model)
    place = f"{layout.world_size} rank(s): tp {config.parallel.tp}, pp {config.parallel.pp}, dp {layout.dp_size}"
    return [
        ("device", f"{device}, {config.model.dtype}, {threads} thread(s)"),
        ("layout", place),
        ("transformer layers", "Transformer Engine" if engine else "megatron-core, local"),
        ("core attention", core_attention(config.model)),
        ("norms", "Transformer Engine" if engine else "PyTorch rms_norm"),
        ("optimizer", adam_implementation()),
        ("rollouts", "embedded generator"),
        *[(f"op {name}", by) for name, by in ops],
    ]
