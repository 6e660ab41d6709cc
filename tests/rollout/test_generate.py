"""The embedded generator.

B responses, V vocabulary, T response tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from dsm_train.config import ModelConfig
from dsm_train.megatron import platform
from dsm_train.megatron.layers import PackedAttend
from dsm_train.megatron.model import forward_hidden
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model
from dsm_train.packing.microbatch import pack
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.types import Prompt, Rollouts, offsets
from triton_kernels import PackedLayout

STOP = [7, 8, 9]  # three of 50 tokens: a response of 12 tokens ends early about every second time
SAMPLING = SamplingConfig(max_new_tokens=12)
GREEDY = replace(SAMPLING, temperature=0.0)
# ragged lengths, the shortest and longest not at the ends
PROMPTS = [Prompt(100 + i, [(3 * i + j) % tiny.VOCAB for j in range(n)]) for i, n in enumerate([4, 1, 11, 6])]

CONFIGS = {
    "grouped query": tiny.MODEL,
    "tied head": tiny.tied(),
    "multi head": replace(tiny.MODEL, num_kv_heads=4),
    "one key head": replace(tiny.MODEL, num_kv_heads=1),
    "biases and query-key norms": tiny.BIASES,
}


@pytest.fixture(scope="module")
def policy(layout: Parallel) -> Model:
    return tiny.model(layout)


def responses(rollouts: Rollouts) -> list[list[int]]:
    return [rollouts.sequences.response(s).tolist() for s in range(rollouts.sequences.num_responses)]


@torch.no_grad()
def best_next(policy: Model, sequences: list[list[int]]) -> list[int]:
    """The likeliest token after each whole sequence, without any cache."""
    device = policy.head_weight().device
    cu = offsets([len(tokens) for tokens in sequences]).to(device)
    layout = PackedLayout.from_cu_seqlens(cu)
    tokens = torch.tensor([t for tokens in sequences for t in tokens], device=device)
    hidden = forward_hidden(policy.chunks[0], policy.config, tokens, layout.positions_T, PackedAttend(layout))
    return (hidden[cu[1:].long() - 1, 0] @ policy.head_weight().T).argmax(-1).tolist()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(
    "sampling",
    [SAMPLING, replace(SAMPLING, temperature=0.6, top_p=0.9, top_k=20), GREEDY],
    ids=["plain", "truncated", "greedy"],
)
def test_log_probabilities_are_the_trainers(config: ModelConfig, sampling: SamplingConfig, layout: Parallel) -> None:
    policy = tiny.model(layout, config)
    rollouts = EmbeddedEngine(policy, STOP, seed=0).generate(PROMPTS, 3, sampling, step=0)
    T = rollouts.sequences.response_token_T.numel()
    micro_batches = pack(rollouts.sequences, 40, platform.device())
    assert len(micro_batches) > 1
    # greedy log-probabilities are at temperature 1
    trainers = policy.logprobs(micro_batches, T, sampling.temperature or 1.0)
    torch.testing.assert_close(rollouts.rollout_logprob_T, trainers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_greedy_decoding_is_that_without_a_cache(config: ModelConfig, layout: Parallel) -> None:
    policy = tiny.model(layout, config)
    decoded = responses(EmbeddedEngine(policy, STOP, seed=0).generate(PROMPTS, 1, GREEDY, step=0))
    expected: list[list[int]] = [[] for _ in PROMPTS]
    for _ in range(GREEDY.max_new_tokens):
        best = best_next(policy, [p.token + tokens for p, tokens in zip(PROMPTS, expected, strict=True)])
        for tokens, token in zip(expected, best, strict=True):
            if not set(tokens) & set(STOP):
                tokens.append(token)
    assert decoded == expected


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_greedy_tokens_are_those_of_transformers(name: str, layout: Parallel) -> None:
    """In its own cached generation; scaled frequencies, biases and query-key norms at every position."""
    config = replace(tiny.ARCHITECTURES[name], vocab_multiple=tiny.VOCAB)  # no row that transformers would take for one
    policy = tiny.model(layout, config)
    reference = tiny.llama(config, tiny.full_weights(policy.chunks), torch.float32)
    decoded = responses(EmbeddedEngine(policy, [], seed=0).generate(PROMPTS, 1, GREEDY, step=0))
    for prompt, tokens in zip(PROMPTS, decoded, strict=True):
        token_1N = torch.tensor([prompt.token])
        generated = reference.generate(
            token_1N,
            attention_mask=torch.ones_like(token_1N),
            max_new_tokens=len(tokens),
            do_sample=False,
            pad_token_id=0,
        )
        assert generated[0].tolist() == prompt.token + tokens


def test_the_same_call_gives_the_same_bits(policy: Model) -> None:
    first, second = (EmbeddedEngine(policy, STOP, seed=0).generate(PROMPTS, 3, SAMPLING, step=5) for _ in range(2))
    assert responses(first) == responses(second)
    assert torch.equal(first.rollout_logprob_T, second.rollout_logprob_T)


@pytest.mark.parametrize("change", ["seed", "step", "prompt id"])
def test_every_counter_changes_the_responses(change: str, policy: Model) -> None:
    base = responses(EmbeddedEngine(policy, STOP, seed=0).generate(PROMPTS, 2, SAMPLING, step=0))
    prompts = [Prompt(p.id + 1000, p.token) for p in PROMPTS] if change == "prompt id" else PROMPTS
    engine = EmbeddedEngine(policy, STOP, seed=int(change == "seed"))
    other = responses(engine.generate(prompts, 2, SAMPLING, step=int(change == "step")))
    # a chance meeting of two short responses is possible, many are not
    assert sum(a != b for a, b in zip(base, other, strict=True)) >= 6
    assert sum(base[2 * p] != base[2 * p + 1] for p in range(4)) >= 3  # samples of a group differ


def test_a_task_that_is_drawn_again_gets_other_responses(policy: Model) -> None:
    engine = EmbeddedEngine(policy, [], seed=0)  # nothing stops early: 12 tokens of 50 do not meet by chance
    drawn = [Prompt(7, PROMPTS[0].token, occurrence) for occurrence in range(8)]
    rollouts = engine.generate(drawn, 4, SAMPLING, step=0)
    assert len({tuple(response) for response in responses(rollouts)}) == 32
    # wherever the draw is computed: a replica that has the odd ones answers them alike
    odd = responses(engine.generate(drawn[1::2], 4, SAMPLING, step=0))
    assert odd == [r for p in range(1, 8, 2) for r in responses(rollouts)[4 * p : 4 * p + 4]]


def test_a_response_does_not_depend_on_its_company(policy: Model) -> None:
    engine = EmbeddedEngine(policy, STOP, seed=0)
    together = engine.generate(PROMPTS, 4, SAMPLING, step=0)
    for p, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], 2, SAMPLING, step=0)
        assert responses(alone) == responses(together)[4 * p : 4 * p + 2]
        span = slice(int(together.sequences.response_cu[4 * p]), int(together.sequences.response_cu[4 * p + 2]))
        torch.testing.assert_close(alone.rollout_logprob_T, together.rollout_logprob_T[span], rtol=1e-5, atol=1e-5)


# groups of 4: one at a time, even where a batch is smaller than a group; two and two; three and one
@pytest.mark.parametrize("batch", [1, 8, 12])
def test_batches_of_groups_are_joined_in_order(batch: int, policy: Model) -> None:
    engine = EmbeddedEngine(policy, STOP, seed=0)
    whole, parts = (engine.generate(PROMPTS, 4, replace(SAMPLING, batch=b), step=0) for b in (1024, batch))
    assert responses(parts) == responses(whole)
    for name in ("prompt_token", "prompt_cu", "response_cu", "group_cu"):
        assert torch.equal(getattr(parts.sequences, name), getattr(whole.sequences, name)), name
    assert torch.equal(parts.prompt_id_P, whole.prompt_id_P) and torch.equal(parts.finished_S, whole.finished_S)
    torch.testing.assert_close(parts.rollout_logprob_T, whole.rollout_logprob_T, rtol=1e-5, atol=1e-5)


def test_responses_end_at_a_stop_token_or_at_the_limit(policy: Model) -> None:
    rollouts = EmbeddedEngine(policy, STOP, seed=0).generate(PROMPTS, 8, SAMPLING, step=0)
    finished = rollouts.finished_S.tolist()
    assert 0 < sum(finished) < len(finished)  # both ends occur
    for response, done in zip(responses(rollouts), finished, strict=True):
        assert not set(response[:-1]) & set(STOP)
        assert (response[-1] in STOP) == done
        assert done or len(response) == SAMPLING.max_new_tokens
    sequences = rollouts.sequences
    assert [sequences.prompt(p).tolist() for p in range(4)] == [p.token for p in PROMPTS]
    assert rollouts.prompt_id_P.tolist() == [p.id for p in PROMPTS]
    assert sequences.group_cu.tolist() == [0, 8, 16, 24, 32]
    assert rollouts.rollout_logprob_T.numel() == sequences.response_token_T.numel()


def test_a_stop_token_at_the_limit_has_finished(policy: Model) -> None:
    rollouts = EmbeddedEngine(policy, range(tiny.VOCAB), seed=0).generate(PROMPTS, 2, SAMPLING, step=0)
    assert [len(r) for r in responses(rollouts)] == [1] * 8 and bool(rollouts.finished_S.all())
    one_token = replace(SAMPLING, max_new_tokens=1)
    rollouts = EmbeddedEngine(policy, [], seed=0).generate(PROMPTS, 2, one_token, step=0)
    assert [len(r) for r in responses(rollouts)] == [1] * 8 and not bool(rollouts.finished_S.any())


def test_finished_responses_leave_the_batch(layout: Parallel) -> None:
    """The work of a decoding step is that of the responses that are still going."""
    policy = tiny.model(layout)
    rows: list[int] = []
    policy.chunks[0].decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    rollouts = EmbeddedEngine(policy, STOP, seed=0).generate(PROMPTS, 8, SAMPLING, step=0)
    length_S = rollouts.sequences.response_cu.diff()
    prefill = sum(len(p.token) for p in PROMPTS)  # each prompt once, not once per sample
    # the row that decodes token n + 1 reads token n: only responses longer than n take part
    expected = [int((length_S > n).sum()) for n in range(1, int(length_S.max()))]
    assert rows == [prefill, *expected] and expected[-1] < expected[0]


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY], ids=["sampled", "greedy"])
def test_padding_of_the_vocabulary_is_never_sampled(sampling: SamplingConfig, layout: Parallel) -> None:
    policy = tiny.model(layout)
    padding_VD = policy.chunks[0].head_weight()[tiny.VOCAB :]
    assert padding_VD.shape[0] == 14
    with torch.no_grad():
        padding_VD.copy_(100 * torch.randn(padding_VD.shape, generator=torch.Generator().manual_seed(0)))
    rollouts = EmbeddedEngine(policy, [], seed=0).generate(PROMPTS, 4, sampling, step=0)
    assert int(rollouts.sequences.response_token_T.max()) < tiny.VOCAB


def test_bf16_logits_are_fp32_out_of_the_product(layout: Parallel) -> None:
    """Rounding the logits to bf16 would put log-probabilities on a coarse grid, apart from the trainer's."""
    policy = tiny.model(layout, replace(tiny.MODEL, dtype="bf16"))
    one_token = replace(SAMPLING, max_new_tokens=1)  # prefill is the trainer's own forward pass
    rollouts = EmbeddedEngine(policy, STOP, seed=0).generate(PROMPTS, 8, one_token, step=0)
    trainers = policy.logprobs(pack(rollouts.sequences, 1000, platform.device()), 32, 1.0)
    torch.testing.assert_close(rollouts.rollout_logprob_T, trainers, rtol=1e-5, atol=1e-5)


def test_bf16_decoding_stays_close_to_the_trainer(layout: Parallel) -> None:
    policy = tiny.model(layout, replace(tiny.MODEL, dtype="bf16"))
    rollouts = EmbeddedEngine(policy, STOP, seed=0).generate(PROMPTS, 4, SAMPLING, step=0)
    T = rollouts.sequences.response_token_T.numel()
    trainers = policy.logprobs(pack(rollouts.sequences, 1000, platform.device()), T, 1.0)
    assert float((rollouts.rollout_logprob_T - trainers).abs().mean()) < 0.05


def test_no_prompts_give_no_responses(policy: Model) -> None:
    rollouts = EmbeddedEngine(policy, STOP, seed=0).generate([], 4, SAMPLING, step=0)
    assert rollouts.sequences.num_responses == rollouts.sequences.num_prompts == 0


def test_a_prompt_without_tokens_raises(policy: Model) -> None:
    with pytest.raises(ValueError, match="prompt 3 has no token"):
        EmbeddedEngine(policy, STOP, seed=0).generate([PROMPTS[0], Prompt(3, [])], 1, SAMPLING, step=0)
