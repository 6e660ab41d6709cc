"""`dsm-train runs` reads the folders of runs, whatever is in them."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dsm_train.__main__ import main
from dsm_train.checkpoint.place import Place
from dsm_train.reporting.record import Layout, Record
from dsm_train.reporting.runs import Run

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
A_WHILE = timedelta(hours=3, minutes=5)


def write_run(path: Path, *, age: timedelta = A_WHILE, rows: int = 120, **about: Any) -> Path:
    """Write the folder of a run that trained so many steps of 190 and died so long ago."""
    path.mkdir(parents=True)
    died = datetime.now() - age
    started = (died - timedelta(minutes=1)).strftime("%Y%m%d-%H%M%S")
    state = {"stage": "grpo", "started": started, "finished": None, "ended": None, "pid": 1, "host": "h"} | about
    (path / "run.json").write_text(json.dumps(state) + "\n")
    (path / "config.yaml").write_text("run:\n  seed: 0\nwarmup:\n  steps: 40\n  epochs: null\nsteps: 190\n")
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            row: dict[str, Any] = {"step": step, "phase": "grpo", "time": died.timestamp(), "reward": step / 1000}
            row |= {"loss": 0.5, "kl": None, "heldout_accuracy": 0.75} if step == 20 else {"loss": 0.25, "kl": None}
            file.write(json.dumps(row | {"padding": "x" * 500}) + "\n")
    return path


def write_checkpoint(run: Path, step: int, **about: Any) -> Path:
    """Write what the table reads of a checkpoint."""
    at: Mapping[str, Any] = {"loop": "grpo", "step": step, "steps": 190, "total": 40 + step} | about
    sizes: Mapping[str, Any] = {"metrics_bytes": 1, "samples_bytes": 1, "seconds": 1.0}
    empty: Mapping[str, Any] = {"models": ("policy",), "identity": {}, "results": {}, "counts": {}, "last": {}}
    place = Place(**at, **sizes, **empty)
    folder = run / "checkpoints" / place.name
    folder.mkdir(parents=True)
    (run / "checkpoints" / "model").mkdir(exist_ok=True)  # which describes their model
    place.write(folder)
    (folder / "__0_0.distcp").write_bytes(bytes(1_500_000))
    (folder / "SHA256SUMS").write_text("")
    return folder


def start(command: str, directory: Path, **about: Any) -> dict[str, Any]:
    record = Record(
        time="2026-12-01T02:54:35+00:00",
        host="node7",
        directory=str(directory),
        command=command,
        versions={"dsm": "0.1.0", "torch": "2.13.0", "transformers": None},
        commit="c7fe62e2c15ad529322e3d1729a8e25869fe71bf",
        clean=False,
        changed=2,
        patch="changes/0123456789ab.patch",
        devices=("4 x NVIDIA H200",),
        layout=Layout(4, 1, 2, 1, 1, 2, False, False),
        seed=7,
    )
    return asdict(replace(record, **about))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["runs", *arguments])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return text


def row_of(text: str, name: str) -> str:
    (row,) = (line for line in text.splitlines() if line.startswith(name + " "))
    return " ".join(row.split())


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def test_the_table_has_a_line_for_each_run_the_newest_first(runs: Path, capsys: pytest.CaptureFixture[str]):
    write_run(runs / "old", age=timedelta(days=4))
    write_run(runs / "deep" / "down" / "new", age=timedelta(minutes=5))
    write_run(runs / "deep" / "down" / "too" / "deep")
    write_run(runs / "old" / "unfinished-20261201-020202")  # a part of that run
    write_run(runs / ".hidden")
    write_checkpoint(runs / "old", 100)
    text = printed(capsys)
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["run", "deep/down/new", "old"]
    assert row_of(text, "deep/down/new").endswith(" broken off grpo 120/190 reward 0.12, acc 0.75 5m no checkpoint")
    assert row_of(text, "old").endswith("grpo 120/190 reward 0.12, acc 0.75 4d grpo 100")
    assert text.count("to continue") == 1 and "too" not in text and "hidden" not in text


@pytest.mark.parametrize(
    ("about", "state", "origin"),
    [
        ({}, "broken off", "grpo 100"),
        ({"ended": "stopped by SIGTERM after step 100 of 190 of grpo"}, "stopped (SIGTERM)", "grpo 100"),
        ({"ended": "stopped by a signal"}, "stopped", "grpo 100"),
        ({"ended": "the disk of runs/x: No space left on device"}, "failed (disk)", "grpo 100"),
        ({"ended": "RuntimeError: shapes differ"}, "failed (RuntimeError)", "grpo 100"),
        ({"ended": "step 101: the gradient's norm is not finite"}, "failed", "grpo 100"),
        ({"finished": "20261201-030000"}, "finished", "no, finished"),
    ],
)
def test_the_state_is_how_the_run_ended(about: dict[str, Any], state: str, origin: str, runs: Path):
    write_checkpoint(write_run(runs / "x", **about), 100)
    run = Run.read(runs / "x")
    place = run.origin if isinstance(run.origin, str) else f"{run.origin.loop} {run.origin.step}"
    assert (run.state, place) == (state, origin)


def test_a_run_lives_while_its_process_holds_the_lock_and_is_not_disturbed(
    runs: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_run(runs / "x", age=timedelta(0), ended="stopped by SIGTERM after step 3 of 190 of grpo")
    write_checkpoint(path, 100)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in runs.rglob("*") if file.is_file()}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path / "run.json")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        assert row_of(printed(capsys), "x").endswith("no, running")
        assert "running, process 1 on h" in printed(capsys, f"folder={path}")
        child.stdin.close()
    assert row_of(printed(capsys), "x").endswith("grpo 100")
    with (path / "run.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in runs.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("contents", "state"),
    [
        (b"", "nothing began"),
        (b"{", "unreadable"),
        (b"\xff\xfe\x00", "unreadable"),
        (b"[1, 2]", "unreadable"),
        (b'{"started": 5, "starts": "x", "checkpoints": 3, "stage": ["a"]}', "broken off"),
        (b'{"starts": [5, {"command": "a \'b", "time": 3}]}', "broken off"),
        (b'{"pid": 1, "host": "h", "started": "20260101-000000", "finished": null}', "broken off"),
    ],
)
def test_a_damaged_or_early_run_json_is_a_row(
    contents: bytes, state: str, runs: Path, capsys: pytest.CaptureFixture[str]
):
    write_run(runs / "whole")
    write_checkpoint(write_run(runs / "x"), 100)
    (runs / "x" / "run.json").write_bytes(contents)
    text = printed(capsys)
    assert f" {state} grpo 120/190 reward 0.12, acc 0.75 " in row_of(text, "x") and row_of(text, "whole")
    assert state in printed(capsys, f"folder={runs / 'x'}")


@pytest.mark.parametrize(
    ("contents", "step", "values"),
    [
        (b'{"step": 3, "phase": "sft", "loss": 0.5}\n{"step": 4, "pha', "grpo: sft 3/40", "loss 0.5"),
        (b'{"step": 1, "phase": "sft", "loss": 1, "heldout_loss": 2}\n', "grpo: sft 1/40", "loss 1, held-out loss 2"),
        (b'{"step": 9, "phase": "sft", "loss": 1}\n{"step": 0, "phase": "grpo", "heldout_accuracy": 0.25}\n',
         "grpo 0/190", "acc 0.25"),
        (b"\x00\x00\x00\n", "grpo", "cannot be read"),
        (b'[]\n7\n{"phase": 3}\n', "grpo", "cannot be read"),
        (b"", "grpo", ""),
    ],
)  # fmt: skip
def test_damaged_or_few_metrics_are_a_row(
    contents: bytes, step: str, values: str, runs: Path, capsys: pytest.CaptureFixture[str]
):
    (write_run(runs / "x") / "metrics.jsonl").write_bytes(contents)
    row = row_of(printed(capsys), "x")
    assert " ".join(f"x broken off {step} {values} ".split()) in row


def test_only_the_end_of_long_metrics_is_read(runs: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_run(runs / "x")
    whole = Run.read(path).progress
    assert whole.values is not None and whole.values["heldout_accuracy"] == 0.75  # of step 20
    monkeypatch.setattr("dsm_train.reporting.runs.TAIL", 1000)
    end = Run.read(path).progress
    assert end.step == 120 and end.values is not None and "heldout_accuracy" not in end.values


def damage(run: Path, how: str) -> None:
    newest = run / "checkpoints" / "00000140-grpo-100"
    if how == "no sums":
        (newest / "SHA256SUMS").unlink()
    elif how == "state cut off":
        (newest / "state.json").write_text('{"format": 1')
    elif how == "newer":
        (newest / "state.json").write_text(json.dumps({"format": 99, "version": "9.0"}))
    elif how == "being written":
        newest.rename(newest.with_name(f".{newest.name}.writing"))


@pytest.mark.parametrize(
    ("how", "origin", "alone"),
    [
        ("not at all", "grpo 100", "grpo 100"),
        ("no sums", "grpo 90", "none is whole"),
        ("state cut off", "grpo 90", "none is whole"),
        ("newer", "a newer dsm wrote it", "a newer dsm wrote it"),
        ("being written", "grpo 90", "no checkpoint"),
    ],
)
def test_a_run_continues_from_its_newest_checkpoint_that_is_whole(
    how: str, origin: str, alone: str, runs: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("two", "one"):
        write_checkpoint(write_run(runs / name), 100)
        damage(runs / name, how)
    write_checkpoint(runs / "two", 90)
    text = printed(capsys)
    assert row_of(text, "two").endswith(f" 3h {origin}") and row_of(text, "one").endswith(f" 3h {alone}")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("dsm-train grpo steps=190", "dsm-train grpo steps=190 run.out=runs/x"),
        ("dsm-train grpo run.out=runs/x", "dsm-train grpo run.out=runs/x"),
        ("dsm-train grpo --run.out=./runs/x", "dsm-train grpo --run.out=./runs/x"),
        ("dsm-train grpo run.out=runs/before", "dsm-train grpo run.out=runs/before run.out=runs/x"),
        ("dsm-train grpo run.out=runs/x run.resume=never",
         "dsm-train grpo run.out=runs/x run.resume=never run.resume=auto"),
        ("dsm-train grpo 'a=b c' run.out=runs/x", "dsm-train grpo 'a=b c' run.out=runs/x"),
    ],
)  # fmt: skip
def test_the_command_that_continues_is_the_last_one_with_the_folder(
    given: str, expected: str, runs: Path, capsys: pytest.CaptureFixture[str]
):
    starts = [start("dsm-train grpo first", Path.cwd()), start(given, Path.cwd())]
    write_checkpoint(write_run(runs / "x", starts=starts), 100)
    assert printed(capsys).splitlines()[-2:] == ["to continue x:", f"  {expected}"]


def test_the_command_leads_to_the_folder_it_was_given_in(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A shell runs the lines: `dsm-train` there is a script that says where it is and what it was given."""
    home = Path.cwd() / "my folder"
    prompts = " ".join(f"prompts.{n}={'x' * 20}" for n in range(9))
    write_checkpoint(write_run(home / "runs" / "x", starts=[start(f"dsm-train grpo {prompts} 'a=b c'", home)]), 100)
    lines = printed(capsys, "folder=my folder/runs").split("to continue x:\n")[1]
    tools = Path("tools")
    tools.mkdir()
    (tools / "dsm-train").write_text('#!/bin/sh\npwd; for word in "$@"; do echo "$word"; done\n')
    (tools / "dsm-train").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools.absolute()}{os.pathsep}{os.environ['PATH']}")
    said = subprocess.run(["sh", "-c", lines], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [str(home), "grpo", *prompts.split(), "a=b c", f"run.out={home / 'runs' / 'x'}"]


def test_many_runs_get_a_hint_in_place_of_commands(runs: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(4):
        write_checkpoint(write_run(runs / f"{number} x", starts=[start("dsm-train grpo", Path.cwd())]), 100)
    last = printed(capsys).splitlines()[-1]
    arguments = shlex.split(last)
    assert arguments[:2] == ["dsm-train", "runs"] and "command" not in last
    assert "to continue\n  dsm-train grpo" in printed(capsys, *arguments[2:])


def test_the_page_of_a_run_tells_what_ran(runs: Path, capsys: pytest.CaptureFixture[str]):
    starts = [start("torchrun --standalone --nproc-per-node 4 -m dsm_train grpo", Path.cwd()), {"clean": True}]
    path = write_run(runs / "x", starts=starts[:1], ended="stopped by SIGTERM after step 100 of 190 of grpo " * 3)
    write_checkpoint(path, 90)
    write_checkpoint(path, 100, best_folder="00000130-grpo-90", time="2026-12-01T03:00:00")
    text = printed(capsys, f"folder={path}")
    flat = " ".join(text.split())
    for part in (
        "state stopped (SIGTERM): stopped by SIGTERM after step 100 of 190 of grpo",
        "step grpo 120/190",
        "metrics reward 0.12, accuracy 0.75, loss 0.25 ",
        "code c7fe62e2c15ad529322e3d1729a8e25869fe71bf, 2 file(s) changed: changes/0123456789ab.patch",
        "versions dsm 0.1.0, torch 2.13.0 ",
        "layout 4 rank(s): tp 2, dp 2; seed 7",
        "devices 4 x NVIDIA H200",
        "00000130-grpo-90 step 90 of 190 of grpo, at no known time, 1.5 MB, the best",
        "00000140-grpo-100 step 100 of 190 of grpo, 2026-12-01 03:00:00, 1.5 MB to continue",
        "to continue torchrun --standalone --nproc-per-node 4 -m dsm_train grpo run.out=runs/x",
    ):
        assert part in flat


def test_a_long_name_is_cut_and_control_characters_do_not_reach_the_terminal(
    runs: Path, capsys: pytest.CaptureFixture[str]
):
    write_run(runs / ("a long name " * 12), ended="VeryLongNamedConfigurationError: x")
    write_run(runs / "new\nline\x1b[31m", stage="gr\x1bpo")
    text = printed(capsys)
    assert "\x1b" not in text and "new?line?[31m" in text and len(text.splitlines()) == 3


def test_no_runs_and_no_folder_are_a_line(runs: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["runs"])
    assert end.value.code == 2
    line = "dsm-train runs: folder = runs does not exist: name a folder that holds runs, or that of a run\n"
    assert capsys.readouterr().err == line
    runs.mkdir()
    assert printed(capsys) == "no runs in runs, up to 3 levels down\n"
    (runs / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        main(["runs", "folder=runs/file"])
    assert end.value.code == 2 and "is a file" in capsys.readouterr().err


def test_the_table_needs_neither_torch_nor_megatron(runs: Path):
    write_checkpoint(write_run(runs / "x", starts=[start("dsm-train grpo", Path.cwd())]), 100)
    code = """
import sys
from importlib.abc import MetaPathFinder
class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformers", "pyarrow", "numpy", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
from dsm_train.__main__ import main
main(["runs"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "grpo 100" in done.stdout, done.stderr


def test_a_reader_that_leaves_is_no_crash(runs: Path):
    for number in range(1200):  # more than a pipe holds
        (runs / f"{number:05}-{'x' * 60}").mkdir(parents=True)
        (runs / f"{number:05}-{'x' * 60}" / "run.json").write_text("{}")
    command = [sys.executable, "-m", "dsm_train", "runs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b"" and child.wait() == 0
