"""PackedLayout against brute force: positions, segments, and work tables with every visible pair once.

The same on every device, and without the interpreter.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import offsets
from packed_cases import GROUPS, SEQUENCES, Groups, layout_of, positions_of, segments_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_kernels import PackedLayout

pytestmark = pytest.mark.no_interpret

CPU = torch.device("cpu")


def assert_segments_and_positions(sequences: list[int] | Groups, device: torch.device) -> None:
    layout, segments = layout_of(sequences, device), segments_of(sequences)
    found = [(s, e, [*range(start, end)], until) for s, e, start, end, until in layout.segments_N5.tolist()]
    expected = [
        (rows.start, rows.stop, [*prompt], max(rows.stop, *(end.stop for end, _, p in segments if p is rows), 0))
        for rows, _, prompt in segments
        if len(rows)
    ]
    assert found == expected, sequences
    assert layout.positions_T.dtype == torch.int64
    assert layout.positions_T.tolist() == positions_of(sequences).tolist(), sequences


@pytest.mark.parametrize("sequences", [GROUPS, SEQUENCES, [0], []])
def test_segments_and_positions(sequences: list[int] | Groups, device: torch.device) -> None:
    assert_segments_and_positions(sequences, device)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_prompts_responses_and_groups_may_be_empty_in_any_position(num_groups: int) -> None:
    prompts, responses = (0, 1, 3), ([], [0], [2], [0, 2], [2, 0])
    if num_groups == 3:
        prompts, responses = (0, 2), ([], [0], [1])
    groups = itertools.product(prompts, responses)
    for sequences in itertools.product(groups, repeat=num_groups):
        assert_segments_and_positions([*sequences], CPU)


def seen(sequences: list[int] | Groups, window: int | None) -> Tensor:
    """Visibility of each key [column] to each query [row], set up segment by segment."""
    segments = segments_of(sequences)
    T = segments[-1][0].stop if segments else 0
    visible_TT = torch.zeros(T, T, dtype=torch.bool)
    for rows, first, prompt in segments:
        for row in rows:
            path = [*prompt, *range(rows.start, row + 1)]
            visible_TT[row, path if window is None else path[-window:]] = True
        assert first == len(prompt)
    return visible_TT


@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
@pytest.mark.parametrize("sequences", [GROUPS, SEQUENCES, [(50, [35] * 5)], [0]])
def test_query_tiles_cover_every_pair_once(sequences: list[int] | Groups, window: int | None) -> None:
    visible_TT = seen(sequences, window)
    found_TT, block, work = torch.zeros_like(visible_TT, dtype=torch.int), 16, []
    for first, end, start, path, shift in layout_of(sequences, CPU).query_tiles(block, window).tolist():
        last = min(first + block, end)
        low = path if window is None else max(path, first - window + 1)
        work.append(last - low)
        for column in range(low, last):
            key = column if column >= start else column - shift
            for row in range(max(first, column), last):
                found_TT[row, key] += window is None or row - column < window
    assert torch.equal(found_TT, visible_TT.int())
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
@pytest.mark.parametrize("sequences", [GROUPS, SEQUENCES, [(50, [35] * 5)], [0]])
def test_key_tiles_cover_every_pair_once(sequences: list[int] | Groups, window: int | None) -> None:
    visible_TT = seen(sequences, window)
    layout, covered_TT = layout_of(sequences, CPU), torch.zeros_like(visible_TT, dtype=torch.int)
    tiles, slots = layout.key_tiles(16, 8, 1, window), {}
    for key, key_end, query, query_end, slot in tiles.items_I5.tolist():
        covered_TT[query:query_end, key:key_end] += 1
        assert query_end > query
        if slot >= 0:
            slots[slot] = (key, key_end)
    assert not covered_TT.numel() or int(covered_TT.max()) <= 1
    assert bool((covered_TT[visible_TT] == 1).all())
    summed = [(key, end) for key, end, first, n in tiles.sums_M4.tolist() for _ in range(first, first + n)]
    assert [slots[slot] for slot in range(tiles.num_slots)] == summed


def test_a_prompt_of_many_responses_is_shared_among_programs() -> None:
    """(P, G, R) = (512, 64, 512): uncut, a prompt's tile would see 260 blocks of queries, a response's at most 4."""
    layout = layout_of([(512, [512] * 64)], CPU)
    heads, block = 8, 128
    items = layout.key_tiles(128, block, heads, None).items_I5
    blocks = (items[:, 3] - items[:, 2] + block - 1) // block
    per_program = int(blocks.sum()) * heads / 264
    assert int(blocks.max()) <= max(4, per_program + 1)


class Operations(TorchDispatchMode):
    """Number of PyTorch's operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_tables_are_made_once_and_without_a_loop_over_tiles() -> None:
    def made_of(num_groups: int) -> tuple[PackedLayout, int]:
        group_cu = offsets([16] * num_groups, CPU)
        with Operations() as operations:
            layout = PackedLayout.from_groups(
                torch.full((num_groups,), 64), torch.full((16 * num_groups,), 128), group_cu
            )
            layout.query_tiles(128, None), layout.key_tiles(128, 64, 8, None)
        return layout, operations.count

    layout, operations = made_of(512)  # a million tokens
    assert operations == made_of(2)[1] < 300
    tiles = layout.query_tiles(128, None), layout.key_tiles(128, 64, 8, None)
    assert layout.query_tiles(128, None) is tiles[0] and layout.key_tiles(128, 64, 8, None) is tiles[1]
    assert layout.query_tiles(64, None) is not tiles[0]


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 tokens, .* got 4294967294"):
        PackedLayout.from_groups(torch.tensor([2**31 - 1]), torch.tensor([2**31 - 1]), offsets([1], CPU))
