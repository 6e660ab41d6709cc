"""State of the optimizer as a checkpoint has it; layouts: tests/distributed/test_checkpoints.py."""

from __future__ import annotations

import types
from typing import Any, cast

import torch

from dsm_train.megatron.checkpoint import _adam_step, _set_adam_step
from dsm_train.megatron.step import TrainableModel


class StepsByGroup(torch.optim.Optimizer):
    """Counts steps as Transformer Engine's Adam does: by group, and none of a group that is empty."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1


def test_a_rank_without_a_shard_of_some_group_continues_and_saves_again() -> None:
    adam = StepsByGroup([{"params": [torch.zeros(2)]}, {"params": []}], {})
    model = cast(TrainableModel, types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=adam)))
    adam.step()
    _set_adam_step(model, _adam_step(model))
    adam.step()
    assert _adam_step(model) == 2
