"""Sequences and rollouts: taking responses, and putting parts after each other."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import tiny
import torch

from dsm_train.types import Rollouts, Sequences

# two responses to each of three prompts; an empty response inside
WHOLE = tiny.sequences([2, 5, 1], [3, 1, 0, 2, 4, 6])


def rollouts(seed: int, prompts: list[int], responses: list[int]) -> Rollouts:
    sequences = tiny.sequences(prompts, responses, seed)
    T = sequences.response_token_T.numel()
    logprob_T = torch.arange(T) + seed / 10
    return Rollouts(
        sequences=sequences,
        prompt_id_P=torch.arange(len(prompts)) + 10 * seed,
        rollout_logprob_T=logprob_T,
        margin_T=logprob_T + 0.25,
        finished_S=torch.arange(len(responses)) % 2 == seed % 2,
        weight_version=3,
        reward_S=torch.arange(len(responses)).float(),
        reward_SF=torch.arange(2 * len(responses)).float().view(-1, 2) + seed,
        ref_logprob_T=logprob_T + 0.5,
        old_logprob_T=logprob_T + 0.75,
    )


def pairs(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of every sequence."""
    return [
        (sequences.prompt(p).tolist(), sequences.response(s).tolist())
        for s, p in enumerate(sequences.prompt_of_response_S.tolist())
    ]


@pytest.mark.parametrize(
    ("index", "group_cu"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 2, 4, 6]),
        ([1, 4, 5], [0, 1, 3]),  # part of a group; a prompt without a response is left out
        ([5, 4, 0, 3], [0, 2, 3, 4]),  # any order
        ([0, 2, 1], [0, 1, 2, 3]),  # a group that is torn apart gets its prompt twice
        ([2], [0, 1]),  # the empty response alone
        ([], [0]),
    ],
)
def test_taken_responses_keep_their_prompts(index: list[int], group_cu: list[int]) -> None:
    taken = WHOLE.take(torch.tensor(index, dtype=torch.int64))
    assert pairs(taken) == [pairs(WHOLE)[s] for s in index]
    assert taken.group_cu.tolist() == group_cu and taken.num_prompts == len(group_cu) - 1
    assert {taken.prompt_cu.dtype, taken.response_cu.dtype, taken.group_cu.dtype} == {torch.int32}
    assert taken.prompt_token.dtype == taken.response_token_T.dtype == torch.int64


def test_rows_of_taken_responses() -> None:
    index_S = torch.tensor([4, 2, 0])
    assert torch.equal(WHOLE.response_token_T[WHOLE.rows_of(index_S)], WHOLE.take(index_S).response_token_T)
    assert WHOLE.rows_of(index_S).tolist() == [6, 7, 8, 9, 0, 1, 2]


def test_groups_are_sequences_of_their_own() -> None:
    index_S = WHOLE.responses_of(torch.tensor([2, 0]))
    assert index_S.tolist() == [4, 5, 0, 1] and WHOLE.prompts_of(index_S).tolist() == [2, 0]
    part = WHOLE.take(index_S)
    assert pairs(part) == [pairs(WHOLE)[s] for s in index_S] and part.group_cu.tolist() == [0, 2, 4]


def test_taken_rollouts_have_every_field_along_its_axis() -> None:
    whole = rollouts(1, [2, 3], [2, 1, 3, 2])
    index_S = torch.tensor([3, 1, 0])
    taken, sequences = whole.take(index_S), whole.sequences
    assert pairs(taken.sequences) == [pairs(sequences)[s] for s in index_S] and taken.weight_version == 3
    index = {"P": sequences.prompts_of(index_S), "S": index_S, "T": sequences.rows_of(index_S)}
    for field in fields(Rollouts):
        if isinstance(value := getattr(whole, field.name), torch.Tensor):  # a field without an axis would be lost
            assert torch.equal(getattr(taken, field.name), value[index[field.metadata["axis"]]]), field.name
    assert replace(whole, reward_S=None).take(index_S).reward_S is None


def test_parts_make_the_whole() -> None:
    parts = [WHOLE.take(torch.arange(first, last)) for first, last in ((0, 2), (2, 2), (2, 6))]
    joined = Sequences.concatenate(parts)
    for field in fields(Sequences):
        a, b = getattr(joined, field.name), getattr(WHOLE, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype, field.name


def test_joined_rollouts_keep_every_field() -> None:
    a, b = rollouts(1, [2, 3], [2, 1, 3, 2]), rollouts(2, [4], [1, 5])
    joined = Rollouts.concatenate([a, b])
    assert pairs(joined.sequences) == pairs(a.sequences) + pairs(b.sequences)
    assert joined.weight_version == 3
    for field in fields(Rollouts):
        if field.name not in ("sequences", "weight_version"):
            assert torch.equal(
                getattr(joined, field.name), torch.cat([getattr(a, field.name), getattr(b, field.name)])
            ), field.name


def test_log_probabilities_that_a_part_lacks_are_absent() -> None:
    a, b = rollouts(1, [2], [2, 1]), rollouts(2, [4], [1, 5])
    joined = Rollouts.concatenate([replace(a, ref_logprob_T=None), b])
    assert joined.ref_logprob_T is None and joined.old_logprob_T is not None
    fresh = [replace(part, reward_S=torch.empty(0), ref_logprob_T=None, old_logprob_T=None) for part in (a, b)]
    assert Rollouts.concatenate(fresh).reward_S.numel() == 0
