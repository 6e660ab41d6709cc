"""Records of a run while it trains: metrics.jsonl, tensorboard, samples.jsonl and a line of progress.

Every sink takes None in place of its folder or stream and then does nothing, so that all ranks run the same code
and only rank 0 writes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat, TextIO


def prepare_output(folder: Path) -> None:
    """Create the output folder and prove that it can be written, before anything is trained.

    Raises ValueError with the path and the reason otherwise. A folder without any write permission is refused for
    root as well, whom the system would let through.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(None, f"{existing} is a file")
        if not existing.stat().st_mode & 0o222 or not os.access(existing, os.W_OK):
            raise PermissionError(None, f"{existing} is read-only")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {str(folder)!r}: {error.strerror}; choose a folder you can write to"
        ) from error


def json_safe(value: Any) -> Any:
    """Replace NaN and infinities by None: JSON has no word for them, and a reader must not stumble over them."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _JsonLines:
    """File of one JSON object per line, each on disk as soon as it is written; None writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("ab", buffering=0) if path else None  # close has nothing to write, on a full disk either

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file:
            text = (json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
            while text:  # the system takes part of it where the disk becomes full
                text = text[self._file.write(text) :]

    def sync(self) -> int:
        if not self._file:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        if self._file:
            self._file.close()


HEADLINES = ("heldout_accuracy", "reward", "loss", "kl", "response_tokens")
"""Metrics that tensorboard shows first: it sorts by name, and all others go to a group that follows."""


class Metrics:
    """Metrics of each step: a line of metrics.jsonl, and scalars under tensorboard/ if tensorboard is installed."""

    def __init__(self, folder: Path | None) -> None:
        """Continue metrics.jsonl where there is one; tensorboard's files are written anew, with the same rows."""
        self._lines = _JsonLines(folder / "metrics.jsonl" if folder else None)
        if folder:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._tensorboard = _tensorboard_writer(folder / "tensorboard") if folder else None
        if folder and self._tensorboard:
            for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._draw(row.pop("step"), row.pop("phase"), row.pop("time"), row)

    def log(self, step: int, phase: str, values: Mapping[str, SupportsFloat]) -> None:
        """Append {"step", "phase", "time", ...values}; values may be 0-d tensors; NaN and infinities become null."""
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        self._lines.write({"step": step, "phase": phase, "time": round(now, 3)} | numbers)
        self._draw(step, phase, now, numbers)

    def _draw(self, step: int, phase: str, now: float, numbers: Mapping[str, float | None]) -> None:
        if self._tensorboard is None:
            return
        for name, number in numbers.items():
            group = phase if name in HEADLINES else f"{phase}_details"
            value = math.nan if number is None else number
            self._tensorboard.add_scalar(f"{group}/{name}", value, step, wall_time=now)
        self._tensorboard.flush()

    def sync(self) -> int:
        """Have all rows on the disk; returns the size of metrics.jsonl."""
        return self._lines.sync()

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        if self._tensorboard:
            self._tensorboard.close()


def _tensorboard_writer(folder: Path) -> Any | None:
    """Return tensorboard's own writer (0.3 s to import, where torch.utils.tensorboard takes 2 s), or None."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(folder))


@dataclass(frozen=True, slots=True)
class Sample:
    """Response for a person to read."""

    prompt: str
    response: str
    answer: str
    reward: float
    finish: str
    """Reason for its end: a stop token, the length limit, ..."""
    parts: dict[str, float]
    """Value of each reward function, by name."""
    task: str
    """Place of the question: file and line, with the row's own id."""


class Samples:
    """Rollouts to read: samples.jsonl with one line per response."""

    def __init__(self, folder: Path | None) -> None:
        self._lines = _JsonLines(folder / "samples.jsonl" if folder else None)

    def log(self, step: int, samples: Iterable[Sample]) -> None:
        """Append {"step", "prompt", "response", "answer", "reward", "finish", "parts", "task"} for each sample."""
        for sample in samples:
            self._lines.write({"step": step} | asdict(sample))

    def sync(self) -> int:
        """Have all lines on the disk; returns the file's size."""
        return self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class Progress:
    """Progress of a run and the time left: one line redrawn on a terminal, a line every 10 s elsewhere.

    with Progress("grpo", 260, sys.stderr) as progress:
        progress.step({"reward": 0.61})    # grpo 121/260  46 %  2:31 elapsed, 2:56 left  reward 0.61
    """

    def __init__(self, label: str, total: int, stream: TextIO | None, interval: float = 10.0, done: int = 0) -> None:
        """Begin with `done` of `total` steps done."""
        self._label, self._total, self._stream, self._interval = label, total, stream, interval
        self._start = self._last_step = time.perf_counter()
        self._last_line = -math.inf
        self._durations: deque[float] = deque(maxlen=50)
        self._first = self._done = done
        self._line = ""

    def step(self, values: Mapping[str, SupportsFloat]) -> None:
        """Count one more step done and show its values."""
        now = time.perf_counter()
        if self._done == self._first + 1:
            self._durations.clear()  # the first step also compiles and allocates: no measure of the others
        self._durations.append(now - self._last_step)
        self._done, self._last_step = self._done + 1, now
        left = (self._total - self._done) * sum(self._durations) / len(self._durations)
        shown = "".join(f"  {name} {_short(float(value))}" for name, value in values.items())
        self._line = (
            f"{self._label} {self._done}/{self._total}  {100 * self._done // self._total} %  "
            f"{_clock(now - self._start)} elapsed, {_clock(left)} left{shown}"
        )
        if self._stream is None:
            return
        if self._stream.isatty():
            self._stream.write("\r" + self._line[: shutil.get_terminal_size().columns - 1] + "\x1b[K")
            self._stream.flush()
        elif now - self._last_line >= self._interval or self._done == self._total:
            self._write_line(now)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._stream is None or not self._line:
            return
        if self._stream.isatty():
            self._stream.write("\n")
            self._stream.flush()
        else:
            self._write_line(time.perf_counter())
        self._line = ""

    def _write_line(self, now: float) -> None:
        assert self._stream is not None
        self._stream.write(self._line + "\n")
        self._stream.flush()
        self._line, self._last_line = "", now

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _clock(seconds: float) -> str:
    """Write seconds as 2:05, or 1:02:05 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(value: float) -> str:
    """Write a number in few characters: 0.612, 1e-06, 5.23k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class Stopwatch:
    """Stopwatch of the phases of a step: seconds by name in `laps`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    def rate(self, tokens: int) -> dict[str, float]:
        """Return the laps, their sum, and tokens per second over it."""
        seconds = sum(self.laps.values())
        return self.laps | {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
