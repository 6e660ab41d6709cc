"""Progress of a step and the time left, as one line on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_EVERY_TERMINAL, _EVERY_FILE = 0.5, 60.0
"""Seconds between two lines: on a terminal they replace each other, in a log they do not."""
_QUIET = 1.0
"""A step that takes less than this many seconds says nothing."""


class ShardProgress:
    """Progress line that watches, while the block runs, for the files that finished shards leave behind.

    The shards may be worked on anywhere: the file system is what all machines of a cluster share. Time left goes by the
    bytes of the inputs.
    """

    def __init__(self, name: str, pending: Sequence[tuple[Path, int]], shards: int) -> None:
        """`pending`: per unfinished shard the file that will mark it finished, and its size; `shards`: all of them."""
        self._name, self._shards = name, shards
        self._pending = dict(pending)
        self._before = shards - len(pending)
        self._bytes = sum(self._pending.values()) or 1
        self._terminal = sys.stderr.isatty()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ShardProgress:
        self._started = time.monotonic()
        if self._before:
            print(f"{self._name}: {self._before} of {self._shards} shards were finished before", file=sys.stderr)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is not None or time.monotonic() - self._started > _QUIET:
            self._show(end="\n")

    def _watch(self) -> None:
        seconds = every = _EVERY_TERMINAL if self._terminal else _EVERY_FILE
        while not self._over.wait(seconds):
            started = time.monotonic()
            self._show(end="" if self._terminal else "\n")
            # Looking for a hundred thousand files is slow: spend no more than a twentieth of the time on it.
            seconds = max(every, 20 * (time.monotonic() - started))

    def _show(self, end: str) -> None:
        self._pending = {path: size for path, size in self._pending.items() if not path.exists()}
        seconds = time.monotonic() - self._started
        line = progress_line(
            self._name,
            self._shards - len(self._pending),
            self._shards,
            seconds,
            self._bytes,
            sum(self._pending.values()),
        )
        print(f"\r{line:<79}" if self._terminal else line, end=end, file=sys.stderr, flush=True)


def progress_line(name: str, done: int, shards: int, seconds: float, size: int, left: int) -> str:
    """Line for `done` of `shards` finished, with `left` of `size` bytes still to do after `seconds`."""
    line = f"{name}: {done} of {shards} shards, {duration(seconds)}"
    if not left:
        return line
    if left == size:
        return f"{line}, time left unknown until a shard is finished"
    return f"{line}, about {duration(seconds * left / (size - left))} left"


def duration(seconds: float) -> str:
    """Seconds in words: "12 s", "3 min 20 s", "5 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
