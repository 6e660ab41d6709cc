"""Rewards of a step: shuffled, and in numbers, where some responses have no verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch

from dsm_train.rewards import RewardFunction
from dsm_train.rewards.grader import Verdict
from dsm_train.rollout.grading import reward_metrics, rollout_metrics, shuffle_rewards, with_rewards
from dsm_train.types import Rollouts

NONE = math.nan
FUNCTIONS = [RewardFunction(call="mine:a"), RewardFunction(call="mine:b")]
PARTS = [(1.0, 0.5), (1.0, NONE), (0.0, 0.25), (NONE, 0.5), (NONE, NONE), (NONE, 2.0), (1.0, 1.0), (1.0, NONE)]
"""Four groups of two, by two functions: without a verdict are one response of the first, both of the third ..."""


def graded() -> Rollouts:
    sequences = tiny.sequences([2, 3, 2, 1], [2, 1, 3, 2, 1, 1, 2, 4])
    T = sequences.response_token_T.numel()
    rollouts = Rollouts(
        sequences, torch.arange(4), torch.zeros(T), torch.ones(T), torch.ones(8, dtype=torch.bool), weight_version=0
    )
    return with_rewards(rollouts, [Verdict(sum(parts), parts[0] >= 1, parts) for parts in PARTS])


def test_means_are_over_verdicts() -> None:
    rollouts = graded()
    assert rollouts.reward_S is not None and rollouts.reward_SF is not None
    values = reward_metrics(rollouts.reward_S, rollouts.reward_SF, FUNCTIONS)
    assert values == pytest.approx(
        {
            "reward": (1.5 + 0.25 + 2.0) / 3,
            "reward_std": torch.tensor([1.5, 0.25, 2.0]).std().item(),
            "no_verdict": 5 / 8,
            "reward_a": 4 / 5,
            "reward_b": (0.5 + 0.25 + 0.5 + 2 + 1) / 5,
            "no_verdict_a": 3 / 8,
            "no_verdict_b": 3 / 8,
        }
    )
    measured = reward_metrics(rollouts.reward_S, rollouts.reward_SF, [FUNCTIONS[0], replace(FUNCTIONS[1], weight=0.0)])
    assert measured == values | {"no_verdict": 3 / 8}  # a function that only measures judges nothing
    whole = torch.tensor([[1.0], [0.0]])
    assert reward_metrics(whole[:, 0], whole, FUNCTIONS[:1]).keys() == {
        "reward",
        "reward_std",
        "no_verdict",
        "reward_a",
    }
    nothing = torch.full((2, 1), NONE)
    assert math.isnan(reward_metrics(nothing[:, 0], nothing, FUNCTIONS[:1])["reward"])


def test_a_group_with_one_verdict_or_none_has_no_spread() -> None:
    rollouts = graded()
    assert rollout_metrics(rollouts)["groups_without_spread"] == 1.0
    assert rollouts.reward_S is not None
    rollouts.reward_S[1] = 0.0
    assert rollout_metrics(rollouts)["groups_without_spread"] == 0.75


def test_shuffled_rewards_stay_among_the_responses_with_a_verdict() -> None:
    rollouts, seen = graded(), set()
    assert rollouts.reward_S is not None
    for step in range(20):
        shuffled = shuffle_rewards(rollouts, seed=1, step=step)
        assert shuffled.reward_S is not None and shuffled.reward_SF is not None
        assert torch.equal(shuffled.reward_S.isnan(), rollouts.reward_S.isnan())
        judged = shuffled.reward_S[~shuffled.reward_S.isnan()]
        assert torch.equal(judged, shuffled.reward_SF[~shuffled.reward_S.isnan()].sum(1))  # parts go with their sum
        assert sorted(judged.tolist()) == [0.25, 1.5, 2.0]
        seen.add(tuple(judged.tolist()))
    assert len(seen) > 3
