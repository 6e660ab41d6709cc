"""Packing: every response token is a target exactly once, beside the token that predicts it."""

from __future__ import annotations

import pytest
import tiny
import torch

from dsm_train.config import ModelConfig
from dsm_train.megatron import platform
from dsm_train.megatron.parallel import Parallel
from dsm_train.packing import MicroBatch, estimated_cost, pack, sequence_lengths
from dsm_train.types import Sequences
from dsm_train.update import Rows, optimizer_step, policy_loss
from triton_kernels import Objective

CPU = torch.device("cpu")
# prompts, responses: one of each; groups of two with ragged lengths; empty responses first, inside, last; length 1
SHAPES = [([3], [4]), ([2, 5, 1], [3, 1, 7, 2, 4, 6]), ([4, 3, 1], [0, 5, 0, 1, 3, 0]), ([1, 1], [1, 1])]


def whole(sequences: Sequences, s: int) -> list[int]:
    prompt = int(sequences.prompt_of_response_S[s])
    return sequences.prompt(prompt).tolist() + sequences.response(s).tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("max_tokens", [13, 20, 1000])  # about one sequence, a few, all in one
def test_every_response_token_is_predicted_once_by_the_token_before_it(
    shape: tuple[list[int], list[int]], max_tokens: int
) -> None:
    sequences = tiny.sequences(*shape)
    seen = torch.zeros(sequences.response_token_T.numel(), dtype=torch.int64)
    s = 0
    for batch in pack(sequences, max_tokens, CPU):
        assert 0 < batch.token_N.numel() <= max_tokens
        assert batch.layout.num_tokens == batch.token_N.numel() == batch.position_N.numel()
        assert batch.response_cu.dtype == torch.int32 and int(batch.response_cu[-1]) == batch.target_T.numel()
        assert torch.equal(batch.target_T, sequences.response_token_T[batch.row_T])
        seen[batch.row_T] += 1
        start = 0
        for first, last in batch.response_cu.unfold(0, 2, 1).tolist():
            tokens = whole(sequences, s)
            end = start + len(tokens) - 1
            assert batch.token_N[start:end].tolist() == tokens[:-1]
            assert batch.position_N[start:end].tolist() == list(range(len(tokens) - 1))
            assert batch.target_T[first:last].tolist() == sequences.response(s).tolist()
            # the row of the response's token i reads the state at position prompt + i - 1
            prompt = len(tokens) - (last - first)
            assert (batch.state_T[first:last] - start).tolist() == [prompt + i - 1 for i in range(last - first)]
            start, s = end, s + 1
        assert start == batch.token_N.numel()
    assert s == sequences.num_responses and bool((seen == 1).all())


def test_no_prompt_token_is_a_target() -> None:
    # prompts of tokens below 10, responses of tokens from 10 on
    sequences = Sequences.from_lists([[1, 2, 3], [4, 5]], [[10, 11], [12], [13, 14, 15], []], group_size=2)
    batches = pack(sequences, 8, CPU)
    assert len(batches) == 2
    assert torch.cat([b.target_T for b in batches]).tolist() == [10, 11, 12, 13, 14, 15]
    assert [b.token_N[b.state_T].tolist() for b in batches] == [[3, 10, 3], [5, 13, 14]]


def test_rows_bring_values_back_in_order() -> None:
    sequences = tiny.sequences([2, 5, 1], [3, 1, 7, 2, 4, 6])
    values = torch.full((sequences.response_token_T.numel(),), -1)
    batches = pack(sequences, 13, CPU)
    assert len(batches) > 2
    for batch in batches:
        values[batch.row_T] = batch.target_T
    assert torch.equal(values, sequences.response_token_T)


def tokens(batches: list[MicroBatch]) -> list[int]:
    return [batch.token_N.numel() for batch in batches]


def test_micro_batches_are_few_and_even() -> None:
    sequences = tiny.sequences([3] * 7, [3] * 7)  # 5 packed tokens each: the last token of a sequence predicts nothing
    assert sequence_lengths(sequences).tolist() == [5] * 7
    assert tokens(pack(sequences, 9, CPU)) == [5] * 7
    assert tokens(pack(sequences, 14, CPU)) == [10, 10, 10, 5]
    # five fit: filling greedily would leave 25 and 10
    assert tokens(pack(sequences, 25, CPU)) == [20, 15]
    assert tokens(pack(sequences, 35, CPU)) == [35]


