"""State of the optimizer as a checkpoint has it; layouts: tests/distributed/test_checkpoints.py."""

from __future__ import annotations

import gc
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch

from dsm_train.megatron.checkpoint import Saver, _adam_step, _set_adam_step, fill_adam
from dsm_train.megatron.parallel import Parallel
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_written_is_held_once(dtype: Any, tmp_path: Path, layout: Parallel) -> None:
    config = replace(tiny.MODEL, dtype=dtype)
    Saver(layout).start(folder(tmp_path / "first"), {"policy": tiny.trainable(layout, config)}).finish()
    model = tiny.trainable(layout, config)
    fill_adam(model)
    weights = sum(parameter.numel() for chunk in model.chunks for parameter in chunk.parameters())
    before = held_bytes()
    writing = Saver(layout).start(folder(tmp_path / "second"), {"policy": model})
    held = held_bytes() - before
    writing.finish()
    assert held <= 1.1 * weights * (12 if dtype == "fp32" else 14), (
        "views are copied by Megatron, and must not be again"
    )


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def held_bytes() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
