"""Supervised fine-tuning on worked solutions; also the warm-up of GRPO.

S examples, T solution tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsm_train.config import SftTraining
from dsm_train.configs import SftConfig
from dsm_train.data.source import draw, solved
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.eval.evaluate import Evaluator
from dsm_train.grpo import token_weights
from dsm_train.megatron.step import Loss, TrainableModel
from dsm_train.packing.microbatch import MicroBatch
from dsm_train.reporting.report import learning_curve
from dsm_train.run import Run, start
from dsm_train.types import Sequences
from dsm_train.update import optimizer_step, supervised_loss


def train_sft(config: SftConfig) -> None:
    """Stage `sft`."""
    with start(config, config.sampling, "dsm-train sft") as run:
        model = run.trainable(config.sft.optim, config.sft.steps)
        supervise(run, model, config.sft, run.evaluator(model, config.sampling))
        run.save(model)
        if run.parallel.is_main:
            learning_curve(config.run.out / "metrics.jsonl", config.run.out / "curve.png")


def supervise(run: Run, model: TrainableModel, config: SftTraining, evaluator: Evaluator) -> dict[str, object]:
    """Train on worked solutions, token mean over each step; returns what it came to, for the report."""
    tasks = solved(run.tasks.train, config.examples)
    every, seed = run.config.eval.every, run.config.run.seed
    accuracy = evaluator.greedy_accuracy(run.eval_tasks())
    with run.progress("sft", config.steps) as progress:
        for step in range(config.steps):
            run.parallel.watchdog.enter(f"supervised step {step + 1}")
            batch = draw(tasks, config.batch, step, seed)
            result = optimizer_step(model, *_micro_batches(run, batch, config))
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
            if (every and (step + 1) % every == 0) or step + 1 == config.steps:
                accuracy = values["heldout_accuracy"] = evaluator.greedy_accuracy(run.eval_tasks())
            run.metrics.log(step + 1, "sft", values)
            progress.step({"loss": result.loss, "accuracy": accuracy})
    on_examples = evaluator.greedy_accuracy(tasks[: len(run.tasks.heldout)])
    return {
        "warmup_examples": len(tasks),
        "train_tasks": len(run.tasks.train),
        "warmup_accuracy_on_examples": on_examples,
        "warmup_seconds": run.seconds(),
    }


def _micro_batches(run: Run, batch: Sequence[Task], config: SftTraining) -> tuple[list[MicroBatch], Loss]:
    """This replica's share of a batch, packed, and its loss: the mean over the whole batch's solution tokens."""
    examples = [_example(task, run.tokenizer, config.prompt_loss) for task in batch]
    num_tokens = sum(len(solution) for _, solution in examples)
    mine = examples[run.parallel.dp_rank :: run.parallel.dp_size]
    sequences = Sequences.from_lists([p for p, _ in mine], [s for _, s in mine])
    weight_T = token_weights(sequences.response_cu, "token", len(batch), num_tokens, fixed_length=1)
    return run.pack(sequences), supervised_loss(weight_T)


def _example(task: Task, tokenizer: Tokenizer, prompt_loss: bool) -> tuple[list[int], list[int]]:
    """What is given and what is learnt: prompt, and solution with its end token; tokenised apart."""
    prompt, solution = tokenizer.encode(task.prompt), [*tokenizer.encode(task.solution or ""), tokenizer.eos_id]
    return (prompt[:1], prompt[1:] + solution) if prompt_loss else (prompt, solution)
