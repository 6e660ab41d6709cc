"""Rewards: pure functions from a response's text to a number."""

from __future__ import annotations

from dsm_train.rewards.config import RewardConfig
from dsm_train.rewards.format import format_reward
from dsm_train.rewards.numeric import extract_number, numeric_reward, parse_number

__all__ = ["RewardConfig", "extract_number", "format_reward", "numeric_reward", "parse_number", "reward"]


def reward(response: str, answer: str, config: RewardConfig) -> float:
    """The weighted sum of the parts that `config` asks for, each 0.0 or 1.0."""
    total = 0.0
    if config.numeric:
        total += config.numeric * numeric_reward(response, answer)
    if config.format:
        total += config.format * format_reward(response)
    return total
