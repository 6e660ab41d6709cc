"""Signals that ask a job to stop: SIGTERM and SIGUSR1, as schedulers send them, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from dsm_train.cli.errors import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ECHO = 2.0
"""Seconds after Ctrl-C in which another is the same one, which torchrun passes on; a later one ends the job at once."""


class Stop:
    """Listener to signals: within a loop they are noted, for the loop to save and stop; elsewhere they end the job."""

    def __init__(self, tells: bool) -> None:
        """Tells: this rank says what it heard."""
        self.asked = 0
        """Number of the signal that was heard; 0: none."""
        self.noted = False
        """True within a loop."""
        self._tells, self._since, self._before = tells, 0.0, dict[signal.Signals, Any]()

    def listen(self) -> None:
        """Begin; only Python's main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def close(self) -> None:
        """Leave the signals to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), bool(self.asked)
        if number == signal.SIGINT and again and now - self._since > _ECHO:
            raise KeyboardInterrupt
        self.asked, self._since = self.asked or number, self._since or now
        if not self.noted:
            raise SystemExit(STOPPED)
        if self._tells and not again:  # print may be what was interrupted
            second = "; Ctrl-C again ends at once, and loses what is not saved" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: saving, then stopping{second}\n".encode())
