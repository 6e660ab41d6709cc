"""Sequences to packed micro-batches under a token budget, of costs as even as can be.

A micro-batch holds consecutive responses, and the prompt of each of their groups once: [prompt | response | ...]. A
group that is cut between micro-batches has its prompt in each.

N packed tokens, T loss rows, S responses, P prompts (groups), U states that predict something, D hidden. Row t is the
position whose hidden state predicts `target_T[t]`: the shift by one between a token and its predictor is made here and
nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsm_train.packing.cost import Load, cut_evenly, fewest_parts, token_load
from dsm_train.types import Sequences, offsets, spans
from triton_kernels import PackedLayout


@dataclass(frozen=True)
class States:
    """Which hidden state predicts each loss row: a prompt's last one predicts the first token of all its responses."""

    state_T: Tensor
    """Index into N."""
    order_T: Tensor
    """The loss rows sorted by their state."""
    state_U: Tensor
    """The states that predict a row."""
    count_U: Tensor
    """How many each of them predicts."""

    @staticmethod
    def of(state_T: Tensor, device: torch.device) -> States:
        """From indices on the CPU."""
        order_T = torch.argsort(state_T, stable=True)
        state_U, count_U = torch.unique_consecutive(state_T[order_T], return_counts=True)
        return States(*(x.to(device) for x in (state_T, order_T, state_U, count_U)))

    def gather(self, hidden_ND: Tensor) -> Tensor:
        """[T, D]. Backwards, a state's rows are added in their order, in fp32 at least, and rounded once."""
        return _Gather.apply(hidden_ND, self)


class _Gather(torch.autograd.Function):
    """Of rows taken twice, index_select sums the gradient by atomics on a GPU, and indexing rounds at each sum."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, states: States) -> Tensor:
        ctx.states, ctx.num_tokens = states, len(hidden_ND)
        return hidden_ND.index_select(0, states.state_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        states = ctx.states
        rows_TD = grad_TD.index_select(0, states.order_T).to(torch.promote_types(grad_TD.dtype, torch.float32))
        sum_UD = torch.segment_reduce(rows_TD, "sum", lengths=states.count_U, unsafe=True)  # unsafe: no check, no wait
        grad_ND = grad_TD.new_zeros(ctx.num_tokens, grad_TD.shape[1])
        return grad_ND.index_copy_(0, states.state_U, sum_UD.to(grad_TD.dtype)), None


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive responses with their prompts, packed; on the device of the model.

    An empty one holds one token, and no loss row.
    """

    token_N: Tensor
    """Input tokens: prompts, and every response without its last token, which predicts nothing."""
    position_N: Tensor
    """Position of each token in its sequence."""
    layout: PackedLayout
    """Which tokens see each other."""
    states: States
    """The states that predict the loss rows."""
    target_T: Tensor
    """The token that each loss row predicts."""
    response_cu: Tensor
    """Offsets of the responses in loss rows [S + 1], int32."""
    row_T: Tensor
    """Index of each loss row among the response tokens of the whole batch, on the CPU."""

    @staticmethod
    def of(sequences: Sequences, first_row: int, device: torch.device) -> MicroBatch:
        """All of the sequences, the first of whose tokens is that of number `first_row` in the whole batch."""
        prompt_of_S, length_S = sequences.prompt_of_response_S, sequences.response_cu.diff().long()
        tokens, first_P = token_load(sequences), sequences.group_cu[:-1].long()
        # Before each response, if it is the first of its group, the prompt; then the response.
        prompt_S = torch.zeros_like(length_S).index_copy(0, first_P, tokens.prompt_P)
        responses_begin = sequences.prompt_token.numel()
        start_S2 = torch.stack([sequences.prompt_cu[prompt_of_S], sequences.response_cu[:-1] + responses_begin], 1)
        length_S2 = torch.stack([prompt_S, tokens.own_S], 1)
        index_N = spans(start_S2.flatten(), length_S2.flatten())
        token_N = torch.cat([sequences.prompt_token, sequences.response_token_T])[index_N]
        begin_S = length_S2.flatten().cumsum(0).view(-1, 2)[:, 0]
        # A token is predicted by the one before it; a response's first token by the prompt's last, wherever that is.
        state_T = spans(begin_S - 1, length_S)
        state_T[sequences.response_cu[:-1][length_S > 0]] = (begin_S[first_P] - 1)[prompt_of_S][length_S > 0]
        layout = _layout(tokens, prompt_of_S, device)
        return MicroBatch(
            token_N=(token_N if token_N.numel() else token_N.new_zeros(1)).to(device),
            position_N=layout.positions_T,
            layout=layout,
            states=States.of(state_T, device),
            target_T=sequences.response_token_T.to(device),
            response_cu=sequences.response_cu.to(device),
            row_T=torch.arange(first_row, first_row + len(state_T)),
        )


def _layout(tokens: Load, prompt_of_S: Tensor, device: torch.device) -> PackedLayout:
    """A group of one response is a sequence like any other; an empty buffer gets one token."""
    alone_P = tokens.group_cu.diff() == 1
    prompt_P = torch.where(alone_P, 0, tokens.prompt_P)
    response_S = tokens.own_S + (tokens.prompt_P - prompt_P)[prompt_of_S]
    if not tokens.total:
        prompt_P, response_S, group_cu = torch.tensor([1]), torch.tensor([], dtype=torch.int64), offsets([0])
    else:
        group_cu = tokens.group_cu
    return PackedLayout.from_groups(prompt_P, response_S, group_cu, device=device)


def pack(
    sequences: Sequences, max_tokens: int, device: torch.device, *, cost: Load | None = None, multiple: int = 1
) -> list[MicroBatch]:
    """All responses, in order, in micro-batches of at most `max_tokens` tokens; prompts are shared within groups.

    As few as the budget allows, at least one, rounded up to a multiple of `multiple`, and cut where the largest cost is
    the least possible (`cost` as of `estimated_cost`; the tokens unless given). Those that get no response are empty:
    they keep this rank's collectives in step. Raises `ValueError` when one sequence alone is longer.
    """
    tokens = token_load(sequences)
    if tokens.largest > max_tokens:
        raise ValueError(
            f"a sequence of {tokens.largest} tokens does not fit a micro-batch of run.max_tokens = {max_tokens}"
        )
    count = -(-max(1, fewest_parts(tokens, max_tokens)) // multiple) * multiple
    cuts = cut_evenly(cost or tokens, count, tokens, max_tokens)
    return [
        MicroBatch.of(sequences.take(torch.arange(first, last)), int(sequences.response_cu[first]), device)
        for first, last in pairwise(cuts)
    ]


def repeat_prompts(sequences: Sequences) -> Sequences:
    """The same responses, each with a prompt of its own: groups of one."""
    prompt_of_S = sequences.prompt_of_response_S
    length_S = sequences.prompt_cu.diff()[prompt_of_S]
    return replace(
        sequences,
        prompt_token=sequences.prompt_token[spans(sequences.prompt_cu[prompt_of_S], length_S)],
        prompt_cu=offsets(length_S.tolist()),
        group_cu=torch.arange(sequences.num_responses + 1, dtype=torch.int32),
    )


def sequence_lengths(sequences: Sequences) -> Tensor:
    """Tokens of each sequence [S] on its own: its prompt, and its response less the last token."""
    tokens = token_load(sequences)
    return tokens.own_S + tokens.prompt_P[sequences.prompt_of_response_S]
