"""Linear growth of work with its input, tested without a limit in seconds that a busy machine could exceed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TypeVar

Input = TypeVar("Input")
TIMES = 8
"""How much larger the large input is: linear work takes 8 times as long, quadratic work 64 times."""
_TRIES = 5


def is_linear(work: Callable[[Input], object], small: Input, large: Input) -> bool:
    """True if `work` takes less than 24 times as long on `large`, which is TIMES as large as `small`.

    The shortest of up to five runs of each counts: CPU time is only ever lengthened by what else the machine does.
    """
    shortest_small = shortest_large = float("inf")
    for _ in range(_TRIES):
        shortest_small = min(shortest_small, _cpu_seconds(work, small))
        shortest_large = min(shortest_large, _cpu_seconds(work, large))
        if shortest_large < 24 * shortest_small:
            return True
    return False


def _cpu_seconds(work: Callable[[Input], object], given: Input) -> float:
    gc.collect()
    gc.disable()  # a collection takes as long as the objects of all other tests are many
    try:
        started = time.thread_time()
        work(given)
        return time.thread_time() - started
    finally:
        gc.enable()
