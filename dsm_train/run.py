"""A job: ranks at work on a configuration, with an output folder, records and a voice."""

from __future__ import annotations

import atexit
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from dsm_train import __version__
from dsm_train.checkpoint.find import MODEL
from dsm_train.checkpoint.keeper import Keeper, State
from dsm_train.checkpoint.place import FOLDER
from dsm_train.checkpoint.resume import Origin, begin, choose
from dsm_train.checkpoint.stop import Stop
from dsm_train.cli import check_alike, digest, fingerprint, tell_torchrun, to_yaml, user_errors
from dsm_train.cli.errors import NOT_FINITE, Ended, end_of
from dsm_train.configs import StageConfig
from dsm_train.data.tokenizer import FILES, Tokenizer
from dsm_train.hf.architectures import HeadKind
from dsm_train.hf.config import fresh_config
from dsm_train.hf.dtypes import BY_NAME, WeightsType
from dsm_train.hf.files import weights_digest
from dsm_train.hf.folder import Pretrained, write_config, write_tokenizer_note
from dsm_train.hf.names import pieces
from dsm_train.hf.writer import appearing
from dsm_train.loop import Loop
from dsm_train.megatron import parallel, platform, weights
from dsm_train.megatron.flash import core_attention
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import uses_transformer_engine
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, adam_implementation
from dsm_train.megatron.weights import ModelSpec
from dsm_train.packing.packer import Packer
from dsm_train.prepare import Questions
from dsm_train.reporting.folder import RunFolder, claim_folder
from dsm_train.reporting.metrics import Metrics, Samples, prepare_output
from dsm_train.reporting.record import Record, command, own_code
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
    _keeper: Keeper | None
    source: Pretrained | None = None
    """Folder that the weights came from, as it was at the start."""

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return platform.device()

    @property
    def keeper(self) -> Keeper:
        """Keeper of the checkpoints of a stage that trains."""
        assert self._keeper is not None, "a stage that trains has one"
        return self._keeper

    def seconds(self) -> float:
        """Measure the time that the run has taken, that before its checkpoint included."""
        return self.keeper.seconds()

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Compute values once in a run; one that is continued takes them from its checkpoint. They are plain JSON."""
        results = self.keeper.results
        if name not in results:
            results[name] = compute()
        return results[name]

    def say(self, text: str) -> None:
        """Tell the user, from the main rank."""
        if self.parallel.is_main:
            print(text, flush=True)

    def loop(self, label: str, steps: int, state: State) -> Loop:
        """Begin a loop of so many steps that change `state`; its metrics stand under this label."""
        return Loop(label, steps, state, self.parallel, self.metrics, self.keeper)

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
        shape, kind, dtype = self.config.model, model.spec.kind, BY_NAME[self.weights_dtype].torch
        self.parallel.watchdog.enter("saving of weights")
        with self.parallel.watchdog.paused(), appearing(self.out / "weights", self.parallel.is_main) as folder:
            weights.save_weights(folder, model.chunks, shape, self.parallel, dtype, kind)
            if self.parallel.is_main:
                self.describe(folder, tokenizer, kind)

    def describe(self, folder: Path, tokenizer: Tokenizer, kind: HeadKind = "language") -> None:
        """Write what lies beside the weights, the tokenizer as well; for the main rank."""
        model, dtype = self.config.model, self.weights_dtype
        if self.source is not None:
            self.source.write(folder, model, kind, dtype, without=FILES)
        else:
            write_config(folder, fresh_config(model, special_ids(tokenizer)).written(model, kind, dtype))
        tokenizer.save(folder)
        write_tokenizer_note(folder, tokenizer.vocab_size, tokenizer.fingerprint())

    @property
    def weights_dtype(self) -> WeightsType:
        """Type that the weights are written in."""
        return self.config.run.weights_dtype or self.config.model.dtype


def special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """List a tokenizer's special tokens by their keys in config.json."""
    return {
        "bos_token_id": next(iter(tokenizer.bos_ids), None),
        "eos_token_id": tokenizer.eos_id if len(tokenizer.stop_ids) == 1 else list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }


@contextmanager
def start(config: ConfigT, stage: str, questions: Questions, *, trains: bool = True) -> Iterator[Job[ConfigT]]:
    """Start the ranks of a job whose configuration was prepared (prepare.py).

    An error in what the user gave is one line and exit status 2; other ends that are no crash: cli/errors.py. A stage
    that does not train claims no folder and keeps no records.
    """
    folder = origin = None
    with user_errors(f"dsm-train {stage}"):
        if trains and parallel.rank() == 0:
            folder = claim_folder(config.run, stage)
        elif config.run.out is not None and not trains:
            prepare_output(config.run.out)
        threads = parallel.set_threads(config.run.threads)
        ranks = parallel.start(config.parallel, config.run.seed)
        who = identity(config, questions)
        check_alike(ranks.gather_over_ranks(who))
        if trains:
            who = {"the stage": stage} | who | surroundings(ranks, threads)
            origin = choose(config.run, folder, who, ranks, shared=config.checkpoint.wanted)
    stop = Stop(tells=ranks.is_main, saves=config.checkpoint.wanted)
    opening = [startup_table(served_by(config, ranks, threads)), *questions.notes, *missing_ops()]
    try:
        if not ranks.is_replica_main:
            questions.grader.close()  # it has tried the user's functions, and others grade
        if origin is not None:
            with training(config, stage, questions, ranks, folder, origin, stop, opening) as job:
                yield job
            return
        with ranks.watchdog.failures():
            if ranks.is_main:  # the output of a stage that answers is its answer
                print("\n".join(opening), file=sys.stderr, flush=True)
            yield Job(config, ranks, Metrics(None), Samples(None), None, questions.source)
    finally:
        stop.pass_over()
        questions.grader.close()
        if folder is not None:
            folder.close()
        parallel.stop(ranks)
        stop.close()


