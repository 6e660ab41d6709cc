"""The data that flows through the trainer.

P prompts (groups), S responses, T response tokens of all responses, packed. All tensors are on the CPU; all `*_cu` are
int32 offsets, first 0, last the total.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

PER_P, PER_S, PER_T = {"axis": "P"}, {"axis": "S"}, {"axis": "T"}
"""Metadata of a dataclass's field: it holds a value per prompt, per response or per response token."""
RecordT = TypeVar("RecordT")


def take_along(record: RecordT, index: Mapping[str, Tensor]) -> dict[str, Any]:
    """Index every field of a dataclass along the axis that it declares; absent fields stay absent."""
    declared = {f.name: f.metadata["axis"] for f in fields(record) if "axis" in f.metadata}  # type: ignore[arg-type]
    values = {name: (getattr(record, name), index[axis]) for name, axis in declared.items()}
    return {name: None if value is None else value[rows] for name, (value, rows) in values.items()}


def offsets(lengths: list[int]) -> Tensor:
    """Turn lengths into int32 offsets [n + 1]."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def spans(start: Tensor, length: Tensor) -> Tensor:
    """Concatenate the index ranges start[i] .. start[i] + length[i] - 1, int64."""
    start, length = start.long(), length.long()
    before = length.cumsum(0) - length
    return torch.arange(int(length.sum())) + (start - before).repeat_interleave(length)


def _joined(offsets: Sequence[Tensor]) -> Tensor:
    """Concatenate the segments that the offsets of several parts describe."""
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
        """Build from token lists; response i belongs to prompt i // group_size."""
        return Sequences(
            torch.tensor([t for p in prompts for t in p], dtype=torch.int64),
            offsets([len(p) for p in prompts]),
            torch.tensor([t for r in responses for t in r], dtype=torch.int64),
            offsets([len(r) for r in responses]),
            torch.arange(0, len(responses) + 1, group_size, dtype=torch.int32),
        )

    @property
    def num_responses(self) -> int:
        """Number of responses, S."""
        return self.response_cu.numel() - 1

    @property
    def num_prompts(self) -> int:
        """Number of prompts, P."""
        return self.prompt_cu.numel() - 1

    @property
    def prompt_of_response_S(self) -> Tensor:
        """Prompt index of each response."""
        return torch.repeat_interleave(torch.arange(self.num_prompts), self.group_cu.diff().long())

    def take(self, index_S: Tensor) -> Sequences:
        """Select these responses, in this order; consecutive ones of a prompt are a group that shares it.

        Prompts without a response are left out. The rows of the selected tokens: `rows_of`; the prompts: `prompts_of`.
        """
        prompt_S = self.prompt_of_response_S[index_S]
        group_P, size_P = torch.unique_consecutive(prompt_S, return_counts=True)
        length_P = self.prompt_cu.diff()[group_P]
        return Sequences(
            self.prompt_token[spans(self.prompt_cu[group_P], length_P)],
            offsets(length_P.tolist()),
            self.response_token_T[self.rows_of(index_S)],
            offsets(self.response_cu.diff()[index_S].tolist()),
            offsets(size_P.tolist()),
        )

    def rows_of(self, index_S: Tensor) -> Tensor:
        """Index the T tokens by these responses, in this order."""
        return spans(self.response_cu[index_S], self.response_cu.diff()[index_S])

    def prompts_of(self, index_S: Tensor) -> Tensor:
        """Index the P prompts by the groups that `take` makes of these responses."""
        return torch.unique_consecutive(self.prompt_of_response_S[index_S])

    def responses_of(self, index_P: Tensor) -> Tensor:
        """Index the S responses by these groups, in this order."""
        return spans(self.group_cu[index_P], self.group_cu.diff()[index_P])

    @staticmethod
    def concatenate(parts: Sequence[Sequences]) -> Sequences:
        """Concatenate sequences; each part keeps prompts of its own."""
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
    """Question as an engine takes it."""

    id: int
    """Stable number of the task; part of the counter of the random numbers."""
    token: list[int]
    """Its tokens."""
    occurrence: int = 0
    """Times that the exploration stage drew this task before, over all replicas; part of the counter as well."""


@dataclass(frozen=True)
class Rollouts:
    """Responses sampled in one exploration stage, with what was computed about them since."""

    sequences: Sequences
    prompt_id_P: Tensor = field(metadata=PER_P)
    """Task number of each prompt."""
    rollout_logprob_T: Tensor = field(metadata=PER_T)
    """Log-probability of each token when it was sampled: full vocabulary, at the sampling temperature."""
    margin_T: Tensor = field(metadata=PER_T)
    """Distance of each choice from another token, fp32: the decision margin of rollout/sampling.py."""
    finished_S: Tensor = field(metadata=PER_S)
    """True where a stop token ended the response, False where the length limit did."""
    weight_version: int
    """Optimizer steps that the sampling weights had seen."""
    reward_S: Tensor | None = field(default=None, metadata=PER_S)
    """Reward of each response, NaN where there is no verdict; None until graded."""
    reward_SF: Tensor | None = field(default=None, metadata=PER_S)
    """Value that each of F reward functions gave, NaN where it gave none; None until graded."""
    ref_logprob_T: Tensor | None = field(default=None, metadata=PER_T)
    """Log-probabilities under the reference model; None until computed, or when kl_coef is 0."""
    old_logprob_T: Tensor | None = field(default=None, metadata=PER_T)
    """The trainer's log-probabilities before the update; None when the update is on-policy."""

    def take(self, index_S: Tensor) -> Rollouts:
        """Select these responses, in this order, with every field along its axis; see `Sequences.take`."""
        sequences = self.sequences
        index = {"P": sequences.prompts_of(index_S), "S": index_S, "T": sequences.rows_of(index_S)}
        return Rollouts(sequences.take(index_S), weight_version=self.weight_version, **take_along(self, index))

    @staticmethod
    def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
        """Concatenate rollouts of the same weights; a field that some part lacks is absent."""
        tensors: dict[str, Any] = {}
        for name in (f.name for f in fields(Rollouts) if "axis" in f.metadata):
            values = [getattr(part, name) for part in parts]
            tensors[name] = None if any(value is None for value in values) else torch.cat(values)
        sequences = Sequences.concatenate([part.sequences for part in parts])
        return Rollouts(sequences, weight_version=parts[0].weight_version, **tensors)
