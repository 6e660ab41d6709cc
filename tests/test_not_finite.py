"""What is done about optimizer steps that were not made, beside the runs of tests/end_to_end/test_not_finite_run.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny

from dsm_train.config import OptimConfig
from dsm_train.losses import PolicyLoss, Stats
from dsm_train.megatron.parallel import Parallel
from dsm_train.not_finite import Guard, NotFinite
from dsm_train.update import StepResult, step_metrics
from dsm_train.verify.synthetic import synthetic_rollouts

BATCH = synthetic_rollouts(50, 40, seed=0)


def result(loss: float, grad_norm: float) -> StepResult:
    return StepResult(loss, grad_norm, 1e-3, Stats.nothing(PolicyLoss.names))


def test_a_batch_that_cannot_be_written_does_not_hide_what_happened(tmp_path: Path, layout: Parallel) -> None:
    (tmp_path / "file").touch()
    model = tiny.trainable(layout)
    model.optimizer_step(math.inf)
    guard = Guard(model, tmp_path / "file", "grpo", "optim.not_finite")
    with pytest.raises(NotFinite) as stop:
        guard.check(6, [result(1.0, 1.0), result(math.inf, 2.0)], BATCH, print)
    assert str(stop.value).startswith(
        "step 7 of grpo (optimizer step 1): the loss is inf, and the weights are as before"
    )
    assert "optim.not_finite=skip leaves it out; the batch could not be written to " in str(stop.value)
    assert str(stop.value).endswith(("Not a directory", "File exists"))


def test_several_minibatches_of_a_step_are_one_line(tmp_path: Path, layout: Parallel) -> None:
    model = tiny.trainable(layout, optim=OptimConfig(lr=1e-3, not_finite="skip"))
    guard = Guard(model, tmp_path, "grpo", "optim.not_finite")
    said: list[str] = []
    results = [result(1.0, math.inf), result(0.5, 1.0), result(math.nan, math.nan)]
    guard.check(0, results[1:2], BATCH, said.append)
    assert not said and not list(tmp_path.iterdir())
    guard.check(0, results, BATCH, said.append)
    (line,) = said
    assert line.startswith(
        "step 1: the gradient norm is inf, so that 2 optimizer steps are skipped; look for the cause"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["not-finite-grpo-1.parquet"]
    metrics = step_metrics(results)
    assert metrics["skipped"] == 2 and metrics["loss"] == 0.5 and metrics["grad_norm"] == 1.0
    assert math.isnan(step_metrics(results[:1])["loss"]) and "skipped" not in step_metrics(results[1:2])
