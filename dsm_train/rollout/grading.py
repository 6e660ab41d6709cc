"""Grading of rollouts, samples for people to read, and the metrics of a step.

P prompts, S responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dsm_train.data.format import Format
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.reporting.metrics import Sample
from dsm_train.rewards.grader import Grader, Verdict
from dsm_train.types import Rollouts


def verdicts(rollouts: Rollouts, tasks: Sequence[Task], tokenizer: Tokenizer, grader: Grader) -> list[Verdict]:
    """Judge every response: `tasks[p]` is the task of prompt p."""
    sequences = rollouts.sequences
    return grader.grade(
        [tokenizer.decode(sequences.response(s).tolist()) for s in range(sequences.num_responses)],
        [tasks[p] for p in sequences.prompt_of_response_S.tolist()],
        rollouts.finished_S.tolist(),
    )


def with_rewards(rollouts: Rollouts, tasks: Sequence[Task], tokenizer: Tokenizer, grader: Grader) -> Rollouts:
    """Reward every response: `tasks[p]` is the task of prompt p."""
    rewards = [verdict.reward for verdict in verdicts(rollouts, tasks, tokenizer, grader)]
    return replace(rollouts, reward_S=torch.tensor(rewards, dtype=torch.float32))


def shuffle_rewards(rollouts: Rollouts, seed: int, step: int) -> Rollouts:
    """Permute the rewards within the step, so that they carry no information (a control experiment)."""
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFFFFFF)
    assert rollouts.reward_S is not None
    order = torch.randperm(rollouts.reward_S.numel(), generator=generator)
    return replace(rollouts, reward_S=rollouts.reward_S[order])


def read_samples(
    rollouts: Rollouts, tasks: Sequence[Task], tokenizer: Tokenizer, format: Format, count: int
) -> list[Sample]:
    """Write out the first response of each of the first `count` groups, for people to read."""
    assert rollouts.reward_S is not None
    samples = []
    for p, task in enumerate(tasks[:count]):
        s = int(rollouts.sequences.group_cu[p])
        samples.append(
            Sample(
                format.text(task),
                tokenizer.decode(rollouts.sequences.response(s).tolist()),
                task.answer,
                float(rollouts.reward_S[s]),
                "stop" if rollouts.finished_S[s] else "length",
            )
        )
    return samples


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Summarise a step's rollouts, on this replica."""
    sequences = rollouts.sequences
    assert rollouts.reward_S is not None
    reward_PG = rollouts.reward_S.view(sequences.num_prompts, -1)
    spread_P = reward_PG.amax(1) - reward_PG.amin(1)
    return {
        "reward": float(reward_PG.mean()),
        "groups_without_spread": float((spread_P == 0).float().mean()),
        "response_tokens": sequences.response_token_T.numel() / sequences.num_responses,
        "finished": float(rollouts.finished_S.float().mean()),
    }
