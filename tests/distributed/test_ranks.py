"""Ranks that fail or stay: the test that started them fails with what they printed, and none is left behind."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def one_raises(rank: int, world: int, store: dist.Store, out: Path) -> None:
    if rank == 1:
        raise ValueError("what rank 1 says")
    time.sleep(100)


def one_stays(rank: int, world: int, store: dist.Store, out: Path) -> None:
    if rank == 1:
        time.sleep(100)


def writes_its_place(rank: int, world: int, store: dist.Store, out: Path, *arguments: str) -> None:
    place = [rank, world, torch.get_num_threads(), torch.cuda.is_available(), dist.is_initialized(), *arguments]
    (out / f"{rank}.txt").write_text(repr(place))


def test_the_first_rank_that_fails_ends_all_and_its_traceback_is_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="(?s)Traceback.*ValueError: what rank 1 says"):
        run_ranks(one_raises, 3, tmp_path)
    assert not multiprocessing.active_children()


def test_ranks_end_by_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the ranks took longer than 2 s"):
        run_ranks(one_stays, 3, tmp_path, timeout=2)
    assert not multiprocessing.active_children()


def test_a_rank_starts_on_one_thread_of_the_cpu_outside_of_any_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "7")
    run_ranks(writes_its_place, 2, tmp_path, "a", "b")
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == repr([rank, 2, 1, False, False, "a", "b"])
