"""Signals that ask a job to stop: SIGTERM and SIGUSR1 of schedulers, SIGHUP of a terminal that closes, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from dsm_train.cli.errors import STOPPED, Ended

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_ECHO = 2.0
"""Seconds after a signal in which Ctrl-C is the same one, which torchrun passes on twice; a later one ends the job."""


class Stop:
    """Listener to signals: within a loop they are noted, for the loop to save and stop; elsewhere they end the job."""

    def __init__(self, tells: bool, saves: bool = True) -> None:
        """tells: this rank says what it heard; saves: a loop writes a checkpoint before it stops."""
        self.saves = saves
        self.asked = 0
        """Number of the signal that was heard; 0: none."""
        self.place: str | None = None
        """Place of the newest checkpoint."""
        self._noted, self._over = False, False
        self._tells, self._since, self._before = tells, 0.0, dict[signal.Signals, Any]()

    def listen(self) -> None:
        """Begin; only Python's main thread can. Signals that are ignored, as SIGHUP under nohup, stay so."""
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._hear) for number in heard}

    def close(self) -> None:
        """Leave the signals to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def note(self) -> None:
        """Note signals from now on, for `asked` to be looked at."""
        self._noted = True

    def heed(self) -> None:
        """End the job at a signal from now on, and at one that nobody has looked at."""
        self._noted = False
        if self.asked:
            raise self.end(agreed=False)

    def pass_over(self) -> None:
        """Pass over signals from now on: the job ends anyway."""
        self._over = True

    def end(self, *, agreed: bool) -> Ended:
        """Make the end of the job by the signal that was heard; agreed: on all ranks."""
        where = "before the first checkpoint" if self.place is None else f"after {self.place}"
        where = where if self.saves else "without a checkpoint, as checkpoint.* turns them off"
        return Ended(STOPPED, f"stopped by {signal.Signals(self.asked).name} {where}", agreed=agreed)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            return
        now, again = time.monotonic(), bool(self.asked)
        if number == signal.SIGINT and again and now - self._since > _ECHO:
            raise KeyboardInterrupt
        if again:
            return
        self.asked, self._since = number, now
        if not self._noted:
            raise self.end(agreed=False)
        if self._tells:  # print may be what was interrupted
            second = "; Ctrl-C again ends at once, and loses what is not saved" if number == signal.SIGINT else ""
            does = "saving, then stopping" if self.saves else "stopping at the end of this phase"
            os.write(2, f"\n{signal.Signals(number).name}: {does}{second}\n".encode())
