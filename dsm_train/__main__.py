"""The command line: `python -m dsm_train <stage> --config recipes/x.yaml [key=value ...]`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COMING = ("pretrain", "reward", "ppo", "rft", "dpo", "convert", "plan")
USAGE = """usage: dsm-train <stage> [--config FILE] [key=value ...]

stages:
  sft          supervised fine-tuning on worked solutions
  grpo         GRPO (DeepSeekMath, Algorithm 1), after a supervised warm-up where one is asked for
  eval         greedy accuracy and pass@k on held-out tasks
  generate     sample responses to prompts
  verify-step  compare an optimizer step in this layout with the same step on one rank
  corpus       mine mathematics from Common Crawl: extract, dedup, rounds, decontaminate, tokenise

dsm-train <stage> --help explains every key. On several ranks: torchrun --nproc-per-node N -m dsm_train <stage> ...
coming: """ + " ".join(COMING)


@dataclass(frozen=True)
class Stage:
    """A stage: its configuration, what runs it, and a sentence on it."""

    config: type
    run: Callable[[Any], None]
    description: str


def stage(name: str) -> Stage:
    """The stage of this name; imports what it needs and no more."""
    from dsm_train import configs

    if name == "grpo":
        from dsm_train.stages.grpo import train_grpo

        return Stage(configs.GrpoConfig, train_grpo, "GRPO: sample groups of responses, score them, update the policy.")
    if name == "sft":
        from dsm_train.stages.sft import train_sft

        return Stage(configs.SftConfig, train_sft, "Supervised fine-tuning on worked solutions.")
    if name == "verify-step":
        from dsm_train.stages.verify_step import verify_step

        return Stage(configs.VerifyStepConfig, verify_step, "Compare an optimizer step here with the same on one rank.")
    from dsm_train.stages.evaluate import evaluate, generate

    if name == "eval":
        return Stage(configs.EvaluateConfig, evaluate, "Greedy accuracy and pass@k on held-out tasks.")
    return Stage(configs.GenerateConfig, generate, "Sample responses to prompts.")


def stage_configs() -> list[type]:
    """The configurations of all stages, which may share a recipe."""
    from dsm_train import configs
    from dsm_train.corpus.config import CorpusConfig

    return [
        configs.SftConfig,
        configs.GrpoConfig,
        configs.EvaluateConfig,
        configs.GenerateConfig,
        configs.VerifyStepConfig,
        CorpusConfig,
    ]


def main(argv: list[str] | None = None) -> None:
    """Entry point of `dsm-train`."""
    # OpenMP's threads spin while they wait, which starves every other process of the machine, and is starved by them:
    # asleep, a step is as fast alone and several times faster beside others. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name == "corpus":
        from dsm_train.corpus import stage as corpus

        corpus.main(rest)
        return
    known = ("sft", "grpo", "eval", "generate", "verify-step", "corpus")
    if name not in known:
        what = "is not built yet" if name in COMING else "is no stage"
        print(f"dsm-train: {name} {what}; stages that run: {' '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    packages = ("megatron", "pyarrow", "transformers", "tyro")
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(
            f"dsm-train: the trainer needs {', '.join(missing)}: pip install --no-build-isolation '.[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from dsm_train.cli import load_config, user_errors

    chosen = stage(name)
    prog = f"dsm-train {name}"
    with user_errors(prog):
        config = load_config(chosen.config, rest, prog=prog, description=chosen.description, others=stage_configs())
    chosen.run(config)


if __name__ == "__main__":
    main()
