"""The work tables of packed attention: every visible pair once, heaviest first, no program too long."""

from __future__ import annotations

import time

import pytest
import torch
from cases import offsets
from test_packed_attention import GROUPS, SEQUENCES, Groups, layout_of, segments_of
from torch import Tensor

from triton_kernels import PackedLayout

CPU = torch.device("cpu")


def seen(sequences: list[int] | Groups, window: int | None) -> Tensor:
    """Which query [row] sees which key [column], set up segment by segment."""
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
@pytest.mark.parametrize("sequences", [GROUPS, SEQUENCES, [(100, [70] * 9)], [0]])
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
@pytest.mark.parametrize("sequences", [GROUPS, SEQUENCES, [(100, [70] * 9)], [0]])
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


def test_tables_are_made_once_and_in_little_time() -> None:
    layout = PackedLayout.from_groups(
        torch.full((512,), 64), torch.full((8192,), 128), offsets([16] * 512, CPU)
    )  # a million tokens
    started = time.perf_counter()
    tiles = layout.query_tiles(128, None), layout.key_tiles(128, 64, 8, None)
    assert time.perf_counter() - started < 2  # a loop over tiles would take longer, one over tokens minutes
    assert layout.query_tiles(128, None) is tiles[0] and layout.key_tiles(128, 64, 8, None) is tiles[1]
    assert layout.query_tiles(64, None) is not tiles[0]


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 tokens, .* got 4294967294"):
        PackedLayout.from_groups(torch.tensor([2**31 - 1]), torch.tensor([2**31 - 1]), offsets([1], CPU))
