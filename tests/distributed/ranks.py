"""Real ranks for the distributed tests: processes on this machine that talk over gloo.

They are forked from one process that has imported Megatron once for all of them; it has neither process groups nor
CUDA, nor threads of its own.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

_FORKED = multiprocessing.get_context("forkserver")
_ON_THE_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # gloo, whatever the machine has
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """Ranks at work, until they have ended or are killed."""

    def __init__(self, main: Callable[..., None], world: int, out: Path, *arguments: str, timeout: float = 300) -> None:
        """Call `main(rank, world, store, out, *arguments)` on each of `world` ranks.

        `store` is a `dist.FileStore` of this call's own. A rank that hangs prints its stack before `timeout` seconds.
        """
        _start_server()
        unique = out / f"{main.__module__}-{world}-{time.monotonic_ns()}"
        self._prints = [unique.with_name(f"{unique.name}-{rank}.txt") for rank in range(world)]
        # The function by name: a rank imports its module with the environment in place.
        names = (main.__module__, main.__qualname__)
        self._ranks = [
            _FORKED.Process(
                target=_rank, args=(names, rank, world, unique, out, prints, timeout, arguments), daemon=True
            )
            for rank, prints in enumerate(self._prints)
        ]
        for rank in self._ranks:
            rank.start()

    @property
    def statuses(self) -> list[int | None]:
        """Exit status of each rank, below 0 for a signal; None while it runs."""
        return [rank.exitcode for rank in self._ranks]

    def wait(self, seconds: float, *, others: bool = False, news: int | None = None) -> bool:
        """Wait until all have ended, or one has failed; False when it takes longer than so many seconds.

        others: wait for those that a failed one leaves behind as well; news: a file from which ranks can be heard, and
        which ends the waiting when it can be read.
        """
        deadline = time.monotonic() + seconds
        while None in (statuses := self.statuses) and (others or not any(statuses)):
            running = [rank.sentinel for rank in self._ranks if rank.exitcode is None]
            ready = connection.wait([*running, *([] if news is None else [news])], max(0, deadline - time.monotonic()))
            if not ready:
                return False
            if news in ready:
                break
        return True

    def kill(self, rank: int | None = None) -> None:
        """Kill those that run, or one of them."""
        if rank is not None:
            return self._ranks[rank].kill()
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()

    def printed(self) -> list[str]:
        """Read what each rank has printed."""
        return [file.read_text() if file.exists() else "" for file in self._prints]


def run_ranks(main: Callable[..., None], world: int, out: Path, *arguments: str, timeout: float = 300) -> list[str]:
    """Call `main` on ranks as `Ranks` does; the first that fails ends all. Returns what each rank printed.

    A failure, or ranks that take longer than `timeout` seconds, is an AssertionError with all that the ranks printed.
    """
    ranks = Ranks(main, world, out, *arguments, timeout=timeout)
    try:
        in_time = ranks.wait(timeout)
        time.sleep(0.2 if any(ranks.statuses) else 0)  # others may have something to say too
    finally:
        ranks.kill()
    printed = ranks.printed()
    assert in_time, f"the ranks took longer than {timeout} s\n" + "\n".join(printed)
    assert ranks.statuses == [0] * world, "\n".join(printed)
    return printed


def _start_server() -> None:
    """Start the process that ranks are forked from, unless it runs."""
    _FORKED.set_forkserver_preload(["dsm_train.megatron.step"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ON_THE_CPU.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def _rank(
    main: tuple[str, str],
    rank: int,
    world: int,
    store: Path,
    out: Path,
    prints: Path,
    timeout: float,
    arguments: tuple[str, ...],
) -> None:
    """One rank, in its own process."""
    file = os.open(prints, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in _OF_A_LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(_ON_THE_CPU)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * timeout)  # a rank that hangs says where
    module, name = main
    function = getattr(importlib.import_module(module), name)
    function(rank, world, dist.FileStore(str(store), world), out, *arguments)
