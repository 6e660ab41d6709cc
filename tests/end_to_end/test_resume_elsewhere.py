"""A run that goes on in another layout, and in another: as if it had stayed where it was, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import GRPO, WARMUP, run, run_on_ranks, values
from safetensors.torch import load_file

CALL = "[{call: reward_of_digits:digits}]"
RUN = (*GRPO, *WARMUP, "model.num_kv_heads=2", "steps=4",
       "algorithm.minibatches=2", "algorithm.reference_every=2", "optim.schedule=linear",
       "rewards.unfinished=keep", f"rewards.functions={CALL}", "checkpoint.every=1", "checkpoint.keep=9")  # fmt: skip
LEGS: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (1, 2, ("parallel.tp=2",)),
    (2, 2, ("parallel.pp=2",)),
    (3, 2, ("parallel.distributed_optimizer=true",)),
    (4, 1, ()),
)
"""Steps of GRPO after which each leg is left, its ranks and its layout."""


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that tiny models differ in: digits of the response."""
    (tmp_path / "reward_of_digits.py").write_text(
        "def digits(completions, tasks):\n    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)


def checkpoint(folder: Path, step: int) -> Path:
    (found,) = (folder / "checkpoints").glob(f"*-grpo-{step}")
    return found


@pytest.mark.usefixtures("reward")
def test_a_run_moves_from_tensor_to_pipeline_to_data_parallel_to_one_rank(tmp_path: Path) -> None:
    run("grpo", *RUN, f"run.out={tmp_path / 'stays'}")
    resume: tuple[str, ...] = ()
    out = tmp_path / "stays"
    for step, ranks, layout in LEGS:
        out = tmp_path / f"leg-{step}"
        arguments = (*RUN, *layout, *resume, f"run.out={out}")
        if ranks == 1:
            run("grpo", *arguments)
        else:
            printed = run_on_ranks(ranks, tmp_path, "grpo", *arguments)
            assert ("equal to rounding" in printed) == bool(resume)
        resume = (f"run.resume={checkpoint(out, step)}",) if step < 4 else ()
    stayed, moved = values(tmp_path / "stays"), values(out)
    assert [(row["phase"], row["step"]) for row in moved] == [(row["phase"], row["step"]) for row in stayed]
    for there, here in zip(stayed, moved, strict=True):
        assert here == close_to(there)
    before, after = (
        load_file(tmp_path / "stays/weights/model.safetensors"),
        load_file(out / "weights/model.safetensors"),
    )
    for name, expected in before.items():
        assert (after[name] - expected).norm() <= 1e-5 * expected.norm(), name


def close_to(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
        for name, value in row.items()
    }
