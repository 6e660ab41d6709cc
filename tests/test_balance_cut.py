"""Cutting a line of work evenly: as good as trying every cut."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement, pairwise

import pytest
import torch

from dsm_train.packing import cut_evenly


def best(cost: list[int], count: int, size: list[int], max_size: int) -> int | None:
    """The least possible largest cost by trying every cut; None where no cut keeps the sizes."""
    tries = []
    for inner in combinations_with_replacement(range(len(cost) + 1), count - 1):
        cuts = list(pairwise([0, *inner, len(cost)]))
        if all(sum(size[a:b]) <= max_size for a, b in cuts):
            tries.append(max(sum(cost[a:b]) for a, b in cuts))
    return min(tries, default=None)


@pytest.mark.parametrize("items", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_cut_is_better(items: int, count: int) -> None:
    rng = random.Random(10 * items + count)
    for _ in range(10):
        check(rng, items, count)


def check(rng: random.Random, items: int, count: int) -> None:
    max_size = rng.randrange(5, 15)
    # costs of 0, one giant, and costs that do not follow the sizes
    cost = [rng.choice([0, 1, rng.randrange(1, 10), rng.choice([5, 1000])]) for _ in range(items)]
    size = [rng.randrange(0, 6) for _ in range(items)]
    expected = best(cost, count, size, max_size)
    cost_S, size_S = torch.tensor(cost, dtype=torch.int64), torch.tensor(size, dtype=torch.int64)
    if expected is None:
        with pytest.raises(ValueError, match=f"more than {count} parts of at most {max_size}"):
            cut_evenly(cost_S, count, size_S, max_size)
    else:
        cuts = cut_evenly(cost_S, count, size_S, max_size)
        assert len(cuts) == count + 1 and cuts[0] == 0 and cuts[-1] == items and cuts == sorted(cuts)
        assert all(sum(size[a:b]) <= max_size for a, b in pairwise(cuts))
        assert max(sum(cost[a:b]) for a, b in pairwise(cuts)) == expected
    unlimited = cut_evenly(cost_S, count)
    assert max(sum(cost[a:b]) for a, b in pairwise(unlimited)) == best(cost, count, [0] * items, 0)


def test_one_too_large_for_any_part_raises() -> None:
    with pytest.raises(ValueError, match="parts of at most 4 tokens"):
        cut_evenly(torch.tensor([1, 1]), 5, torch.tensor([5, 1]), 4)


def test_large_costs_are_exact() -> None:
    large = 2**55  # where a float cannot tell it from one more
    assert cut_evenly(torch.tensor([large + 1, large, large, large + 1]), 2) == [0, 2, 4]
    assert cut_evenly(torch.tensor([large, large + 1, 1, large, large]), 2) == [0, 2, 5]


def test_a_hundred_thousand_responses_are_cut_at_once() -> None:
    cost_S = torch.randint(1, 10**15, (100_000,), generator=torch.Generator().manual_seed(0))
    cost = cost_S.tolist()  # their sum exceeds 64 bits
    parts = [sum(cost[a:b]) for a, b in pairwise(cut_evenly(cost_S, 64))]
    assert sum(cost) / 64 <= max(parts) <= sum(cost) / 64 + 10**15
