"""Where the sequences of a packed buffer lie, and the work tables that attention's kernels go through.

A segment is a sequence, a prompt or a response: rows start..end - 1 of the buffer. A token sees its own segment up to
itself and, in a response, the group's prompt before it. So a response's path is the prompt's rows followed by its own,
and the kernels count columns along it: column c is row c from the segment's start on, and row c - shift before.

T packed tokens, S responses, P prompts (groups), N segments, I work items, M key tiles that several items share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from triton_kernels._common import segment_ids

_PROGRAMS = 2 * 132
"""Programs among which the keys' gradients are shared: two for each multiprocessor of an H100 or H200. A constant, not
the GPU at hand, so that sums have one order everywhere."""
_FEWEST_BLOCKS = 4
"""Blocks of queries that a program takes at least: its keys are loaded, and its sums stored, once for all of them."""

_Table = TypeVar("_Table")


@dataclass(frozen=True)
class KeyTiles:
    """Work of the keys' gradient: tiles of keys, those that many queries see cut into several items.

    items_I5: int32 (first key row, end of the tile's rows, first query row, end of the query rows, slot); the slot is
    -1 for an item that has its tile to itself, otherwise where its partial sums go. sums_M4: int32 (first key row,
    end, first slot, number of slots) of the tiles whose slots are to be added, in the order of the slots.
    """

    items_I5: Tensor
    sums_M4: Tensor
    num_slots: int


@dataclass(frozen=True)
class PackedLayout:
    """Layout of a packed buffer of tokens; make it once per batch and give it to every layer.

    positions_T: int64 position of each token in its own path; a response's go on from its prompt's.
    segments_N5: int32 (start, end, prompt start, prompt end, end of the rows that see it) of each segment that is not
    empty, in the buffer's order; a segment without a prompt has an empty range there.
    """

    positions_T: Tensor
    segments_N5: Tensor
    _host_N5: Tensor
    """The segments on the host, int64."""
    _tables: dict[tuple[object, ...], object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions_T.numel()

    @functools.cached_property
    def longest_group(self) -> int:
        """Rows from a prompt's first to the last that sees it, at most."""
        return int((self._host_N5[:, 4] - self._host_N5[:, 2]).clamp(min=0).max()) if len(self._host_N5) else 0

    @property
    def shares_prompts(self) -> bool:
        """Whether any segment sees a prompt."""
        return bool((self._host_N5[:, 3] > self._host_N5[:, 2]).any())

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, *, device: torch.device | None = None) -> PackedLayout:
        """Independent sequences: sequence i is rows cu_seqlens[i]..cu_seqlens[i + 1]; they may be empty.

        cu_seqlens: int32 offsets, first 0; on the host, where they are known there, since a GPU would be waited for.
        The layout is on `device`, or where they are. Raises `ValueError` otherwise.
        """
        cu = _host_offsets("cu_seqlens", cu_seqlens)
        start, end = cu[:-1], cu[1:]
        return _layout(torch.stack([start, end, start, start, end], 1), device or cu_seqlens.device)

    @staticmethod
    def from_groups(
        prompt_len_P: Tensor, response_len_S: Tensor, group_cu: Tensor, *, device: torch.device | None = None
    ) -> PackedLayout:
        """Groups [prompt | response 1 | ... | response G], one after the other; all lengths may be 0.

        prompt_len_P, response_len_S: int32 or int64. group_cu: int32 offsets [P + 1], the responses of each prompt.
        Device as of `from_cu_seqlens`. Raises `ValueError` for anything else and for counts that do not fit.
        """
        prompt_P = _host_lengths("prompt_len_P", prompt_len_P)
        length_S = _host_lengths("response_len_S", response_len_S)
        cu = _host_offsets("group_cu", group_cu)
        if len(cu) != len(prompt_P) + 1 or int(cu[-1]) != len(length_S):
            raise ValueError(
                f"group_cu must have {len(prompt_P)} + 1 offsets that end at {len(length_S)}, the number of responses; "
                f"got {len(cu)} that end at {int(cu[-1])}"
            )
        if not group_cu.device == prompt_len_P.device == response_len_S.device:
            raise ValueError(
                "prompt_len_P, response_len_S and group_cu must share a device; got "
                f"{prompt_len_P.device}, {response_len_S.device}, {group_cu.device}"
            )
        before_S = torch.cat([cu.new_zeros(1), length_S.cumsum(0)])
        group_end_P = prompt_P.cumsum(0) + before_S[cu[1:]]
        prompt_start_P = group_end_P - prompt_P - (before_S[cu[1:]] - before_S[cu[:-1]])
        prompt_end_P = prompt_start_P + prompt_P
        group_S = segment_ids(cu, len(length_S))
        start_S = prompt_end_P[group_S] + before_S[:-1] - before_S[cu[:-1]][group_S]
        prompts = (prompt_start_P, prompt_end_P, prompt_start_P, prompt_start_P, group_end_P)
        responses = (start_S, start_S + length_S, prompt_start_P[group_S], prompt_end_P[group_S], start_S + length_S)
        segments = torch.cat([torch.stack(prompts, 1), torch.stack(responses, 1)])
        return _layout(segments[torch.argsort(segments[:, 0], stable=True)], device or group_cu.device)

    def query_tiles(self, block: int, window: int | None) -> Tensor:
        """Tiles of `block` queries, int32 [I, 5], those that see most first.

        (first row, end of the segment, its start, first column of the path, shift): see the file's head.
        """
        return self._table((block, window), lambda: _to(_query_tiles(self._host_N5, block, window), self._device))

    def key_tiles(self, block: int, query_block: int, num_heads: int, window: int | None) -> KeyTiles:
        """Tiles of `block` keys of `num_heads` key heads, seen by queries in blocks of `query_block`; most work first.

        A prompt is seen by all its responses: its tiles are cut so that no program works much longer than others.
        """

        def make() -> KeyTiles:
            items_I5, sums_M4, num_slots = _key_tiles(self._host_N5, block, query_block, num_heads, window)
            return KeyTiles(_to(items_I5, self._device), _to(sums_M4, self._device), num_slots)

        return self._table((block, query_block, num_heads, window), make)

    @property
    def _device(self) -> torch.device:
        return self.positions_T.device

    def _table(self, key: tuple[object, ...], make: Callable[[], _Table]) -> _Table:
        """Made at the first use, kept for the other layers."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]  # pyright: ignore[reportReturnType]


def _layout(segments_N5: Tensor, device: torch.device) -> PackedLayout:
    """From all segments in the buffer's order, on the host."""
    total = int(segments_N5[-1, 1]) if len(segments_N5) else 0
    if total >= 2**31:
        raise ValueError(f"a packed buffer has at most 2^31 - 1 tokens, its offsets being int32; got {total}")
    start, end, prompt_start, prompt_end, _ = segments_N5.unbind(1)
    positions_T = torch.arange(total, device="cpu") - (start - (prompt_end - prompt_start)).repeat_interleave(
        end - start
    )
    host_N5 = segments_N5[end > start]
    return PackedLayout(_to(positions_T, device), _to(host_N5.int(), device), host_N5)


