"""Table of the built-in rewards: the names that `rewards.functions` takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dsm_train.data.tasks import Task
from dsm_train.rewards.format import format_reward
from dsm_train.rewards.numeric import numeric_reward, parse_number

_DECIMAL_COMMA = re.compile(r"[0-9],[0-9]")


@dataclass(frozen=True, slots=True)
class BuiltInReward:
    """Row of the table."""

    judge: Callable[[str, Task], float | None]
    """Value of a completion of a task; None for no verdict. Pure, and quick for any text: it runs in the trainer."""
    unreadable: Callable[[Task], str | None] = lambda task: None
    """Reason why the gold answer of a task cannot be read; None where it can, or is not needed."""


def unreadable_number(task: Task) -> str | None:
    """Say why a task's gold answer is no number; None where it is one."""
    if not task.answer.strip():
        return "has no answer"
    if parse_number(task.answer) is not None:
        return None
    hint = ": write a decimal point; a comma separates thousands" if _DECIMAL_COMMA.search(task.answer) else ""
    return f"answer must be a number or end in '#### number', got {task.answer[-60:]!r}{hint}"


# A new reward takes a line here, its name in config.py's `BuiltIn`, and its function in a file beside this one.
BUILT_IN: dict[str, BuiltInReward] = {
    "numeric": BuiltInReward(lambda completion, task: numeric_reward(completion, task.answer), unreadable_number),
    "format": BuiltInReward(lambda completion, task: format_reward(completion)),
}