def test_the_cut_follows_the_cost() -> None:
    sequences = tiny.sequences([3] * 6, [3] * 6)
    cost_S = torch.tensor([50, 10, 10, 10, 10, 10])
    assert tokens(pack(sequences, 25, CPU, cost_S=cost_S)) == [5, 25]
    assert tokens(pack(sequences, 20, CPU, cost_S=cost_S)) == [10, 20]  # the budget holds whatever the cost


@pytest.mark.parametrize("multiple", [1, 2, 3, 4])
@pytest.mark.parametrize("max_tokens", [5, 12, 1000])
def test_the_number_of_micro_batches_is_a_multiple(max_tokens: int, multiple: int) -> None:
    sequences = tiny.sequences([3] * 5, [3] * 5)
    batches = pack(sequences, max_tokens, CPU, multiple=multiple)
    fewest = len(pack(sequences, max_tokens, CPU))
    assert len(batches) % multiple == 0 and fewest <= len(batches) < fewest + multiple
    assert torch.equal(torch.cat([batch.row_T for batch in batches]), torch.arange(15))


def test_a_sequence_longer_than_the_budget_raises() -> None:
    with pytest.raises(ValueError, match=r"12 tokens .* run.max_tokens = 11"):
        pack(tiny.sequences([3, 6], [3, 7]), 11, CPU)


@pytest.mark.parametrize("multiple", [1, 2])
def test_nothing_is_packed_into_empty_micro_batches(multiple: int) -> None:
    batches = pack(Sequences.from_lists([], []), 10, CPU, multiple=multiple)
    assert len(batches) == multiple
    for batch in batches:
        assert batch.token_N.tolist() == batch.position_N.tolist() == [0] and batch.layout.num_tokens == 1
        assert batch.state_T.numel() == batch.target_T.numel() == batch.row_T.numel() == 0
        assert batch.response_cu.tolist() == [0] and batch.response_cu.dtype == torch.int32


def test_a_sequence_that_predicts_nothing_leaves_a_token() -> None:
    """A prompt of one token without a response has nothing to run, and is still a micro-batch."""
    (batch,) = pack(Sequences.from_lists([[5]], [[]]), 10, CPU)
    assert batch.token_N.numel() == batch.layout.num_tokens == 1 and batch.target_T.numel() == 0
    assert batch.response_cu.tolist() == [0, 0]


def test_costs_are_those_of_the_layers_the_attention_and_the_head() -> None:
    model = ModelConfig(num_layers=3, hidden_size=8, num_heads=4, num_kv_heads=2, ffn_size=16)
    sequences = tiny.sequences([3, 1], [5, 0])
    n, K = 3 + 5 - 1, 2
    projections = n * (8 * 4 * K + 2 * 8 * 2 * K + 4 * K * 8)  # queries, keys and values, output
    feed_forward = n * 3 * 8 * 16
    attention = n * n / 2 * 2 * 4 * K  # half of n^2, with keys and with values
    head = 5 * 8 * 50
    assert estimated_cost(sequences, model, 50).tolist() == [
        3 * 2 * (3 * (projections + feed_forward + attention) + head),
        0,
    ]


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_rank_without_work_trains_nothing(layout: Parallel, multiple: int) -> None:
    """The step runs, with loss and gradient 0 and nothing in the statistics; a rank beside it may have work."""
    policy = tiny.trainable(layout)
    rows = Rows(torch.empty(0), torch.empty(0))
    micro_batches = pack(Sequences.from_lists([], []), 10, platform.device(), multiple=multiple)
    step = optimizer_step(policy, micro_batches, policy_loss(rows, Objective(kl_coef=0.0), temperature=1.0))
    assert step.loss == step.grad_norm == float(step.stats.sums.abs().sum()) == 0


def test_empty_micro_batches_change_nothing(layout: Parallel) -> None:
    sequences = tiny.sequences([2, 3], [4, 1, 3, 2])
    T = sequences.response_token_T.numel()
    rows = Rows(torch.full((T,), 1 / T), torch.linspace(-1, 2, T))
    loss = policy_loss(rows, Objective(kl_coef=0.0), temperature=1.0)
    one, padded = (
        optimizer_step(tiny.trainable(layout), pack(sequences, 1000, platform.device(), multiple=m), loss)
        for m in (1, 8)
    )
    for name in ("loss", "grad_norm"):
        assert getattr(padded, name) == pytest.approx(getattr(one, name), rel=1e-5) and getattr(one, name) != 0
    torch.testing.assert_close(padded.stats.sums, one.stats.sums)
    policy = tiny.model(layout)
    logprobs = [policy.logprobs(pack(sequences, 1000, platform.device(), multiple=m), T, 1.0) for m in (1, 8)]
    torch.testing.assert_close(*logprobs)
