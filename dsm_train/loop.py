"""The steps of a loop: phases with watchdog and stopwatch, progress, metrics, and checkpoints to continue from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from dsm_train.checkpoint.keeper import Keeper, State
from dsm_train.cli.errors import Ended
from dsm_train.megatron.parallel import Parallel
from dsm_train.reporting.metrics import Metrics, Progress, Stopwatch


class Loop(AbstractContextManager["Loop"]):
    """The steps of a loop and the phases of each.

    with job.loop("grpo", 260, State({"policy": policy})) as loop:
        for step in loop:                  # those that are left of 0, 1, ...; people count from 1
            with loop.phase("rollout"):    # the watchdog's phase, and rollout_seconds in the metrics
                ...
            loop.log({"reward": 0.61}, shown={"reward": "reward"})
    """

    def __init__(
        self, label: str, steps: int, state: State, parallel: Parallel, metrics: Metrics, keeper: Keeper
    ) -> None:
        """Begin where the run's checkpoint stands, with its state."""
        self._label, self._steps, self._parallel, self._metrics, self._keeper = label, steps, parallel, metrics, keeper
        self.done, last = keeper.enter(label, steps, state)
        """Steps that are done."""
        self.last: dict[str, float] = {name: float("nan") if x is None else x for name, x in last.items()}
        """Metrics of the last step that is done."""
        stream = sys.stderr if parallel.is_main and self.done < steps else None
        self._progress = Progress(label, steps, stream, done=self.done)
        self._watch, self._phases = Stopwatch(), 0

    def __enter__(self) -> Loop:
        self._keeper.stop.note()
        return self

    def __iter__(self) -> Iterator[int]:
        for step in range(self.done, self._steps):
            self._watch, self._phases = Stopwatch(), 0
            yield step
            self.done = step + 1
            if (line := self._keeper.misses(self.done, self.last)) is not None:
                self.say(line)
            self._keeper.after(self.done, self.last)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Enter a phase of the current step, and time it. Only the last phase of a step changes what it trains."""
        if self._phases:
            self._keeper.between(self.done)
        self._phases += 1
        self._parallel.watchdog.enter(f"{name} of step {self.done + 1}")
        yield
        self._watch.lap(f"{name}_seconds")

    def log(self, values: Mapping[str, float], *, tokens: int | None = None, shown: Mapping[str, str]) -> None:
        """Write the step's metrics, and show some of them, by the names that people read.

        tokens: this replica's, for the times of the phases and the rate over all replicas. Collective.
        """
        self.last = dict(values)
        if tokens is not None:
            values = {**values, **self._watch.rate(sum(self._parallel.gather_over_data(tokens)))}
        self._metrics.log(self.done + 1, self._label, values)
        self._progress.step({text: values[name] for name, text in shown.items() if name in values})

    def say(self, text: str) -> None:
        """Tell the user, from the main rank, below the line of progress."""
        if self._parallel.is_main:
            self._progress.close()
            print(text, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        if error is None:
            self._keeper.stop.heed()
        elif isinstance(error, Ended) and error.agreed:
            self._keeper.close()  # what is being written is not lost
