"""The stages `eval` and `generate`."""

from __future__ import annotations

import json

from dsm_train.cli import user_errors
from dsm_train.configs import EvaluateConfig, GenerateConfig
from dsm_train.data.tasks import Task
from dsm_train.run import check_lengths, start
from dsm_train.types import Prompt


def evaluate(config: EvaluateConfig) -> None:
    """Stage `eval`: prints, and writes eval.json."""
    with start(config, config.sampling, "dsm-train eval", trains=False) as run:
        evaluator = run.evaluator(run.model(), config.sampling)
        result: dict[str, object] = {"tasks": len(run.tasks.heldout)}
        result["greedy_accuracy"] = evaluator.greedy_accuracy(run.tasks.heldout)
        if config.eval.samples:
            result["pass_at_k"] = evaluator.pass_at_k(run.tasks.heldout, config.eval.samples)
        run.say(json.dumps(result))
        if run.parallel.is_main:
            (config.run.out / "eval.json").write_text(json.dumps(result, indent=2) + "\n")


def generate(config: GenerateConfig) -> None:
    """Stage `generate`: prints responses."""
    with start(config, config.sampling, "dsm-train generate", trains=False) as run:
        texts = config.prompts or tuple(task.prompt for task in run.tasks.heldout[:4])
        with user_errors("dsm-train generate"):
            given = [Task(i, text, answer="", solution=None) for i, text in enumerate(texts)]
            check_lengths(config, config.sampling, given, run.tokenizer)
        prompts = [Prompt(i, run.tokenizer.encode(text)) for i, text in enumerate(texts)]
        rollouts = run.engine(run.model()).generate(prompts, config.num_samples, config.sampling, step=-1)
        for s, p in enumerate(rollouts.sequences.prompt_of_response_S.tolist()):
            response = run.tokenizer.decode(rollouts.sequences.response(s).tolist())
            run.say(f"{texts[p]}\033[1m{response}\033[0m" if run.is_terminal else f"{texts[p]}{response}")
