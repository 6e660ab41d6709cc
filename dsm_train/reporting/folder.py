"""Folder of a run: claimed by one run at a time, never with files of two runs in it."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from dsm_train.config import RunConfig
from dsm_train.reporting.metrics import prepare_output

STATE = "run.json"
"""Who runs or ran here, and whether it finished; locked while the run lives."""
ROLLOUTS = "rollouts"
"""Folder of the rollouts that were recorded since the last checkpoint."""
FILES = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "tensorboard",
    "report.json",
    "curve.png",
    "eval.json",
    "weights",
    "checkpoints",
    "changes",
    ROLLOUTS,
)
"""Files and folders that a run writes. Those of other names are the user's and stay."""
RESULTS = ("report.json", "curve.png", "eval.json", "weights")
"""Files and folders that a run writes at its end."""
RECORDS = ("metrics.jsonl", "samples.jsonl")
"""Files that grow while a run trains."""


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
        file = os.fdopen(os.open(path / STATE, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
        try:
            state = _lock(path, file)
            _check_room(path, state, overwrite, init)
        except BaseException:
            file.close()
            raise
        return cls(path, state, file)

    @property
    def unfinished(self) -> bool:
        """True when the folder holds a run that began and did not finish."""
        begun = bool(self._state) or (self.path / "checkpoints").exists()  # its state may be damaged
        return begun and not _finished(self.path, self._state)

    @property
    def identity(self) -> dict[str, str]:
        """Identity of the run that the folder holds; {} where none is known."""
        return dict(self._state.get("identity") or {})

    @property
    def is_restarted(self) -> bool:
        """True when torchrun has started the ranks of the run that the folder holds again."""
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        return again and (self._state.get("agent"), self._state.get("host")) == (_agent(), socket.gethostname())

    @property
    def starts(self) -> list[Any]:
        """Records of the starts of the run that the folder holds."""
        return list(self._state.get("starts") or [])

    @property
    def named(self) -> str | None:
        """Folder that the user named for the run to continue from, if it was so."""
        return self._state.get("named")

    def begin(self, *, keep: Collection[str] = (), **state: Any) -> None:
        """Begin a new run: files of a finished one are removed, those of a broken-off one moved aside as a whole.

        They go to unfinished-DATE-TIME. keep: names of files that stay for the new run; state: more for run.json.
        """
        _make_room(self.path, self._state, keep)
        self._state = {"started": _now(), **self._who(), **state}
        self._write({"finished": None, "ended": None})

    def resume(self, metrics_bytes: int, samples_bytes: int, source: Path | None = None, **state: Any) -> list[str]:
        """Continue the run that the folder holds, or that of another folder: records are cut back to their sizes then.

        source: folder of the run whose checkpoint is continued, if it is another; its records are copied.
        Returns lines about records that are not what they were.
        """
        sizes = dict(zip(RECORDS, (metrics_bytes, samples_bytes), strict=True))
        if source is not None:
            self.begin(**state)
            for name in sizes:
                if (source / name).exists():
                    shutil.copyfile(source / name, self.path / name)
        elif _finished(self.path, self._state):  # the user goes back
            _remove(self.path / name for name in RESULTS)
        notes = [note for name, size in sizes.items() if (note := _cut(self.path / name, size)) is not None]
        self._write({**self._who(), **state, "finished": None, "ended": None})
        return notes

    def end(self, how: str) -> None:
        """Note how the run ended that did not finish; a disk that is full or read-only cannot take it."""
        with suppress(OSError):
            self._write({"ended": how})

    def finish(self, **state: Any) -> None:
        """Note that the run did all it was asked for."""
        self._write({**state, "finished": _now()})
        shutil.rmtree(self.path / ROLLOUTS, ignore_errors=True)  # recorded to be taken up by a run that is continued

    @staticmethod
    def _who() -> dict[str, Any]:
        return {"pid": os.getpid(), "host": socket.gethostname(), "agent": _agent()}

    def close(self) -> None:
        """Let other runs have the folder."""
        self._file.close()

    def _write(self, change: dict[str, Any]) -> None:
        self._state |= change
        text, file = (json.dumps(self._state) + "\n").encode(), self._file.fileno()
        size = os.fstat(file).st_size
        try:
            _write_at(file, size, b"\n" * (len(text) - size))  # a full disk takes nothing from what was there
        except OSError:
            os.ftruncate(file, size)
            raise
        _write_at(file, 0, text)
        os.ftruncate(file, len(text))  # a kill before it leaves the end of a longer text behind

    def __enter__(self) -> RunFolder:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_at(file: int, place: int, text: bytes) -> None:
    """Write all of a text; the system takes part of it where the disk becomes full."""
    while text:
        written = os.pwrite(file, text, place)
        place, text = place + written, text[written:]


def claim_folder(run: RunConfig, stage: str) -> RunFolder:
    """Claim `run.out`, or a new folder named after the stage where there is none; for the main rank alone.

    The other ranks get `path` from the main rank, once there is a process group.
    """
    path = run.out or restarted(stage) or new_folder(stage)
    return RunFolder.claim(path, overwrite=run.overwrite, init=run.init)


def restarted(stage: str, parent: Path = Path("runs")) -> Path | None:
    """Find the folder that a run had before torchrun started its ranks again; None where it did not."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not parent.is_dir():
        return None
    for path in sorted(parent.glob(f"{stage}-*"), reverse=True):
        state = read_state(path)
        if state.get("agent") == _agent() and state.get("host") == socket.gethostname() and not state.get("finished"):
            return path
    return None


def _agent() -> int | None:
    """Process of torchrun, which starts ranks again; None without it."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


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


def read_state(path: Path) -> dict[str, Any]:
    """Read who runs or ran in a folder, as run.json has it; {} for nobody, or a file that cannot be read."""
    try:
        with (path / STATE).open(encoding="utf-8") as file:
            return _read(file)
    except (OSError, UnicodeDecodeError):
        return {}


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        state, _ = json.JSONDecoder().raw_decode(file.read() or "{}")
    except json.JSONDecodeError:
        return {}
    return state if isinstance(state, dict) else {}


def _cut(file: Path, size: int) -> str | None:
    """Cut what was written after a checkpoint off a file; returns a line where it has become shorter than it was."""
    has = file.stat().st_size if file.exists() else 0
    if has > size:
        os.truncate(file, size)
    if 0 < has < size:
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # half a row
    if has >= size:
        return None
    return f"{file} has {has} bytes, and had {size} at the checkpoint: rows are missing"


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


def _make_room(path: Path, state: dict[str, Any], keep: Collection[str]) -> None:
    """Remove or move aside what an earlier run left."""
    old = [file for file in _old(path) if file.name not in keep]
    if _finished(path, state):
        _remove(old)
    elif old:
        aside = _aside(path, str(state.get("started") or _now()), [file.name for file in old])
        for file in old:
            file.rename(aside / file.name)


def _aside(path: Path, started: str, names: list[str]) -> Path:
    """Create the folder that an unfinished run is moved to; a move that was broken off is gone on with."""
    for count in itertools.count(1):
        aside = path / (f"unfinished-{started}" if count == 1 else f"unfinished-{started}-{count}")
        if not any((aside / name).exists() for name in names):
            break
    aside.mkdir(exist_ok=True)
    return aside


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def _finished(path: Path, state: dict[str, Any]) -> Any:
    """Return when the earlier run finished, True where only its weights tell, or nothing."""
    return state.get("finished") or (not state and (path / "weights").exists())


def _old(path: Path) -> list[Path]:
    return [path / name for name in FILES if (path / name).exists()]


def _now() -> str:
    """Date and time, as a part of a file's name."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")
