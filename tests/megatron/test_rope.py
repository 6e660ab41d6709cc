"""Rotary scaling against transformers' own, which is to the bit the same.

N tokens, K head size.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dsm_train.config import ModelConfig, RopeScaling
from dsm_train.megatron.rope import RotaryEmbedding

CPU = torch.device("cpu")
# As published: Llama 3.2 1B, DeepSeek Coder 6.7B, Qwen2.5 with its 128K recipe, and what YaRN is without its options.
PUBLISHED = {
    "none": ModelConfig(head_size=128),
    "Llama 3.2": ModelConfig(
        head_size=64, rope_base=500000.0,
        rope=RopeScaling("llama3", factor=32.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "DeepSeek Coder": ModelConfig(head_size=128, rope_base=100000.0, rope=RopeScaling("linear", factor=4.0)),
    "Qwen2.5": ModelConfig(
        head_size=128, rope_base=1000000.0, rope=RopeScaling("yarn", factor=4.0, original_length=32768)
    ),
    "dynamic": ModelConfig(head_size=128, rope=RopeScaling("dynamic", factor=2.0, original_length=4096)),
    "not truncated": ModelConfig(
        head_size=64, rope_base=150000.0,
        rope=RopeScaling("yarn", factor=32.0, original_length=4096, truncate=False, attention_factor=1.25),
    ),
    "no ramp": ModelConfig(head_size=32, rope=RopeScaling("yarn", factor=2.0, original_length=1024, beta_fast=1.0)),
}  # fmt: skip


def theirs(model: ModelConfig) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(tiny.transformers_config(replace(model, output_bias=False), tiny.VOCAB))


def assert_the_same_bits(model: ModelConfig) -> None:
    ours, reference = RotaryEmbedding.of(model, CPU), theirs(model)
    assert ours.frequency_P.dtype == torch.float32
    assert torch.equal(ours.frequency_P, reference.inv_freq)
    assert ours.attention_factor == reference.attention_scaling


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_scalings(model: ModelConfig) -> None:
    assert_the_same_bits(model)


@pytest.mark.parametrize("kind", ["none", "linear", "dynamic", "llama3", "yarn"])
def test_any_scaling(kind: Any) -> None:
    draw = random.Random(0)
    for _ in range(200):
        low = draw.uniform(0.5, 4)
        scaling = RopeScaling(
            kind,
            factor=draw.uniform(1, 64),
            original_length=draw.choice([1024, 4096, 8191, 32768, 131072]),
            low_freq_factor=low,
            high_freq_factor=low + draw.uniform(0.1, 8),
            beta_fast=draw.uniform(2, 64),
            beta_slow=draw.uniform(0.2, 2),
            truncate=draw.random() < 0.5,
            attention_factor=draw.choice([None, 0.7, 1.3]),
        )
        model = ModelConfig(head_size=2 * draw.randrange(2, 129), rope_base=math.exp(draw.uniform(5, 16)), rope=scaling)
        assert_the_same_bits(model)


@pytest.mark.parametrize("name", ["none", "Llama 3.2", "Qwen2.5"])
def test_cos_and_sin_are_those_of_every_position(name: str) -> None:
    model, position_N = PUBLISHED[name], torch.tensor([0, 1, 5, 4095, 131071, 3])
    cos, sin = theirs(model)(torch.zeros(1), position_N[None])
    for mine, expected in zip(RotaryEmbedding.of(model, CPU).tables(position_N), (cos, sin), strict=True):
        assert mine.shape == (6, 1, model.kv_channels)
        torch.testing.assert_close(mine[:, 0], expected[0], rtol=1e-6, atol=1e-6)


def test_scalings_that_are_refused() -> None:
    with pytest.raises(ValueError, match="^original_length must be given with kind = yarn; got None"):
        RopeScaling("yarn", factor=4.0)
    with pytest.raises(ValueError, match="^high_freq_factor must be above low_freq_factor = 4.0; got 4.0"):
        RopeScaling("llama3", original_length=8192, low_freq_factor=4.0)
    dynamic = RopeScaling("dynamic", factor=2.0, original_length=4096)
    assert ModelConfig(rope=dynamic, max_length=4096).rope is dynamic
    with pytest.raises(ValueError, match=r"^max_length must be at most rope.original_length = 4096.*; got 4097$"):
        ModelConfig(rope=dynamic, max_length=4097)
