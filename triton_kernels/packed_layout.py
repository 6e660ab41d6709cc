"""Where the sequences of a packed buffer lie, and the index tensors with which attention gathers and returns them.

T packed tokens, S responses, P prompts (groups), B sequences of one bucket, L and M their padded queries and keys,
N their queries or keys without the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triton_kernels._common import segment_ids

_MAX_PAIRS = 2**18
"""Padded (query, key) pairs of one bucket, at most, unless a single query has more keys: bounds the score tensor."""

_NEVER = 2**31 - 1
"""Position of a padding key: beyond every query."""


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, padded: B query ranges, each with its key range. No two of them share a row.

    q_index_BL, k_index_BM: packed rows, int64; padding repeats the range's last row, so that nothing from another
    sequence comes near. q_position_BL, k_position_BM: int32 positions; padding is -1 and `_NEVER`, hence never visible.
    q_slot_N, k_slot_N: flat indices of what is not padding.
    """

    q_index_BL: Tensor
    k_index_BM: Tensor
    q_position_BL: Tensor
    k_position_BM: Tensor
    q_slot_N: Tensor
    k_slot_N: Tensor

    @property
    def q_row_N(self) -> Tensor:
        """Packed rows of the queries."""
        return self.q_index_BL.flatten()[self.q_slot_N]

    @property
    def k_row_N(self) -> Tensor:
        """Packed rows of the keys."""
        return self.k_index_BM.flatten()[self.k_slot_N]

    def visible(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """1 where the query sees the key, else 0: [B, 1, L, M]."""
        q_B1L1, k_B11M = self.q_position_BL[:, None, :, None], self.k_position_BM[:, None, None, :]
        visible = k_B11M <= q_B1L1
        if window is not None:
            visible &= k_B11M > q_B1L1 - window
        return visible.to(dtype)


def buckets_from_tensors(tensors: Sequence[Tensor]) -> list[Bucket]:
    """Undo `PackedLayout`'s flattening: registered ops take lists of tensors only."""
    return [Bucket(*tensors[i : i + 6]) for i in range(0, len(tensors), 6)]


@dataclass(frozen=True)
class PackedLayout:
    """Layout of a packed buffer of tokens; make it once per batch and give it to every layer.

    positions_T: int64 position of each token in its own path; a response's go on from its prompt's.
    own: buckets in which each segment sees itself. shared: buckets in which a group's responses, as one range of
    queries, see its prompt. Both are flattened, the six tensors of a bucket after each other.
    """

    positions_T: Tensor
    own: list[Tensor]
    shared: list[Tensor]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions_T.numel()

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor) -> PackedLayout:
        """Independent sequences: sequence i is rows cu_seqlens[i]..cu_seqlens[i + 1]; they may be empty.

        cu_seqlens: int32 offsets, first 0. Raises `ValueError` otherwise.
        """
        cu = _host_offsets("cu_seqlens", cu_seqlens)
        length_S = cu[1:] - cu[:-1]
        none = length_S[:0]
        return _layout(cu[:-1], length_S, torch.zeros_like(length_S), (none, none, none, none), cu_seqlens.device)

    @staticmethod
    def from_groups(prompt_len_P: Tensor, response_len_S: Tensor, group_cu: Tensor) -> PackedLayout:
        """Groups [prompt | response 1 | ... | response G], one after the other; all lengths may be 0.

        prompt_len_P, response_len_S: int32 or int64. group_cu: int32 offsets [P + 1], the responses of each prompt.
        Raises `ValueError` for anything else and for counts that do not fit.
        """
        prompt_P = _host_lengths("prompt_len_P", prompt_len_P)
        length_S = _host_lengths("response_len_S", response_len_S)
        cu = _host_offsets("group_cu", group_cu)
        if len(cu) != len(prompt_P) + 1 or int(cu[-1]) != len(length_S):
            raise ValueError(
                f"group_cu must have {len(prompt_P)} + 1 offsets that end at {len(length_S)}, the number of responses; "
                f"got {len(cu)} that end at {int(cu[-1])}"
            )
        before_S = torch.cat([cu.new_zeros(1), length_S.cumsum(0)])
        responses_P = before_S[cu[1:]] - before_S[cu[:-1]]
        prompt_start_P = (prompt_P + responses_P).cumsum(0) - prompt_P - responses_P
        group_S = segment_ids(cu, len(length_S))
        response_start_S = (prompt_start_P + prompt_P - before_S[cu[:-1]])[group_S] + before_S[:-1]
        start = torch.cat([prompt_start_P, response_start_S])
        order = torch.argsort(start, stable=True)
        position = torch.cat([torch.zeros_like(prompt_P), prompt_P[group_S]])
        shared = (prompt_start_P + prompt_P, responses_P, prompt_start_P, prompt_P)
        length = torch.cat([prompt_P, length_S])
        return _layout(start[order], length[order], position[order], shared, group_cu.device)


