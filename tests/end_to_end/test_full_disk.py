"""Full disks: whatever cannot be written ends the run in one line, and it goes on as if nothing had been.

Every write fails from a moment on: the process may write no more than so many bytes to any file. Where the system lets
a test mount a file system of its own, that becomes full as well.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import run
from failing import RUN, Result, ended, fill, happening, ranks_ended, undisturbed, write_reward

MOMENTS = {
    "run.json": ("dsm_train.run:begin", 1, None),
    "config.yaml": ("dsm_train.run:to_yaml", 1, None),
    "tensorboard, at start": ("dsm_train.reporting.metrics:_tensorboard_writer", 1, None),
    "metrics.jsonl": ("dsm_train.reporting.metrics:_JsonLines.write", 1, None),
    "tensorboard": ("dsm_train.reporting.metrics:Metrics._draw", 5, "step 3 of 3 of sft"),
    "samples.jsonl": ("dsm_train.reporting.metrics:Samples.log", 2, "step 3 of 3 of sft"),
    "rollouts": ("dsm_train.rollout.record:_write", 2, "step 3 of 3 of sft"),
    "record": ("dsm_train.rollout.record:_write", 3, "step 3 of 3 of sft"),
    "common.pt": ("dsm_train.megatron.checkpoint:Saver.start", 3, "step 3 of 3 of sft"),
    "distcp": (
        "dsm_train.megatron.checkpoint:FileSystemWriterAsync.write_preloaded_data", 3, "step 3 of 3 of sft"
    ),
    ".metadata": ("dsm_train.megatron.checkpoint:Writing.finish", 4, "step 2 of 4 of grpo"),
    "state.json": ("dsm_train.checkpoint.place:Place.write", 3, "step 3 of 3 of sft"),
    "SHA256SUMS": ("dsm_train.checkpoint.keeper:sha256", 3, "step 3 of 3 of sft"),
    "weights": ("dsm_train.run:weights.save_weights", 1, "step 4 of 4 of grpo"),
    "tokenizer": ("dsm_train.run:write_tokenizer_note", 2, "step 4 of 4 of grpo"),
    "report.json": ("dsm_train.stages.grpo:write_report", 1, "step 4 of 4 of grpo"),
    "curve.png": ("dsm_train.stages.grpo:learning_curve", 1, "step 4 of 4 of grpo"),
    "run.json, at the end": ("dsm_train.run:RunFolder.finish", 1, "step 4 of 4 of grpo"),
}  # fmt: skip
"""Writer, call before which the disk is full, and the checkpoint that is left."""
SIZES = ("64k", "600k", "1m", "1400k", "1900k")
"""Sizes of a file system, each too small for the run."""
ROOT = Path(__file__).parents[2]
QUICK = ("run.json", "rollouts", "distcp")


@contextmanager
def without_limit() -> Iterator[None]:
    """Let files grow again."""
    try:
        yield
    finally:
        fill(resource.getrlimit(resource.RLIMIT_FSIZE)[1])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run whose disk had room."""
    folder = tmp_path_factory.mktemp("whole")
    return undisturbed(folder, f"record={folder / 'recorded.parquet'}", "record_step=1")


@pytest.mark.parametrize(
    "file", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in MOMENTS if f not in QUICK)]
)
def test_a_run_whose_disk_is_full_ends_in_a_line_and_goes_on_exactly(
    file: str, expected: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reward(tmp_path)
    monkeypatch.chdir(tmp_path)
    out, (where, number, place) = tmp_path / "run", MOMENTS[file]
    command = (*RUN, f"run.out={out}", f"record={tmp_path / 'recorded.parquet'}", "record_step=1")
    with without_limit(), happening(where, number, fill):
        status, lines, _ = ended(capsys, *command)
    assert (status, lines) == (74, [line(out, "File too large", place)])
    run("grpo", *command)
    assert (f": {place}\n" in capsys.readouterr().out) == (place is not None)
    assert Result.of(out) == expected
    assert not [*out.glob(".*"), *(out / "checkpoints").glob(".*")]


def line(out: Path, reason: str, place: str | None) -> str:
    saved = "there is no checkpoint yet" if place is None else f"the last checkpoint is whole: {place}"
    return (
        f"dsm-train grpo: the disk of {out}: {reason}; {saved}; make room, or have it writable again; "
        "the same command continues"
    )


@pytest.mark.slow
def test_ranks_end_when_the_disk_of_one_is_full(
    expected: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reward(tmp_path)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    command = (*RUN, "model.num_kv_heads=2", "parallel.tp=2", f"run.out={out}")
    writer = "dsm_train.megatron.checkpoint:FileSystemWriterAsync.write_preloaded_data"
    statuses, printed = ranks_ended(2, tmp_path, {1: (writer, 3, "full")}, *command)
    assert statuses == [74, 74], printed
    assert "File too large" in printed and "Traceback" not in printed
    statuses, printed = ranks_ended(2, tmp_path, {}, *command)
    assert statuses == [0, 0] and "continued from" in printed, printed
    whole = ranks_ended(2, tmp_path, {}, *command[:-1], f"run.out={tmp_path / 'whole'}")
    assert whole[0] == [0, 0] and Result.of(out) == Result.of(tmp_path / "whole")


def test_a_file_system_that_is_full_ends_a_run_in_a_line(expected: Result, tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user and mount namespaces here; the tests above fill the disk otherwise")
    write_reward(tmp_path)
    (tmp_path / "small").mkdir()
    path = os.pathsep.join([str(ROOT), *(str(ROOT / "tests" / room) for room in ("end_to_end", "distributed"))])
    done = subprocess.run(
        [unshare, "-Urm", sys.executable, "-c", "import test_full_disk as t; t.run_on_a_small_disk()"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert Result.of(tmp_path / "kept") == expected
    assert "Traceback" not in done.stderr
    reports = [text for text in done.stderr.splitlines() if text.startswith("dsm-train grpo: ")]
    assert len(reports) == len(SIZES) and all("run: No space left on device; " in text for text in reports), reports


def run_on_a_small_disk() -> None:
    """Run on a file system that is too small, made larger each time; in a namespace of its own."""
    for number, size in enumerate((*SIZES, "64m")):
        again = "remount," if number else ""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", "small"], check=True)
        try:
            run("grpo", *RUN, "run.out=small/run", "record=small/recorded.parquet", "record_step=1")
        except SystemExit as end:
            assert end.code == 74, end
    shutil.copytree("small/run", "kept")
