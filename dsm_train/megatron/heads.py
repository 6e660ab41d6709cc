"""The head of a model: which one it is built with, and what a loss sees of it.

T loss rows, D hidden, V vocabulary (this rank's shard).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dsm_train.config import ModelConfig
from dsm_train.hf.architectures import HeadKind


@dataclass(frozen=True)
class HeadSpec:
    """The head that a model is built with."""

    vocab_size: int
    """Tokens: rows of the embedding and of a language head, both padded when they are built."""
    kind: HeadKind = "language"
    """language: a row per token, split over tensor-parallel ranks. value: one row, whole on every rank."""

    @classmethod
    def of(cls, model: ModelConfig, kind: HeadKind = "language") -> HeadSpec:
        """Specify the head of a model whose vocabulary is known: a stage's preparation fills it from the tokenizer."""
        assert model.vocab_size is not None
        return cls(model.vocab_size, kind)


@dataclass(frozen=True)
class LanguageHead:
    """States that predict the loss rows, and the output head over the vocabulary."""

    hidden_TD: Tensor
    weight_VD: Tensor
    """This rank's rows, without those that pad the vocabulary; a rank that holds padding alone has none."""
    tp_group: ProcessGroup | None
    """Ranks that share the vocabulary; None: this rank has all of it."""
    reduce_dx: bool
    """Let the loss op sum the hidden states' gradient over the ranks; sequence parallelism sums it afterwards."""
    workspace_bytes: int | None
    """Memory that the logits of a chunk may take; None: the op's default."""


@dataclass(frozen=True)
class ValueHead:
    """States at the loss rows, and one row that turns each into a value."""

    hidden_TD: Tensor
    weight_1D: Tensor

    @property
    def value_T(self) -> Tensor:
        """Value of each loss row, fp32 and differentiable."""
        return F.linear(self.hidden_TD.float(), self.weight_1D.float()).squeeze(1)


Head = LanguageHead | ValueHead


class ValueLayer(torch.nn.Module):
    """The one row of a value head, in the place of Megatron's output layer."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))
