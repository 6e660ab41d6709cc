"""A run's folder holds one run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsm_train.config import RunConfig
from dsm_train.reporting.folder import FILES, RESULTS, RunFolder, claim_folder, new_folder, read_state
from dsm_train.reporting.metrics import Metrics

HOLD = """
import sys
from pathlib import Path
from dsm_train.reporting.folder import RunFolder
with RunFolder.claim(Path(sys.argv[1]), overwrite=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def write_run(path: Path, text: str, *, finish: bool, overwrite: bool = False) -> None:
    with RunFolder.claim(path, overwrite=overwrite) as folder:
        for name in FILES:
            if "." in name:
                (path / name).write_text(text)
            else:
                (path / name).mkdir()
                (path / name / "file").write_text(text)
        if finish:
            folder.finish()


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def test_a_finished_run_is_not_touched(tmp_path: Path):
    write_run(tmp_path, "first", finish=True)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r"^run.out: .* holds a run that finished on \d{8}-\d{6}: .*run.overwrite=true"
    ):
        RunFolder.claim(tmp_path, overwrite=False)
    assert contents(tmp_path) == before


def test_overwriting_leaves_nothing_of_the_old_run_and_all_of_the_user_s(tmp_path: Path):
    write_run(tmp_path, "first", finish=True)
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder.claim(tmp_path, overwrite=True):
        assert set(contents(tmp_path)) == {"run.json", "notes.txt"}  # a crash here leaves no old weights behind


def test_a_run_that_was_broken_off_is_moved_aside_as_a_whole(tmp_path: Path):
    write_run(tmp_path, "first", finish=False)
    write_run(tmp_path, "second", finish=True)
    (aside,) = tmp_path.glob("unfinished-*")
    assert set(contents(aside).values()) == {"first"} and {path.name for path in aside.iterdir()} == set(FILES)
    assert {(tmp_path / name).read_text() for name in FILES if "." in name} == {"second"}


def test_weights_of_unknown_origin_count_as_a_finished_run(tmp_path: Path):
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="holds a run that finished: choose another folder"):
        RunFolder.claim(tmp_path, overwrite=False)


@pytest.mark.parametrize("finish", [True, False])
def test_weights_to_start_from_are_never_replaced(finish: bool, tmp_path: Path):
    write_run(tmp_path, "first", finish=finish)
    with pytest.raises(ValueError, match=r"run.init = .*weights is among the files that this run replaces"):
        RunFolder.claim(tmp_path, overwrite=True, init=tmp_path / "weights")
    assert (tmp_path / "weights" / "file").read_text() == "first"


def test_two_runs_at_once(tmp_path: Path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match=rf"a run lives in .* \(process {first.pid} on {os.uname().nodename}, since"
        ):
            RunFolder.claim(tmp_path, overwrite=overwrite)
    first.send_signal(signal.SIGKILL)
    first.wait()
    RunFolder.claim(tmp_path, overwrite=False).close()  # a killed run holds nothing


