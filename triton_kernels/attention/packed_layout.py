"""Segments of a packed buffer, and the work tables of attention's Triton kernels.

A segment is a sequence, a prompt or a response: rows start..end - 1 of the buffer. A token sees its own segment up to
itself and, in a response, the group's prompt. A response's path is the prompt's rows followed by its own. The kernels
count columns along the path: column c is row c from the segment's start on, and row c - shift before it.

T packed tokens, S responses, P prompts (groups), N segments, I work items, M key tiles that several items share, Z
slots for partial sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from triton_kernels._common import segment_ids

_PROGRAMS = 2 * 132
"""Programs that share the keys' gradients: two for each multiprocessor of an H100 or H200. It does not follow the GPU
at hand, so that sums have one order everywhere."""
_FEWEST_BLOCKS = 4
"""Fewest blocks of queries of a program: they repay loading the keys and storing the sums once."""
_MOST_TOKENS = 2**31 - 1

_Table = TypeVar("_Table")


@dataclass(frozen=True)
class KeyTiles:
    """Work of the keys' gradient: tiles of keys; a tile that many queries see is cut into several items.

    items_I5: int32 (first key row, end of the tile's rows, first query row, end of the query rows, slot). The slot
    holds the item's partial sums; it is -1 for an item that has its tile to itself. sums_M4: int32 (first key row, end,
    first slot, number of slots) of the tiles whose slots are to be added, in the order of the slots. slots_Z0: empty;
    its length is the number of slots, which a compiled graph can only know as a shape.
    """

    items_I5: Tensor
    sums_M4: Tensor
    slots_Z0: Tensor

    @property
    def num_slots(self) -> int:
        """Z."""
        return len(self.slots_Z0)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Layout of a packed buffer of tokens; make it once per batch and give it to every layer.

    positions_T: int64 position of each token in its own path; a response's follow its prompt's. segments_N5: int32
    (start, end, prompt start, prompt end, end of the rows that see it) of each segment that is not empty, in the
    buffer's order; a segment without a prompt has an empty range there. longest_group: rows from a prompt's first to
    the last that sees it, at most.

    Two layouts are equal only if they are the same object.
    """

    positions_T: Tensor
    segments_N5: Tensor
    longest_group: int
    _host_N5: Tensor
    """The segments on the host, int64."""
    _tables: dict[tuple[object, ...], object] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions_T.numel()

    @property
    def shares_prompts(self) -> bool:
        """True if any segment sees a prompt."""
        return bool((self._host_N5[:, 3] > self._host_N5[:, 2]).any())

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, *, device: torch.device | str | None = None) -> PackedLayout:
        """Independent sequences: sequence i is rows cu_seqlens[i]..cu_seqlens[i + 1] - 1; they may be empty.

        cu_seqlens: int32 offsets, the first 0. Pass them on the host where they are known there: offsets on a GPU cost
        a synchronisation. The layout is on `device`, by default that of the offsets. Raises `ValueError` for anything
        else.
        """
        cu = _host_offsets("cu_seqlens", cu_seqlens)
        start, end = cu[:-1], cu[1:]
        return _layout(torch.stack([start, end, start, start, end], 1), device or cu_seqlens.device)

    @staticmethod
    def from_groups(
        prompt_len_P: Tensor, response_len_S: Tensor, group_cu: Tensor, *, device: torch.device | str | None = None
    ) -> PackedLayout:
        """Groups [prompt | response 1 | ... | response G], one after the other; all lengths may be 0.

        prompt_len_P, response_len_S: int32 or int64. group_cu: int32 offsets [P + 1], the responses of each prompt.
        `device` as for `from_cu_seqlens`. Raises `ValueError` for anything else and for counts that do not fit.
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
        return _layout(segments[torch.argsort(segments[:, 0])], device or group_cu.device)

    def query_tiles(self, block: int, window: int | None) -> Tensor:
        """Tiles of `block` queries, int32 [I, 5], those that see most first.

        (first row, end of the segment, its start, first column of the path, shift): see the file's head.
        """
        key = (block, window)
        return self._table(key, lambda: make_query_tiles(self._host_N5, *key, self._device))

    def key_tiles(self, block: int, query_block: int, num_heads: int, window: int | None) -> KeyTiles:
        """Tiles of `block` keys of `num_heads` key heads, seen by queries in blocks of `query_block`; most work first.

        All responses see their prompt: its tiles are cut so that no program works much longer than others.
        """
        key = (block, query_block, num_heads, window)
        return self._table(key, lambda: KeyTiles(*make_key_tiles(self._host_N5, *key, self._device)))

    @property
    def _device(self) -> torch.device:
        return self.positions_T.device

    def _table(self, key: tuple[object, ...], make: Callable[[], _Table]) -> _Table:
        """Make a table at its first use and keep it for the other layers."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]  # pyright: ignore[reportReturnType]


