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


def run_ranks(main: Callable[..., None], world: int, out: Path, *arguments: str, timeout: float = 300) -> list[str]:
    """Call `main(rank, world, store, out, *arguments)` on each of `world` ranks; the first that fails ends all.

    Returns what each rank printed; one that hangs prints its stack before the time is up. `store` is a
    `dist.FileStore` of this call's own. A failure, or ranks that take longer than `timeout` seconds, is an
    AssertionError with all that the ranks printed.
    """
    _start_server()
    unique = out / f"{main.__module__}-{world}-{time.monotonic_ns()}"
    prints = [unique.with_name(f"{unique.name}-{rank}.txt") for rank in range(world)]
    # The function by name: a rank imports its module with the environment in place.
    names = (main.__module__, main.__qualname__)
    ranks = [
        _FORKED.Process(
            target=_rank, args=(names, rank, world, unique, out, prints[rank], timeout, arguments), daemon=True
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + timeout
    try:
        for rank in ranks:
            rank.start()
        while None in (statuses := [rank.exitcode for rank in ranks]) and not any(statuses):
            running = [rank.sentinel for rank in ranks if rank.exitcode is None]
            late = not connection.wait(running, deadline - time.monotonic())
            assert not late, f"the ranks took longer than {timeout} s\n" + _printed(prints)
        time.sleep(0.2 if any(statuses) else 0)  # others may have something to say too
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world, _printed(prints)
    return [file.read_text() for file in prints]


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


def _printed(files: list[Path]) -> str:
    return "\n".join(file.read_text() for file in files if file.exists())
