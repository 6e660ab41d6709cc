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

from dsm_train.packing.cost import Cost, cut_evenly, fewest_parts, token_cost
from dsm_train.types import Sequences, offsets, spans
from triton_kernels import PackedLayout


@dataclass(frozen=True)
class States:
    """Map of loss rows to the hidden states that predict them.

    A prompt's last state predicts the first token of all its responses.
    """

    state_T: Tensor
    """Index into N."""
    order_T: Tensor
    """Loss rows sorted by their state."""
    state_U: Tensor
    """States that predict a row."""
    count_U: Tensor
    """Number of rows that each of them predicts."""

    @staticmethod
    def of(state_T: Tensor, device: torch.device) -> States:
        """Build from indices on the CPU."""
        order_T = torch.argsort(state_T, stable=True)
        state_U, count_U = torch.unique_consecutive(state_T[order_T], return_counts=True)
        return States(*(x.to(device) for x in (state_T, order_T, state_U, count_U)))

    def gather(self, hidden_ND: Tensor) -> Tensor:
        """Gather [T, D]. The backward pass adds a state's rows in their order, in fp32 at least, and rounds once."""
        return _Gather.apply(hidden_ND, self)


class _Gather(torch.autograd.Function):
    """Gather whose gradient is summed in a fixed order.

    A state may predict several rows: index_select would add their gradients with atomics, in no fixed order, and
    indexing would round after every addition.
    """

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
    """Layout of attention: which tokens see each other."""
    states: States
    """States that predict the loss rows."""
    target_T: Tensor
    """Token that each loss row predicts."""
    response_cu: Tensor
    """Offsets of the responses in loss rows [S + 1], int32."""
    row_T: Tensor
    """Index of each loss row among the response tokens of the whole batch, on the CPU."""

    @staticmethod
    def of(sequences: Sequences, first_row: int, device: torch.device) -> MicroBatch:
        """Pack all of the sequences; their first response token is row `first_row` of the whole batch."""
        prompt_of_S, length_S = sequences.prompt_of_response_S, sequences.response_cu.diff().long()
        tokens, first_P = token_cost(sequences), sequences.group_cu[:-1].long()
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


def _layout(tokens: Cost, prompt_of_S: Tensor, device: torch.device) -> PackedLayout:
    """Build the attention layout: a group of one response is an ordinary sequence; an empty buffer gets one token."""
    alone_P = tokens.group_cu.diff() == 1
    prompt_P = torch.where(alone_P, 0, tokens.prompt_P)
    response_S = tokens.own_S + (tokens.prompt_P - prompt_P)[prompt_of_S]
    if not tokens.total:
        prompt_P, response_S, group_cu = torch.tensor([1]), torch.tensor([], dtype=torch.int64), offsets([0])
    else:
        group_cu = tokens.group_cu
    return PackedLayout.from_groups(prompt_P, response_S, group_cu, device=device)


def pack(
    sequences: Sequences, max_tokens: int, device: torch.device, *, cost: Cost | None = None, multiple: int = 1
) -> list[MicroBatch]:
    """Pack all responses, in order, into micro-batches of at most `max_tokens` tokens; groups share their prompt.

    As few micro-batches as the budget allows, at least one, rounded up to a multiple of `multiple`, cut so that the
    largest cost is the least possible (`cost` as `estimated_cost` gives it; tokens by default). A micro-batch without
    responses keeps this rank's collectives in step. Raises `ValueError` when one sequence alone is longer.
    """
    tokens = token_cost(sequences)
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
    """Give each response a prompt of its own: groups of one."""
    prompt_of_S = sequences.prompt_of_response_S
    length_S = sequences.prompt_cu.diff()[prompt_of_S]
    return replace(
        sequences,
        prompt_token=sequences.prompt_token[spans(sequences.prompt_cu[prompt_of_S], length_S)],
        prompt_cu=offsets(length_S.tolist()),
        group_cu=torch.arange(sequences.num_responses + 1, dtype=torch.int32),
    )


def sequence_lengths(sequences: Sequences) -> Tensor:
    """Count the packed tokens of each sequence alone [S]: its prompt, and its response less the last token."""
    tokens = token_cost(sequences)
    return tokens.own_S + tokens.prompt_P[sequences.prompt_of_response_S]
