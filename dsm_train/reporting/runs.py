"""Runs as their folders show them: state, last metrics, and the checkpoint to continue from.

A run is read as it stands on the disk, damaged or half written, and never changed. Imports neither torch nor Megatron.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dsm_train.checkpoint.place import SUMS, NewerFormat, Place, checkpoints
from dsm_train.reporting.folder import STATE, read_state
from dsm_train.reporting.record import Record

DEPTH = 3
"""Levels below a folder that are searched for runs."""
TAIL = 2**18
"""Bytes of metrics.jsonl that are read from its end."""


@dataclass(frozen=True)
class Progress:
    """Last rows of metrics.jsonl."""

    loop: str = ""
    step: int | None = None
    time: float = 0.0
    """Seconds since 1970."""
    values: Mapping[str, float] | None = None
    """Last value of each metric in this loop; None: the file holds nothing that can be read."""

    @classmethod
    def read(cls, file: Path) -> Progress:
        """Read the end of the file, however long it is."""
        try:
            with file.open("rb") as opened:
                opened.seek(max(0, opened.seek(0, os.SEEK_END) - TAIL))
                lines = opened.read().splitlines()
        except FileNotFoundError:
            return cls(values={})
        except OSError:
            return cls()
        rows = [row for row in map(_row, lines) if row is not None]
        if not rows:
            return cls(values=None if lines else {})
        at, values = rows[-1], {}
        for row in rows:
            if row["phase"] == at["phase"]:
                values |= {name: value for name, value in row.items() if _is_number(value)}
        return cls(at["phase"], at["step"], values.get("time", 0.0), values)


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint in a run's folder that was finished."""

    folder: Path
    place: Place | None
    trouble: str = ""
    """Reason why nothing can be continued from it."""
    newer: bool = False
    """True when a later version wrote it."""

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read where the run stood; the checksums are compared when it is continued, not here."""
        if not (folder / SUMS).exists():
            return cls(folder, None, f"{SUMS} is missing")
        try:
            return cls(folder, Place.read(folder))
        except NewerFormat:
            return cls(folder, None, "a newer dsm wrote it", newer=True)
        except ValueError as error:
            return cls(folder, None, str(error))

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(_stat(file)[0] for file in self.folder.rglob("*") if file.is_file())


@dataclass(frozen=True)
class Run:
    """Run as its folder shows it."""

    path: Path
    about: Mapping[str, Any]
    """Contents of run.json; whoever wrote it, any key may lack."""
    state: str
    """Words for a person: running, finished, stopped (SIGTERM), failed (disk), broken off, ..."""
    progress: Progress
    steps: int | None
    """Steps of the loop in all."""
    checkpoints: tuple[Checkpoint, ...]
    """The oldest first."""
    starts: tuple[Record, ...]
    """Starts of the run, likewise."""
    time: float
    """Last sign of life, in seconds since 1970."""

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a folder that holds run.json."""
        about, progress, found = (
            read_state(path),
            Progress.read(path / "metrics.jsonl"),
            _checkpoints(path),
        )
        records = about.get("starts")
        starts = tuple(map(Record.of, records)) if isinstance(records, list) else ()
        steps = next((c.place.steps for c in reversed(found) if c.place and c.place.loop == progress.loop), None)
        times = [about.get("started"), about.get("finished"), *(start.time for start in starts)]
        return cls(
            path,
            about,
            _state(path, about),
            progress,
            steps or _configured_steps(path, progress.loop),
            found,
            starts,
            max(progress.time, *map(seconds_of, times)) or _stat(path / STATE)[1],
        )

    @property
    def origin(self) -> Place | str:
        """Place of the checkpoint that the run is continued from, or the reason why it is not."""
        if self.state in ("running", "finished", "unreadable", "nothing began"):
            return f"no, {self.state}"
        for found in reversed(self.checkpoints):
            if found.newer:
                return found.trouble
            if found.place is not None:
                return found.place
        return "none is whole" if self.checkpoints else "no checkpoint"

    @property
    def best(self) -> str | None:
        """Name of the best checkpoint, if the run looks for it."""
        return next((c.place.best_folder for c in reversed(self.checkpoints) if c.place), None)

    def command(self) -> list[str] | None:
        """Return the words, as a shell reads them, of the command that continues the run; None: it was not recorded."""
        start = self.starts[-1] if self.starts else Record()
        words = split(start.command)
        if words is None:
            return None
        here = Path.cwd()
        folder = here if start.directory is None else Path(str(start.directory))
        out = [word.partition("=")[2] for word in words if word.removeprefix("--").startswith("run.out=")]
        if not out or (folder / out[-1]).resolve() != self.path.resolve():
            words.append(f"run.out={self.path if folder == here else self.path.absolute()}")
        if any(word.removeprefix("--").startswith("run.resume") for word in words):
            words.append("run.resume=auto")  # the later one wins
        away = [] if folder == here else [f"cd {shlex.quote(str(folder))} &&"]
        return [*away, *map(shlex.quote, words)]


