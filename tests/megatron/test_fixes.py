"""Corrections of megatron-core: each test fails without its correction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch

from dsm_train.config import OptimConfig, ParallelConfig
from dsm_train.megatron import parallel
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import TrainableModel


@pytest.fixture(scope="module")
def sharded() -> Iterator[Parallel]:
    layout = parallel.start(ParallelConfig(distributed_optimizer=True), seed=0)
    yield layout
    parallel.stop(layout)


def adam_steps(policy: TrainableModel) -> list[float]:
    inner = policy.optimizer.chained_optimizers[0].optimizer
    return [float(state["step"]) for state in inner.state.values()]


def test_loaded_adam_steps_count_once_per_update(sharded: Parallel) -> None:
    policy = tiny.trainable(sharded, optim=OptimConfig(lr=1e-3))

    def update() -> None:
        for _, parameter in policy.chunks[0].named_parameters():
            parameter.main_grad.fill_(1e-3)
        policy.optimizer_step()

    update()
    assert len(adam_steps(policy)) > 1 and set(adam_steps(policy)) == {1.0}
    inner = policy.optimizer.chained_optimizers[0]
    inner.load_state_dict(inner.state_dict())
    assert set(adam_steps(policy)) == {1.0}
    update()
    assert set(adam_steps(policy)) == {2.0}
    assert all(torch.isfinite(p).all() for p in policy.chunks[0].parameters())
