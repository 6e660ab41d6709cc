"""One configuration per stage, composed of the components in config.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from dsm_train.checkpoint.config import CheckpointConfig
from dsm_train.config import (
    AlgorithmConfig,
    Given,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SftTraining,
    above,
    at_least,
    check_warmup,
    require,
)
from dsm_train.data.config import DataConfig
from dsm_train.eval.config import EvalConfig
from dsm_train.rewards.config import RewardConfig
from dsm_train.rollout.config import SamplingConfig
from dsm_train.verify.config import VerifyConfig

Side = Literal["train", "heldout"]
"""Training or held-out tasks."""


def check_vocab_size(config: StageConfig) -> None:
    """Raise `ValueError` when the command line gives the size of a tokenizer to train beside weights that have one.

    A recipe may: it is also that of the run whose weights are now `run.init`.
    """
    if config.run.init is not None and config.given.get("data.vocab_size") == "":
        raise ValueError("data.vocab_size trains a tokenizer at start, and run.init brings one: leave one out")


def require_weights(run: RunConfig, stage: str) -> None:
    """Raise `ValueError` unless a stage that does not train was given trained weights."""
    rule = f"given: {stage} works on trained weights, such as those in a run's folder weights/"
    require(run.init is not None, "run.init", rule, "none")


@dataclass(frozen=True)
class StageConfig:
    """Components that every stage has."""

    run: RunConfig = field(default_factory=RunConfig)
    """Run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallelism."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """Rewards."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    given: Given = field(default_factory=Given, compare=False, repr=False)
    """Keys that the user set; not a value of the configuration."""

    unheeded: ClassVar[Mapping[str, str]] = {}
    """Keys and sections that a recipe may hold and the stage does not use, each with what to do instead."""
    answers: ClassVar[tuple[Side, ...]] = ()
    """Tasks that the stage answers and grades."""

    def __post_init__(self) -> None:
        check_vocab_size(self)

    @property
    def reads_tasks(self) -> bool:
        """True when the stage needs tasks: to work on, or to train a tokenizer."""
        return bool(self.answers) or (self.run.init is None and self.data.tokenizer is None)

    @property
    def supervised(self) -> SftTraining | None:
        """Supervised training of the stage; None for a stage without."""
        return None


@dataclass(frozen=True)
class SftConfig(StageConfig):
    """Stage `sft`."""

    sft: SftTraining = field(default_factory=SftTraining)
    """Supervised fine-tuning."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """Sampling in evaluation."""

    answers: ClassVar[tuple[Side, ...]] = ("heldout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sft.steps != 0, "sft.steps", "at least 1", self.sft.steps)

    @property
    def supervised(self) -> SftTraining | None:
        """Training of the stage itself."""
        return self.sft


@dataclass(frozen=True)
class GrpoConfig(StageConfig):
    """Stage `grpo`: the paper's Algorithm 1, after a supervised warm-up if asked for."""

    warmup: SftTraining = field(default_factory=SftTraining)
    """Supervised warm-up before GRPO; skipped unless steps or epochs are given."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Algorithm."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of rollouts."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of GRPO."""
    steps: int = 200
    """Exploration stages: sample, score, update."""
    record: Path | None = None
    """Write the scored rollouts of exploration stage record_step to this Parquet file x.parquet, for verify-step."""
    record_step: int = 1
    """Exploration stage, counted from 1, whose rollouts `record` holds; 0: of all, in x-1.parquet ..."""

    answers: ClassVar[tuple[Side, ...]] = ("train", "heldout")

    @property
    def supervised(self) -> SftTraining | None:
        """Warm-up, if there is one."""
        return self.warmup if self.warmup.steps or self.warmup.epochs else None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "steps")
        require(0 <= self.record_step <= self.steps, "record_step", f"in 0..steps = {self.steps}", self.record_step)
        require(
            self.sampling.temperature > 0,
            "sampling.temperature",
            "above 0 for GRPO: greedy responses of a group are all equal",
            self.sampling.temperature,
        )
        require(self.record_step == 1 or self.record is not None, "record_step", "given with record", self.record_step)
        warmup = [key for key in self.given if key.startswith("warmup.")]
        if warmup and self.supervised is None and not {"warmup.steps", "warmup.epochs"} & set(warmup):
            raise ValueError(f"{warmup[0]} is given, and warmup.steps = 0 skips the warm-up: set warmup.steps as well")
        updates = self.steps * self.algorithm.minibatches * self.algorithm.epochs
        check_warmup(self.optim, updates, "steps x minibatches x epochs")


