"""Layouts, inputs and the dense oracle of packed attention's tests.

T packed tokens, H query heads, J key heads, K head size.
"""

from __future__ import annotations

import torch
from cases import offsets
from torch import Tensor

from triton_kernels import PackedLayout

Groups = list[tuple[int, list[int]]]

# Groups of 0, 1, 2 and 3 responses; lengths around a power of two; empty prompts and responses; empty groups.
GROUPS: Groups = [(5, [3, 0, 7]), (64, [1, 63]), (0, [4]), (9, []), (1, [65]), (2, [0, 0]), (0, [])]
SEQUENCES = [1, 64, 0, 63, 65, 5, 200, 1]
K, K_VALUE = 8, 6


def layout_of(sequences: list[int] | Groups, device: torch.device) -> PackedLayout:
    """Layout from the lengths of sequences, or of each group's prompt and responses."""
    groups = [x for x in sequences if isinstance(x, tuple)]
    if not groups:
        return PackedLayout.from_cu_seqlens(offsets([x for x in sequences if isinstance(x, int)], device))
    prompts = torch.tensor([prompt for prompt, _ in groups], device=device)
    responses = torch.tensor([length for _, lengths in groups for length in lengths], dtype=torch.int32, device=device)
    return PackedLayout.from_groups(prompts, responses, offsets([len(lengths) for _, lengths in groups], device))


def segments_of(sequences: list[int] | Groups) -> list[tuple[range, int, range]]:
    """(rows, position of the first, rows of the prompt) of each segment."""
    segments, row = [], 0
    for x in sequences:
        prompt, responses = x if isinstance(x, tuple) else (x, [])
        prompt_rows = range(row, row + prompt)
        segments.append((prompt_rows, 0, range(0)))
        row += prompt
        for response in responses:
            segments.append((range(row, row + response), prompt, prompt_rows))
            row += response
    return segments


def positions_of(sequences: list[int] | Groups) -> Tensor:
    """Position of each token."""
    return torch.tensor([at for rows, first, _ in segments_of(sequences) for at in range(first, first + len(rows))])


def dense(
    q_THK: Tensor, k: Tensor, v: Tensor, sequences: list[int] | Groups, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out, lse_TH) by a mask of T x T, set up segment by segment."""
    T, position_T = len(q_THK), positions_of(sequences).to(q_THK.device)
    visible_TT = torch.zeros(T, T, dtype=torch.bool, device=q_THK.device)
    for rows, _, prompt_rows in segments_of(sequences):
        for seen in (rows, prompt_rows):
            visible_TT[rows.start : rows.stop, seen.start : seen.stop] = True
    distance_TT = position_T[:, None] - position_T
    visible_TT &= (distance_TT >= 0) & (distance_TT < (window or T + 1))
    k, v = (x.repeat_interleave(q_THK.shape[1] // k.shape[1], 1) for x in (k, v))
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k) * scale
    scores_HTT = scores_HTT.masked_fill(~visible_TT, -torch.inf)
    return torch.einsum("hts,shk->thk", scores_HTT.softmax(-1), v), scores_HTT.logsumexp(-1).T


def make(
    T: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device, size: int = K, value_size: int = K_VALUE
) -> list[Tensor]:
    """[q, k, v] that require gradients; q is not contiguous."""
    generator = torch.Generator().manual_seed(T)
    H, J = heads
    q_THK = torch.randn(H, T, size, generator=generator).transpose(0, 1)
    k, v = torch.randn(T, J, size, generator=generator), torch.randn(T, J, value_size, generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (q_THK, k, v)]


def gradients(inputs: list[Tensor], out: Tensor, lse_TH: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of both outputs."""
    weights = [
        torch.linspace(-1, 2, x.numel(), device=x.device, dtype=torch.float64).view(x.shape) for x in (out, lse_TH)
    ]
    return torch.autograd.grad((out * weights[0]).sum() + (lse_TH * weights[1]).sum(), inputs)
