"""Fixtures of all tests. Tests marked `gpu` skip visibly without a GPU; `no_interpret` under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from dsm_train.megatron.parallel import Parallel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if "no_interpret" in item.keywords and os.environ.get("TRITON_INTERPRET") == "1":
            item.add_marker(pytest.mark.skip(reason="not under TRITON_INTERPRET=1"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that an op serves."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def layout() -> Iterator[Parallel]:
    """The layout of a single rank."""
    # Imported here: the ops' tests run without Megatron.
    from dsm_train.config import ParallelConfig
    from dsm_train.megatron import parallel

    layout = parallel.start(ParallelConfig(), seed=0)
    yield layout
    parallel.stop(layout)
