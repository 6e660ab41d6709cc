"""Grading of rollouts, samples for people to read, and the metrics of a step.

P prompts, S responses, T response tokens, F reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsm_train.data.format import Format
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.megatron.parallel import Parallel
from dsm_train.reporting.metrics import Sample
from dsm_train.rewards.config import RewardFunction
from dsm_train.rewards.grader import Grader, Verdict
from dsm_train.types import Rollouts


def verdicts(
    rollouts: Rollouts,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    grader: Grader,
    parallel: Parallel,
    batch: range | None = None,
) -> list[Verdict]:
    """Judge every response of this replica, or those in `batch`: `tasks[p]` is the task of prompt p. Collective.

    One rank of the replica grades and tells the others: functions of the user's need not say the same twice.
    """
    graded: list[Verdict] = []
    if parallel.is_replica_main:
        sequences = rollouts.sequences
        batch = range(sequences.num_responses) if batch is None else batch
        prompt_of_response_S, finished_S = sequences.prompt_of_response_S.tolist(), rollouts.finished_S.tolist()
        with parallel.watchdog.paused():  # functions of the user's have a time limit of their own
            graded = grader.grade(
                [tokenizer.decode(sequences.response(s).tolist()) for s in batch],
                [tasks[prompt_of_response_S[s]] for s in batch],
                [finished_S[s] for s in batch],
            )
    return parallel.object_from_replica_main(graded)


def with_rewards(rollouts: Rollouts, graded: Sequence[Verdict]) -> Rollouts:
    """Add the reward of every response, and its parts."""
    rewards, parts = [verdict.reward for verdict in graded], [verdict.parts for verdict in graded]
    return replace(
        rollouts,
        reward_S=torch.tensor(rewards, dtype=torch.float32),
        reward_SF=torch.tensor(parts, dtype=torch.float32),
    )


def shuffle_rewards(rollouts: Rollouts, seed: int, step: int) -> Rollouts:
    """Permute the rewards within the step, so that they carry no information (a control experiment).

    Responses without a verdict stay so: they are left out, as in the experiment that this one controls.
    """
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFFFFFF)
    assert rollouts.reward_S is not None and rollouts.reward_SF is not None
    index_S, judged = torch.arange(rollouts.reward_S.numel()), ~rollouts.reward_S.isnan()
    index_S[judged] = index_S[judged][torch.randperm(int(judged.sum()), generator=generator)]
    return replace(rollouts, reward_S=rollouts.reward_S[index_S], reward_SF=rollouts.reward_SF[index_S])


def read_samples(
    rollouts: Rollouts, tasks: Sequence[Task], tokenizer: Tokenizer, format: Format, labels: Sequence[str], count: int
) -> list[Sample]:
    """Write out the first response of each of the first `count` groups, for people to read.

    labels: names of the reward functions.
    """
    assert rollouts.reward_S is not None and rollouts.reward_SF is not None
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
                dict(zip(labels, rollouts.reward_SF[s].tolist(), strict=True)),
                task.label,
            )
        )
    return samples


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Summarise a step's rollouts, on this replica; its rewards: `reward_metrics`."""
    sequences = rollouts.sequences
    assert rollouts.reward_S is not None
    reward_PG = rollouts.reward_S.view(sequences.num_prompts, -1)
    # A response without a verdict widens no spread, and a group without any verdict has none.
    highest_P, lowest_P = reward_PG.nan_to_num(-math.inf).amax(1), reward_PG.nan_to_num(math.inf).amin(1)
    return {
        "groups_without_spread": float((highest_P <= lowest_P).float().mean()),
        "response_tokens": sequences.response_token_T.numel() / sequences.num_responses,
        "finished": float(rollouts.finished_S.float().mean()),
    }


def reward_metrics(reward_S: Tensor, reward_SF: Tensor, functions: Sequence[RewardFunction]) -> dict[str, float]:
    """Summarise the rewards of a step, of all replicas: means and deviation over the responses with a verdict.

    NaN where there is no verdict at all. A function of weight 0 has no part in `no_verdict`.
    """
    labels, counted = [f.label for f in functions], [i for i, f in enumerate(functions) if f.weight]
    judged = reward_S[~reward_S.isnan()].double()
    failed_F = reward_SF.isnan().double().mean(0).tolist()
    mean_F = reward_SF.double().nanmean(0).tolist()
    return {
        "reward": float(judged.mean()),
        "reward_std": float(judged.std()) if len(judged) > 1 else 0.0,
        "no_verdict": float(reward_SF[:, counted].isnan().any(1).double().mean()),
        **{f"reward_{label}": mean for label, mean in zip(labels, mean_F, strict=True)},
        **{f"no_verdict_{label}": share for label, share in zip(labels, failed_F, strict=True) if share},
    }
