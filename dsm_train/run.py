"""A job: ranks at work on a configuration, with an output folder, records and a voice."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import torch

from dsm_train import __version__
from dsm_train.cli import check_alike, digest, fingerprint, to_yaml, user_errors
from dsm_train.configs import StageConfig
from dsm_train.data.tokenizer import FILES, Tokenizer
from dsm_train.hf.config import fresh_config
from dsm_train.hf.dtypes import BY_NAME
from dsm_train.hf.folder import Pretrained, write_config, write_tokenizer_note
from dsm_train.hf.names import pieces
from dsm_train.hf.writer import appearing
from dsm_train.megatron import parallel, platform, weights
from dsm_train.megatron.flash import core_attention
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import uses_transformer_engine
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, adam_implementation
from dsm_train.megatron.weights import ModelSpec
from dsm_train.packing.packer import Packer
from dsm_train.prepare import Questions
from dsm_train.reporting.folder import claim_folder
from dsm_train.reporting.metrics import Metrics, Progress, Samples, Stopwatch, prepare_output
from dsm_train.reporting.report import startup_table
from triton_kernels import implementations

ConfigT = TypeVar("ConfigT", bound=StageConfig)
OwnConfigT = TypeVar("OwnConfigT", bound=StageConfig, covariant=True)


@dataclass(frozen=True)
class Job(Generic[OwnConfigT]):
    """One stage at work on this rank."""

    config: OwnConfigT
    parallel: Parallel
    metrics: Metrics
    samples: Samples
    source: Pretrained | None = None
    """Folder that the weights came from, as it was at the start."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return platform.device()

    def seconds(self) -> float:
        """Measure the time since the job started."""
        return time.perf_counter() - self.started

    def say(self, text: str) -> None:
        """Tell the user, from the main rank."""
        if self.parallel.is_main:
            print(text, flush=True)

    def loop(self, label: str, steps: int) -> Loop:
        """Begin a loop of so many steps, whose metrics stand under this label."""
        return Loop(label, steps, self.parallel, self.metrics)

    def packer(self) -> Packer:
        """Make the packer of this job's layout."""
        config, run = self.config, self.config.run
        rows = HeadSpec.of(config.model).vocab_size
        return Packer(config.model, rows, config.parallel, self.device, run.max_tokens, run.share_prompts)

    def language_model(self) -> ModelSpec:
        """Specify the model that the configuration names, with a language head."""
        config = self.config
        return ModelSpec(config.model, HeadSpec.of(config.model), config.run.init, config.run.seed)

    @property
    def out(self) -> Path:
        """Output folder of a stage that trains."""
        assert self.config.run.out is not None, "a stage that trains has claimed a folder"
        return self.config.run.out

    def save(self, model: Model, tokenizer: Tokenizer) -> None:
        """Write weights and tokenizer to the output folder, a Hugging Face folder, also for `run.init`. Collective."""
        config, kind = self.config, model.spec.kind
        source, dtype = self.source, config.run.weights_dtype or config.model.dtype
        self.parallel.watchdog.enter("saving of weights")
        with self.parallel.watchdog.paused(), appearing(self.out / "weights", self.parallel.is_main) as folder:
            weights.save_weights(folder, model.chunks, config.model, self.parallel, BY_NAME[dtype].torch, kind)
            if not self.parallel.is_main:
                return
            if source is not None:
                source.write(folder, config.model, kind, dtype, without=FILES)
            else:
                description = fresh_config(config.model, special_ids(tokenizer))
                write_config(folder, description.written(config.model, kind, dtype))
            tokenizer.save(folder)
            write_tokenizer_note(folder, tokenizer.vocab_size, tokenizer.fingerprint())


def special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """List a tokenizer's special tokens by their keys in config.json."""
    return {
        "bos_token_id": next(iter(tokenizer.bos_ids), None),
        "eos_token_id": tokenizer.eos_id if len(tokenizer.stop_ids) == 1 else list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }


