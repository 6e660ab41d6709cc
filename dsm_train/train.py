"""GRPO, the paper's Algorithm 1 (DeepSeekMath, arXiv 2402.03300): sample groups, score them, update the policy."""

from __future__ import annotations

from dsm_train.checkpoint.keeper import State
from dsm_train.configs import GrpoConfig
from dsm_train.explore import explore, grade, with_logprobs
from dsm_train.grpo import Algorithm
from dsm_train.megatron.step import Model, TrainableModel
from dsm_train.not_finite import Guard
from dsm_train.prepare import Questions
from dsm_train.reporting.journal import Journal
from dsm_train.rollout.book import Book
from dsm_train.rollout.engine import RolloutEngine
from dsm_train.run import Job
from dsm_train.update import update


def reinforce(
    job: Job[GrpoConfig],
    questions: Questions,
    algo: Algorithm,
    policy: TrainableModel,
    reference: Model | None,
    engine: RolloutEngine,
    journal: Journal,
    book: Book | None,
) -> None:
    """Run the exploration stages of Algorithm 1: sample a group of responses per question, score them, update.

    reference: the model that the KL penalty holds the policy to; None when kl_coef is 0. book: record of rollouts.
    """
    config, packer, parallel = job.config, job.packer(), job.parallel
    renew, sampling = config.algorithm.reference_every, config.sampling
    guard = Guard(policy, job.out, "grpo", "optim.not_finite")
    models = {"policy": policy} if reference is None else {"policy": policy, "reference": reference}
    with job.loop("grpo", config.steps, State(models, journal.counts)) as loop:
        for step in loop:
            with loop.phase("rollout"):
                engine.sync(policy)
                tasks, rollouts = explore(engine, questions, config, policy, step, book)
            with loop.phase("score"):
                if reference is not None and renew and step and step % renew == 0:
                    reference.take_weights(policy)
                rollouts = grade(rollouts, tasks, questions, config, parallel, step, book)
                rollouts = with_logprobs(
                    rollouts, policy, reference, packer, sampling.temperature, old=not algo.on_policy
                )
            with loop.phase("update"):
                results = update(policy, rollouts, algo, sampling, packer)
            guard.check(step, results, rollouts, loop.say)
            journal.log(loop, step, tasks, rollouts, results)