def test_half_a_state_is_an_unfinished_run(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"pid": 1, "finis')
    (tmp_path / "metrics.jsonl").write_text("old")
    with RunFolder.claim(tmp_path, overwrite=False):
        pass
    assert [path.read_text() for path in tmp_path.glob("unfinished-*/metrics.jsonl")] == ["old"]


def test_a_state_that_is_lost_beside_checkpoints_is_an_unfinished_run(tmp_path: Path) -> None:
    write_run(tmp_path, "first", finish=True)
    shutil.rmtree(tmp_path / "weights")
    for text in ("", "{", "[1]"):
        (tmp_path / "run.json").write_text(text)
        folder = RunFolder.claim(tmp_path, overwrite=False)
        assert folder.unfinished and folder.identity == {} and folder.named is None
        folder.close()


def test_two_runs_that_began_in_the_same_second_are_moved_to_two_folders(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        write_run(tmp_path, text, finish=False)
        state = json.loads((tmp_path / "run.json").read_text())
        (tmp_path / "run.json").write_text(json.dumps(state | {"started": "20261201-120000"}))
    asides = {path.name: (path / "metrics.jsonl").read_text() for path in tmp_path.glob("unfinished-*")}
    assert asides == {"unfinished-20261201-120000": "first", "unfinished-20261201-120000-2": "second"}


def resumed(path: Path, metrics_bytes: int, samples_bytes: int, source: Path | None = None) -> list[str]:
    folder = RunFolder.claim(path, overwrite=True)
    notes = folder.resume(metrics_bytes, samples_bytes, source, named="there")
    assert folder.named == "there" and not read_state(path)["finished"]
    folder.close()
    return notes


@pytest.mark.parametrize(
    ("size", "left", "told"),
    [
        (16, '{"step": 1}\n', True),  # more than there is: what is left of the last row goes
        (12, '{"step": 1}\n', False),
        (0, "", False),
    ],
)
def test_records_are_cut_back(size: int, left: str, told: bool, tmp_path: Path) -> None:
    write_run(tmp_path, '{"step": 1}\n{"s', finish=False)
    notes = resumed(tmp_path, size, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == left and (tmp_path / "samples.jsonl").read_text() == ""
    assert notes == ([f"{tmp_path}/metrics.jsonl has 15 bytes, and had 16 at the checkpoint: rows are missing"] * told)


def test_a_record_that_vanished_is_told(tmp_path: Path) -> None:
    write_run(tmp_path, "row\n", finish=False)
    (tmp_path / "samples.jsonl").unlink()
    assert resumed(tmp_path, 4, 4) == [
        f"{tmp_path}/samples.jsonl has 0 bytes, and had 4 at the checkpoint: rows are missing"
    ]


@pytest.mark.parametrize("finish", [True, False])
def test_results_of_the_end_go_when_the_user_goes_back_from_it(finish: bool, tmp_path: Path) -> None:
    write_run(tmp_path, "row\n", finish=finish)
    resumed(tmp_path, 4, 4)
    assert [(tmp_path / name).exists() for name in RESULTS] == [not finish] * len(RESULTS)
    assert (tmp_path / "checkpoints").exists() and (tmp_path / "metrics.jsonl").read_text() == "row\n"


def test_records_of_another_run_are_copied_up_to_the_checkpoint(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_run(old, "row\nmore\n", finish=True)
    before = contents(old)
    assert resumed(new, 4, 0, old) == []
    assert contents(old) == before
    assert (new / "metrics.jsonl").read_text() == "row\n" and not (new / "checkpoints").exists()


def test_a_run_without_a_name_gets_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    first, second = claim_folder(RunConfig(), "grpo"), claim_folder(RunConfig(), "grpo")
    named = claim_folder(RunConfig(out=Path("here")), "grpo")
    assert first.path != second.path and {first.path.parent, second.path.parent} == {Path("runs")}
    assert named.path == Path("here")
    for folder in (first, second, named):
        folder.close()


def test_default_names_are_new_each_time(tmp_path: Path):
    folders = [new_folder("grpo", tmp_path / "runs") for _ in range(3)]
    assert len(set(folders)) == 3 and all(path.is_dir() and path.name.startswith("grpo-2") for path in folders)


def test_tensorboard_shows_one_run(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for reward in (0.25, 0.75):
        with RunFolder.claim(tmp_path, overwrite=True) as folder:
            metrics = Metrics(tmp_path)
            metrics.log(1, "grpo", {"reward": reward})
            metrics.close()
            folder.finish()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (tag,) = events.Tags()["tensors"]
    assert [event.tensor_proto.float_val[0] for event in events.Tensors(tag)] == [0.75]


def test_tensorboard_shows_the_points_of_a_run_that_is_continued(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((1, 4), (3, 5)):  # the checkpoint is after step 2
        metrics, sizes = Metrics(tmp_path), []
        for step in range(first, last):
            metrics.log(step, "grpo", {"reward": step / 4})
            sizes.append(metrics.sync())
        metrics.close()
        os.truncate(tmp_path / "metrics.jsonl", sizes[1])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (tag,) = events.Tags()["tensors"]
    points = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(tag)]
    assert points == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]


def test_nothing_is_removed_before_the_run_begins(tmp_path: Path) -> None:
    write_run(tmp_path, "old", finish=True)
    RunFolder.claim(tmp_path, overwrite=True).close()  # a start that is refused after the claim
    assert (tmp_path / "metrics.jsonl").read_text() == "old"
    with pytest.raises(ValueError, match="holds a run that finished"):  # and it still counts as finished
        RunFolder.claim(tmp_path, overwrite=False)
