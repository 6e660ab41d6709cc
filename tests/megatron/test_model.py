"""The Megatron model against transformers' models with the same weights.

N packed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsm_train.config import ModelConfig
from dsm_train.megatron import platform
from dsm_train.megatron.layers import PackedAttend
from dsm_train.megatron.model import forward_hidden, padded_vocab, uses_transformer_engine
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model
from dsm_train.packing.microbatch import pack
from triton_kernels import PackedLayout

LENGTHS = [1, 9, 2, 30, 17]  # a single token, short ones, and one past a power of two

CONFIGS = {
    "grouped query": tiny.MODEL,
    "tied head": tiny.tied(),
    "multi head": replace(tiny.MODEL, num_kv_heads=4),
    **tiny.ARCHITECTURES,
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def policy(request: pytest.FixtureRequest, layout: Parallel) -> Iterator[Model]:
    yield tiny.model(layout, request.param)


def packed_hidden(policy: Model, sequences: list[Tensor]) -> Tensor:
    cu = torch.tensor([0, *[s.numel() for s in sequences]]).cumsum(0).int()
    layout = PackedLayout.from_cu_seqlens(cu)
    chunk = policy.chunks[0]
    return forward_hidden(chunk, policy.config, torch.cat(sequences), layout.positions_T, PackedAttend(layout))


def random_tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(tiny.VOCAB, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def test_logits_are_transformers(policy: Model) -> None:
    tokens = random_tokens()
    hidden_N1D = packed_hidden(policy, tokens)
    assert hidden_N1D.shape == (sum(LENGTHS), 1, policy.config.hidden_size)
    logits_NV = hidden_N1D.squeeze(1) @ policy.chunks[0].head_weight().T
    reference = tiny.llama(policy.config, tiny.full_weights(policy.chunks), torch.float64)
    expected_NV = torch.cat([reference(t[None]).logits[0] for t in tokens])
    assert float((logits_NV - expected_NV).abs().max() / expected_NV.abs().max()) < 1e-5


@torch.no_grad()
def test_packing_changes_nothing(policy: Model) -> None:
    tokens = random_tokens()
    apart = torch.cat([packed_hidden(policy, [t]) for t in tokens])
    torch.testing.assert_close(packed_hidden(policy, tokens), apart, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_log_probabilities_are_transformers_at_the_temperature(policy: Model) -> None:
    sequences = tiny.sequences([3, 1, 6], [4, 9, 1, 0, 2, 7])
    T = sequences.response_token_T.numel()
    logprob_T = policy.logprobs(pack(sequences, 20, platform.device()), T, temperature=0.7)
    reference = tiny.llama(policy.config, tiny.full_weights(policy.chunks), torch.float64)
    expected = []
    for s, p in enumerate(sequences.prompt_of_response_S.tolist()):
        prompt, response = sequences.prompt(p), sequences.response(s)
        logits = reference(torch.cat([prompt, response])[None]).logits[0, prompt.numel() - 1 : -1, : tiny.VOCAB]
        expected.append((logits / 0.7).log_softmax(-1).gather(1, response[:, None]).squeeze(1))
    assert logprob_T.dtype == torch.float32
    torch.testing.assert_close(logprob_T.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the largest output of any operator."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@torch.no_grad()
def test_the_forward_pass_holds_no_logits(layout: Parallel) -> None:
    # with the vocabulary widened, logits would be by far the largest tensor
    config = replace(tiny.MODEL, vocab_multiple=4096)
    policy = tiny.model(layout, config)
    policy_tokens = random_tokens()
    with LargestTensor() as largest:
        packed_hidden(policy, policy_tokens)
    assert 0 < largest.numel < sum(LENGTHS) * 4096 / 8


@torch.no_grad()
def test_bf16_is_close_to_fp32(layout: Parallel) -> None:
    full, half = tiny.model(layout), tiny.model(layout, replace(tiny.MODEL, dtype="bf16"))
    sequences = tiny.sequences([3, 1, 6], [4, 9, 1, 5, 2, 7])
    T = sequences.response_token_T.numel()
    a, b = (m.logprobs(pack(sequences, 100, platform.device()), T, 1.0) for m in (full, half))
    assert half.head_weight().dtype == torch.bfloat16 and b.dtype == torch.float32
    assert 0 < float((a - b).abs().mean()) < 0.1


@torch.no_grad()
def test_recomputing_activations_changes_no_output(layout: Parallel) -> None:
    sequences = tiny.sequences([3], [6, 5])
    results = [
        tiny.model(layout, config).logprobs(pack(sequences, 100, platform.device()), 11, 1.0)
        for config in (tiny.MODEL, replace(tiny.MODEL, recompute=True))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(("size", "multiple", "tp", "padded"), [(50, 64, 1, 64), (64, 64, 1, 64), (65, 64, 2, 128)])
def test_the_vocabulary_is_padded_to_split_evenly(size: int, multiple: int, tp: int, padded: int) -> None:
    assert padded_vocab(size, multiple, tp) == padded


def test_transformer_engine_is_refused_where_it_is_absent() -> None:
    assert uses_transformer_engine(ModelConfig(layers="local")) is False
    if not uses_transformer_engine(ModelConfig()):
        with pytest.raises(ValueError, match="model.layers=auto"):
            uses_transformer_engine(ModelConfig(layers="transformer_engine"))
