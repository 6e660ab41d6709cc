"""Reward for the form of a response, whatever its answer."""

from __future__ import annotations

import re

from dsm_train.rewards.numeric import UNSIGNED

ANSWER_LINE = rf"#### [-+]?\$?{UNSIGNED}(?:/[0-9]+)?"


def format_reward(response: str, pattern: str = ANSWER_LINE) -> float:
    """Reward 1.0 if the response's last line is its answer and states it for the only time, else 0.0.

    `pattern` is a regular expression that the last line must match whole and that must match nowhere else. Blank
    space at the end is allowed.
    """
    last_line = response.rstrip().rpartition("\n")[2]
    if re.fullmatch(pattern, last_line) is None:
        return 0.0
    return float(sum(1 for _ in re.finditer(pattern, response)) == 1)
