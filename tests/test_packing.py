"""Packing: every response token is a target exactly once, beside the token that predicts it."""

from __future__ import annotations

import pytest
import tiny
import torch

from dsm_train.packing import pack, sequence_lengths
from dsm_train.types import Sequences

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
        assert batch.token_N.numel() <= max_tokens
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


def test_micro_batches_are_filled_greedily() -> None:
    sequences = tiny.sequences([3] * 4, [3] * 4)  # 5 packed tokens each: the last token of a sequence predicts nothing
    assert sequence_lengths(sequences).tolist() == [5, 5, 5, 5]
    assert [b.token_N.numel() for b in pack(sequences, 10, CPU)] == [10, 10]
    assert [b.token_N.numel() for b in pack(sequences, 9, CPU)] == [5, 5, 5, 5]


def test_a_sequence_longer_than_the_budget_raises() -> None:
    with pytest.raises(ValueError, match=r"12 tokens .* run.max_tokens = 11"):
        pack(tiny.sequences([3, 6], [3, 7]), 11, CPU)


def test_nothing_gives_no_micro_batch() -> None:
    assert pack(Sequences.from_lists([], []), 10, CPU) == []


def test_groups_are_sequences_of_their_own() -> None:
    sequences = tiny.sequences([2, 5, 1], [3, 1, 7, 2, 0, 6])
    part, span_S, span_T = sequences.groups(1, 3)
    assert (span_S, span_T) == (slice(2, 6), slice(4, 19))
    assert [whole(part, s) for s in range(4)] == [whole(sequences, s) for s in range(2, 6)]
    assert part.group_cu.tolist() == [0, 2, 4]
