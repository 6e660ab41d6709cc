"""Protocol of a rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dsm_train.megatron.step import Model
from dsm_train.rollout.config import SamplingConfig
from dsm_train.types import Prompt, Rollouts


class RolloutEngine(Protocol):
    """Engine that samples responses with the policy's current weights."""

    def sync(self, model: Model) -> None:
        """Take over the model's weights. Collective."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...

    def generate(self, prompts: Sequence[Prompt], num_samples: int, sampling: SamplingConfig, *, step: int) -> Rollouts:
        """Sample `num_samples` responses to each prompt.

        The random number of a token is a function of (engine's seed, step, prompt id, occurrence of the prompt, sample
        index, position): the same arguments and weights give the same responses.
        """
        ...