@torch.inference_mode(False)  # training may use a layout that was made for generation
def _layout(segments_N5: Tensor, device: torch.device | str) -> PackedLayout:
    """Layout of segments on the host, sorted by their start; the empty ones are dropped."""
    device = torch.device(device)
    host_N5 = segments_N5[segments_N5[:, 1] > segments_N5[:, 0]]
    total = int(host_N5[-1, 1]) if len(host_N5) else 0
    if total > _MOST_TOKENS:
        raise ValueError(f"a packed buffer has at most 2^31 - 1 tokens, its offsets being int32; got {total}")
    start, end, prompt_start, prompt_end, seen_until = host_N5.unbind(1)
    path_start = start - (prompt_end - prompt_start)
    positions_T = torch.arange(total, device="cpu") - path_start.repeat_interleave(end - start)
    longest_group = int((seen_until - prompt_start).max()) if len(host_N5) else 0
    return PackedLayout(_to(positions_T, device), _to(host_N5.int(), device), longest_group, host_N5)


# The tables are made by ops, so that a compiled graph can call them: their sizes depend on the values of the segments.
@torch.library.custom_op("dsm::attention_query_tiles", mutates_args=())
def make_query_tiles(segments_N5: Tensor, block: int, window: int | None, device: torch.device) -> Tensor:
    """See `PackedLayout.query_tiles`; the segments are on the host."""
    with torch.inference_mode(False):
        return _to(_query_tiles(segments_N5, block, window), device)


