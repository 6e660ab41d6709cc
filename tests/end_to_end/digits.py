"""Reward function of a user's that gives groups a spread from the first step on."""

from __future__ import annotations


def digits(completions: list[str], tasks: list[object]) -> list[float]:
    """Count the digits of each response."""
    return [float(sum(character.isdigit() for character in text)) for text in completions]
