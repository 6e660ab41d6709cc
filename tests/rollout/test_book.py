"""Rollouts that are recorded are taken where they are those of this very step, by these very weights."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from dsm_train.data.tasks import Task
from dsm_train.megatron.parallel import Parallel
from dsm_train.rollout.book import Book
from dsm_train.types import Rollouts

TASKS = [Task(id=number, question="", place="") for number in (3, 7)]


def rollouts(step: int, weight_version: int) -> Rollouts:
    sequences = tiny.sequences([2, 3], [1, 2, 3, 4], seed=step)
    per_token, finished_S = torch.zeros(10), torch.ones(4, dtype=torch.bool)
    return Rollouts(sequences, torch.tensor([3, 7]), per_token, per_token, finished_S, weight_version)


def recorded(folder: Path, layout: Parallel, steps: list[int]) -> Book:
    """A book of an earlier start of the run."""
    book = Book(folder, layout, lambda: 0)
    for step in steps:
        book.keep(step, rollouts(step, step))
    return Book(folder, layout, lambda: 0)


def test_recorded_rollouts_are_taken_step_by_step(tmp_path: Path, layout: Parallel) -> None:
    book = recorded(tmp_path, layout, [4, 5])
    for step in (4, 5):
        found = book.find(step, TASKS, step)
        assert found is not None
        assert torch.equal(found.sequences.response_token_T, rollouts(step, step).sequences.response_token_T)
    assert book.find(6, TASKS, 6) is None


def test_those_of_other_weights_or_tasks_are_not(tmp_path: Path, layout: Parallel) -> None:
    assert recorded(tmp_path, layout, [4]).find(4, TASKS, 3) is None
    assert recorded(tmp_path, layout, [4]).find(4, TASKS[::-1], 4) is None


def test_none_is_taken_after_a_step_that_was_sampled_anew(tmp_path: Path, layout: Parallel) -> None:
    book = recorded(tmp_path, layout, [4, 5])  # the user went back to step 3, and has mended a reward function
    assert book.find(3, TASKS, 3) is None
    book.keep(3, rollouts(3, 3))
    again = Book(tmp_path, layout, lambda: 0)  # killed before the next checkpoint
    assert again.find(3, TASKS, 3) is not None
    assert again.find(4, TASKS, 4) is None, "as many optimizer steps, but other ones"


def test_those_of_saved_steps_go(tmp_path: Path, layout: Parallel) -> None:
    saved = 0
    book = Book(tmp_path, layout, lambda: saved)
    for step in (0, 1, 2):
        book.keep(step, rollouts(step, step))
    saved = 2
    book.keep(3, rollouts(3, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.parquet", "3.parquet"]
