"""Sequences to packed micro-batches under a token budget.

N packed tokens of a micro-batch, T loss rows. Row t is the position whose hidden state predicts `target_T[t]`: the
shift by one between a token and its predictor is made here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsm_train.types import Sequences
from triton_kernels import PackedLayout


@dataclass(frozen=True)
class MicroBatch:
    """Whole sequences, packed; on the device of the model."""

    token_N: Tensor
    """Input tokens: every sequence without its last token, which predicts nothing."""
    position_N: Tensor
    """Position of each token in its sequence."""
    layout: PackedLayout
    """Which tokens see each other."""
    state_T: Tensor
    """Index into N of the state that predicts each loss row."""
    target_T: Tensor
    """The token that each loss row predicts."""
    response_cu: Tensor
    """Offsets of the responses in loss rows [S + 1], int32."""
    row_T: Tensor
    """Index of each loss row among the response tokens of the whole batch, on the CPU."""


def pack(sequences: Sequences, max_tokens: int, device: torch.device) -> list[MicroBatch]:
    """Fill micro-batches with whole sequences in order, at most `max_tokens` tokens each.

    Raises `ValueError` when one sequence alone is longer.
    """
    lengths = sequence_lengths(sequences)
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest > max_tokens:
        raise ValueError(f"a sequence of {longest} tokens does not fit a micro-batch of run.max_tokens = {max_tokens}")
    micro_batches, first, total = [], 0, 0
    for s, length in enumerate(lengths.tolist()):
        if total + length > max_tokens:
            micro_batches.append(_micro_batch(sequences, range(first, s), device))
            first, total = s, 0
        total += length
    if first < sequences.num_responses:
        micro_batches.append(_micro_batch(sequences, range(first, sequences.num_responses), device))
    return micro_batches


def sequence_lengths(sequences: Sequences) -> Tensor:
    """Packed tokens of each sequence [S]: prompt plus response, less the last token."""
    prompt_S = sequences.prompt_cu.diff()[sequences.prompt_of_response_S]
    return (prompt_S + sequences.response_cu.diff() - 1).clamp(min=0).long()


def _micro_batch(sequences: Sequences, members: range, device: torch.device) -> MicroBatch:
    prompt_of_S = sequences.prompt_of_response_S.tolist()
    tokens, states, start = [], [], 0
    for s in members:
        prompt, response = sequences.prompt(prompt_of_S[s]), sequences.response(s)
        tokens += [prompt, response[:-1]] if response.numel() else [prompt[:-1]]
        states.append(torch.arange(response.numel()) + (start + prompt.numel() - 1))
        start += prompt.numel() + max(response.numel() - 1, -1)
    span = slice(int(sequences.response_cu[members.start]), int(sequences.response_cu[members.stop]))
    lengths = sequence_lengths(sequences)[members.start : members.stop]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    layout = PackedLayout.from_cu_seqlens(cu_seqlens.to(device))
    return MicroBatch(
        token_N=torch.cat(tokens).to(device),
        position_N=layout.positions_T,
        layout=layout,
        state_T=torch.cat(states).to(device),
        target_T=sequences.response_token_T[span].to(device),
        response_cu=(sequences.response_cu[members.start : members.stop + 1] - span.start).to(device),
        row_T=torch.arange(span.start, span.stop),
    )
