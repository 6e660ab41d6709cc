"""The worlds of `test_hangs.py`: three ranks each over gloo, all at once, forked from the one process that
`main` runs in.

A rank's stderr is OUT/SCENARIO-RANK.txt; OUT/results.json has each rank's exit status and seconds to its end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dsm_train.watchdog import Watchdog

WORLD = 3
TIMEOUT = 3.0


def all_reduce() -> None:
    dist.all_reduce(torch.ones(1))


def late_for_the_next_phase(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("update of step 2")
    if rank == 1:
        time.sleep(100)
    watchdog.enter("rollout of step 3")
    all_reduce()


def late_on_the_second_node(rank: int, watchdog: Watchdog) -> None:
    late_for_the_next_phase(rank, watchdog)


def late_within_a_phase(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("update of step 2")
    if rank == 1:
        time.sleep(100)
    all_reduce()


def stopped(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("update of step 2")
    if rank == 2:
        time.sleep(1)  # its watchdog tells of the phase
        os.kill(os.getpid(), signal.SIGSTOP)
    all_reduce()


def killed_in_a_collective(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("update of step 2")
    if rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce()


def killed_while_others_work(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("update of step 2")
    if rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def raises(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("scoring of step 2")
    if rank == 1:
        raise ValueError("the reward is not a number\nsecond line")
    all_reduce()


def raises_in_a_collective(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("scoring of step 2")
    if rank == 1:
        dist.broadcast(torch.ones(1), src=WORLD)  # no such rank
    all_reduce()


def exits(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("scoring of step 2")
    if rank == 2:
        sys.exit(3)
    all_reduce()


def deadlock(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("update of step 2")
    if rank == 0:
        watchdog.enter("rollout of step 3")
    dist.recv(torch.ones(1), src=(rank + 1) % WORLD)


def finished(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("update of step 2")
    if rank == 1:
        watchdog.close()
        time.sleep(100)
    all_reduce()


def works(rank: int, watchdog: Watchdog) -> None:
    """Wait, without a hang, for work of unknown length, and for work that makes progress."""
    watchdog.enter("saving")
    if rank == 0:
        with watchdog.paused():
            time.sleep(1.3 * TIMEOUT)
    dist.barrier()
    watchdog.enter("rollout of step 3")
    if rank == 2:
        for _ in range(8):
            watchdog.beat()
            time.sleep(TIMEOUT / 6)
    all_reduce()
    watchdog.close()


def computes(rank: int, watchdog: Watchdog) -> None:
    """Work without a sign of progress, for which nobody waits."""
    watchdog.enter("preparation")
    time.sleep(1.5 * TIMEOUT)
    watchdog.close()


def store_ends(rank: int, watchdog: Watchdog) -> None:
    watchdog.enter("update of step 2")
    time.sleep(100)


store_stops = store_ends
SCENARIOS: dict[str, Callable[[int, Watchdog], None]] = {
    f.__name__: f
    for f in (late_for_the_next_phase, late_on_the_second_node, late_within_a_phase, stopped, killed_in_a_collective,
              killed_while_others_work, raises, raises_in_a_collective, exits, deadlock, finished, works, computes,
              store_ends)
} | {"store_stops": store_stops}  # fmt: skip


STAY = (("stopped", 2), ("finished", 1))
"""Ranks that do not end: the others are not theirs to end."""


def run(name: str, rank: int, store: dist.Store, start: Path) -> None:
    """One rank of one world. All worlds begin together, once every rank has connected to the others of its own."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    all_reduce()
    (start / f"{name}-{rank}").touch()
    while start.exists():
        time.sleep(0.05)
    os.environ["GROUP_RANK"] = str(min(rank, 1) if name == "late_on_the_second_node" else 0)  # as torchrun sets it
    watchdog = Watchdog(dist.PrefixStore("watchdog", store), rank, WORLD, TIMEOUT, prog="dsm-train grpo")
    (start.with_name("started") / f"{name}-{rank}").unlink()
    with watchdog.failures():
        SCENARIOS[name](rank, watchdog)


def fork(child: Callable[[], None], stderr: Path) -> int:
    """The id of a process that runs `child`."""
    pid = os.fork()
    if pid:
        return pid
    status = 0
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    try:
        child()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def serve(out: Path, name: str) -> tuple[int, int]:
    """The process id and port of a store with a process of its own, as torchrun's is."""
    reader, writer = os.pipe()

    def child() -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        time.sleep(300)

    pid = fork(child, out / f"store-{name}.txt")
    return pid, int(os.read(reader, 10))


def start_all(out: Path, names: tuple[str, ...], ports: dict[str, int]) -> dict[int, tuple[str, int]]:
    """Scenario and rank of each process id, once all have begun."""
    start, ranks = out / "start", {}
    start.mkdir()
    for name in names:
        for rank in range(WORLD):

            def child(name: str = name, rank: int = rank) -> None:
                if name in ports:
                    store = dist.TCPStore("127.0.0.1", ports[name], is_master=False)
                else:  # a TCPStore looks up the name of whoever connects, which may take its time
                    store = dist.FileStore(str(out / f"{name}.store"), WORLD)
                run(name, rank, store, start)

            ranks[fork(child, out / f"{name}-{rank}.txt")] = (name, rank)
    while len(list(start.iterdir())) < len(ranks):
        time.sleep(0.05)
    start.rename(out / "started")
    while list((out / "started").iterdir()):
        time.sleep(0.05)
    return ranks


def main(rank: int, world: int, store: dist.Store, out: Path, *names: str) -> None:
    """Run the scenarios; this process is no rank of any."""
    stores = {name: serve(out, name) for name in names if "store" in name or name == "late_for_the_next_phase"}
    ranks = start_all(out, names, {name: port for name, (_, port) in stores.items()})
    begin, left = time.monotonic(), set(ranks)
    results: dict[str, list[tuple[int, float] | None]] = {name: [None] * WORLD for name in names}
    time.sleep(1)
    for name, sign in {"store_ends": signal.SIGKILL, "store_stops": signal.SIGSTOP}.items():
        if name in stores:
            os.kill(stores[name][0], sign)
    while any(ranks[pid] not in STAY for pid in left) and time.monotonic() - begin < 20:
        time.sleep(0.05)
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                name, rank = ranks[pid]
                results[name][rank] = (os.waitstatus_to_exitcode(status), time.monotonic() - begin)
                left.remove(pid)
    for pid in [*left, *(pid for pid, _ in stores.values())]:
        os.kill(pid, signal.SIGKILL)
    (out / "results.json").write_text(json.dumps(results))
