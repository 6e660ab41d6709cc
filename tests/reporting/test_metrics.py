"""Tests of metrics, samples and progress."""

from __future__ import annotations

import io
import json
import math
import os
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsm_train.reporting.metrics import Metrics, Progress, Sample, Samples, prepare_output


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_lines_are_on_disk_at_once_and_valid_json(tmp_path: Path):
    metrics = Metrics(tmp_path)
    metrics.log(1, "sft", {"loss": np.array(0.5), "lr": 1e-6, "grad_norm": math.nan, "ratio": math.inf})
    (row,) = rows(tmp_path / "metrics.jsonl")  # before close
    assert row.pop("time") > 1.7e9
    assert row == {"step": 1, "phase": "sft", "loss": 0.5, "lr": 1e-6, "grad_norm": None, "ratio": None}
    metrics.close()
    resumed = Metrics(tmp_path)  # appends
    resumed.log(2, "sft", {"loss": 0.25})
    resumed.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_tensorboard_holds_the_scalars(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path)
    metrics.log(3, "grpo", {"reward": 0.5, "clipped_high": 0.0, "heldout_accuracy": 0.1})
    metrics.log(4, "grpo", {"reward": 0.75})
    metrics.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    # tensorboard sorts by name: what a reader looks for first comes first
    assert sorted(events.Tags()["tensors"]) == ["grpo/heldout_accuracy", "grpo/reward", "grpo_details/clipped_high"]
    points = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("grpo/reward")]
    assert points == [(3, 0.5), (4, 0.75)]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    metrics, samples = Metrics(None), Samples(None)
    metrics.log(1, "grpo", {"reward": 1.0})
    samples.log(1, [Sample("p", "r", "a", 1.0, "stop", {"numeric": 1.0}, "a.jsonl:1")])
    metrics.close()
    samples.close()
    with Progress("grpo", 1, None) as progress:
        progress.step({})
    assert not list(tmp_path.iterdir())


def test_samples_keep_the_text_as_it_is(tmp_path: Path):
    samples = Samples(tmp_path)
    first = Sample("1+1=", "2\u2028\n", "2", 1.0, "stop", {"numeric": 1.0}, "a.jsonl:1 (x)")
    samples.log(7, [first, Sample("é", "", "3", math.nan, "length", {"numeric": math.nan}, "task 2")])
    samples.close()
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(lines[0]) == {"step": 7} | asdict(first)
    second = json.loads(lines[1])
    assert second["reward"] is None and second["parts"] == {"numeric": None} and "é" in lines[1]


def test_output_folder_is_created_and_left_empty(tmp_path: Path):
    prepare_output(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_output_folder_that_is_or_lies_below_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(ValueError, match=rf"cannot write to .*'{folder}': {tmp_path}/file is a file; choose"):
            prepare_output(folder)


def test_read_only_output_folder(tmp_path: Path):
    # root may write here all the same; the mode is what the user meant
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        for folder in (tmp_path, tmp_path / "runs"):
            with pytest.raises(ValueError, match=rf"'{folder}': {tmp_path} is read-only; choose"):
                prepare_output(folder)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_output_folder_that_the_system_refuses():
    with pytest.raises(ValueError, match=r"cannot write to the output folder '/proc/runs': \S+"):
        prepare_output(Path("/proc/runs"))


def test_progress_off_a_terminal_is_rare_and_ends_with_the_last_step():
    stream = io.StringIO()
    with Progress("grpo", 100, stream) as progress:
        for step in range(100):
            progress.step({"reward": step / 100, "tokens/s": 5230.0})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # the first step, so that a run is seen to live, and the last
    assert lines[0].startswith("grpo 1/100  1 %  0:00 elapsed, ")
    assert lines[1] == "grpo 100/100  100 %  0:00 elapsed, 0:00 left  reward 0.99  tokens/s 5.23k"


def test_progress_stopped_early_shows_where():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress("grpo", 100, stream) as progress:
        progress.step({})
        progress.step({})
        raise RuntimeError
    assert stream.getvalue().splitlines()[-1].startswith("grpo 2/100")


def test_progress_on_a_terminal_redraws_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with Progress("grpo", 3, stream) as progress:
        for _ in range(3):
            progress.step({"reward": 0.5, "a_long_name": 1e-6})
    drawn = stream.getvalue()
    assert drawn.count("\n") == 1 and drawn.endswith("\n") and drawn.count("\r") == 3
    assert all(len(line) < 40 for line in drawn.replace("\x1b[K", "").strip().split("\r"))


def test_time_left_ignores_the_first_step():
    # a first step of an hour (compilation), then quick ones: hours left would be wrong
    stream = io.StringIO()
    progress = Progress("grpo", 100, stream, interval=0.0)
    progress._last_step -= 3600
    progress.step({})
    progress.step({})
    first, second = stream.getvalue().splitlines()
    assert ", 99:00:00 left" in first and ", 0:00 left" in second
