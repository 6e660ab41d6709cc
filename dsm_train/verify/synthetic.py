"""A made-up batch that reaches every term of the loss, for `verify-step`.

Ragged: responses of one token and a long one. Groups whose rewards are all equal. Every second group has responses
without tokens, as a server returns for requests that it gave up: dealt out in turn, some data-parallel replica has
nothing to learn from. Off-policy: log ratios up and down, far inside the usual clip ranges (0.2, 0.28) and far beyond,
each with both signs of the advantage, so that both sides clip; none is near an edge, where rounding would decide.
P prompts, S responses, T response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsm_train.types import Rollouts, Sequences

PROMPT_LENGTHS = (5, 2, 1, 4, 12, 1, 3, 3)
SILENT = (0, 0, 0, 0)
RESPONSE_LENGTHS = (1, 60, 2, 9) + SILENT + (3, 1, 5, 4) + SILENT + (12, 7, 1, 20) + SILENT + (6, 15, 8, 1) + SILENT
REWARDS = (1.0, 0.0, 0.5, 0.2) + (1.0, 0.0) * 2 + (1.0,) * 4 + (1.0, 0.0) * 2
REWARDS += (0.9, 0.1, 1.0, 0.0) + (1.0, 0.0) * 2 + (1.0, 0.0, 1.0, 0.3) + (1.0, 0.0) * 2
GROUP_SIZE = 4
INSIDE, BEYOND = (0.05, 0.12), (0.6, 0.9)
"""Sizes of log ratios, on either side of ln 1.2 = 0.18, -ln 0.8 = 0.22 and ln 1.28 = 0.25. The mean over a response
that alternates between them, beyond first, is at least 0.32."""


def synthetic_rollouts(vocab_size: int, max_length: int, seed: int) -> Rollouts:
    """Make random tokens in 8 groups of 4 responses, cut where they exceed `max_length`, with rewards.

    The policy's log-probabilities are unknown until it computes them: the sampled ones are 0, and the old and reference
    ones are distances from them. logprob - old_logprob of a response's tokens is `BEYOND`, `INSIDE`, or both in turn,
    by group; up in the first two responses of a group and down in the others. The reference is 0.1 to 0.5 away, either
    way.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = [min(length, max(1, max_length // 2)) for length in PROMPT_LENGTHS]
    room = [max_length - length for length in prompt_lengths for _ in range(GROUP_SIZE)]
    response_lengths = [min(length, most) for length, most in zip(RESPONSE_LENGTHS, room, strict=True)]
    prompts, responses = (
        [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
        for lengths in (prompt_lengths, response_lengths)
    )
    sequences = Sequences.from_lists(prompts, responses, GROUP_SIZE)
    zero_T = torch.zeros(sum(response_lengths))
    return Rollouts(
        sequences,
        prompt_id_P=torch.arange(len(prompts)),
        rollout_logprob_T=zero_T,
        margin_T=zero_T,
        finished_S=torch.tensor([length > 0 for length in response_lengths]),
        weight_version=0,
        reward_S=torch.tensor(REWARDS),
        old_logprob_T=-_log_ratios(sequences, generator),
        ref_logprob_T=_uniform((0.1, 0.5), zero_T, generator) * _uniform((-1.0, 1.0), zero_T, generator).sign(),
    )


def _log_ratios(sequences: Sequences, generator: torch.Generator) -> Tensor:
    """Draw the distance of each token from the old policy."""
    length_S = sequences.response_cu.diff().long()
    position_T = torch.arange(int(length_S.sum())) - sequences.response_cu[:-1].long().repeat_interleave(length_S)
    kind_T = (sequences.prompt_of_response_S // 2).repeat_interleave(length_S)  # of the groups with tokens
    beyond_T = (kind_T % 4 == 0) | ((kind_T % 2 == 1) & (position_T % 2 == 0))
    up_S = torch.arange(sequences.num_responses) % GROUP_SIZE < GROUP_SIZE // 2
    direction_T = torch.where(up_S, 1.0, -1.0).repeat_interleave(length_S)
    size_T = torch.where(beyond_T, _uniform(BEYOND, direction_T, generator), _uniform(INSIDE, direction_T, generator))
    return direction_T * size_T


def _uniform(bounds: tuple[float, float], like_T: Tensor, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(like_T.shape, generator=generator)