def _query_tiles(segments_N5: Tensor, block: int, window: int | None) -> Tensor:
    start, end, prompt_start, prompt_end, _ = segments_N5.unbind(1)
    segment_I, offset_I = _tiles(end - start, block)
    first = start[segment_I] + offset_I
    path = (start - (prompt_end - prompt_start))[segment_I]
    lowest = path if window is None else torch.maximum(path, first - window + 1)
    work = torch.minimum(first + block, end[segment_I]) - lowest
    items_I5 = torch.stack([first, end[segment_I], start[segment_I], path, (start - prompt_end)[segment_I]], 1)
    return items_I5[torch.argsort(work, descending=True, stable=True)].int()


def _key_tiles(
    segments_N5: Tensor, block: int, query_block: int, num_heads: int, window: int | None
) -> tuple[Tensor, Tensor, int]:
    start, end, _, _, seen_until = segments_N5.unbind(1)
    segment_M, offset_M = _tiles(end - start, block)
    key, until = start[segment_M] + offset_M, seen_until[segment_M]
    key_end = torch.minimum(key + block, end[segment_M])
    if window is not None:
        # No query sees the tile from `window` after its last key on. The path of a response goes on where the prompt
        # ends, so if that lies behind the prompt, all its responses begin within the window.
        beyond = key_end - 1 + window
        until = torch.where(beyond > end[segment_M], until, beyond)
    blocks_M = _ceil_div(until - key, query_block)
    most = max(_FEWEST_BLOCKS, int(_ceil_div(blocks_M.sum() * num_heads, _PROGRAMS)))
    parts_M = _ceil_div(blocks_M, most)
    tile_I, part_I = _tiles(parts_M, 1)
    rows_I = (_ceil_div(blocks_M, parts_M) * query_block)[tile_I]
    first_query = key[tile_I] + part_I * rows_I
    query_end = torch.minimum(first_query + rows_I, until[tile_I])
    is_cut_M = parts_M > 1
    slots_M = torch.where(is_cut_M, parts_M, 0)
    first_slot_M = slots_M.cumsum(0) - slots_M
    slot_I = torch.where(is_cut_M[tile_I], first_slot_M[tile_I] + part_I, -1)
    items_I5 = torch.stack([key[tile_I], key_end[tile_I], first_query, query_end, slot_I], 1)
    order = torch.argsort(query_end - first_query, descending=True, stable=True)
    sums_M4 = torch.stack([key, key_end, first_slot_M, slots_M], 1)[is_cut_M]
    return items_I5[order].int(), sums_M4.int(), int(slots_M.sum())


