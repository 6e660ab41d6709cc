"""Token sampling with counter-based random numbers.

B rows that are decoded together, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsm_train.rollout.config import SamplingConfig

_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's output function (Steele, Lea, Flood 2014), on int64 that wraps around."""
    x = x + _signed(_GAMMA)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def sample_counter(sample_G: Tensor, occurrence_P: Tensor) -> Tensor:
    """Number each sample of each prompt, int64 [P * G]: no two pairs alike, and the sample's index at occurrence 0."""
    return (sample_G | (occurrence_P << 32)[:, None]).flatten()


def counter_uniform(seed: int, step: int, prompt_id_B: Tensor, sample_B: Tensor, position_B: Tensor) -> Tensor:
    """Compute uniform numbers in (0, 1), fp64 [B], each a function of its five counters alone: the same on any device.

    sample_B: `sample_counter` of the sample's index and of the prompt's occurrence within the stage.
    """
    state = _mix(torch.full_like(prompt_id_B, seed))
    for counter in (step, prompt_id_B, sample_B, position_B):
        state = _mix(state ^ counter)
    return (_shift_right(state, 12).double() + 0.5) * 2.0**-52


@dataclass(frozen=True)
class Sampled:
    """Choices of one decoding step."""

    token_B: Tensor
    """Token ids, int64."""
    logprob_B: Tensor
    """fp32 log-probability at the temperature, over the full vocabulary: what the trainer's `logprob_T` is compared
    with. Truncation by top_p or top_k is not in it."""
    margin_B: Tensor
    """Distance of the choice from another token: from the random number to the nearer edge of the chosen token's
    interval of the cumulative distribution; for greedy choices the difference of the two best log-probabilities."""


def sample(logits_BV: Tensor, uniform_B: Tensor | None, sampling: SamplingConfig) -> Sampled:
    """Choose one token per row by inverting the cumulative distribution; greedy when the temperature is 0."""
    logits = logits_BV.float()
    if sampling.temperature == 0:
        logprob_BV = logits.log_softmax(-1)
        best, token = logprob_BV.topk(2, dim=-1)
        return Sampled(token[:, 0], best[:, 0], best[:, 0] - best[:, 1])
    if uniform_B is None:
        raise ValueError("sampling at a temperature above 0 needs random numbers")
    logprob_BV = (logits / sampling.temperature).log_softmax(-1)
    cdf_BV = _truncate(logprob_BV, sampling).double().cumsum(-1)
    point_B = (uniform_B * cdf_BV[:, -1]).unsqueeze(1)
    token_B1 = torch.searchsorted(cdf_BV, point_B, right=True).clamp(max=logits.shape[-1] - 1)
    above = cdf_BV.gather(1, token_B1)
    below = torch.where(token_B1 > 0, cdf_BV.gather(1, (token_B1 - 1).clamp(min=0)), torch.zeros_like(above))
    margin = torch.minimum(above - point_B, point_B - below).squeeze(1)
    return Sampled(token_B1.squeeze(1), logprob_BV.gather(1, token_B1).squeeze(1), margin.float())


def _truncate(logprob_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """Set the probabilities outside top_k and top_p to 0 (ties at the edge stay in)."""
    prob_BV = logprob_BV.exp()
    if 0 < sampling.top_k < prob_BV.shape[-1]:
        prob_BV = prob_BV * (prob_BV >= prob_BV.topk(sampling.top_k, dim=-1).values[:, -1:])
    if sampling.top_p < 1:
        ordered = prob_BV.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered  # mass of the tokens that come before
        enough = before < sampling.top_p * prob_BV.sum(-1, keepdim=True)
        smallest = ordered.masked_fill(~enough, 2.0).amin(-1, keepdim=True)
        prob_BV = prob_BV * (prob_BV >= smallest)
    return prob_BV
