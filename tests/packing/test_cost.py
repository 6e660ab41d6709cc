"""Cutting a line of work evenly: as good as trying every cut.

A part takes what its responses take, and once what the prompt of each of their groups takes.
"""

from __future__ import annotations

import random
from itertools import combinations_with_replacement, pairwise

import pytest
import torch
from torch import Tensor

from dsm_train.packing.cost import Cost, cut_evenly, fewest_parts
from dsm_train.types import offsets


def alone(own_S: Tensor) -> Cost:
    """Responses without prompts."""
    return Cost(own_S, torch.zeros_like(own_S), torch.arange(len(own_S) + 1, dtype=torch.int32))


def taken(cost: Cost, first: int, last: int) -> int:
    """Cost of the responses first..last - 1, counted one by one."""
    sizes = cost.group_cu.diff().tolist()
    group_of = [group for group, size in enumerate(sizes) for _ in range(size)]
    prompts = sum(int(cost.prompt_P[group]) for group in set(group_of[first:last]))
    return sum(cost.own_S[first:last].tolist()) + prompts


def best(cost: Cost, count: int, size: Cost, max_size: int) -> int | None:
    """The least possible largest cost by trying every cut; None where no cut keeps the sizes."""
    tries, items = [], len(cost.own_S)
    parts = list(combinations_with_replacement(range(items + 1), 2))
    cost_of, size_of = ({part: taken(each, *part) for part in parts} for each in (cost, size))
    for inner in combinations_with_replacement(range(items + 1), count - 1):
        cuts = list(pairwise([0, *inner, items]))
        if all(size_of[cut] <= max_size for cut in cuts):
            tries.append(max(cost_of[cut] for cut in cuts))
    return min(tries, default=None)


@pytest.mark.parametrize("items", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_cut_is_better(items: int, count: int) -> None:
    rng = random.Random(10 * items + count)
    for _ in range(10):
        check(rng, items, count)


def check(rng: random.Random, items: int, count: int) -> None:
    max_size = rng.randrange(5, 15)
    # groups of any size, some without a response; in half of the cases no prompt takes anything
    sizes = []
    while sum(sizes) < items:
        sizes.append(min(rng.choice([0, 1, 2, 7]), items - sum(sizes)))
    group_cu, shared = offsets(sizes), rng.random() < 0.5

    def draw(own: list[int], prompt: list[int]) -> Cost:
        return Cost(torch.tensor(own, dtype=torch.int64), shared * torch.tensor(prompt, dtype=torch.int64), group_cu)

    # costs of 0, one giant, and costs that do not follow the sizes
    cost = draw(
        [rng.choice([0, 1, rng.randrange(1, 10), rng.choice([5, 1000])]) for _ in range(items)],
        [rng.choice([0, 3, 20, 500]) for _ in sizes],
    )
    size = draw([rng.randrange(0, 6) for _ in range(items)], [rng.randrange(0, 5) for _ in sizes])
    expected = best(cost, count, size, max_size)
    if expected is None:
        with pytest.raises(ValueError, match=f"more than {count} parts of at most {max_size}"):
            cut_evenly(cost, count, size, max_size)
    else:
        cuts = cut_evenly(cost, count, size, max_size)
        assert len(cuts) == count + 1 and cuts[0] == 0 and cuts[-1] == items and cuts == sorted(cuts)
        assert all(taken(size, a, b) <= max_size for a, b in pairwise(cuts))
        assert max(taken(cost, a, b) for a, b in pairwise(cuts)) == expected
        assert fewest_parts(size, max_size) <= count
    unlimited = cut_evenly(cost, count)
    nothing = alone(torch.zeros(items, dtype=torch.int64))
    assert max(taken(cost, a, b) for a, b in pairwise(unlimited)) == best(cost, count, nothing, 0)
    assert cost.total == taken(cost, 0, items)
    assert cost.largest == max((taken(cost, s, s + 1) for s in range(items)), default=0)


def test_parts_are_as_few_as_any_cut_has() -> None:
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.choice([1, 2, 7]) for _ in range(rng.randrange(1, 3))]
        own_S, prompt_P = (torch.tensor([rng.randrange(0, 6) for _ in range(n)]) for n in (sum(sizes), len(sizes)))
        size = Cost(own_S, prompt_P, offsets(sizes))
        limit = size.largest + rng.randrange(0, 6)
        fewest = next(n for n in range(10) if n and best(size, n, size, limit) is not None)
        assert fewest_parts(size, limit) == fewest


def test_costs_of_several_replicas_are_one_line() -> None:
    one = Cost(torch.tensor([1, 2, 4]), torch.tensor([10, 20]), offsets([2, 1]))
    other = Cost(torch.tensor([8]), torch.tensor([40, 50]), offsets([0, 1]))
    both = Cost.concatenate([one, alone(torch.tensor([], dtype=torch.int64)), other])
    assert both.group_cu.tolist() == [0, 2, 3, 3, 4]
    assert [taken(both, s, s + 1) for s in range(4)] == [11, 12, 24, 58]
    assert both.total == one.total + other.total == 15 + 10 + 20 + 50


def test_one_too_large_for_any_part_raises() -> None:
    with pytest.raises(ValueError, match="parts of at most 4 tokens"):
        cut_evenly(alone(torch.tensor([1, 1])), 5, alone(torch.tensor([5, 1])), 4)
    with pytest.raises(ValueError, match="parts of at most 4 tokens"):
        cut_evenly(alone(torch.tensor([1])), 5, Cost(torch.tensor([3]), torch.tensor([2]), offsets([1])), 4)


def test_large_costs_are_exact() -> None:
    large = 2**55  # where a float cannot tell it from one more
    assert cut_evenly(alone(torch.tensor([large + 1, large, large, large + 1])), 2) == [0, 2, 4]
    assert cut_evenly(alone(torch.tensor([large, large + 1, 1, large, large])), 2) == [0, 2, 5]


def test_a_hundred_thousand_responses_are_cut_at_once() -> None:
    cost_S = torch.randint(1, 10**15, (100_000,), generator=torch.Generator().manual_seed(0))
    cost = cost_S.tolist()  # their sum exceeds 64 bits
    parts = [sum(cost[a:b]) for a, b in pairwise(cut_evenly(alone(cost_S), 64))]
    assert sum(cost) / 64 <= max(parts) <= sum(cost) / 64 + 10**15
