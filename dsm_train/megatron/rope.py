"""Rotary position embedding (Su et al., arXiv 2104.09864), with the frequency scalings of the Llama family.

Every formula has the order of operations of transformers 5 in fp32, so that the frequencies are equal to the bit.
N packed tokens, H heads, K head size, P = K / 2 pairs that turn together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsm_train.config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotary embedding of a model, at any positions."""

    frequency_P: Tensor
    """Angle of each pair from one position to the next, fp32."""
    attention_factor: float
    """Factor of cos and sin, so that its square multiplies attention's scores."""

    @staticmethod
    def of(model: ModelConfig, device: torch.device) -> RotaryEmbedding:
        """Compute the embedding of a model, on the CPU as transformers does, and move it to the device."""
        frequency_P, factor = scaled_frequencies(model)
        return RotaryEmbedding(frequency_P.to(device), factor)

    def tables(self, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cos and sin [N, 1, K] fp32 at given positions."""
        angle = position_N.float()[:, None, None] * self.frequency_P.repeat(2)
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor


def scaled_frequencies(model: ModelConfig) -> tuple[Tensor, float]:
    """Compute frequencies [P] in fp32 and the factor of cos and sin."""
    scaling, K = model.rope, model.kv_channels
    period_P = model.rope_base ** (torch.arange(0, K, 2, dtype=torch.float32) / K)
    frequency_P = 1.0 / period_P
    if scaling.kind == "linear":
        return frequency_P / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequency_P, scaling), 1.0
    if scaling.kind == "yarn":
        kept_P = _yarn_kept(K, model.rope_base, scaling)
        interpolated_P = 1.0 / (scaling.factor * period_P)
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
        return interpolated_P * (1 - kept_P) + frequency_P * kept_P, factor
    return frequency_P, 1.0  # none; dynamic, which scales beyond original_length only


def _llama3(frequency_P: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide the frequencies of long waves by the factor, keep those of short ones, and blend in between."""
    length, low, high = scaling.original_length, scaling.low_freq_factor, scaling.high_freq_factor
    assert length is not None, "RopeScaling requires it"
    wavelength_P = 2 * math.pi / frequency_P
    long_P, short_P = wavelength_P > length / low, wavelength_P < length / high
    kept_P = (length / wavelength_P - low) / (high - low)
    blended_P = (1 - kept_P) * frequency_P / scaling.factor + kept_P * frequency_P
    scaled_P = torch.where(long_P, frequency_P / scaling.factor, frequency_P)
    return torch.where(long_P | short_P, scaled_P, blended_P)


def _yarn_kept(K: int, base: float, scaling: RopeScaling) -> Tensor:
    """Compute the share of each pair's own frequency (Peng et al., arXiv 2309.00071): a ramp from 1 down to 0."""
    length = scaling.original_length
    assert length is not None, "RopeScaling requires it"

    def pair(turns: float) -> float:
        """The pair, fractional, that turns so often over the original length."""
        return (K * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, K - 1)
    if low == high:
        high += 0.001  # a step
    return 1 - ((torch.arange(K // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def rotate(x_NHK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Rotate pairs (i, i + K/2) of every head, in fp32."""
    x = x_NHK.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos_NK + torch.cat([-second, first], dim=-1) * sin_NK).to(x_NHK.dtype)
