"""Folder of a run: claimed by one run at a time, never with files of two runs in it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from dsm_train.config import RunConfig
from dsm_train.reporting.metrics import prepare_output

STATE = "run.json"
"""Who runs or ran here, and whether it finished; locked while the run lives."""
FILES = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "tensorboard",
    "report.json",
    "curve.png",
    "eval.json",
    "weights",
)
"""Files and folders that a run writes. Those of other names are the user's and stay."""


class RunFolder:
    """Output folder of a run that trains, held by the main rank.

    with RunFolder.claim(Path("runs/x"), overwrite=False) as folder:    # begins with a folder that is clear
        ...
        folder.finish()    # without it the run counts as broken off
    """

    def __init__(self, path: Path, state: dict[str, Any], file: TextIO) -> None:
        self.path, self._state, self._file = path, state, file

    @classmethod
    def claim(cls, path: Path, *, overwrite: bool, init: Path | None = None) -> RunFolder:
        """Take the folder for a new run, creating it where it is missing; nothing is removed before `begin`.

        init: weights that the new run starts from.
        Raises ValueError when the folder cannot be written, another run lives in it, a finished run would be lost, or
        `init` lies among the files to go. A file system without locks lets a second run in.
        """
        prepare_output(path)
        file = (path / STATE).open("a+", encoding="utf-8")
        try:
            state = _lock(path, file)
            _check_room(path, state, overwrite, init)
        except BaseException:
            file.close()
            raise
        return cls(path, state, file)

    def begin(self) -> None:
        """Begin the run: files of a finished one are removed, those of one that was broken off moved aside as a whole.

        They go to unfinished-DATE-TIME.
        """
        _make_room(self.path, self._state)
        self._state = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        self._write({"finished": None})

    def finish(self) -> None:
        """Note that the run did all it was asked for."""
        self._write({"finished": _now()})

    def close(self) -> None:
        """Let other runs have the folder."""
        self._file.close()

    def _write(self, change: dict[str, Any]) -> None:
        self._state |= change
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(self._state) + "\n")
        self._file.flush()

    def __enter__(self) -> RunFolder:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def claim_folder(run: RunConfig, stage: str) -> RunFolder:
    """Claim `run.out`, or a new folder named after the stage where there is none; for the main rank alone.

    The other ranks get `path` from the main rank, once there is a process group.
    """
    path = new_folder(stage) if run.out is None else run.out
    return RunFolder.claim(path, overwrite=run.overwrite, init=run.init)


def new_folder(stage: str, parent: Path = Path("runs")) -> Path:
    """Create and return parent/STAGE-DATE-TIME, a folder that no other run has."""
    prepare_output(parent)
    name = f"{stage}-{_now()}"
    for count in range(1, 1000):
        path = parent / (name if count == 1 else f"{name}-{count}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise ValueError(f"{parent} holds a thousand runs of this second: set run.out")


def _lock(path: Path, file: TextIO) -> dict[str, Any]:
    """Lock the state's file and return the state that an earlier run left; ValueError while that run lives."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        state = _read(file)
        who = f"process {state.get('pid')} on {state.get('host')}, since {state.get('started')}"
        raise ValueError(f"run.out: a run lives in {path} ({who}): choose another folder, or stop that run") from None
    except OSError:
        pass  # there are file systems without locks
    return _read(file)


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        state = json.loads(file.read() or "{}")
    except json.JSONDecodeError:  # killed while writing
        return {}
    return state if isinstance(state, dict) else {}


def _check_room(path: Path, state: dict[str, Any], overwrite: bool, init: Path | None) -> None:
    """Raise ValueError where a finished run or a model would be lost, or the weights that the new run starts from."""
    finished = _finished(path, state)
    if finished and not overwrite:
        when = f" on {finished}" if isinstance(finished, str) else ""
        raise ValueError(
            f"run.out: {path} holds a run that finished{when}: choose another folder, or replace it with "
            "run.overwrite=true"
        )
    if not (path / STATE).stat().st_size and (path / "config.json").exists():
        raise ValueError(f"run.out: {path} holds a model, not a run: choose another folder")
    if init is not None and any(init.absolute().is_relative_to(file.absolute()) for file in _old(path)):
        raise ValueError(f"run.init = {init} is among the files that this run replaces: choose another run.out")


def _make_room(path: Path, state: dict[str, Any]) -> None:
    """Remove or move aside what an earlier run left."""
    aside = None if _finished(path, state) else path / f"unfinished-{state.get('started') or _now()}"
    for file in _old(path):
        if aside is not None:
            aside.mkdir(exist_ok=True)
            file.rename(aside / file.name)
        elif file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def _finished(path: Path, state: dict[str, Any]) -> Any:
    """Return when the earlier run finished, True where only its weights tell, or nothing."""
    return state.get("finished") or (not state and (path / "weights").exists())


def _old(path: Path) -> list[Path]:
    return [path / name for name in FILES if (path / name).exists()]


def _now() -> str:
    """Date and time, as a part of a file's name."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")
