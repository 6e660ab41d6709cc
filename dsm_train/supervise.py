"""Supervised training: cross-entropy on the learnt tokens of examples, the mean over each optimizer step.

S examples of a batch, T their tokens from the first learnt one on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsm_train.balance import deal
from dsm_train.checkpoint.keeper import State
from dsm_train.configs import GrpoConfig, StageConfig
from dsm_train.data.source import readable
from dsm_train.eval.evaluate import Evaluator
from dsm_train.examples import Examples
from dsm_train.losses import SupervisedLoss
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, TrainableModel
from dsm_train.not_finite import Guard
from dsm_train.packing.microbatch import MicroBatch
from dsm_train.packing.packer import Packer
from dsm_train.prepare import Questions
from dsm_train.rollout.record import SupervisedBatch
from dsm_train.run import Job
from dsm_train.types import Sequences
from dsm_train.update import optimizer_step, skipped_metric

SHOWN = {"loss": "loss", "heldout_loss": "held-out loss", "heldout_accuracy": "accuracy"}


def supervise(
    job: Job[StageConfig], questions: Questions, model: TrainableModel, evaluator: Evaluator
) -> dict[str, float]:
    """Train through the prepared course; returns the last step's metrics, with those of the held-out tasks."""
    course, parallel, every = questions.course, job.parallel, job.config.eval.every
    assert course is not None, "a stage with supervised training prepares it"
    packer, section = job.packer(), "warmup" if isinstance(job.config, GrpoConfig) else "sft"
    guard = Guard(model, job.out, "sft", f"{section}.optim.not_finite")
    watched = readable(questions.tasks.heldout[: job.config.eval.tasks], questions.grader)
    with job.loop("sft", course.steps, State({"policy": model})) as loop:
        for step in loop:
            with loop.phase("update"):
                batch, learnt_T = course.batch(step)
                result = optimizer_step(model, *share(batch, learnt_T, packer, parallel))
            guard.check(step, [result], SupervisedBatch(batch, learnt_T), loop.say)
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, **skipped_metric([result])}
            values |= {"epoch": course.cuts[step + 1] / len(course.examples), "learnt_tokens": result.stats.tokens}
            if (every and (step + 1) % every == 0) or step + 1 == course.steps:
                if len(course.heldout):
                    values["heldout_loss"] = mean_loss(model, course.heldout, packer, parallel)
                if watched:
                    values["heldout_accuracy"] = evaluator.greedy_accuracy(watched, loop.say)
            loop.log(values, shown=SHOWN)
    return loop.last


def share(
    batch: Sequences, learnt_T: Tensor, packer: Packer, parallel: Parallel
) -> tuple[list[MicroBatch], SupervisedLoss]:
    """Pack this replica's part of a batch that all hold; the loss is the mean over the whole batch's learnt tokens."""
    index_S = deal(packer.cost(batch), parallel)
    weight_T = learnt_T.float() * (1.0 / int(learnt_T.sum()))
    return packer.pack(batch.take(index_S)), SupervisedLoss(weight_T[batch.rows_of(index_S)])


@torch.no_grad()
def mean_loss(model: Model, examples: Examples, packer: Packer, parallel: Parallel) -> float:
    """Compute the cross-entropy of the learnt tokens, the mean over all of them, without gradient. Collective."""
    parallel.watchdog.enter("validation loss")
    batch, learnt_T = examples.take(torch.arange(len(examples)))
    index_S = deal(packer.cost(batch), parallel)
    row_T = batch.rows_of(index_S)
    logprob_T = model.logprobs(packer.pack(batch.take(index_S)), len(row_T), temperature=1.0)
    mine = float(logprob_T.double()[learnt_T[row_T]].sum())
    return -sum(parallel.gather_over_data(mine)) / int(learnt_T.sum())
