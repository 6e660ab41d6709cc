"""Processes as a user starts them: signals from the first second on, and torchrun that starts ranks again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from failing import RUN, Result, write_reward

ROOT = Path(__file__).parents[2]
KILLER = """
import os, signal
def digits(completions, tasks):
    if completions and tasks and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        digits.calls += 1
        if digits.calls == 6:
            os.kill(os.getppid(), signal.SIGKILL)
    return [float(sum(c.isdigit() for c in text)) for text in completions]
digits.calls = 0
"""
"""The reward function, which kills the rank that asks it once."""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["with run.out", "without"])
def test_torchrun_starts_the_ranks_again_and_they_continue(given: bool, tmp_path: Path) -> None:
    (tmp_path / "reward_of_digits.py").write_text(KILLER)
    out = ["run.out=runs/it"] if given else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    arguments = (*RUN, "model.num_kv_heads=2", "parallel.tp=2", "checkpoint.every=1")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "dsm_train", "grpo", *arguments, *out],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continued from runs/" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    write_reward(tmp_path)
    whole = subprocess.run(
        [sys.executable, *launcher[:-1], "-m", "dsm_train", "grpo", *arguments, "run.out=whole"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    assert Result.of(folder) == Result.of(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_last_line_of_a_process_that_was_stopped_is_the_command_that_continues_it(
    number: signal.Signals, tmp_path: Path
) -> None:
    write_reward(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "dsm_train", "grpo", *RUN, "steps=100000"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    begun = next(line for line in process.stderr if line.startswith("grpo "))
    process.send_signal(number)
    lines = process.stderr.read().splitlines()
    assert process.wait() == 75, lines
    found = re.fullmatch(
        rf"dsm-train grpo: stopped by {number.name} after step \d+ of 100000 of grpo; "
        r"to continue: (python -m dsm_train grpo .* run.out=(runs/grpo-\S+))",
        lines[-1],
    )
    assert found is not None, (begun, lines)
    assert (tmp_path / found[2] / "checkpoints").is_dir() and "Traceback" not in "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_ctrl_c_during_the_start_is_a_line(seconds: float, tmp_path: Path) -> None:
    write_reward(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "dsm_train", "grpo", *RUN, "run.out=run"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 75 and printed.splitlines()[-1].startswith("dsm-train grpo: stopped by SIGINT")
    assert "Traceback" not in printed
