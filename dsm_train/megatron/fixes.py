"""Corrections of megatron-core, on every device; each names the place, and has a test that fails without it.

A release that was not looked at gets no correction: `apply` refuses it, for a fix that no longer fits trains wrongly.
"""

from __future__ import annotations

import functools
import queue
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.package_info import __version__

# Each of these has every bug below.
_LOOKED_AT = ("0.16.", "0.19.")


@functools.cache
def apply() -> None:
    """Apply all corrections, once."""
    if not __version__.startswith(_LOOKED_AT):
        raise ImportError(
            f"megatron-core {__version__} was not checked for the bugs that dsm corrects in 0.16 and 0.19: "
            "pip install -c constraints.txt megatron-core"
        )
    _separate_adam_steps()
    _results_within_the_process()


def _separate_adam_steps() -> None:
    """optimizer/distrib_optimizer.py, load_state_dict: `s["step"] = step` gives all parameters one and the same tensor.

    torch's AdamW adds 1 to it for every parameter, so that after loading, the bias correction is that of a far later
    step: silently wrong weights. Only without Transformer Engine and apex, whose Adam keeps no step per parameter.
    """
    load = DistributedOptimizer.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = load_state_dict


def _results_within_the_process() -> None:
    """dist_checkpointing/strategies/filesystem_async.py: results of writing pass through a manager process.

    It takes seconds to start, and a rank that is killed leaves it behind for ever. Our writer is a thread.
    """
    setattr(filesystem_async, "_results_queue", queue.Queue())  # noqa: B010 (typed as a queue of processes)
