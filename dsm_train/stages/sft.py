"""Stage `sft`: supervised fine-tuning on worked solutions; also the warm-up of GRPO.

S examples, T solution tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsm_train.cli import user_errors
from dsm_train.config import SftTraining
from dsm_train.configs import SftConfig, StageConfig
from dsm_train.data.format import Format
from dsm_train.data.source import draw, solved
from dsm_train.data.tasks import Task
from dsm_train.eval.evaluate import Evaluator
from dsm_train.grpo import token_weights
from dsm_train.losses import SupervisedLoss
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import TrainableModel
from dsm_train.prepare import Questions, prepare
from dsm_train.reporting.report import learning_curve
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.run import Job, start
from dsm_train.types import Sequences
from dsm_train.update import optimizer_step

STAGE = "sft"


def train_sft(config: SftConfig) -> None:
    """Fine-tune a model on the tasks' worked solutions, and write weights, metrics and curve."""
    with user_errors(f"dsm-train {STAGE}"):
        config, questions = prepare(config, config.sampling)
    with start(config, STAGE, questions) as job:
        tokenizer = questions.tokenizer
        spec = job.language_model()
        model = TrainableModel.build(spec, job.parallel, config.sft.optim, config.sft.steps)
        engine = EmbeddedEngine(model, tokenizer.stop_ids, config.run.seed)
        evaluator = Evaluator(engine, tokenizer, questions.format, job.parallel, config.sampling, questions.grader)
        supervise(job, questions, model, config.sft, evaluator)
        job.save(model, tokenizer)
        if job.parallel.is_main:
            learning_curve(job.out / "metrics.jsonl", job.out / "curve.png")


def supervise(
    job: Job[StageConfig], questions: Questions, model: TrainableModel, training: SftTraining, evaluator: Evaluator
) -> dict[str, Any]:
    """Train on worked solutions, token mean over each step; returns the outcome for the report."""
    tasks, heldout = solved(questions.tasks.train, training.examples), questions.tasks.heldout
    watched, every, seed = heldout[: job.config.eval.tasks], job.config.eval.every, job.config.run.seed
    packer = job.packer()
    with job.loop("sft", training.steps) as loop:
        for step in loop:
            with loop.phase("update"):
                batch = draw(tasks, training.batch, step, seed)
                sequences, loss = examples(batch, questions.format, training.prompt_loss, job.parallel)
                result = optimizer_step(model, packer.pack(sequences), loss)
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
            if (every and (step + 1) % every == 0) or step + 1 == training.steps:
                values["heldout_accuracy"] = evaluator.greedy_accuracy(watched)
            loop.log(values, shown={"loss": "loss", "heldout_accuracy": "accuracy"})
    return {
        "warmup_examples": len(tasks),
        "train_tasks": len(questions.tasks.train),
        "warmup_accuracy_on_examples": evaluator.greedy_accuracy(tasks[: len(heldout)]),
        "warmup_seconds": job.seconds(),
    }


def examples(
    batch: Sequence[Task], format: Format, prompt_loss: bool, parallel: Parallel
) -> tuple[Sequences, SupervisedLoss]:
    """Tokenise this replica's share of a batch; the loss is the mean over the whole batch's solution tokens."""
    pairs = [example(task, format, prompt_loss) for task in batch]
    num_tokens = sum(len(solution) for _, solution in pairs)
    mine = parallel.share(pairs)
    sequences = Sequences.from_lists([p for p, _ in mine], [s for _, s in mine])
    return sequences, SupervisedLoss(token_weights(sequences.response_cu, "token", len(batch), num_tokens, 1))


def example(task: Task, format: Format, prompt_loss: bool) -> tuple[list[int], list[int]]:
    """Split an example into the tokens that are given and those that are learnt: prompt, and solution with its end."""
    whole = format.example(task)
    return (whole.prompt[:1], whole.prompt[1:] + whole.response) if prompt_loss else (whole.prompt, whole.response)
