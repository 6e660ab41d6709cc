"""The keeper of a run's checkpoints: decides when one is written, which stay, and restores the one to continue from."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsm_train.checkpoint.config import CheckpointConfig
from dsm_train.checkpoint.find import WRITING, remove
from dsm_train.checkpoint.place import FOLDER, STATE_FILE, SUMS, Place, checkpoints
from dsm_train.checkpoint.resume import Origin
from dsm_train.checkpoint.stop import Stop
from dsm_train.megatron.checkpoint import Saver, Writing, load, sha256
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, TrainableModel
from dsm_train.reporting.metrics import Metrics, Samples


@dataclass(frozen=True)
class State:
    """State that the steps of a loop change, and that a checkpoint holds."""

    models: Mapping[str, Model]
    """Models by name; one that is not trained and has its initial weights is not written."""
    counts: Any = None
    """Counters of the loop, a dataclass of numbers and text; None: there are none."""


@dataclass
class Kept:
    """Checkpoints in numbers."""

    saved: int = 0
    stall_seconds: float = 0.0
    """Time that training waited for them."""


@dataclass
class Keeper:
    """Keeper of a run's checkpoints, on every rank; all methods are collective unless they say otherwise."""

    config: CheckpointConfig
    run: Path
    parallel: Parallel
    origin: Origin
    metrics: Metrics
    samples: Samples
    stop: Stop
    kept: Kept = field(default_factory=Kept)

    def __post_init__(self) -> None:
        self._found = self.origin.found  # until it is restored
        place = None if self._found is None else self._found.place
        self._started = time.perf_counter() - (0.0 if place is None else place.seconds)
        self.results: dict[str, Any] = {} if place is None else dict(place.results)
        """Values that the stage computed once."""
        self._best: float | None = None
        self._best_folder: str | None = None
        self._saver = Saver(self.parallel)
        self._writing: tuple[Writing, Place] | None = None
        self._saved: tuple[str, int] | None = None if place is None else (place.loop, place.step)
        self.stop.place = None if place is None else str(place)
        self._since, self._base = time.monotonic(), 0  # steps of earlier loops
        self._label, self._steps, self._state = "", 0, State({})

    def enter(self, label: str, steps: int, state: State) -> tuple[int, Mapping[str, float | None]]:
        """Begin a loop; returns its steps that are done, with the metrics of the last. Restores the state if it is due.

        A loop before the one that the checkpoint is of is done.
        """
        self._base += self._steps
        self._label, self._steps, self._state = label, steps, state
        self._best = self._best_folder = None  # losses of two loops are of two kinds
        found = self._found
        if found is None:
            return 0, {}
        if found.place.loop != label:
            return steps, {}
        place, self._found = found.place, None
        self._take_best(place)
        load(found.folder, {name: state.models[name] for name in place.models}, self.parallel)
        for name, value in place.counts.items():
            setattr(state.counts, name, value)
        return place.step, place.last

    def after(self, step: int, values: Mapping[str, float]) -> None:
        """Write a checkpoint if one is due after `step` steps of the loop; raises `Ended` where a signal came."""
        asked, writes, old, better = self._agree(
            self.stop.asked,
            self._writes,
            self.parallel.is_main and self._is_old(),
            self.parallel.is_main and self._improves(values),
        )
        if self._writing is not None and not writes:
            self._finish()
        last = step == self._steps
        due = self.config.every is not None and step % self.config.every == 0
        if better or due or old or (self.config.wanted and (last or asked)):
            self._save(step, values)
        if asked:
            self._end(asked)
        if last:
            self._finish()

    def misses(self, step: int, values: Mapping[str, float]) -> str | None:
        """Say that no step of the loop had the metric of the best, once it should have; not collective."""
        best = self.config.best
        evaluated = best is not None and best.startswith("heldout_")  # at some steps
        if best is None or best in values or self._best is not None or step != (self._steps if evaluated else 1):
            return None
        return (
            f"checkpoint.best = {best}: no step of {self._label} has had it, and none is kept as the best; "
            f"step {step} has {', '.join(values)}"
        )

    def between(self, step: int) -> None:
        """Stop between two phases of a step where a signal came, after `step` whole ones: the weights are theirs."""
        asked, writes = self._agree(self.stop.asked, self._writes)
        if asked or not writes:
            self._finish()  # the phase to come may be long, and what is being written may be of this very step
        if asked:
            if self.config.wanted and self._saved != (self._label, step):
                self._save(step, {})
            self._end(asked)

    def close(self) -> None:
        """Wait for what is being written."""
        self._finish()

    def saved(self) -> int:
        """Count the steps of this loop that the newest checkpoint holds; not collective."""
        return self._saved[1] if self._saved is not None and self._saved[0] == self._label else 0

    def seconds(self) -> float:
        """Measure the time that the run has taken; not collective."""
        return time.perf_counter() - self._started

    @property
    def _writes(self) -> bool:
        """True while this rank writes a checkpoint."""
        return self._writing is not None and self._writing[0].going_on

    def _end(self, number: int) -> None:
        self._finish()
        self.stop.asked = number  # perhaps another rank heard it
        raise self.stop.end(agreed=True)

    def _agree(self, *values: int) -> list[int]:
        """Find the largest of each number over all ranks."""
        if self.parallel.world_size == 1:
            return list(values)
        return self.parallel.all_reduce(torch.tensor(values), dist.ReduceOp.MAX).tolist()

    def _is_old(self) -> bool:
        minutes = self.config.every_minutes
        return minutes is not None and time.monotonic() - self._since >= 60 * minutes

    def _take_best(self, place: Place) -> None:
        """Take up the best checkpoint so far, if it is of the same metric and still there."""
        asked = {"checkpoint.best": str(self.config.best), "checkpoint.best_is": self.config.best_is}
        there = place.best_folder is not None and (self.run / FOLDER / place.best_folder / SUMS).exists()
        if self.parallel.from_main(there) and asked.items() <= place.identity.items():
            self._best, self._best_folder = place.best, place.best_folder

    def _improves(self, values: Mapping[str, float]) -> bool:
        """Take note of a value of the metric that is the best so far; not collective."""
        value = math.nan if self.config.best is None else values.get(self.config.best, math.nan)
        sign = 1 if self.config.best_is == "highest" else -1
        if math.isnan(value) or (self._best is not None and sign * value <= sign * self._best):
            return False
        self._best, self._best_folder = value, ""
        return True

    def _save(self, step: int, values: Mapping[str, float]) -> None:
        """Begin to write a checkpoint; training goes on meanwhile."""
        begun = time.perf_counter()
        self._finish()
        models = {n: m for n, m in self._state.models.items() if m.steps or isinstance(m, TrainableModel)}
        place = Place(
            loop=self._label,
            step=step,
            steps=self._steps,
            total=self._base + step,
            models=tuple(models),
            identity=self.origin.identity,
            metrics_bytes=self.metrics.sync(),
            samples_bytes=self.samples.sync(),
            seconds=self.seconds(),
            results=dict(self.results),
            counts={} if self._state.counts is None else asdict(self._state.counts),
            last={name: value if math.isfinite(value) else None for name, value in values.items()},
            best=self._best,
            best_folder=self._best_folder,
            time=datetime.now().isoformat(timespec="seconds"),
        )
        if self._best_folder == "":
            self._best_folder = place.name
            place = replace(place, best_folder=place.name)
        folder = self._folder_of(place)
        self.parallel.watchdog.enter(f"checkpoint of step {step}")
        if self.parallel.is_main:
            remove(folder)
            folder.mkdir(parents=True)
        self.parallel.gather_over_ranks(None)  # the folder is there
        self._writing = self._saver.start(folder, models), place
        self._since = time.monotonic()
        self.kept.stall_seconds += time.perf_counter() - begun

    def _finish(self) -> None:
        """Wait for the checkpoint that is being written, and let it appear; raises `OSError` where it cannot."""
        if self._writing is None:
            return
        begun = time.perf_counter()
        (writing, place), self._writing = self._writing, None
        folder = self._folder_of(place)
        try:
            sums = writing.finish()
            if self.parallel.is_main:
                self._publish(folder, place, sums)
                self._prune(place)
        except Exception:
            if self.parallel.is_main:
                remove(folder)  # there may be no room for half of it
            raise
        self._saved, self.stop.place = (place.loop, place.step), str(place)
        self.kept.saved += 1
        self.kept.stall_seconds += time.perf_counter() - begun

    def _publish(self, folder: Path, place: Place, sums: dict[str, str]) -> None:
        """Complete a checkpoint whose files are written, and let it appear: the main rank's."""
        place.write(folder)
        sums[STATE_FILE] = sha256(folder / STATE_FILE)
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        (folder / SUMS).write_text(lines, encoding="utf-8")
        for name in (*sums, SUMS, "."):
            _sync(folder / name)
        whole = folder.with_name(place.name)
        remove(whole)  # one that was passed over as damaged
        folder.rename(whole)
        _sync(whole.parent)

    def _folder_of(self, place: Place) -> Path:
        return self.run / FOLDER / f".{place.name}{WRITING}"

    def _prune(self, newest: Place) -> None:
        """Remove what is no longer wanted: the main rank's."""
        *old, _ = [path for path in checkpoints(self.run) if path.name <= newest.name]
        kept = old[max(0, len(old) - self.config.keep + 1) :]
        for folder in old:
            if folder not in kept and folder.name != newest.best_folder:
                remove(folder)


def _sync(path: Path) -> None:
    """Have a file or a folder on the disk before what follows."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
