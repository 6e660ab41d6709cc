"""A process of its own for code that the trainer cannot trust to return: functions of the user's.

A function in the trainer's own process could hold the interpreter for ever (a regular expression that backtracks does,
and no signal nor thread ends it), take the run down with it, or disturb CUDA. Here the time limit is hard: the process
is killed, with all that it started, and another takes its place.

    worker = Worker(["my_rewards:length_penalty"], folders=["/home/me"], timeout_seconds=60)
    match worker.call(0, completions, tasks):
        case Returned(values): ...
        case Failed(reason): ...

It is started anew rather than forked, as a fork of a process with CUDA and threads is broken, and by `subprocess`
rather than `multiprocessing`, which would import the program's main module again. Messages are pickled.

Other code that has to run apart (a symbolic comparison, a sandbox, a tool) is a function of lists of one length as
well, named as module:function, in a worker of this kind: a new built-in reward of that sort needs nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from multiprocessing import connection
from pathlib import Path
from typing import Any

from dsm_train.rewards.outcome import Failed, Returned

IMPORT_SECONDS = 240.0
"""Time limit of importing the functions' modules: large packages on a cold disk take minutes. Ranks wait for it."""
_CLOSE_SECONDS = 2.0
_PROGRAM = """
import json, sys
path, *arguments = json.loads(sys.argv[1])
sys.path[:] = path
from dsm_train.rewards.child import serve
serve(*arguments)
"""


def find_source(module: str, folders: Sequence[str]) -> Path | None:
    """Find the file that a worker would import as `module`, without importing it; None for one that is not found."""
    places, file = [*folders, *sys.path], None
    for part in module.split("."):
        found = PathFinder.find_spec(part, places)
        if found is None:
            return None
        places, file = found.submodule_search_locations or [], found.origin
    return None if file is None else Path(file)


class Worker:
    """Process that holds some functions, module:function each; it starts when it is first needed."""

    def __init__(self, calls: Sequence[str], folders: Sequence[str], timeout_seconds: float) -> None:
        """folders: where modules are looked for before all other places; timeout_seconds: limit of one call."""
        self._calls, self._folders, self._timeout = list(calls), list(folders), timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._connection: connection.Connection | None = None

    def call(self, index: int, *arguments: Sequence[Any]) -> Returned | Failed:
        """Call function number `index` on lists of one length; the outcome of anything that can happen, in time."""
        if (failed := self._wait_until_ready()) is not None:
            return failed
        assert self._connection is not None
        try:
            self._connection.send((index, arguments))
            if self._connection.poll(self._timeout):
                return self._connection.recv()
        except (EOFError, OSError):
            return self._ended()
        self._kill()
        self._start()  # the modules are imported while the trainer goes on
        return Failed(f"took longer than rewards.timeout_seconds = {self._timeout:g}")

    def close(self) -> None:
        """End the process. A later call starts another."""
        if self._connection is not None and self._process is not None:
            self._connection.close()  # it ends by itself
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_SECONDS)
        self._kill()

    def _start(self) -> None:
        ours, theirs = connection.Pipe()
        descriptor = theirs.fileno()
        arguments = json.dumps([[*map(str, sys.path)], descriptor, os.getpid(), self._calls, self._folders])
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", _PROGRAM, arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
            start_new_session=True,  # a group of its own, to be killed with all that it starts
        )
        theirs.close()
        self._connection, self._ready = ours, False

    def _wait_until_ready(self) -> Failed | None:
        """Wait until the functions are imported."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        if self._ready:
            return None
        try:
            if not self._connection.poll(IMPORT_SECONDS):
                self._kill()
                return Failed(f"importing the functions' modules took longer than {IMPORT_SECONDS:g} s")
            self._connection.recv()
        except (EOFError, OSError):
            return self._ended()
        self._ready = True
        return None

    def _ended(self) -> Failed:
        """Say how the process ended that was to answer."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        status = self._process.returncode
        self._kill()
        how = (
            f"was ended by {signal.Signals(-status).name}" if status and status < 0 else f"exited with status {status}"
        )
        return Failed(f"the process of the reward functions {how}")

    def _kill(self) -> None:
        """Kill the process and all that it started, if it runs."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._connection = None
