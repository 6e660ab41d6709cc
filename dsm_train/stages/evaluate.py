"""Stages `eval` and `generate`: a model answers, and nothing is trained."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from dsm_train.cli import user_errors
from dsm_train.configs import EvaluateConfig, GenerateConfig
from dsm_train.data.tasks import Task
from dsm_train.eval.evaluate import Evaluator
from dsm_train.megatron.step import Model
from dsm_train.prepare import check_lengths, prepare
from dsm_train.reporting.metrics import json_safe
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.run import start
from dsm_train.types import Prompt


def evaluate(config: EvaluateConfig) -> None:
    """Measure accuracy on held-out tasks; printed, and written to eval.json where run.out is given."""
    with user_errors("dsm-train eval"):
        config, questions = prepare(config, config.sampling)
    with start(config, "eval", questions, trains=False) as job:
        tokenizer, heldout = questions.tokenizer, questions.tasks.heldout
        model = Model.build(job.language_model(), job.parallel)
        engine = EmbeddedEngine(model, tokenizer.stop_ids, config.run.seed)
        evaluator = Evaluator(engine, tokenizer, questions.format, job.parallel, config.sampling, questions.grader)
        greedy = evaluator.greedy(heldout, job.say)
        result: dict[str, Any] = {"tasks": len(heldout), "greedy_accuracy": greedy.accuracy, "reward": greedy.reward}
        if greedy.no_verdict:
            result["no_verdict"] = greedy.no_verdict
        if config.eval.samples:
            result["pass_at_k"] = evaluator.pass_at_k(heldout, config.eval.samples)
        job.say(json.dumps(json_safe(result)))
        if job.parallel.is_main and config.run.out is not None:
            (config.run.out / "eval.json").write_text(json.dumps(json_safe(result), indent=2) + "\n")


def generate(config: GenerateConfig) -> None:
    """Sample responses to prompts, and print them."""
    with user_errors("dsm-train generate"):
        config, questions = prepare(config, None)
        tokenizer = questions.tokenizer
        if not config.prompts:
            questions = replace(questions, notes=(*questions.notes, "no prompts are given: held-out tasks are asked"))
        asked = [Task(i, text) for i, text in enumerate(config.prompts)] or questions.tasks.heldout[:4]
        check_lengths(config, config.sampling, asked, [len(questions.format.prompt(task)) for task in asked])
    with start(config, "generate", questions, trains=False) as job:
        model = Model.build(job.language_model(), job.parallel)
        engine = EmbeddedEngine(model, tokenizer.stop_ids, config.run.seed)
        prompts = [Prompt(task.id, questions.format.prompt(task)) for task in asked]
        rollouts = engine.generate(prompts, config.num_samples, config.sampling, step=-1)
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        for s, p in enumerate(rollouts.sequences.prompt_of_response_S.tolist()):
            response = tokenizer.decode(rollouts.sequences.response(s).tolist())
            job.say(f"{questions.format.text(asked[p])}{bold}{response}{plain}")