def find_runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Find the folders of runs, so many levels down; what lies in a run's folder belongs to that run."""
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[:1] != ".")
    except OSError:
        return
    for path in inside:
        if (path / STATE).is_file():
            yield path
        elif depth > 1:
            yield from find_runs(path, depth - 1)


def seconds_of(text: object) -> float:
    """Read a date and time as run.json (20261201-143000) or a record has it; 0 for what is none."""
    for read in (lambda given: datetime.strptime(given, "%Y%m%d-%H%M%S"), datetime.fromisoformat):
        try:
            return read(str(text)).timestamp()
        except (ValueError, OverflowError, OSError):
            continue
    return 0.0


def split(command: object) -> list[str] | None:
    """Split a command into its words; None for what is none."""
    try:
        return shlex.split(command) if isinstance(command, str) else None
    except ValueError:
        return None


def _state(path: Path, about: Mapping[str, Any]) -> str:
    """Put the state of a run into words."""
    if about.get("finished"):
        return "finished"
    alive, ended = _lives(path / STATE), about.get("ended")
    if alive:
        return "running"
    if not about:
        return "nothing began" if alive is False and _stat(path / STATE)[0] == 0 else "unreadable"
    if not ended:
        return "broken off" if alive is False else "unfinished"
    how = re.match(r"(stopped) by (?:(SIG\w+))?|the (disk)|(\w*(?:Error|Exception|Interrupt))\b", str(ended))
    if how is None:
        return "failed"
    why = how[2] or how[3] or how[4]
    return (how[1] or "failed") + (f" ({why})" if why else "")


def _lives(file: Path) -> bool | None:
    """Try the lock that a living run holds on its run.json, and let go of it; None: there is no telling."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, or a file that may not be read
        return None
    return False


def _checkpoints(run: Path) -> tuple[Checkpoint, ...]:
    try:
        return tuple(map(Checkpoint.read, checkpoints(run)))
    except OSError:
        return ()


def _configured_steps(run: Path, loop: str) -> int | None:
    """Look up the steps of a loop in config.yaml, as text, for reading YAML takes long; None: it does not tell."""
    pattern = r"^(?:sft|warmup):\n  steps: (\d+)$" if loop == "sft" else r"^steps: (\d+)$"
    try:
        found = re.search(pattern, (run / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(found[1]) if found else None


def _row(line: bytes) -> dict[str, Any] | None:
    """Parse a row of metrics; None for a part of one, as a kill or a begin in the middle of the file leaves it."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("phase"), str) and isinstance(row.get("step"), int)
    return row if whole else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stat(file: Path) -> tuple[int, float]:
    """Return the size and the time of the last change; zeros for a file that is gone."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0.0
    return found.st_size, found.st_mtime
