"""A rank that keeps the others waiting ends the run, with a line that names the rank and its phase.

Every rank reports to the run's store, from a thread of its own: the phase it is in, how often it has made progress, and
whether its main thread waits for other ranks. It reads what the others report. The first that sees that the run has
stopped leaves a verdict in the store; all ranks end by it, and one of each node prints it.

A verdict rests on three facts:

- A rank whose reports stop changing is dead or stopped: to report needs nothing but the process.
- The run stands still when no rank makes progress (`enter`, `beat`) and at least one waits. It is the ranks that do not
  wait that are waited for. A rank's waiting is read off its main thread's stack, and off its GPU, which is busy while
  a collective on it waits.
- An exception within a collective is mostly the echo of another rank's end, which is looked for first.
"""

from __future__ import annotations

import json
import linecache
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import torch

from dsm_train.cli.errors import Ended, tell_torchrun

if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True)
class Report:
    """Report of a rank about itself."""

    host: str = "unknown"
    phase: str = "start"
    entered: int = 0
    """Phases entered."""
    beats: int = 0
    """Signs of life given."""
    waits: bool = False
    """True while the main thread waits for other ranks."""
    where: str = "unknown"
    """Line that the main thread executes."""
    paused: bool = False
    closed: bool = False
    number: int = 0
    """Reports before this one."""


@dataclass(frozen=True)
class Seen:
    """A rank's newest report, and the times in seconds at which it, and the rank's progress, last changed."""

    report: Report
    alive: float = 0.0
    moved: float = 0.0

    def then(self, report: Report, now: float) -> Seen:
        """Take in the report that was read now."""
        moves = (report.entered, report.beats) != (self.report.entered, self.report.beats)
        return Seen(report, alive=now if report != self.report else self.alive, moved=now if moves else self.moved)


