"""GRPO, the paper's Algorithm 1: sample groups, score them, update the policy."""

from __future__ import annotations

from collections.abc import Sequence

from dsm_train.cli import user_errors
from dsm_train.data import Task
from dsm_train.data.source import draw
from dsm_train.grpo import Algorithm, algorithm, token_rows
from dsm_train.megatron.step import Model, TrainableModel
from dsm_train.megatron.weights import copy_weights
from dsm_train.metrics import Stopwatch
from dsm_train.packing import pack, sequence_lengths
from dsm_train.report import Report, learning_curve, write_report
from dsm_train.rollout.score import read_samples, rollout_metrics, score, shuffle_rewards
from dsm_train.run import Run, check_batch, start
from dsm_train.sft import supervise
from dsm_train.stages import GrpoConfig
from dsm_train.types import Prompt, Rollouts
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
    engine = run.engine(policy)
    reference = run.copy_of(policy) if algo.objective.kl_coef > 0 else None
    every, renew = config.eval.every, config.algorithm.reference_every
    with run.progress("grpo", config.steps) as progress:
        for step in range(config.steps):
            if reference is not None and renew and step and step % renew == 0:
                copy_weights(policy.chunks, reference.chunks)
            watch = Stopwatch()
            tasks = run.mine(draw(run.tasks.train, config.algorithm.prompts_per_step, step, config.run.seed))
            prompts = [Prompt(task.id, run.tokenizer.encode(task.prompt)) for task in tasks]
            rollouts = engine.generate(prompts, config.algorithm.group_size, config.sampling, step=step)
            watch.lap("rollout_seconds")
            rollouts = score_rollouts(run, config, policy, reference, rollouts, tasks, step)
            watch.lap("score_seconds")
            results = update(run, config, algo, policy, rollouts)
            watch.lap("update_seconds")
            values = run.average(rollout_metrics(rollouts)) | step_metrics(results)
            if reference is None:
                del values["kl"]  # there is nothing to measure it against
            values |= watch.rate(run.total(int(sequence_lengths(rollouts.sequences).sum())))
            if every and (step + 1) % every == 0 and step + 1 < config.steps:
                values["heldout_accuracy"] = run.evaluator(policy, config.sampling).greedy_accuracy(run.eval_tasks())
            run.metrics.log(step + 1, "grpo", values)
            run.samples.log(step + 1, read_samples(rollouts, tasks, run.tokenizer, count=4))
            shown = ("reward", "heldout_accuracy", "kl", "response_tokens", "tokens_per_second")
            progress.step({name: values[name] for name in shown if name in values})


def score_rollouts(
    run: Run,
    config: GrpoConfig,
    policy: Model,
    reference: Model | None,
    rollouts: Rollouts,
    tasks: Sequence[Task],
    step: int,
) -> Rollouts:
    """Rewards, and the log-probabilities that the update compares with."""
    rollouts = score(rollouts, tasks, run.tokenizer, config.rewards)
    if config.algorithm.shuffle_rewards:
        rollouts = shuffle_rewards(rollouts, config.run.seed, step)
    on_policy = config.algorithm.minibatches * config.algorithm.epochs == 1
    if reference is None and on_policy:
        return rollouts
    micro_batches = pack(rollouts.sequences, config.run.max_tokens, run.device)
    rows, temperature = rollouts.sequences.response_token_T.numel(), config.sampling.temperature
    if reference is not None:
        rollouts = rollouts.with_(ref_logprob_T=reference.logprobs(micro_batches, rows, temperature))
    if not on_policy:  # with a single update the ratio is 1, and old is the log-probability of the update itself
        rollouts = rollouts.with_(old_logprob_T=policy.logprobs(micro_batches, rows, temperature))
    return rollouts


def update(
    run: Run, config: GrpoConfig, algo: Algorithm, policy: TrainableModel, rollouts: Rollouts
) -> list[StepResult]:
    """mu passes over the rollouts, each in as many optimizer steps as there are minibatches."""
    rows = token_rows(rollouts, algo, config, run.parallel)
    results = []
    for _ in range(config.algorithm.epochs):
        for part, part_rows in rows:
            micro_batches = pack(part, config.run.max_tokens, run.device)
            loss = policy_loss(part_rows, algo.objective, config.sampling.temperature)
            results.append(optimizer_step(policy, micro_batches, loss))
    return results
