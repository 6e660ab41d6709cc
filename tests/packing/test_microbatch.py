"""Packing: every response token is a target exactly once, beside a state that has seen its past and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import tiny
import torch

from dsm_train.config import ModelConfig
from dsm_train.losses import PolicyLoss
from dsm_train.megatron import platform
from dsm_train.megatron.parallel import Parallel
from dsm_train.packing.cost import Cost, estimated_cost, token_cost
from dsm_train.packing.microbatch import MicroBatch, States, pack, repeat_prompts, sequence_lengths
from dsm_train.rows import Rows
from dsm_train.types import Sequences, offsets
from dsm_train.update import optimizer_step
from triton_kernels import Objective, PackedLayout, packed_attention

CPU = torch.device("cpu")
# Prompt and response lengths by group: one of each; groups of two with ragged lengths; empty responses first, inside,
# last; length 1; groups of 1, 2 and 7; a group without any token to predict.
SHAPES = {
    "one": [(3, [4])],
    "ragged": [(2, [3, 1]), (5, [7, 2]), (1, [4, 6])],
    "empty": [(4, [0, 5]), (3, [0, 1]), (1, [3, 0])],
    "short": [(1, [1]), (1, [1])],
    "sizes": [(3, [2, 5, 1, 4, 3, 1, 2]), (6, [4]), (2, [3, 6]), (1, [5, 0, 0, 2, 1, 7, 3])],
    "nothing": [(4, [2, 3]), (5, [0, 0, 0]), (2, [0]), (3, [1, 4])],
    "no response": [(2, [3, 2]), (9, []), (1, [4, 1])],
}


def grouped(shape: list[tuple[int, list[int]]], seed: int = 0) -> Sequences:
    """Random tokens."""
    rng = random.Random(seed)
    prompts, responses = (
        [[rng.randrange(tiny.VOCAB) for _ in range(length)] for length in lengths]
        for lengths in ([p for p, _ in shape], [n for _, group in shape for n in group])
    )
    apart = Sequences.from_lists(prompts, responses)
    return replace(apart, group_cu=offsets([len(group) for _, group in shape]))


def visible(layout: PackedLayout) -> list[list[int]]:
    """The rows that each row sees: with equal scores, those that its output is the mean of."""
    N = layout.num_tokens
    zero_N1K = torch.zeros(N, 1, 8)
    weight_NN = packed_attention(zero_N1K, zero_N1K, torch.eye(N)[:, None], layout)[:, 0]
    return [row.nonzero().squeeze(1).tolist() for row in weight_NN > 1e-6]


def bare(sequences: Sequences, first: int, last: int) -> list[int]:
    """The tokens of responses first..last - 1 as they are to be packed, written down one by one."""
    tokens, groups = [], sequences.prompt_of_response_S.tolist()
    for prompt, members in groupby(range(first, last), key=lambda s: groups[s]):
        tokens += sequences.prompt(prompt).tolist()
        for s in members:
            tokens += sequences.response(s).tolist()[:-1]
    return tokens or [0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("max_tokens", [11, 20, 1000])  # about one sequence, a few, all in one
@pytest.mark.parametrize("shares", [True, False])
def test_every_response_token_is_predicted_once_from_its_past(
    shape: list[tuple[int, list[int]]], max_tokens: int, shares: bool
) -> None:
    sequences = grouped(shape)
    given = sequences if shares else repeat_prompts(sequences)
    seen = torch.zeros(sequences.response_token_T.numel(), dtype=torch.int64)
    s = 0
    for batch in pack(given, max_tokens, CPU):
        assert 0 < batch.token_N.numel() <= max_tokens
        assert batch.layout.num_tokens == batch.token_N.numel() == batch.position_N.numel()
        assert batch.response_cu.dtype == torch.int32 and int(batch.response_cu[-1]) == batch.target_T.numel()
        assert torch.equal(batch.target_T, sequences.response_token_T[batch.row_T])
        assert batch.token_N.tolist() == bare(given, s, s + len(batch.response_cu) - 1)
        seen[batch.row_T] += 1
        sees = visible(batch.layout)
        for first, last in pairwise(batch.response_cu.tolist()):
            prompt = sequences.prompt(int(sequences.prompt_of_response_S[s])).tolist()
            response = sequences.response(s).tolist()
            assert batch.target_T[first:last].tolist() == response
            for i, state in enumerate(batch.states.state_T[first:last].tolist()):
                past = prompt + response[:i]
                assert batch.token_N[sees[state]].tolist() == past
                assert batch.position_N[sees[state]].tolist() == list(range(len(past)))
                assert state == sees[state][-1]
            s += 1
    assert s == sequences.num_responses and bool((seen == 1).all())


def test_a_prompt_is_there_once_per_micro_batch_that_needs_it() -> None:
    sequences = grouped([(6, [3] * 7), (4, [2]), (5, [4, 4])])
    assert tokens(pack(sequences, 1000, CPU)) == [6 + 7 * 2 + 4 + 1 + 5 + 2 * 3]
    assert tokens(pack(repeat_prompts(sequences), 1000, CPU)) == [7 * (6 + 2) + 4 + 1 + 2 * (5 + 3)]
    # a group larger than a micro-batch has its prompt in each
    first, second, *_, last = pack(sequences, 14, CPU)
    prompt = sequences.prompt(0)
    assert torch.equal(first.token_N[:6], prompt) and torch.equal(second.token_N[:6], prompt)
    assert last.token_N[:5].tolist() == sequences.prompt(2).tolist()
    assert first.layout.shares_prompts and last.layout.shares_prompts
    # responses apart, each fills a micro-batch, and is a sequence like any other
    assert not any(batch.layout.shares_prompts for batch in pack(sequences, 8, CPU))
    assert not any(batch.layout.shares_prompts for batch in pack(repeat_prompts(sequences), 1000, CPU))


def test_repeating_prompts_changes_no_sequence() -> None:
    sequences = grouped(SHAPES["sizes"])
    repeated = repeat_prompts(sequences)
    assert repeated.num_prompts == repeated.num_responses == sequences.num_responses
    for s, p in enumerate(sequences.prompt_of_response_S.tolist()):
        assert torch.equal(repeated.prompt(s), sequences.prompt(p))
        assert torch.equal(repeated.response(s), sequences.response(s))
    assert torch.equal(sequence_lengths(repeated), sequence_lengths(sequences))
    assert token_cost(repeated).total == int(sequence_lengths(sequences).sum()) > token_cost(sequences).total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_a_state_is_the_sum_of_its_rows(dtype: torch.dtype, device: torch.device) -> None:
    state_T = torch.tensor([4, 1, 4, 0, 4, 7, 1])  # 8 rows of padding behind, as sequence parallelism has
    states = States.of(state_T, device)
    generator = torch.Generator().manual_seed(0)
    hidden_ND, grad_TD = (torch.randn(n, 5, generator=generator).to(device, dtype) for n in (16, 7))
    hidden_ND.requires_grad_()
    hidden_TD = states.gather(hidden_ND)
    assert torch.equal(hidden_TD, hidden_ND[state_T.to(device)])
    (grad_ND,) = torch.autograd.grad(hidden_TD, hidden_ND, grad_TD)
    expected_ND = torch.zeros(16, 5, dtype=torch.float64).index_add_(0, state_T, grad_TD.double().cpu())
    torch.testing.assert_close(grad_ND.cpu(), expected_ND.to(dtype))
    (again_ND,) = torch.autograd.grad(states.gather(hidden_ND), hidden_ND, grad_TD)
    assert torch.equal(grad_ND, again_ND) and grad_ND.dtype == dtype


def test_many_rows_of_one_state_are_rounded_once(device: torch.device) -> None:
    """256 + 1 is 256 in bf16: a sum that is rounded at each of its terms would never get on."""
    hidden_ND = torch.zeros(2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    rows_TD = States.of(torch.zeros(65, dtype=torch.int64), device).gather(hidden_ND)
    grad_TD = torch.tensor([256.0] + [1.0] * 64, dtype=torch.bfloat16, device=device)[:, None]
    (grad_ND,) = torch.autograd.grad(rows_TD, hidden_ND, grad_TD)
    assert grad_ND.squeeze(1).tolist() == [320, 0]


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_have_a_gradient_too(rows: int) -> None:
    hidden_ND = torch.ones(3, 2, requires_grad=True)
    states = States.of(torch.full((rows,), 2), CPU)
    (grad_ND,) = torch.autograd.grad(states.gather(hidden_ND).sum(), hidden_ND)
    assert grad_ND.tolist() == [[0, 0], [0, 0], [rows, rows]]


def test_no_prompt_token_is_a_target() -> None:
    # prompts of tokens below 10, responses of tokens from 10 on
    sequences = Sequences.from_lists([[1, 2, 3], [4, 5]], [[10, 11], [12], [13, 14, 15], []], group_size=2)
    batches = pack(sequences, 7, CPU)
    assert len(batches) == 2
    assert torch.cat([b.target_T for b in batches]).tolist() == [10, 11, 12, 13, 14, 15]
    assert [b.token_N[b.states.state_T].tolist() for b in batches] == [[3, 10, 3], [5, 13, 14]]


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
    own_S = torch.tensor([50, 10, 10, 10, 10, 10])
    cost = Cost(own_S, torch.zeros(6, dtype=torch.int64), sequences.group_cu)
    assert tokens(pack(sequences, 25, CPU, cost=cost)) == [5, 25]
    assert tokens(pack(sequences, 20, CPU, cost=cost)) == [10, 20]  # the budget holds whatever the cost


def test_a_group_is_cut_only_where_it_must_be() -> None:
    sequences = grouped([(9, [2, 2, 2, 2]), (9, [2, 2])])
    # two micro-batches of three responses each would have 12 and 21 tokens, the first prompt twice
    assert tokens(pack(sequences, 23, CPU)) == [13, 11]
    assert tokens(pack(sequences, 12, CPU)) == [11, 11, 11]


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
        assert batch.states.state_T.numel() == batch.target_T.numel() == batch.row_T.numel() == 0
        assert batch.response_cu.tolist() == [0] and batch.response_cu.dtype == torch.int32


def test_a_sequence_that_predicts_nothing_leaves_a_token() -> None:
    """A prompt of one token without a response has nothing to run, and is still a micro-batch."""
    (batch,) = pack(Sequences.from_lists([[5]], [[]]), 10, CPU)
    assert batch.token_N.numel() == batch.layout.num_tokens == 1 and batch.target_T.numel() == 0
    assert batch.response_cu.tolist() == [0, 0]


def test_costs_are_those_of_the_layers_the_attention_and_the_head() -> None:
    model = ModelConfig(num_layers=3, hidden_size=8, num_heads=4, num_kv_heads=2, head_size=6, ffn_size=16)
    sequences = tiny.sequences([3, 1], [5, 0])
    n, K = 3 + 5 - 1, 6
    projections = n * (8 * 4 * K + 2 * 8 * 2 * K + 4 * K * 8)  # queries, keys and values, output
    feed_forward = n * 3 * 8 * 16
    attention = n * n / 2 * 2 * 4 * K  # half of n^2, with keys and with values
    head = 5 * 8 * 50
    cost = estimated_cost(sequences, model, 50)
    assert int(cost.own_S[0] + cost.prompt_P[0]) == 3 * 2 * (3 * (projections + feed_forward + attention) + head)
    assert cost.own_S[1] == 0  # but for its prompt, a response without tokens takes nothing


def test_a_shared_prompt_costs_once() -> None:
    model = ModelConfig(num_layers=3, hidden_size=8, num_heads=4, num_kv_heads=2, ffn_size=16)
    sequences = grouped([(6, [3, 5, 1]), (2, [4])])
    shared, repeated = (estimated_cost(x, model, 50) for x in (sequences, repeat_prompts(sequences)))
    assert torch.equal(repeated.own_S, shared.own_S)  # a response sees its prompt whichever way it is stored
    assert shared.total == repeated.total - 2 * int(shared.prompt_P[0])


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_rank_without_work_trains_nothing(layout: Parallel, multiple: int) -> None:
    """The step runs, with loss and gradient 0 and nothing in the statistics; a rank beside it may have work."""
    policy = tiny.trainable(layout)
    rows = Rows(torch.empty(0), torch.empty(0))
    micro_batches = pack(Sequences.from_lists([], []), 10, platform.device(), multiple=multiple)
    step = optimizer_step(policy, micro_batches, PolicyLoss(rows, Objective(kl_coef=0.0), temperature=1.0))
    assert step.loss == step.grad_norm == sum(float(x) for x in step.stats.sums.values()) == 0


def test_empty_micro_batches_change_nothing(layout: Parallel) -> None:
    sequences = tiny.sequences([2, 3], [4, 1, 3, 2])
    T = sequences.response_token_T.numel()
    rows = Rows(torch.full((T,), 1 / T), torch.linspace(-1, 2, T))
    loss = PolicyLoss(rows, Objective(kl_coef=0.0), temperature=1.0)
    one, padded = (
        optimizer_step(tiny.trainable(layout), pack(sequences, 1000, platform.device(), multiple=m), loss)
        for m in (1, 8)
    )
    for name in ("loss", "grad_norm"):
        assert getattr(padded, name) == pytest.approx(getattr(one, name), rel=1e-5) and getattr(one, name) != 0
    torch.testing.assert_close(dict(padded.stats.sums), dict(one.stats.sums))
    policy = tiny.model(layout)
    logprobs = [policy.logprobs(pack(sequences, 1000, platform.device(), multiple=m), T, 1.0) for m in (1, 8)]
    torch.testing.assert_close(*logprobs)