def _layout(
    start: Tensor, length: Tensor, position: Tensor, shared: tuple[Tensor, ...], device: torch.device
) -> PackedLayout:
    """From segments in the buffer's order, and the (query start, length, key start, length) of shared prompts."""
    positions_T = torch.arange(int(length.sum())) - torch.repeat_interleave(start - position, length)
    own, with_prompt = (
        [x.to(device) for bucket in _buckets(*ranges) for x in _bucket_tensors(*bucket, positions_T)]
        for ranges in ((start, length, start, length), shared)
    )
    return PackedLayout(positions_T.to(device), own, with_prompt)


def _buckets(
    q_start: Tensor, q_length: Tensor, k_start: Tensor, k_length: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Group the ranges into buckets: at most 2x padding of queries and of keys, at most `_MAX_PAIRS`."""
    for similar in _length_classes(q_length, ((q_length > 0) & (k_length > 0)).nonzero().flatten()):
        for members in _length_classes(k_length, similar):
            L, M = int(q_length[members].max()), int(k_length[members].max())
            for part in members.split(max(1, _MAX_PAIRS // (L * M))):
                yield from _tiles(q_start[part], q_length[part], k_start[part], k_length[part], max(1, _MAX_PAIRS // M))


def _tiles(
    q_start: Tensor, q_length: Tensor, k_start: Tensor, k_length: Tensor, max_rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Cut a bucket's query ranges into tiles of `max_rows`; keys behind a tile's last query are left out."""
    for first in range(0, int(q_length.max()), max_rows):
        start, length = q_start + first, (q_length - first).clamp(0, max_rows)
        yield start, length, k_start, torch.minimum(k_length, start + length - k_start)


def _length_classes(length: Tensor, members: Tensor) -> Iterator[Tensor]:
    """Split members so that the longest of a class is at most twice as long as its shortest."""
    while members.numel():
        similar = 2 * length[members] >= length[members].max()
        yield members[similar]
        members = members[~similar]


def _bucket_tensors(
    q_start: Tensor, q_length: Tensor, k_start: Tensor, k_length: Tensor, positions_T: Tensor
) -> tuple[Tensor, ...]:
    """The fields of a `Bucket`."""
    q_index_BL, q_valid_BL = _padded_rows(q_start, q_length)
    k_index_BM, k_valid_BM = _padded_rows(k_start, k_length)
    return (
        q_index_BL,
        k_index_BM,
        positions_T[q_index_BL].masked_fill(~q_valid_BL, -1).int(),
        positions_T[k_index_BM].masked_fill(~k_valid_BM, _NEVER).int(),
        q_valid_BL.flatten().nonzero().flatten(),
        k_valid_BM.flatten().nonzero().flatten(),
    )


def _padded_rows(start_B: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Rows start..start + length of each range, the last one repeated as padding; and what is no padding."""
    step_L = torch.arange(int(length_B.max()))
    valid_BL = step_L < length_B[:, None]
    return start_B[:, None] + torch.minimum(step_L, length_B[:, None] - 1), valid_BL


def _host_offsets(name: str, cu: Tensor) -> Tensor:
    """int64 offsets on the host (one synchronisation for a GPU tensor), or `ValueError`."""
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() == 0:
        raise ValueError(f"{name} must be int32 offsets [n + 1]; got {cu.dtype} {tuple(cu.shape)}")
    host = cu.cpu().long()
    if int(host[0]) != 0 or bool((host[1:] < host[:-1]).any()):
        raise ValueError(f"{name} must start at 0 and never decrease; got {host.tolist()}")
    return host


def _host_lengths(name: str, length: Tensor) -> Tensor:
    """int64 lengths on the host, or `ValueError`."""
    if length.dtype not in (torch.int32, torch.int64) or length.dim() != 1:
        raise ValueError(f"{name} must be int32 or int64 [n]; got {length.dtype} {tuple(length.shape)}")
    host = length.cpu().long()
    if bool((host < 0).any()):
        raise ValueError(f"{name} must be at least 0; got {host.tolist()}")
    return host