@contextmanager
def training(
    config: ConfigT,
    stage: str,
    questions: Questions,
    ranks: Parallel,
    folder: RunFolder | None,
    origin: Origin,
    stop: Stop,
    opening: list[str],
) -> Iterator[Job[ConfigT]]:
    """Run a job that trains: records in its folder, which the main rank has, checkpoints, and the ends of a run.

    opening: lines to begin with.
    """
    again = how_to_continue(config, None if folder is None else folder.path)
    out = ranks.from_main(None if folder is None else folder.path)
    assert out is not None
    config = replace(config, run=replace(config.run, out=out))

    def end(error: BaseException) -> Ended | None:
        return end_of(error, out, stop.place)

    with ends(f"dsm-train {stage}", folder, again, end), ranks.watchdog.failures(end), ExitStack() as files:
        stop.listen()
        gpus = [name for name in ranks.gather_over_ranks(gpu_name()) if name]
        metrics, samples = Metrics(None), Samples(None)
        if folder is not None:
            ranks.watchdog.last_words = lambda how: folder.end(how) or again
            record = Record.now(config.parallel, config.run.seed, ranks=ranks.world_size, gpus=gpus)
            starts = [*(folder.starts if origin.same and origin.found else ()), asdict(record)]
            opening += [*begin(folder, origin, stage=stage, starts=starts), f"records and checkpoints: {out}; {again}"]
            own_code().save(out)
            (out / "config.yaml").write_text(to_yaml(config))
            metrics, samples = files.enter_context(closing(Metrics(out))), files.enter_context(closing(Samples(out)))
            print("\n".join(opening), flush=True)
        keeper = Keeper(config.checkpoint, out, ranks, origin, metrics, samples, stop)
        job = Job(config, ranks, metrics, samples, keeper, questions.source)
        if folder is not None:
            with appearing(out / FOLDER / MODEL) as described:
                job.describe(described, questions.tokenizer)
        yield job
        keeper.close()
        if folder is not None:
            stop.pass_over()
            folder.finish(checkpoints=asdict(keeper.kept))


@contextmanager
def ends(
    prog: str, folder: RunFolder | None, again: str, end_of: Callable[[BaseException], Ended | None]
) -> Iterator[None]:
    """Tell of an end that is no crash in one line, with its exit status, and note every end in the run's folder.

    folder: the main rank's, which tells; again: how the run is continued; end_of: finds the end, None for a crash.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        end = end_of(error)
        if folder is not None:
            how = f"{type(error).__name__}: {error}".splitlines()[0] if end is None else end.line
            folder.end(how)
            if end is None:
                atexit.register(print, again, file=sys.stderr)  # below the traceback
            else:
                again = "the same command would end here again" if end.status == NOT_FINITE else again
                line = f"{prog}: {end.line}; {again}"
                print(line, file=sys.stderr, flush=True)
                tell_torchrun(line)
        if end is None:
            raise
        raise end from None


def how_to_continue(config: StageConfig, folder: Path | None) -> str:
    """Say how a run is continued that ends before it has finished."""
    if config.run.out is None and folder is not None:
        return continuing(folder)
    auto = " with run.resume=auto" if config.run.resume == "never" else ""
    return f"the same command{auto} {'continues' if config.checkpoint.wanted else 'begins again'}"


def continuing(out: Path) -> str:
    """Write the command that continues a run whose folder was not given."""
    return f"to continue: {command(sys.argv, os.environ)} {shlex.quote(f'run.out={out}')}"


def surroundings(ranks: Parallel, threads: int) -> dict[str, str]:
    """Write down what computes, as far as rounding depends on it."""
    return {
        "the number of ranks": str(ranks.world_size),
        "the threads of a rank": str(threads),
        "the device": gpu_name() or "cpu",
        "the version of torch": torch.__version__,
    }


def gpu_name() -> str | None:
    """Name this rank's GPU; None on the CPU."""
    return torch.cuda.get_device_name() if platform.device().type == "cuda" else None


def identity(config: StageConfig, questions: Questions) -> dict[str, str]:
    """Write down what has to be the same on every rank: the configuration, and the contents of the files it names."""
    tasks = digest(repr(replace(task, place="")) for task in (*questions.tasks.train, *questions.tasks.heldout))
    return fingerprint(config, tasks, questions.tokenizer.fingerprint(), __version__) | {
        "the digest of the weights": "none" if questions.source is None else weights_digest(questions.source.folder),
        "the digest of the prompts": digest(str(questions.format.prompt(task)) for task in questions.tasks.train[:8]),
        "the digest of the reward functions": digest(questions.grader.sources()),
    }


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
