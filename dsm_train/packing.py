"""Sequences to packed micro-batches under a token budget, of costs as even as can be.

N packed tokens, T loss rows, S responses. Row t is the position whose hidden state predicts `target_T[t]`: the
shift by one between a token and its predictor is made here and nowhere else.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.types import Sequences, spans
from triton_kernels import PackedLayout


@dataclass(frozen=True)
class MicroBatch:
    """Whole sequences, packed; on the device of the model. An empty one holds one token, and no loss row."""

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


def pack(
    sequences: Sequences, max_tokens: int, device: torch.device, *, cost_S: Tensor | None = None, multiple: int = 1
) -> list[MicroBatch]:
    """Whole sequences, in order, in micro-batches of at most `max_tokens` tokens.

    As few as the budget allows, at least one, rounded up to a multiple of `multiple`, and cut where the largest cost is
    the least possible (`cost_S` as of `estimated_cost`; the tokens unless given). Those that get no sequence are empty:
    they keep this rank's collectives in step. Raises `ValueError` when one sequence alone is longer.
    """
    length_S = sequence_lengths(sequences)
    longest = int(length_S.max()) if length_S.numel() else 0
    if longest > max_tokens:
        raise ValueError(f"a sequence of {longest} tokens does not fit a micro-batch of run.max_tokens = {max_tokens}")
    fewest = max(1, len(_fill((_sums(length_S), max_tokens))) - 1)
    count = -(-fewest // multiple) * multiple
    cuts = cut_evenly(length_S if cost_S is None else cost_S, count, length_S, max_tokens)
    line = _Line.of(sequences, length_S)
    return [line.part(first, last, device) for first, last in pairwise(cuts)]


def sequence_lengths(sequences: Sequences) -> Tensor:
    """Packed tokens of each sequence [S]: prompt plus response, less the last token."""
    prompt_S = sequences.prompt_cu.diff()[sequences.prompt_of_response_S]
    return (prompt_S + sequences.response_cu.diff() - 1).clamp(min=0).long()


def estimated_cost(sequences: Sequences, model: ModelConfig, vocab_size: int) -> Tensor:
    """Floating-point operations that a training step spends on each sequence [S], int64.

    3 * (2 n W + 2 n^2 layers * heads * head_size + 2 r hidden * vocab_size), for n packed tokens, r loss rows and the W
    weights of all layers: two operations per weight and token, attention's two products halved by causality, and a
    backward pass of twice the forward (Narayanan et al., arXiv 2104.04473, appendix). The head sees loss rows alone.
    """
    heads, D, K = model.num_heads, model.hidden_size, model.kv_channels
    weights = model.num_layers * (2 * D * K * (heads + model.num_kv_heads) + 3 * D * model.ffn_size)
    n, r = sequence_lengths(sequences), sequences.response_cu.diff().long()
    return 6 * (n * weights + n * n * (model.num_layers * heads * K) + r * (D * vocab_size))


def cut_evenly(cost_S: Tensor, count: int, size_S: Tensor | None = None, max_size: int = 0) -> list[int]:
    """Cut a line into `count` consecutive parts whose largest cost is the least possible: boundaries [count + 1].

    Costs and sizes are integers from 0 on. `size_S`: no part is larger than `max_size`. A part may be empty. Bisection
    over the largest cost; one that parts can be filled up to is found by filling them. Raises `ValueError` when the
    sizes need more parts.
    """
    cost = _sums(cost_S)
    sizes = [] if size_S is None else [(_sums(size_S), max_size)]
    if size_S is not None and (max([0, *size_S.tolist()]) > max_size or len(_fill(*sizes)) - 1 > count):
        raise ValueError(f"{len(cost) - 1} sequences need more than {count} parts of at most {max_size} tokens")
    low, high = max([0, *cost_S.tolist()]), cost[-1]
    while low < high:
        middle = (low + high) // 2
        if len(_fill((cost, middle), *sizes)) - 1 <= count:
            high = middle
        else:
            low = middle + 1
    cuts = _fill((cost, high), *sizes)
    return cuts + cuts[-1:] * (count + 1 - len(cuts))


def _sums(value_S: Tensor) -> list[int]:
    """Sums of the first 0, 1, ... S values."""
    return [0, *accumulate(value_S.tolist())]


def _fill(*limits: tuple[list[int], int]) -> list[int]:
    """Boundaries of the fewest consecutive parts that keep all limits, each given with the sums of what it limits."""
    cuts, end = [0], len(limits[0][0]) - 1
    while cuts[-1] < end:
        cuts.append(min(bisect_right(sums, sums[cuts[-1]] + limit) for sums, limit in limits) - 1)
    return cuts


@dataclass(frozen=True)
class _Line:
    """All sequences packed after each other, to be cut into micro-batches; on the CPU."""

    token_N: Tensor
    cu_seqlens: Tensor
    state_T: Tensor
    target_T: Tensor
    response_cu: Tensor

    @staticmethod
    def of(sequences: Sequences, length_S: Tensor) -> _Line:
        prompt_S = sequences.prompt_of_response_S
        prompt_length_S = sequences.prompt_cu.diff()[prompt_S]
        response_length_S = sequences.response_cu.diff()
        # Of each sequence a span of the prompts' tokens and one of the responses', all but its last token.
        responses_begin = sequences.prompt_token.numel()
        start_S2 = torch.stack([sequences.prompt_cu[prompt_S], sequences.response_cu[:-1] + responses_begin], 1)
        kept_S = (response_length_S - 1).clamp(min=0)
        length_S2 = torch.stack([length_S - kept_S, kept_S], 1)
        tokens = torch.cat([sequences.prompt_token, sequences.response_token_T])
        end_S = length_S.cumsum(0)
        return _Line(
            token_N=tokens[spans(start_S2.flatten(), length_S2.flatten())],
            cu_seqlens=torch.cat([end_S.new_zeros(1), end_S]),
            state_T=spans(end_S - length_S + prompt_length_S - 1, response_length_S),
            target_T=sequences.response_token_T,
            response_cu=sequences.response_cu,
        )

    def part(self, first: int, last: int, device: torch.device) -> MicroBatch:
        """The sequences first..last - 1."""
        n, t = (slice(int(cu[first]), int(cu[last])) for cu in (self.cu_seqlens, self.response_cu))
        token_N, cu_seqlens = self.token_N[n], self.cu_seqlens[first : last + 1] - n.start
        if not token_N.numel():
            token_N, cu_seqlens = token_N.new_zeros(1), torch.tensor([0, 1])
        layout = PackedLayout.from_cu_seqlens(cu_seqlens.to(device, torch.int32))
        return MicroBatch(
            token_N=token_N.to(device),
            position_N=layout.positions_T,
            layout=layout,
            state_T=(self.state_T[t] - n.start).to(device),
            target_T=self.target_T[t].to(device),
            response_cu=(self.response_cu[first : last + 1] - t.start).to(device),
            row_T=torch.arange(t.start, t.stop),
        )
