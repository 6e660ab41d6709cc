"""Stages of the command line, one row each. A new stage is a row here and a file beside this one.

Modules stand as text and are imported when they are asked for: usage and `--help` need neither torch nor Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Stage:
    """Row of the table."""

    name: str
    sentence: str
    config: str
    """Configuration, as module:class."""
    function: str
    """Function that runs the stage, given its configuration; as module:function."""
    trains: bool = False
    """Recipes are written for the stage; others may read them and pass over its values."""
    needs_trainer: bool = True
    """It imports the packages of the extra `train`."""
    has_steps: bool = False
    """`function` takes the arguments and the other stages instead, and reads a step's name and its keys itself."""

    def configuration(self) -> type:
        """Import the configuration's class."""
        return _named(self.config)

    def run(self, *arguments: Any) -> None:
        """Import the function and call it."""
        _named(self.function)(*arguments)


STAGES = (
    Stage(
        "sft",
        "Supervised fine-tuning on worked solutions.",
        "dsm_train.configs:SftConfig",
        "dsm_train.stages.sft:train_sft",
        trains=True,
    ),
    Stage(
        "grpo",
        "GRPO (DeepSeekMath, Algorithm 1), after a supervised warm-up if asked for.",
        "dsm_train.configs:GrpoConfig",
        "dsm_train.stages.grpo:train_grpo",
        trains=True,
    ),
    Stage(
        "eval",
        "Greedy accuracy and pass@k on held-out tasks.",
        "dsm_train.configs:EvaluateConfig",
        "dsm_train.stages.evaluate:evaluate",
    ),
    Stage(
        "generate",
        "Sample responses to prompts.",
        "dsm_train.configs:GenerateConfig",
        "dsm_train.stages.evaluate:generate",
    ),
    Stage(
        "verify-step",
        "Compare an optimizer step in this layout with the same step on one rank.",
        "dsm_train.configs:VerifyStepConfig",
        "dsm_train.stages.verify_step:verify_step",
    ),
    Stage(
        "convert",
        "Write weights in other files or another type: a Hugging Face folder in, and one out.",
        "dsm_train.configs:ConvertConfig",
        "dsm_train.stages.convert:convert",
    ),
    Stage(
        "corpus",
        "Mine mathematics from Common Crawl: extract, dedup, rounds, decontaminate, tokenise.",
        "dsm_train.corpus.config:CorpusConfig",
        "dsm_train.corpus.stage:main",
        has_steps=True,
    ),
    Stage(
        "runs",
        "List the runs in a folder: state, step, last metrics, and how to continue each.",
        "dsm_train.stages.runs:RunsConfig",
        "dsm_train.stages.runs:show_runs",
        needs_trainer=False,
    ),
)
COMING = ("pretrain", "label", "reward", "ppo", "rft", "dpo", "compare", "plan", "rollout-check")
"""Stages that are not built yet."""


def find(name: str) -> Stage:
    """Return the stage of this name; ValueError with the names that exist otherwise."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    what = "is not built yet" if name in COMING else "is no stage"
    raise ValueError(f"{name} {what}; stages that run: {' '.join(stage.name for stage in STAGES)}")


def others(name: str) -> tuple[Stage, ...]:
    """Return the other stages, whose values a shared recipe may hold."""
    return tuple(stage for stage in STAGES if stage.name != name)


def usage() -> str:
    """Write the page of `dsm-train --help`."""
    width = max(len(stage.name) for stage in STAGES)
    rows = "\n".join(f"  {stage.name:<{width}}  {stage.sentence}" for stage in STAGES)
    return f"""usage: dsm-train <stage> [--config FILE] [key=value ...]

stages:
{rows}

dsm-train <stage> --help explains every key; dsm-train --version tells what is installed.
On several ranks: torchrun --nproc-per-node N -m dsm_train <stage> ...
Not built yet: {" ".join(COMING)}"""


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
