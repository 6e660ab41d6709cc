"""The watchdog's judgement and its parts; whole runs that end by it are in distributed/test_hangs.py."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsm_train import watchdog as module
from dsm_train.watchdog import Report, Seen, Watchdog, judge

NOW, TIMEOUT, PATIENCE = 1000.0, 600.0, 3.0


def rank(
    phase: str, entered: int = 1, *, waits: bool = False, closed: bool = False, alive: float = NOW, moved: float = 300.0
) -> Seen:
    """A rank that has made no progress for longer than the timeout."""
    return Seen(Report("a", phase, entered, waits=waits, closed=closed, where="x.py:1 (f)"), alive, moved)


def line(*ranks: Seen, bereaved: bool = False) -> str | None:
    return judge(dict(enumerate(ranks)), NOW, TIMEOUT, PATIENCE, bereaved=bereaved)


@pytest.mark.parametrize(
    "ranks",
    [
        [rank("update", moved=NOW - 1), rank("update", waits=True)],
        [rank("update"), rank("update", waits=True, moved=NOW - TIMEOUT)],  # it may be slow, yet something moves
        [rank("update"), rank("rollout")],  # nobody waits
        [rank("update", alive=NOW - TIMEOUT), rank("update", moved=NOW)],
        [rank("end", closed=True, alive=0), rank("update", moved=NOW, waits=True)],
    ],
)
def test_nothing_is_wrong(ranks: list[Seen]) -> None:
    assert line(*ranks) is None


def test_who_does_not_wait_is_waited_for() -> None:
    assert line(rank("rollout", 2, waits=True), rank("update"), rank("rollout", 2, waits=True)) == (
        'rank 1 (host a) has been in "update" without progress for 700 s while ranks 0, 2 (host a) wait in "rollout": '
        "ended. Alive, at x.py:1 (f). Raise parallel.timeout_minutes (10) if it only needs longer"
    )
    # ahead of those that wait: it has left out a collective
    text = line(rank("update", waits=True), rank("rollout", 2))
    assert text is not None and text.startswith('rank 1 (host a) has been in "rollout"')
    # of several, those that are behind
    text = line(rank("update"), rank("update"), rank("rollout", 2), rank("rollout", 2, waits=True))
    assert text is not None and text.startswith('ranks 0-1 (host a) have been in "update"') and "rank 3" in text


def test_silence_counts_for_less_when_the_run_has_to_end_anyway() -> None:
    silent, waiting = rank("update", alive=NOW - 4), rank("update", waits=True)
    moving = rank("update", waits=True, moved=NOW)
    assert line(silent, moving) is None
    for text in (line(silent, waiting), line(silent, moving, bereaved=True)):
        assert text is not None and "rank 0 (host a) was" in text and "no sign of life for 4 s" in text
        assert 'rank 1 (host a) waits in "update": ended' in text and "Alive" not in text
    text = line(rank("update", alive=NOW - TIMEOUT - 1), moving)
    assert text is not None and "no sign of life for 601 s" in text


def test_what_is_not_known_is_not_claimed() -> None:
    text = line(rank("update", waits=True), rank("rollout", 2, waits=True))
    assert text is not None and "cannot be told" in text
    assert 'rank 0 (host a) is in "update" at x.py:1 (f), rank 1 (host a) is in "rollout" at x.py:1 (f)' in text


def test_a_rank_that_never_came_is_silent() -> None:
    text = judge({0: rank("update", waits=True), 1: Seen(Report())}, NOW, TIMEOUT, PATIENCE)
    assert text is not None and text.startswith('rank 1 (host unknown) was in "start"')


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 7, 9, 8], "ranks 0-2, 7-9"), ([2, 0], "ranks 0, 2")]
)
def test_ranks_are_named_briefly(ranks: list[int], text: str) -> None:
    assert module._ranks(ranks) == text


@pytest.mark.parametrize(
    ("name", "call", "waits"),
    [
        ("torch.distributed.distributed_c10d", "request.block(0.5)", True),
        (
            "megatron.core.pipeline_parallel.p2p_communication",
            "request.wait(0.5)",
            True,
        ),  # written in C: no frame of it
        ("megatron.core.pipeline_parallel.p2p_communication", "request.block(0.5)", False),
        ("__main__", "request.wait(0.5)", False),
    ],
)
def test_a_collective_is_told_from_work(name: str, call: str, waits: bool, tmp_path: Path) -> None:
    class Request:
        wait = block = staticmethod(time.sleep)

    source = tmp_path / "source.py"
    source.write_text(f"def receive(request):\n    {call}\n")
    scope: dict[str, Any] = {"__name__": name}
    exec(compile(source.read_text(), str(source), "exec"), scope)
    thread = threading.Thread(target=scope["receive"], args=(Request(),))
    thread.start()
    while (frame := sys._current_frames().get(thread.ident or 0)) is None or frame.f_code.co_name != "receive":
        time.sleep(0.01)
    assert module._in_collective(frame, 2) == waits
    assert module._place(frame) == f"{tmp_path.name}/source.py:2 (receive)"
    thread.join()


def test_reports_tell_of_the_thread_that_made_the_watchdog() -> None:
    store = dist.HashStore()

    def report() -> Report:
        return Report(**json.loads(store.get("rank0")))

    dog = Watchdog(store, 0, 2, timeout_seconds=30.0)  # the other rank, which never comes, is missed after that
    try:
        dog.enter("rollout of step 1")
        dog.beat()
        with dog.paused():
            while report().number == 0:
                time.sleep(0.05)
            assert (report().phase, report().entered, report().beats) == ("rollout of step 1", 1, 1)
            assert report().paused and not report().waits and "test_watchdog.py" in report().where
    finally:
        dog.close()
    assert report().closed and not report().paused and report().beats == 2


def test_time_that_a_process_did_not_live_through_does_not_count() -> None:
    clock = module._Clock(0.01)
    time.sleep(0.3)
    assert clock.seconds() <= 0.03
    time.sleep(0.01)
    assert 0.01 < clock.seconds() <= 0.06


def test_one_rank_is_not_watched() -> None:
    threads = threading.active_count()
    dog = Watchdog.off()
    dog.enter("rollout of step 1")
    dog.beat()
    with dog.paused(), pytest.raises(ValueError, match="wrong"), dog.failures():
        raise ValueError("wrong")
    dog.close()
    assert threading.active_count() == threads


@pytest.mark.gpu
def test_a_busy_gpu_is_a_wait() -> None:
    dog = Watchdog(dist.HashStore(), 0, 2, timeout_seconds=60.0)
    try:
        torch.cuda.synchronize()
        assert not dog._gpu_is_busy()
        torch.cuda._sleep(2_000_000_000)
        assert dog._gpu_is_busy()
    finally:
        dog.close()
        torch.cuda.synchronize()
