"""The data that flows through the trainer.

P prompts (groups), S responses, T response tokens of all responses, packed. All tensors are on the CPU; all `*_cu` are
int32 offsets, first 0, last the total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


def offsets(lengths: list[int]) -> Tensor:
    """Lengths to int32 offsets [n + 1]."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def spans(start: Tensor, length: Tensor) -> Tensor:
    """Indices of spans after each other: start[i], ..., start[i] + length[i] - 1 for every i; int64."""
    start, length = start.long(), length.long()
    before = length.cumsum(0) - length
    return torch.arange(int(length.sum())) + (start - before).repeat_interleave(length)


def _joined(offsets: Sequence[Tensor]) -> Tensor:
    """Offsets of parts to those of all of them after each other."""
    lengths = torch.cat([cu.diff() for cu in offsets])
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


@dataclass(frozen=True)
class Sequences:
    """S sequences [prompt | response]; the responses of a group share its prompt."""

    prompt_token: Tensor
    """Tokens of all P prompts, packed, int64."""
    prompt_cu: Tensor
    """Offsets of the prompts [P + 1]."""
    response_token_T: Tensor
    """Tokens of all responses, packed, int64; a stop token that was sampled is the last of its response."""
    response_cu: Tensor
    """Offsets of the responses [S + 1]."""
    group_cu: Tensor
    """Offsets of the groups, in responses [P + 1]."""

    @staticmethod
    def from_lists(prompts: list[list[int]], responses: list[list[int]], group_size: int = 1) -> Sequences:
        """From token lists; response i belongs to prompt i // group_size."""
        return Sequences(
            torch.tensor([t for p in prompts for t in p], dtype=torch.int64),
            offsets([len(p) for p in prompts]),
            torch.tensor([t for r in responses for t in r], dtype=torch.int64),
            offsets([len(r) for r in responses]),
            torch.arange(0, len(responses) + 1, group_size, dtype=torch.int32),
        )

    @property
    def num_responses(self) -> int:
        """S."""
        return self.response_cu.numel() - 1

    @property
    def num_prompts(self) -> int:
        """P."""
        return self.prompt_cu.numel() - 1

    @property
    def prompt_of_response_S(self) -> Tensor:
        """Prompt index of each response."""
        return torch.repeat_interleave(torch.arange(self.num_prompts), self.group_cu.diff().long())

    def groups(self, first: int, last: int) -> tuple[Sequences, slice, slice]:
        """Groups first..last - 1 as sequences of their own, and their responses and tokens as slices of all."""
        span_S = slice(int(self.group_cu[first]), int(self.group_cu[last]))
        span_T = slice(int(self.response_cu[span_S.start]), int(self.response_cu[span_S.stop]))
        return self.take(torch.arange(span_S.start, span_S.stop)), span_S, span_T

    def take(self, index_S: Tensor) -> Sequences:
        """The responses of these numbers, in this order; consecutive ones of a prompt are a group that shares it.

        Prompts without a response are left out. Their tokens' rows: `rows_of`.
        """
        group_P, size_P = torch.unique_consecutive(self.prompt_of_response_S[index_S], return_counts=True)
        length_P = self.prompt_cu.diff()[group_P]
        return Sequences(
            self.prompt_token[spans(self.prompt_cu[group_P], length_P)],
            offsets(length_P.tolist()),
            self.response_token_T[self.rows_of(index_S)],
            offsets(self.response_cu.diff()[index_S].tolist()),
            offsets(size_P.tolist()),
        )

    def rows_of(self, index_S: Tensor) -> Tensor:
        """Where the tokens of these responses are among the T, in this order."""
        return spans(self.response_cu[index_S], self.response_cu.diff()[index_S])

    @staticmethod
    def concatenate(parts: Sequence[Sequences]) -> Sequences:
        """Sequences after each other, each part with prompts of its own."""
        return Sequences(
            torch.cat([part.prompt_token for part in parts]),
            _joined([part.prompt_cu for part in parts]),
            torch.cat([part.response_token_T for part in parts]),
            _joined([part.response_cu for part in parts]),
            _joined([part.group_cu for part in parts]),
        )

    def prompt(self, p: int) -> Tensor:
        """Tokens of prompt p."""
        return self.prompt_token[self.prompt_cu[p] : self.prompt_cu[p + 1]]

    def response(self, s: int) -> Tensor:
        """Tokens of response s."""
        return self.response_token_T[self.response_cu[s] : self.response_cu[s + 1]]


@dataclass(frozen=True)
class Prompt:
    """A question as the engine takes it."""

    id: int
    """Stable number of the task; part of the counter of the random numbers."""
    token: list[int]
    """Its tokens."""


@dataclass(frozen=True)
class Rollouts:
    """What one exploration stage sampled, and what was learnt about it since."""

    sequences: Sequences
    prompt_id_P: Tensor
    """Task number of each prompt."""
    rollout_logprob_T: Tensor
    """Log-probability of each token when it was sampled: full vocabulary, at the sampling temperature."""
    margin_T: Tensor
    """How far each choice was from another token, fp32: the decision margin of rollout/sampling.py."""
    finished_S: Tensor
    """True where a stop token ended the response, False where the length limit did."""
    weight_version: int
    """Optimizer steps that the sampling weights had seen."""
    reward_S: Tensor = field(default_factory=lambda: torch.empty(0))
    """Reward per response; empty until scored."""
    ref_logprob_T: Tensor | None = None
    """Log-probabilities under the reference model; None until computed, or when kl_coef is 0."""
    old_logprob_T: Tensor | None = None
    """The trainer's log-probabilities before the update; None when the update is on-policy."""

    @staticmethod
    def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
        """Rollouts of the same weights after each other; log-probabilities that a part lacks are absent."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        sequences = Sequences.concatenate([part.sequences for part in parts])
        tensors = [f.name for f in fields(Rollouts) if f.name not in ("sequences", "weight_version")]
        return Rollouts(
            sequences=sequences, weight_version=parts[0].weight_version, **{name: joined(name) for name in tensors}
        )

    def with_(self, **changes: Tensor) -> Rollouts:
        """A copy with some fields set."""
        return replace(self, **changes)
