"""Rewards: pure functions from a response's text to a number, and the grader that applies them."""

from __future__ import annotations

from dsm_train.rewards.config import RewardConfig
from dsm_train.rewards.format import format_reward
from dsm_train.rewards.numeric import extract_number, numeric_reward, parse_number

__all__ = ["RewardConfig", "extract_number", "format_reward", "numeric_reward", "parse_number"]