class Watchdog:
    """Watchdog of one rank. `enter` and `beat` only count: they never wait."""

    def __init__(
        self, store: Store | None, rank: int, world_size: int, timeout_seconds: float, prog: str = "dsm-train"
    ) -> None:
        """Watch from now on, over the thread that calls.

        store: for this watchdog's keys alone, the same on every rank; timeout_seconds: how long the run may stand
        still; prog: what the line begins with.
        """
        self._rank, self._world_size, self._timeout, self._prog = rank, world_size, timeout_seconds, prog
        self._phase, self._entered, self._beats, self._pauses = "start", 0, 0, 0
        self._closed, self._failed, self._bereaved = threading.Event(), False, False
        self.last_words: Callable[[str], str] | None = None
        """Notes how the run ended, and says how it is continued; on the rank that tells the user."""
        self._tick = min(1.0, timeout_seconds / 10)
        # Every rank reads the reports of all: the more there are, the more rarely, as one store serves them.
        self._read_every = max(self._tick, min(world_size / 32, timeout_seconds / 5))
        self._patience = min(timeout_seconds / 2, max(3.0, 4 * self._read_every))
        self._store = None
        if store is None or world_size == 1:
            return
        # A connection of its own: the run's may be held by a collective. (The stubs do not know of clone.)
        self._store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._host, self._thread, self._reports = socket.gethostname(), threading.get_ident(), 0
        self._stream = torch.cuda.default_stream() if torch.cuda.is_available() else None
        self._seen = {other: Seen(Report()) for other in range(world_size)}
        self._report(self._store)
        self._watcher = threading.Thread(target=self._watch, args=(self._store,), name="watchdog", daemon=True)
        self._watcher.start()
        threading.Thread(target=self._watch_store, name="watchdog-store", daemon=True).start()

    @staticmethod
    def off() -> Watchdog:
        """Make the watchdog of a rank without others: it watches nothing."""
        return Watchdog(None, 0, 1, 60.0)

    def enter(self, phase: str) -> None:
        """Begin a phase of this rank's work, such as "rollout of step 3"."""
        self._phase, self._entered = phase, self._entered + 1

    def beat(self) -> None:
        """Give a sign of life within a phase."""
        self._beats += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend judgement during work of unknown length on one rank, for which the others wait."""
        self._pauses += 1
        try:
            yield
        finally:
            self._beats += 1
            self._pauses -= 1

    @contextmanager
    def failures(self, end_of: Callable[[BaseException], Ended | None] | None = None) -> Iterator[None]:
        """End the other ranks with a line when the block raises; this rank keeps its traceback.

        end_of: finds the end that an exception stands for, None for a crash; the others end with its status.
        """
        try:
            yield
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            end = end_of(error) if end_of is not None else error if isinstance(error, Ended) else None
            agreed = (end is not None and end.agreed) or (isinstance(error, SystemExit) and error.code in (0, None))
            if self._store is not None and not agreed:
                self._fail(self._store, error, end)
            raise

    def close(self) -> None:
        """Leave: this rank has finished, watches no longer, and is no longer missed."""
        if self._store is None or self._closed.is_set():
            return
        self._closed.set()
        self._watcher.join(self._patience)
        if self._watcher.is_alive():
            return  # the store does not answer
        with suppress(RuntimeError):  # the store has gone, and with it whom to tell
            self._report(self._store)

    def _watch(self, store: Store) -> None:
        """Report and look for a verdict every tick; read the others' reports and judge now and then."""
        clock, read = _Clock(self._tick), 0.0
        while not self._closed.wait(self._tick):
            now = clock.seconds()
            try:
                self._report(store, stands=now - self._seen[self._rank].moved > self._timeout / 2)
                if self._failed:
                    continue
                if store.check(["verdict"]):
                    self._end(store)
                if now - read >= self._read_every:
                    read = now
                    self._read(store, now)
                    verdict = judge(self._seen, now, self._timeout, self._patience, bereaved=self._bereaved)
                    if verdict is not None:
                        self._claim(store, 1, verdict)
            except RuntimeError as error:
                # A run that ends well may lose its store before this rank closes.
                if not self._closed.wait(self._patience):
                    self._end_alone(f"has gone ({_first_line(error)})")
                return

    def _watch_store(self) -> None:
        """Watch the store: with its node gone, the watcher would wait for its answer for ever."""
        clock, reports, since = _Clock(self._tick), 0, 0.0
        while not self._closed.wait(self._tick):
            now = clock.seconds()
            if self._reports != reports:
                reports, since = self._reports, now
            elif now - since > self._timeout and self._watcher.is_alive():
                self._end_alone(f"has not answered for {now - since:.0f} s")

    def _report(self, store: Store, *, stands: bool = False) -> None:
        """Tell the store about this rank; `stands`: it has made no progress for a while."""
        frame = sys._current_frames().get(self._thread)
        report = Report(
            host=self._host,
            phase=self._phase,
            entered=self._entered,
            beats=self._beats,
            # The GPU is asked only then: the question would disturb the capture of a CUDA graph.
            waits=(frame is not None and _in_collective(frame, frame.f_lineno)) or (stands and self._gpu_is_busy()),
            where=_place(frame),
            paused=self._pauses > 0,
            closed=self._closed.is_set(),
            number=self._reports,
        )
        store.set(f"rank{self._rank}", json.dumps(asdict(report)))
        self._reports += 1

    def _gpu_is_busy(self) -> bool:
        try:
            return self._stream is not None and not self._stream.query()
        except RuntimeError:
            return False  # a failed kernel: the main thread will hear of it

    def _read(self, store: Store, now: float) -> None:
        """Read the newest reports of all ranks."""
        keys = {rank: f"rank{rank}" for rank in self._seen}
        if not store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        for rank, text in zip(keys, store.multi_get(list(keys.values())), strict=True):
            self._seen[rank] = self._seen[rank].then(Report(**json.loads(text)), now)
        if any(seen.report.paused for seen in self._seen.values()):
            self._seen = {rank: replace(seen, moved=now) for rank, seen in self._seen.items()}

    def _fail(self, store: Store, error: BaseException, end: Ended | None) -> None:
        """Tell the others of this rank's exception."""
        stack = list(traceback.walk_tb(error.__traceback__))
        if end is None and (isinstance(error, torch.distributed.DistError) or _in_collective(*stack[-1])):
            # The echo of another rank's end, most likely: time for the watcher to learn of it, and to end this one.
            self._bereaved = True
            self._pauses += 1
            time.sleep(self._patience + 4 * self._read_every)
        self._failed = True
        what = f"exit status {error.code}" if isinstance(error, SystemExit) else _first_line(error)
        verdict = f'rank {self._rank} (host {self._host}) failed in "{self._phase}": {what}: ended'
        if end is not None:
            verdict = f"{end.line} (rank {self._rank}, host {self._host})"
        with suppress(RuntimeError):  # without a store, the others end by themselves
            self._claim(store, 1 if end is None else end.status, verdict)
            time.sleep(1.5 * self._tick)  # its end may take the store along: the others read first

    def _claim(self, store: Store, status: int, verdict: str) -> None:
        """Leave the verdict, with an exit status, for all ranks to find, unless there is one."""
        if store.add("verdicts", 1) == 1:
            store.set("verdict", json.dumps([status, verdict]))

    def _end(self, store: Store) -> NoReturn:
        """End by the verdict in the store; a rank of each node prints that of a crash, the main rank any other."""
        status, verdict = json.loads(store.get("verdict"))
        again = "" if self.last_words is None else f"; {self.last_words(verdict)}"
        first = store.add(f"printed on {self._host} {os.environ.get('GROUP_RANK')}", 1) == 1
        if first if status == 1 else again:
            self._print(verdict + again)
        elif again:
            self._print(again.removeprefix("; "))
        # Other nodes read the verdict first, and a rank that failed ends first: torchrun, which stops the others of a
        # node when one ends, must neither cut its traceback off nor name another as the cause.
        time.sleep(5 * self._tick)
        os._exit(status)

    def _end_alone(self, what: str) -> NoReturn:
        """End without a store to agree in."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            host = os.environ.get("MASTER_ADDR", "the first node")
            self._print(
                f"the run's store on {host} {what}: that node has ended, has failed or cannot be reached; "
                f'rank {self._rank} (host {self._host}) was in "{self._phase}": ended'
            )
        os._exit(1)

    def _print(self, text: str) -> None:
        """Print past sys.stderr, whose lock the main thread may hold."""
        above = "\n" if sys.stderr.isatty() else ""  # a line of progress may be under way
        os.write(2, f"{above}{self._prog}: {text}\n".encode())
        tell_torchrun(f"{self._prog}: {text}")


class _Clock:
    """Clock of the seconds that this process has lived through: in a job that was suspended, nobody was late."""

    def __init__(self, tick: float) -> None:
        self._longest, self._seconds, self._last = 3 * tick, 0.0, time.monotonic()

    def seconds(self) -> float:
        """Count the seconds since the start; to be asked every tick."""
        now = time.monotonic()
        self._seconds += min(now - self._last, self._longest)
        self._last = now
        return self._seconds


def judge(
    ranks: Mapping[int, Seen], now: float, timeout: float, patience: float, *, bereaved: bool = False
) -> str | None:
    """Decide whether the run has to end: a line that says why, or None.

    timeout: seconds that the run may stand still, and a rank be silent; patience: seconds that a rank may be silent
    when the run stands still, or when this rank is bereaved: the end of another has broken its collective.
    """
    here = {rank: seen for rank, seen in ranks.items() if not seen.report.closed}
    waiting = {rank: seen for rank, seen in here.items() if seen.report.waits}
    stands = bool(waiting) and all(now - seen.moved > timeout for seen in here.values())
    limit = patience if stands or bereaved else timeout
    silent = {rank: seen for rank, seen in here.items() if now - seen.alive > limit}
    if silent:
        seconds = now - next(iter(silent.values())).alive
        others = {rank: seen for rank, seen in waiting.items() if rank not in silent}
        return (
            f"{_phases(silent, 'was', 'were')} and has given no sign of life for {seconds:.0f} s{_while(others)}: "
            "ended. Killed, stopped, or on a node that failed or cannot be reached"
        )
    if not stands:
        return None
    seconds = now - max(seen.moved for seen in here.values())
    busy = {rank: seen for rank, seen in here.items() if rank not in waiting}
    if busy:
        behind = min(seen.report.entered for seen in busy.values())
        late = {rank: seen for rank, seen in busy.items() if seen.report.entered == behind}
        return (
            f"{_phases(late, 'has been', 'have been')} without progress for {seconds:.0f} s{_while(waiting)}: ended. "
            f"Alive, at {next(iter(late.values())).report.where}. "
            f"Raise parallel.timeout_minutes ({timeout / 60:g}) if it only needs longer"
        )
    finished = [rank for rank in ranks if rank not in here]
    if finished:
        return f"{_ranks(finished)} finished{_while(waiting)}, for {seconds:.0f} s: ended"
    return (
        f"all ranks wait for one another, for {seconds:.0f} s: {_phases(waiting, places=True)}: ended. "
        "Which is at fault cannot be told: a message may be lost, or their collectives differ"
    )


def _while(waiting: Mapping[int, Seen]) -> str:
    return f" while {_phases(waiting, 'waits', 'wait')}" if waiting else ""


def _phases(ranks: Mapping[int, Seen], one: str = "is", many: str = "are", *, places: bool = False) -> str:
    """Say where ranks are: `rank 3 (host b) is in "update of step 17"`, those in the same place together."""
    together: dict[str, list[int]] = {}
    for rank, seen in ranks.items():
        place = f'"{seen.report.phase}"' + (f" at {seen.report.where}" if places else "")
        together.setdefault(place, []).append(rank)
    parts = []
    for place, members in together.items():
        first, *more = sorted({ranks[rank].report.host for rank in members})
        host = f"{first} and {len(more)} more" if more else first
        parts.append(f"{_ranks(members)} (host {host}) {one if len(members) == 1 else many} in {place}")
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more places" if len(parts) > 4 else "")


def _ranks(ranks: Iterable[int]) -> str:
    """Name ranks in few characters: `rank 3`, `ranks 0-6, 8`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if '-' in text or ',' in text else ''} {text}"


def _in_collective(frame: FrameType, line: int | None) -> bool:
    """True when a stack that ends in this frame and line waits for other ranks; a frame between lines has none."""
    module, source = frame.f_globals.get("__name__", ""), linecache.getline(frame.f_code.co_filename, line or 0)
    handle = module.startswith(("dsm_train.", "megatron.", "torch.")) and ".wait(" in source
    return handle or module.startswith("torch.distributed.")


def _place(frame: FrameType | None) -> str:
    """Name the innermost line of this project on a stack, or the innermost of all."""
    frames = [step for step, _ in traceback.walk_stack(frame)] if frame is not None else []
    if not frames:
        return "its end"
    ours = [step for step in frames if step.f_globals.get("__name__", "").startswith("dsm_train")]
    place = (ours or frames)[0]
    return f"{'/'.join(place.f_code.co_filename.split(os.sep)[-2:])}:{place.f_lineno} ({place.f_code.co_name})"


def _first_line(error: BaseException) -> str:
    """Give the type and first line of an exception."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