class Loop(AbstractContextManager["Loop"]):
    """The steps of a loop and the phases of each: watchdog, stopwatch, progress and metrics.

    with job.loop("grpo", 260) as loop:
        for step in loop:                  # 0, 1, ...; people count from 1
            with loop.phase("rollout"):    # the watchdog's phase, and rollout_seconds in the metrics
                ...
            loop.log({"reward": 0.61}, shown={"reward": "reward"})
    """

    def __init__(self, label: str, steps: int, parallel: Parallel, metrics: Metrics) -> None:
        self._label, self._steps, self._parallel, self._metrics = label, steps, parallel, metrics
        self._progress = Progress(label, steps, sys.stderr if parallel.is_main else None)
        self._watch, self._number = Stopwatch(), 0

    def __iter__(self) -> Iterator[int]:
        for step in range(self._steps):
            self._watch, self._number = Stopwatch(), step + 1
            yield step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Enter a phase of the current step, and time it."""
        self._parallel.watchdog.enter(f"{name} of step {self._number}")
        yield
        self._watch.lap(f"{name}_seconds")

    def log(self, values: Mapping[str, float], *, tokens: int | None = None, shown: Mapping[str, str]) -> None:
        """Write the step's metrics, and show some of them, by the names that people read.

        tokens: this replica's, for the times of the phases and the rate over all replicas. Collective.
        """
        if tokens is not None:
            values = {**values, **self._watch.rate(sum(self._parallel.gather_over_data(tokens)))}
        self._metrics.log(self._number, self._label, values)
        self._progress.step({text: values[name] for name, text in shown.items() if name in values})

    def say(self, text: str) -> None:
        """Tell the user, from the main rank, below the line of progress."""
        if self._parallel.is_main:
            self._progress.close()
            print(text, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()


@contextmanager
def start(config: ConfigT, stage: str, questions: Questions, *, trains: bool = True) -> Iterator[Job[ConfigT]]:
    """Start the ranks of a job whose configuration was prepared (prepare.py).

    An error in what the user gave is one line and exit status 2. A stage that does not train claims no folder and keeps
    no records.
    """
    folder = None
    with user_errors(f"dsm-train {stage}"):
        if trains and parallel.rank() == 0:
            folder = claim_folder(config.run, stage)
        elif config.run.out is not None and not trains:
            prepare_output(config.run.out)
        threads = parallel.set_threads(config.run.threads)
        ranks = parallel.start(config.parallel, config.run.seed)
        check_alike(ranks.gather_over_ranks(identity(config, questions)))
    out, metrics, samples = folder.path if folder else None, Metrics(None), Samples(None)
    try:
        if not ranks.is_replica_main:
            questions.grader.close()  # it has tried the user's functions, and others grade
        with ranks.watchdog.failures():
            if trains:
                config = replace(config, run=replace(config.run, out=ranks.from_main(out)))
            if folder is not None:
                folder.begin()
                (folder.path / "config.yaml").write_text(to_yaml(config))
                metrics, samples = Metrics(out), Samples(out)
            job = Job(config, ranks, metrics, samples, questions.source)
            opening = [startup_table(served_by(config, ranks, threads)), *questions.notes, *missing_ops()]
            if ranks.is_main:  # the output of a stage that answers is its answer
                print("\n".join(opening), file=sys.stdout if trains else sys.stderr, flush=True)
            yield job
            if folder is not None:
                folder.finish()
    finally:
        metrics.close()
        samples.close()
        questions.grader.close()
        if folder is not None:
            folder.close()
        parallel.stop(ranks)


def identity(config: StageConfig, questions: Questions) -> dict[str, str]:
    """Write down what has to be the same on every rank."""
    tasks = digest(repr(task) for task in (*questions.tasks.train, *questions.tasks.heldout))
    return fingerprint(config, tasks, questions.tokenizer.fingerprint(), __version__)


def missing_ops() -> list[str]:
    """Say what is lost where the C++ ops were not built and the device is the CPU."""
    if platform.device().type != "cpu" or find_spec("triton_kernels._C") is not None:
        return []
    return ["the C++ ops were not built, and slower ones serve: reinstall with a C++ compiler and --no-build-isolation"]


def model_line(config: StageConfig) -> str:
    """Describe the model in a line: size, shape, longest sequence, and the folder that it comes from."""
    model, init = config.model, config.run.init
    parameters = sum(prod(piece.shape) for piece in pieces(model, "language"))
    size = f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"
    return (
        f"{size} parameters: {model.num_layers} layers of {model.hidden_size}, {model.vocab_size} tokens, sequences up "
        f"to {model.max_length}; {'random weights' if init is None else init}"
    )


def served_by(config: StageConfig, ranks: Parallel, threads: int) -> list[tuple[str, str]]:
    """List the implementation of each op and layer in this job."""
    device = platform.device()
    ops = [(op, by[device.type]) for op, by in implementations().items()]
    engine = uses_transformer_engine(config.model)
    place = f"{ranks.world_size} rank(s): tp {config.parallel.tp}, pp {config.parallel.pp}, dp {ranks.dp_size}"
    return [
        ("model", model_line(config)),
        ("device", f"{device}, {config.model.dtype}, {threads} thread(s)"),
        ("layout", place),
        ("transformer layers", "Transformer Engine" if engine else "megatron-core, local"),
        ("core attention", core_attention(config.model)),
        ("norms", "Transformer Engine" if engine else "PyTorch rms_norm"),
        ("optimizer", adam_implementation()),
        ("rollouts", "embedded generator"),
        *[(f"op {name}", by) for name, by in ops],
    ]
