"""Exploration: questions are drawn and answered, responses graded, and log-probabilities computed to compare with."""

from __future__ import annotations

from dataclasses import replace

from dsm_train.configs import GrpoConfig
from dsm_train.data.order import draw, occurrences
from dsm_train.data.tasks import Task
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model
from dsm_train.packing.packer import Packer
from dsm_train.prepare import Questions
from dsm_train.rollout.book import Book
from dsm_train.rollout.engine import RolloutEngine
from dsm_train.rollout.grading import shuffle_rewards, verdicts, with_rewards
from dsm_train.types import Prompt, Rollouts


def explore(
    engine: RolloutEngine, questions: Questions, config: GrpoConfig, policy: Model, step: int, book: Book | None = None
) -> tuple[list[Task], Rollouts]:
    """Draw this replica's share of the step's questions, and sample a group of responses to each.

    book: rollouts of this step that it holds are taken, others go into it.
    """
    parallel = policy.parallel
    drawn = draw(questions.tasks.train, questions.order, config.algorithm.prompts_per_step, step)
    # Counted over the whole stage, before replicas take their shares: random numbers do not depend on the layout.
    tasks, times = parallel.share(drawn), parallel.share(occurrences(drawn))
    if book is not None and (recorded := book.find(step, tasks, policy.steps)) is not None:
        return tasks, recorded
    prompts = [Prompt(task.id, questions.format.prompt(task), n) for task, n in zip(tasks, times, strict=True)]
    rollouts = engine.generate(prompts, config.algorithm.group_size, config.sampling, step=step)
    if book is not None and config.rewards.calls:  # functions of the user's may take long, or fail
        book.keep(step, rollouts)
    return tasks, rollouts


def grade(
    rollouts: Rollouts,
    tasks: list[Task],
    questions: Questions,
    config: GrpoConfig,
    parallel: Parallel,
    step: int,
    book: Book | None = None,
) -> Rollouts:
    """Reward each response, unless it was when it was recorded. Collective."""
    if rollouts.reward_S is None:
        rollouts = with_rewards(rollouts, verdicts(rollouts, tasks, questions.tokenizer, questions.grader, parallel))
        if book is not None:  # such functions need not say the same twice
            book.keep(step, rollouts)
    return shuffle_rewards(rollouts, config.run.seed, step) if config.algorithm.shuffle_rewards else rollouts


def with_logprobs(
    rollouts: Rollouts, policy: Model, reference: Model | None, packer: Packer, temperature: float, *, old: bool
) -> Rollouts:
    """Compute the log-probabilities under the reference model, and under the policy before the update where `old`.

    An on-policy update needs no old ones: they are those of the update itself.
    """
    if reference is None and not old:
        return rollouts
    micro_batches = packer.pack(rollouts.sequences)
    num_rows = rollouts.sequences.response_token_T.numel()
    if reference is not None:
        rollouts = replace(rollouts, ref_logprob_T=reference.logprobs(micro_batches, num_rows, temperature))
    if old:
        rollouts = replace(rollouts, old_logprob_T=policy.logprobs(micro_batches, num_rows, temperature))
    return rollouts