def _tiles(length_N: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Cut each length into blocks: (which one, offset in it) of every block, in order."""
    count_N = _ceil_div(length_N, block)
    owner_I = torch.arange(len(length_N), device="cpu").repeat_interleave(count_N)
    return owner_I, block * (torch.arange(len(owner_I), device="cpu") - (count_N.cumsum(0) - count_N)[owner_I])


def _ceil_div(x: Tensor, y: int | Tensor) -> Tensor:
    return (x + y - 1).div(y, rounding_mode="floor")


def _to(x: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _host_offsets(name: str, cu: Tensor) -> Tensor:
    """int64 offsets on the host (one synchronisation for a GPU tensor), or `ValueError`."""
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() == 0:
        raise ValueError(f"{name} must be int32 offsets [n + 1]; got {cu.dtype} {tuple(cu.shape)}")
    host = cu.cpu().long()
    is_bad = torch.cat([host[:1] != 0, host[1:] < host[:-1]])
    if bool(is_bad.any()):
        raise ValueError(f"{name} must start at 0 and never decrease; got {_shown(host, is_bad)}")
    return host


def _host_lengths(name: str, length: Tensor) -> Tensor:
    """int64 lengths on the host, or `ValueError`."""
    if length.dtype not in (torch.int32, torch.int64) or length.dim() != 1:
        raise ValueError(f"{name} must be int32 or int64 [n]; got {length.dtype} {tuple(length.shape)}")
    host = length.cpu().long()
    if bool((host < 0).any()):
        raise ValueError(f"{name} must be at least 0; got {_shown(host, host < 0)}")
    return host


def _shown(values: Tensor, is_bad: Tensor) -> str:
    """All of a few values; of many the first bad one and the one before it."""
    if len(values) <= 16:
        return str(values.tolist())
    at = int(is_bad.nonzero()[0])
    return f"{values[max(0, at - 1) : at + 1].tolist()} up to index {at} of {len(values)}"