@dataclass(frozen=True)
class EvaluateConfig(StageConfig):
    """Stage `eval`: greedy accuracy and pass@k on held-out tasks."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling for pass@k; greedy accuracy is measured as well."""

    answers: ClassVar[tuple[Side, ...]] = ("heldout",)

    unheeded: ClassVar[Mapping[str, str]] = {
        "eval.every": "it counts steps of training",
        "eval.tasks": "it counts for evaluation while training; data.heldout_tasks says how many tasks there are",
        "run.overwrite": "it keeps no run",
        "run.resume": "it keeps no run",
        "checkpoint": "it keeps no run",
        "run.weights_dtype": "it writes no weights",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self.run, "eval")


@dataclass(frozen=True)
class GenerateConfig(StageConfig):
    """Stage `generate`: sample responses and print them."""

    prompts: tuple[str, ...] = ()
    """Questions to answer, asked as data.* says; none: the first held-out tasks."""
    num_samples: int = 1
    """Responses per prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of responses."""

    unheeded: ClassVar[Mapping[str, str]] = {
        "eval": "dsm-train eval evaluates",
        "rewards": "dsm-train eval grades responses",
        "run.overwrite": "it keeps no run",
        "run.resume": "it keeps no run",
        "checkpoint": "it keeps no run",
        "run.weights_dtype": "it writes no weights",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self.run, "generate")
        at_least(1, self, "num_samples")

    @property
    def reads_tasks(self) -> bool:
        """True without prompts: held-out tasks are asked then."""
        return not self.prompts


@dataclass(frozen=True)
class ConvertConfig:
    """Stage `convert`: read weights or a checkpoint, in any layout, and write them in other files or another type."""

    run: RunConfig = field(default_factory=RunConfig)
    """Run: weights_dtype none keeps the type of every tensor."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallelism."""
    shard_gb: float = 5.0
    """Largest file of weights, in 10^9 bytes, unless one tensor is larger."""
    given: Given = field(default_factory=Given, compare=False, repr=False)
    """Keys that the user set; not a value of the configuration."""

    unheeded: ClassVar[Mapping[str, str]] = {
        "run.overwrite": "remove the folder first",
        "run.resume": "it keeps no run",
        "checkpoint": "it keeps no run",
        "run.seed": "nothing is random",
        "run.max_tokens": "nothing is computed",
        "run.share_prompts": "nothing is computed",
    }

    def __post_init__(self) -> None:
        require(self.run.init is not None, "run.init", "given: the folder to convert, or a checkpoint", "none")
        require(self.run.out is not None, "run.out", "given: the folder to write", "none")
        above(0, self, "shard_gb")


@dataclass(frozen=True)
class VerifyStepConfig(StageConfig):
    """Stage `verify-step`: one optimizer step of a batch in this layout, compared with the same step elsewhere."""

    batch: Path | None = None
    """Rollouts that grpo record=FILE wrote, an exploration stage, or a batch that was not finite (not-finite-*.parquet
    of any stage that trains)."""
    synthetic: bool = False
    """Take a made-up batch instead that reaches every term of the loss: off-policy, clipped on both sides, ragged."""
    layers: int | None = None
    """Keep only the first layers of the model, so that it fits one rank; none: all."""
    reference_layout: str | None = None
    """Compare with this layout of all ranks (tp=1,pp=2) rather than with one rank alone."""
    shuffle: bool = False
    """Pack groups, and the responses of each, in another order in the layout that is verified."""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """Verification."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Algorithm."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the recorded rollouts: their temperature, and the fixed length to average by."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""

    unheeded: ClassVar[Mapping[str, str]] = {
        "eval": "it evaluates nothing",
        "optim.not_finite": "it says what is not finite, and goes on",
        "rewards": "the rewards are those that were recorded",
        "run.overwrite": "it keeps no run",
        "run.resume": "it keeps no run",
        "run.weights_dtype": "it writes no weights",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "layers")
