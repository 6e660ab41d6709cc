"""The data that flows through the trainer.

P prompts (groups), S responses, T response tokens of all responses, packed. All tensors are on the CPU; all `*_cu` are
int32 offsets, first 0, last the total.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def offsets(lengths: list[int]) -> Tensor:
    """Lengths to int32 offsets [n + 1]."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


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
        prompts = slice(int(self.prompt_cu[first]), int(self.prompt_cu[last]))
        part = Sequences(
            self.prompt_token[prompts],
            self.prompt_cu[first : last + 1] - prompts.start,
            self.response_token_T[span_T],
            self.response_cu[span_S.start : span_S.stop + 1] - span_T.start,
            self.group_cu[first : last + 1] - span_S.start,
        )
        return part, span_S, span_T

    def select(self, keep_S: Tensor) -> tuple[Sequences, Tensor]:
        """The sequences of some responses (mask [S]), and the mask [T] of their tokens; all prompts stay."""
        length_S = self.response_cu.diff().long()
        keep_T = keep_S.repeat_interleave(length_S)
        group_P = torch.zeros(self.num_prompts, dtype=torch.int64)
        group_P.index_add_(0, self.prompt_of_response_S, keep_S.long())
        part = Sequences(
            self.prompt_token,
            self.prompt_cu,
            self.response_token_T[keep_T],
            offsets(length_S[keep_S].tolist()),
            offsets(group_P.tolist()),
        )
        return part, keep_T

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
    def concatenate(parts: list[Rollouts]) -> Rollouts:
        """Freshly sampled rollouts of other prompts after each other, as one."""
        sequences = [part.sequences for part in parts]
        joined = Sequences(
            torch.cat([s.prompt_token for s in sequences]),
            offsets([n for s in sequences for n in s.prompt_cu.diff().tolist()]),
            torch.cat([s.response_token_T for s in sequences]),
            offsets([n for s in sequences for n in s.response_cu.diff().tolist()]),
            offsets([n for s in sequences for n in s.group_cu.diff().tolist()]),
        )
        return Rollouts(
            joined,
            torch.cat([part.prompt_id_P for part in parts]),
            torch.cat([part.rollout_logprob_T for part in parts]),
            torch.cat([part.finished_S for part in parts]),
            parts[0].weight_version,
        )

    def with_(self, **changes: Tensor) -> Rollouts:
        """A copy with some fields set."""
        return replace(self, **changes)
