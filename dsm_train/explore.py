"""What comes before the update: questions are drawn and answered, and the answers are scored."""

from __future__ import annotations

from dsm_train.configs import GrpoConfig
from dsm_train.data.source import draw
from dsm_train.data.tasks import Task
from dsm_train.megatron.step import Model
from dsm_train.rollout.engine import RolloutEngine
from dsm_train.rollout.score import score, shuffle_rewards
from dsm_train.run import Run
from dsm_train.types import Prompt, Rollouts


def explore(run: Run, config: GrpoConfig, engine: RolloutEngine, step: int) -> tuple[list[Task], Rollouts]:
    """This replica's share of the step's questions, and a group of responses to each."""
    tasks = run.mine(draw(run.tasks.train, config.algorithm.prompts_per_step, step, config.run.seed))
    prompts = [Prompt(task.id, run.tokenizer.encode(task.prompt)) for task in tasks]
    return tasks, engine.generate(prompts, config.algorithm.group_size, config.sampling, step=step)


def score_rollouts(
    run: Run,
    config: GrpoConfig,
    policy: Model,
    reference: Model | None,
    rollouts: Rollouts,
    tasks: list[Task],
    step: int,
) -> Rollouts:
    """Rewards, and the log-probabilities that the update compares with."""
    rollouts = score(rollouts, tasks, run.tokenizer, config.rewards)
    if config.algorithm.shuffle_rewards:
        rollouts = shuffle_rewards(rollouts, config.run.seed, step)
    on_policy = config.algorithm.minibatches * config.algorithm.epochs == 1
    if reference is None and on_policy:
        return rollouts
    micro_batches = run.pack(rollouts.sequences)
    rows, temperature = rollouts.sequences.response_token_T.numel(), config.sampling.temperature
    if reference is not None:
        rollouts = rollouts.with_(ref_logprob_T=reference.logprobs(micro_batches, rows, temperature))
    if not on_policy:  # with a single update the ratio is 1, and old is the log-probability of the update itself
        rollouts = rollouts.with_(old_logprob_T=policy.logprobs(micro_batches, rows, temperature))
    return rollouts
