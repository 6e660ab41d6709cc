"""The packer of a run: sequences to micro-batches in this layout, under a token budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsm_train.config import ModelConfig, ParallelConfig
from dsm_train.packing.cost import Cost, estimated_cost
from dsm_train.packing.microbatch import MicroBatch, pack, repeat_prompts
from dsm_train.types import Sequences


@dataclass(frozen=True)
class Packer:
    """Packs a replica's sequences for a model in its layout."""

    model: ModelConfig
    vocab_size: int
    parallel: ParallelConfig
    device: torch.device
    max_tokens: int
    """Token budget of a micro-batch."""
    share_prompts: bool = True
    """Store the prompt of a group once in a micro-batch, not once per response."""

    def pack(self, sequences: Sequences) -> list[MicroBatch]:
        """Cut into micro-batches of even cost, in a number that the pipeline's schedule takes."""
        # The interleaved schedule works in rounds of as many micro-batches as there are pipeline ranks.
        rounds = self.parallel.pp if self.parallel.vpp > 1 else 1
        grouped, cost = self._grouped(sequences), self.cost(sequences)
        return pack(grouped, self.max_tokens, self.device, cost=cost, multiple=rounds)

    def cost(self, sequences: Sequences) -> Cost:
        """Estimate the cost of a training step on the sequences."""
        return estimated_cost(self._grouped(sequences), self.model, self.vocab_size)

    def _grouped(self, sequences: Sequences) -> Sequences:
        return sequences if self.share_prompts else repeat_prompts(sequences)
