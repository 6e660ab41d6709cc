"""The made-up batch of verify-step reaches what it promises to reach."""

from __future__ import annotations

import pytest
import torch

from dsm_train.grpo import PRESETS
from dsm_train.types import Rollouts
from dsm_train.verify.synthetic import synthetic_rollouts
from triton_kernels import group_advantage, token_kl

VOCAB, MAX_LENGTH = 50, 64


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return synthetic_rollouts(VOCAB, MAX_LENGTH, seed=3)


def log_ratio_T(rollouts: Rollouts) -> torch.Tensor:
    assert rollouts.old_logprob_T is not None
    return rollouts.rollout_logprob_T - rollouts.old_logprob_T


def advantage_T(rollouts: Rollouts) -> torch.Tensor:
    sequences = rollouts.sequences
    advantage_S = group_advantage(rollouts.reward_S, sequences.group_cu)
    return advantage_S.repeat_interleave(sequences.response_cu.diff().long())


def test_lengths_are_ragged_and_fit(rollouts: Rollouts) -> None:
    sequences = rollouts.sequences
    length_S = sequences.response_cu.diff()
    assert int(length_S.max()) > 20 * int(length_S[length_S > 0].min()) == 20
    total_S = sequences.prompt_cu.diff()[sequences.prompt_of_response_S] + length_S
    assert int(total_S.max()) <= MAX_LENGTH
    assert sequences.response_token_T.min() >= 0 and sequences.response_token_T.max() < VOCAB
    for max_length in (2, 9):
        short = synthetic_rollouts(VOCAB, max_length, seed=3).sequences
        total_S = short.prompt_cu.diff()[short.prompt_of_response_S] + short.response_cu.diff()
        assert 1 <= int(short.prompt_cu.diff().min()) and int(total_S.max()) <= max_length


def test_the_last_of_two_shares_has_no_token(rollouts: Rollouts) -> None:
    sequences = rollouts.sequences
    first, last = (sequences.responses_of(torch.arange(rank, sequences.num_prompts, 2)) for rank in (0, 1))
    assert len(sequences.rows_of(last)) == 0 and len(sequences.rows_of(first)) > 100


def test_some_group_has_no_spread_and_some_has(rollouts: Rollouts) -> None:
    reward_PG = rollouts.reward_S.view(-1, 4)
    spread_P = (reward_PG.amax(1) - reward_PG.amin(1))[::2]  # of the groups with tokens
    assert (spread_P == 0).sum() == 1 and (spread_P > 0).sum() == 3


def test_both_sides_clip_and_both_do_not(rollouts: Rollouts) -> None:
    log_ratio, advantage = log_ratio_T(rollouts), advantage_T(rollouts)
    for up in (True, False):
        for good in (True, False):
            here = ((log_ratio > 0) == up) & (advantage > 0 if good else advantage < 0)
            size = log_ratio[here].abs()
            assert (size > 0.5).any() and (size < 0.13).any(), (up, good)


@pytest.mark.parametrize("seed", range(20))
def test_no_ratio_is_near_an_edge(seed: int) -> None:
    batch = synthetic_rollouts(VOCAB, 1024, seed)
    log_ratio = -batch.old_logprob_T  # type: ignore[operator]
    cu = batch.sequences.response_cu.tolist()
    means = [log_ratio[a:b].mean() for a, b in zip(cu[:-1], cu[1:], strict=True) if b > a]
    for value in (log_ratio, torch.stack(means)):
        for edge in (0.8, 1.2, 1.28):
            assert (value.exp() - edge).abs().min() > 0.05
        assert value.abs().min() > 0.04  # GSPO's edges are at 3e-4


def test_there_is_a_kl(rollouts: Rollouts) -> None:
    assert rollouts.ref_logprob_T is not None
    kl_T = token_kl(rollouts.rollout_logprob_T, rollouts.ref_logprob_T, PRESETS["grpo"].objective.kl)
    assert (kl_T > 1e-3).all()


def test_a_seed_gives_one_batch() -> None:
    one, same, other = (synthetic_rollouts(VOCAB, MAX_LENGTH, seed) for seed in (1, 1, 2))
    assert one.sequences.response_token_T.equal(same.sequences.response_token_T)
    assert not one.sequences.response_token_T.equal(other.sequences.response_token_T)
