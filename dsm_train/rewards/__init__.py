"""Rewards: pure functions from a response's text to a number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsm_train.rewards.format import format_reward
from dsm_train.rewards.numeric import extract_number, numeric_reward, parse_number

__all__ = ["RewardConfig", "extract_number", "format_reward", "numeric_reward", "parse_number", "reward"]


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the parts that make up a response's reward."""

    numeric: float = 1.0
    """Weight of stating the gold answer, exactly."""
    format: float = 0.0
    """Weight of ending in one line "#### number" that states the answer for the only time."""

    def __post_init__(self) -> None:
        """Refuse weights under which nothing can be learned."""
        for name, weight in (("numeric", self.numeric), ("format", self.format)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"reward.{name} must be a finite weight of at least 0, got {weight}")
        if self.numeric == self.format == 0:
            raise ValueError("rewards.numeric and rewards.format are both 0: raise one, or nothing can be learned")


def reward(response: str, answer: str, config: RewardConfig) -> float:
    """The weighted sum of the parts that `config` asks for, each 0.0 or 1.0."""
    total = 0.0
    if config.numeric:
        total += config.numeric * numeric_reward(response, answer)
    if config.format:
        total += config.format * format_reward(response)
    return total
