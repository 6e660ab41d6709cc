"""Rewards: functions from completions and their tasks to numbers, and the grader that applies them."""

from __future__ import annotations

from dsm_train.rewards.config import RewardConfig, RewardFunction
from dsm_train.rewards.format import format_reward
from dsm_train.rewards.numeric import extract_number, numeric_reward, parse_number

__all__ = ["RewardConfig", "RewardFunction", "extract_number", "format_reward", "numeric_reward", "parse_number"]
