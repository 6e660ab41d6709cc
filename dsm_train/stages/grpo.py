"""Stage `grpo`: a supervised warm-up where one is asked for, Algorithm 1, and the report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dsm_train.cli import user_errors
from dsm_train.configs import GrpoConfig
from dsm_train.course import Course
from dsm_train.eval.evaluate import Evaluator, Greedy
from dsm_train.grpo import Algorithm, algorithm
from dsm_train.megatron.step import TrainableModel
from dsm_train.prepare import Questions, check_batch, check_record, prepare
from dsm_train.reporting.folder import ROLLOUTS
from dsm_train.reporting.journal import Journal
from dsm_train.reporting.report import Report, learning_curve, write_report
from dsm_train.rollout.book import Book
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.run import Job, start
from dsm_train.supervise import supervise
from dsm_train.train import reinforce

STAGE = "grpo"


def train_grpo(config: GrpoConfig) -> None:
    """Train a policy from what the configuration names, and write weights, metrics, report and curve."""
    with user_errors(f"dsm-train {STAGE}"):
        algo = algorithm(config.algorithm, config.rewards)
        prompts = config.algorithm.prompts_per_step
        check_batch(config.parallel, "algorithm.prompts_per_step", prompts, algo.minibatches)
        check_record(config.record)
        config, questions = prepare(config, config.sampling)
    with start(config, STAGE, questions) as job:
        tokenizer, heldout = questions.tokenizer, questions.tasks.heldout
        course, updates = questions.course, config.steps * algo.updates
        policy = TrainableModel.build(
            job.language_model(),
            job.parallel,
            *((config.optim, updates) if course is None else (config.warmup.optim, course.steps)),
        )
        engine = EmbeddedEngine(policy, tokenizer.stop_ids, config.run.seed)
        evaluator = Evaluator(engine, tokenizer, questions.format, job.parallel, config.sampling, questions.grader)
        learnt: dict[str, Any] = {}
        if course is not None:
            supervise(job, questions, policy, evaluator)
            learnt |= job.once("warmup", lambda: after_warmup(job, questions, course, evaluator))
            policy.restart(config.optim, updates)
        before = Greedy(**job.once("before", lambda: asdict(before_grpo(job, questions, evaluator))))
        reference = policy.frozen_copy() if algo.has_reference else None
        book = Book(job.out / ROLLOUTS, job.parallel, job.keeper.saved) if config.checkpoint.wanted else None
        reinforce(job, questions, algo, policy, reference, engine, journal(job, questions, algo, evaluator), book)
        seconds = job.seconds()
        after = evaluator.greedy(heldout, job.say)
        job.metrics.log(config.steps, "grpo", {"heldout_accuracy": after.accuracy})
        if before.no_verdict or after.no_verdict:
            learnt |= {"no_verdict_before": before.no_verdict, "no_verdict_after": after.no_verdict}
        if config.eval.samples:
            learnt["pass_at_k"] = evaluator.pass_at_k(heldout, config.eval.samples)
        engine.close()
        job.save(policy, tokenizer)
        if job.parallel.is_main:
            write_report(job.out, Report(before.accuracy, after.accuracy, seconds, learnt))
            learning_curve(job.out / "metrics.jsonl", job.out / "curve.png")
        accuracy = f"{before.accuracy:.3f} before GRPO, {after.accuracy:.3f} after"
        job.say(f"held-out accuracy {accuracy}, {seconds:.0f} s: {job.out}")


def after_warmup(job: Job[GrpoConfig], questions: Questions, course: Course, evaluator: Evaluator) -> dict[str, Any]:
    """Measure what the warm-up taught."""
    tasks = course.examples.tasks[: len(questions.tasks.heldout)]
    return {
        "warmup_examples": len(course.examples),
        "train_tasks": len(questions.tasks.train),
        "warmup_accuracy_on_examples": evaluator.greedy_accuracy(tasks, job.say),
        "warmup_seconds": job.seconds(),
    }


def before_grpo(job: Job[GrpoConfig], questions: Questions, evaluator: Evaluator) -> Greedy:
    """Measure and log the accuracy that reinforcement learning starts from."""
    before = evaluator.greedy(questions.tasks.heldout, job.say)
    job.metrics.log(0, "grpo", {"heldout_accuracy": before.accuracy})
    return before


def journal(job: Job[GrpoConfig], questions: Questions, algo: Algorithm, evaluator: Evaluator) -> Journal:
    """Open the journal of the run."""
    config = job.config
    return Journal(
        parallel=job.parallel,
        samples=job.samples,
        tokenizer=questions.tokenizer,
        evaluator=evaluator,
        heldout=questions.tasks.heldout[: config.eval.tasks],
        steps=config.steps,
        every=config.eval.every,
        max_new_tokens=config.sampling.max_new_tokens,
        has_reference=algo.has_reference,
        record=config.record,
        record_step=config.record_step,
    )
