"""Reward functions of one's own, to copy from: docs/rewards.md tells what they may do.

    python -m dsm_train grpo --config recipes/quickstart.yaml \
        'rewards.functions=[{name: numeric}, {call: my_rewards:length_penalty, weight: 0.1}]'
"""

from __future__ import annotations

from dsm_train.data.tasks import Task


def length_penalty(completions: list[str], tasks: list[Task]) -> list[float]:
    """Take 1 off for every 1000 characters."""
    return [-len(completion) / 1000 for completion in completions]


def right_choice(completions: list[str], tasks: list[Task]) -> list[float | None]:
    """Give 1 to a completion that ends in the right one of the row's choices; no verdict on a row without any."""
    values: list[float | None] = []
    for completion, task in zip(completions, tasks, strict=True):
        choices = task.fields.get("choices", [])
        named = [choice for choice in choices if completion.rstrip(" .\n").endswith(choice)]
        values.append(float(task.answer in named) if task.answer in choices else None)
    return values
