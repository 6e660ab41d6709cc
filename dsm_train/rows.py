"""Loss rows: what a loss needs to know of each response token.

T loss rows (response tokens), S responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from dsm_train.types import PER_T, take_along


@dataclass(frozen=True)
class Rows:
    """Inputs of the policy loss, packed like `Sequences.response_token_T`; on the CPU."""

    weight_T: Tensor = field(metadata=PER_T)
    """Weight of the token in the loss, normalised over the optimizer step; 0: absent."""
    advantage_T: Tensor = field(metadata=PER_T)
    """Advantage of the token."""
    old_logprob_T: Tensor | None = field(default=None, metadata=PER_T)
    """Log-probability before the update; None: the update is on-policy."""
    ref_logprob_T: Tensor | None = field(default=None, metadata=PER_T)
    """Log-probability under the reference model; None when kl_coef is 0."""

    def take(self, row_T: Tensor) -> Rows:
        """Select these rows, in this order."""
        return Rows(**take_along(self, {"T": row_T}))

    def to(self, device: torch.device) -> Rows:
        """Move every field to a device."""
        return Rows(**{name: value.to(device) for name, value in self.present().items()})

    def present(self) -> dict[str, Tensor]:
        """List the fields that are not None, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Concatenate rows; all parts have the same log-probabilities."""
        return Rows(**{name: torch.cat([part.present()[name] for part in parts]) for name in parts[0].present()})
