"""GRPO, the paper's Algorithm 1: sample groups, score them, update the policy."""

from __future__ import annotations

from dsm_train.balance import balance
from dsm_train.cli import user_errors
from dsm_train.configs import GrpoConfig
from dsm_train.explore import explore, score_rollouts
from dsm_train.grpo import Algorithm, algorithm, token_rows
from dsm_train.megatron.step import TrainableModel
from dsm_train.megatron.weights import copy_weights
from dsm_train.packing.microbatch import sequence_lengths
from dsm_train.reporting.metrics import Stopwatch
from dsm_train.reporting.report import Report, learning_curve, write_report
from dsm_train.rollout.record import check_writable, write_rollouts
from dsm_train.rollout.score import read_samples, rollout_metrics
from dsm_train.run import Run, check_batch, start
from dsm_train.stages.sft import supervise
from dsm_train.types import Rollouts
from dsm_train.update import StepResult, optimizer_step, policy_loss, step_metrics

PROG = "dsm-train grpo"


def train_grpo(config: GrpoConfig) -> None:
    """Stage `grpo`: a supervised warm-up where one is asked for, Algorithm 1, and the report."""
    with user_errors(PROG):
        algo = algorithm(config.algorithm)
        check_batch(
            config.parallel,
            "algorithm.prompts_per_step",
            config.algorithm.prompts_per_step,
            config.algorithm.minibatches,
        )
        if config.record is not None:
            check_writable(config.record)
    with start(config, config.sampling, PROG) as run:
        warmup, updates = config.warmup, config.steps * config.algorithm.minibatches * config.algorithm.epochs
        policy = run.trainable(warmup.optim if warmup.steps else config.optim, warmup.steps or updates)
        evaluator = run.evaluator(policy, config.sampling)
        learnt: dict[str, object] = {}
        if warmup.steps:
            learnt = supervise(run, policy, warmup, evaluator)
            policy.restart(config.optim, updates)
        before = evaluator.greedy_accuracy(run.tasks.heldout)
        run.metrics.log(0, "grpo", {"heldout_accuracy": before})
        explore_and_update(run, config, algo, policy)
        seconds = run.seconds()
        after = evaluator.greedy_accuracy(run.tasks.heldout)
        run.metrics.log(config.steps, "grpo", {"heldout_accuracy": after})
        if config.eval.samples:
            learnt["pass_at_k"] = evaluator.pass_at_k(run.tasks.heldout, config.eval.samples)
        run.save(policy)
        if run.parallel.is_main:
            write_report(config.run.out, Report(before, after, seconds, learnt))
            learning_curve(config.run.out / "metrics.jsonl", config.run.out / "curve.png")
        run.say(f"held-out accuracy {before:.3f} before GRPO, {after:.3f} after, {seconds:.0f} s: {config.run.out}")


def explore_and_update(run: Run, config: GrpoConfig, algo: Algorithm, policy: TrainableModel) -> None:
    """The loop of Algorithm 1: explore, score, update."""
    engine, watchdog = run.engine(policy), run.parallel.watchdog
    reference = run.copy_of(policy) if algo.objective.kl_coef > 0 else None
    every, renew = config.eval.every, config.algorithm.reference_every
    with run.progress("grpo", config.steps) as progress:
        for step in range(config.steps):
            if reference is not None and renew and step and step % renew == 0:
                copy_weights(policy.chunks, reference.chunks)
            watch, number = Stopwatch(), step + 1
            watchdog.enter(f"rollout of step {number}")
            tasks, rollouts = explore(run, config, engine, step)
            watch.lap("rollout_seconds")
            watchdog.enter(f"scoring of step {number}")
            rollouts = score_rollouts(run, config, policy, reference, rollouts, tasks, step)
            watch.lap("score_seconds")
            watchdog.enter(f"update of step {number}")
            results = update(run, config, algo, policy, rollouts)
            watch.lap("update_seconds")
            values = run.average(rollout_metrics(rollouts)) | step_metrics(results)
            if reference is None:
                del values["kl"]  # there is nothing to measure it against
            values |= watch.rate(run.total(int(sequence_lengths(rollouts.sequences).sum())))
            if config.record is not None and number == config.record_step:
                write_rollouts(config.record, rollouts, run.parallel)
            if every and number % every == 0 and number < config.steps:
                values["heldout_accuracy"] = run.evaluator(policy, config.sampling).greedy_accuracy(run.eval_tasks())
            run.metrics.log(number, "grpo", values)
            run.samples.log(number, read_samples(rollouts, tasks, run.tokenizer, count=4))
            shown = ("reward", "heldout_accuracy", "kl", "response_tokens", "tokens_per_second")
            progress.step({name: values[name] for name in shown if name in values})


def update(
    run: Run, config: GrpoConfig, algo: Algorithm, policy: TrainableModel, rollouts: Rollouts
) -> list[StepResult]:
    """mu passes over the rollouts, each in as many optimizer steps as there are minibatches."""
    minibatches, fixed_length = config.algorithm.minibatches, config.sampling.max_new_tokens
    work = []
    for sequences, rows in token_rows(rollouts, algo, minibatches, fixed_length, run.parallel):
        sequences, rows = balance(sequences, rows, run.cost(sequences), run.parallel)
        work.append((run.pack(sequences), policy_loss(rows, algo.objective, config.sampling.temperature)))
    return [optimizer_step(policy, *part) for _ in range(config.algorithm.epochs) for part in work]