@torch.library.custom_op("dsm::attention_key_tiles", mutates_args=())
def make_key_tiles(
    segments_N5: Tensor, block: int, query_block: int, num_heads: int, window: int | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(items_I5, sums_M4, slots_Z0), see `KeyTiles`; the segments are on the host."""
    with torch.inference_mode(False):
        tables = _key_tiles(segments_N5, block, query_block, num_heads, window)
        items_I5, sums_M4, slots_Z0 = (_to(x, device) for x in tables)
        return items_I5, sums_M4, slots_Z0


@make_query_tiles.register_fake
def _(segments_N5: Tensor, block: int, window: int | None, device: torch.device) -> Tensor:
    return segments_N5.new_empty(torch.library.get_ctx().new_dynamic_size(), 5, dtype=torch.int32, device=device)


@make_key_tiles.register_fake
def _(
    segments_N5: Tensor, block: int, query_block: int, num_heads: int, window: int | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    items, sums, slots = (torch.library.get_ctx().new_dynamic_size() for _ in range(3))
    items_I5 = segments_N5.new_empty(items, 5, dtype=torch.int32, device=device)
    sums_M4 = segments_N5.new_empty(sums, 4, dtype=torch.int32, device=device)
    return items_I5, sums_M4, segments_N5.new_empty(slots, 0, device=device)


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
) -> tuple[Tensor, Tensor, Tensor]:
    start, end, _, _, seen_until = segments_N5.unbind(1)
    segment_M, offset_M = _tiles(end - start, block)
    key, until = start[segment_M] + offset_M, seen_until[segment_M]
    key_end = torch.minimum(key + block, end[segment_M])
    if window is not None:
        # No query sees the tile from `window` rows after its last key on. If that row lies behind the prompt, all
        # responses begin within the window, because their paths go on where the prompt ends.
        beyond = key_end - 1 + window
        until = torch.where(beyond > end[segment_M], until, beyond)
    blocks_M = _ceil_div(until - key, query_block)
    most_blocks = max(_FEWEST_BLOCKS, int(_ceil_div(blocks_M.sum() * num_heads, _PROGRAMS)))
    parts_M = _ceil_div(blocks_M, most_blocks)
    tile_I, part_I = _tiles(parts_M, 1)
    rows_I = (_ceil_div(blocks_M, parts_M) * query_block)[tile_I]
    first_query = key[tile_I] + part_I * rows_I
    query_end = torch.minimum(first_query + rows_I, until[tile_I])
    is_cut_M = parts_M > 1
    slots_M = torch.where(is_cut_M, parts_M, 0)
    first_slot_M = slots_M.cumsum(0) - slots_M
    slot_I = torch.where(is_cut_M[tile_I], first_slot_M[tile_I] + part_I, -1)
    items_I5 = torch.stack([key[tile_I], key_end[tile_I], first_query, query_end, slot_I], 1)
    heaviest_first = torch.argsort(query_end - first_query, descending=True, stable=True)
    sums_M4 = torch.stack([key, key_end, first_slot_M, slots_M], 1)[is_cut_M]
    return items_I5[heaviest_first].int(), sums_M4.int(), items_I5.new_empty(int(slots_M.sum()), 0)


def _tiles(length_N: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Cut each length into blocks: (index of the length, offset in it) of every block, in order."""
    count_N = _ceil_div(length_N, block)
    owner_I = torch.arange(len(length_N), device="cpu").repeat_interleave(count_N)
    return owner_I, block * (torch.arange(len(owner_I), device="cpu") - (count_N.cumsum(0) - count_N)[owner_I])


def _ceil_div(x: Tensor, y: int | Tensor) -> Tensor:
    return (x + y - 1).div(y, rounding_mode="floor")


def _to(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; the host does not wait for a GPU."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _host_offsets(name: str, cu: Tensor) -> Tensor:
    """int64 offsets on the host, or `ValueError`."""
    host = _host_values(name, cu, (torch.int32,), "int32 offsets [n + 1]")
    if len(host) == 0:
        raise ValueError(f"{name} must be int32 offsets [n + 1]; got none")
    is_bad = torch.cat([host[:1] != 0, host[1:] < host[:-1]])
    if bool(is_bad.any()):
        raise ValueError(f"{name} must start at 0 and never decrease; got {_shown(host, is_bad)}")
    return host


def _host_lengths(name: str, length: Tensor) -> Tensor:
    """int64 lengths on the host, or `ValueError`."""
    host = _host_values(name, length, (torch.int32, torch.int64), "int32 or int64 lengths [n]")
    is_bad = (host < 0) | (host > _MOST_TOKENS)
    if bool(is_bad.any()):
        raise ValueError(f"{name} must be at least 0 and below 2^31; got {_shown(host, is_bad)}")
    return host


def _host_values(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], wanted: str) -> Tensor:
    """int64 values on the host of a tensor [n] (one synchronisation for a GPU tensor), or `ValueError`."""
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{name} must be {wanted}; got a {type(x).__name__} in place of a tensor")
    if x.dtype not in dtypes or x.dim() != 1:
        raise ValueError(f"{name} must be {wanted}; got {x.dtype} {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError(f"{name} must be {wanted}; got a tensor on meta, which has no values")
    return x.cpu().long()


def _shown(values: Tensor, is_bad: Tensor) -> str:
    """Show all of a few values; of many the first bad one and the one before it."""
    if len(values) <= 16:
        return str(values.tolist())
    at = int(is_bad.nonzero()[0])
    return f"{values[max(0, at - 1) : at + 1].tolist()} up to index {at} of {len(values)}"
