"""Stage `sft`: supervised fine-tuning on worked solutions and conversations."""

from __future__ import annotations

from dsm_train.cli import user_errors
from dsm_train.configs import SftConfig
from dsm_train.eval.evaluate import Evaluator
from dsm_train.megatron.step import TrainableModel
from dsm_train.prepare import prepare
from dsm_train.reporting.report import learning_curve
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.run import start
from dsm_train.supervise import supervise

STAGE = "sft"


def train_sft(config: SftConfig) -> None:
    """Fine-tune a model on the tasks' worked solutions, and write weights, metrics and curve."""
    with user_errors(f"dsm-train {STAGE}"):
        config, questions = prepare(config, config.sampling)
    assert questions.course is not None
    with start(config, STAGE, questions) as job:
        tokenizer = questions.tokenizer
        spec = job.language_model()
        model = TrainableModel.build(spec, job.parallel, config.sft.optim, questions.course.steps)
        engine = EmbeddedEngine(model, tokenizer.stop_ids, config.run.seed)
        evaluator = Evaluator(engine, tokenizer, questions.format, job.parallel, config.sampling, questions.grader)
        last = supervise(job, questions, model, evaluator)
        job.save(model, tokenizer)
        if job.parallel.is_main:
            learning_curve(job.out / "metrics.jsonl", job.out / "curve.png")
        names = {"loss": "loss", "heldout_loss": "held-out loss", "heldout_accuracy": "held-out accuracy"}
        values = ", ".join(f"{text} {last[name]:.3f}" for name, text in names.items() if name in last)
        job.say(f"{values}, {job.seconds():.0f} s: {job.out}")
