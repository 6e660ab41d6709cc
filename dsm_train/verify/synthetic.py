"""A made-up batch that reaches every term of the loss, for `verify-step`.

Ragged: responses of one token and a long one. Groups whose rewards are all equal. The second half of the groups has
responses without tokens, as a server returns for requests that it gave up: where groups are shared out in order, some
data-parallel replica has nothing to learn from. Off-policy: log ratios up and down, far inside the usual clip ranges
(0.2, 0.28) and far beyond, each with both signs of the advantage, so that both sides clip; none is near an edge, where
rounding would decide. P prompts, S responses, T response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsm_train.types import Rollouts, Sequences

PROMPT_LENGTHS = (5, 1, 12, 3, 2, 4, 1, 3)
RESPONSE_LENGTHS = (1, 60, 2, 9) + (3, 1, 5, 4) + (12, 7, 1, 20) + (6, 15, 8, 1) + (0,) * 16
REWARDS = (1.0, 0.0, 0.5, 0.2) + (1.0,) * 4 + (0.9, 0.1, 1.0, 0.0) + (1.0, 0.0, 1.0, 0.3) + (1.0, 0.0) * 8
GROUP_SIZE = 4
INSIDE, BEYOND = (0.05, 0.12), (0.6, 0.9)
"""Sizes of log ratios, on either side of ln 1.2 = 0.18, -ln 0.8 = 0.22 and ln 1.28 = 0.25. The mean over a response
that alternates between them, beyond first, is at least 0.32."""


def synthetic_rollouts(vocab_size: int, max_length: int, seed: int) -> Rollouts:
    """Random tokens in 8 groups of 4 responses, cut where they exceed `max_length`, with rewards.

    Its log-probabilities are those that `offset_logprobs` makes; until then they are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = [min(length, max(1, max_length // 2)) for length in PROMPT_LENGTHS]
    room = [max_length - length for length in prompt_lengths for _ in range(GROUP_SIZE)]
    response_lengths = [min(length, most) for length, most in zip(RESPONSE_LENGTHS, room, strict=True)]
    prompts, responses = (
        [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
        for lengths in (prompt_lengths, response_lengths)
    )
    zero_T = torch.zeros(sum(response_lengths))
    return Rollouts(
        Sequences.from_lists(prompts, responses, GROUP_SIZE),
        prompt_id_P=torch.arange(len(prompts)),
        rollout_logprob_T=zero_T,
        margin_T=zero_T,
        finished_S=torch.tensor([length > 0 for length in response_lengths]),
        weight_version=0,
        reward_S=torch.tensor(REWARDS),
    )


def offset_logprobs(rollouts: Rollouts, logprob_T: Tensor, seed: int) -> Rollouts:
    """The rollouts with old and reference log-probabilities at chosen distances from the policy's own.

    Per token of a response, logprob - old_logprob is `BEYOND`, `INSIDE`, or both in turn, by group; up in the first two
    responses of a group and down in the others. The reference is 0.1 to 0.5 away, either way. The rollouts are taken to
    have been sampled by the old policy itself.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    sequences = rollouts.sequences
    length_S = sequences.response_cu.diff().long()
    position_T = torch.arange(len(logprob_T)) - sequences.response_cu[:-1].long().repeat_interleave(length_S)
    group_T = sequences.prompt_of_response_S.repeat_interleave(length_S)
    beyond_T = (group_T % 4 == 0) | ((group_T % 2 == 1) & (position_T % 2 == 0))
    up_S = torch.arange(sequences.num_responses) % GROUP_SIZE < GROUP_SIZE // 2
    direction_T = torch.where(up_S, 1.0, -1.0).repeat_interleave(length_S)
    size_T = torch.where(beyond_T, _uniform(BEYOND, logprob_T, generator), _uniform(INSIDE, logprob_T, generator))
    away_T = _uniform((0.1, 0.5), logprob_T, generator) * _uniform((-1.0, 1.0), logprob_T, generator).sign()
    old_logprob_T = logprob_T - direction_T * size_T
    return rollouts.with_(
        rollout_logprob_T=old_logprob_T, old_logprob_T=old_logprob_T, ref_logprob_T=logprob_T - away_T
    )


def _uniform(bounds: tuple[float, float], like_T: Tensor, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(like_T.shape, generator=generator)
