"""The order in which tasks are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from dsm_train.data.order import draw, occurrences, order_of
from dsm_train.data.tasks import Task

TASKS = [Task(id=i, question=f"{i}") for i in range(10)]


def drawn_of(tasks: list[Task], count: int, step: int, seed: int, weights: Sequence[float] = ()) -> list[Task]:
    return draw(tasks, order_of([task.file for task in tasks], seed, weights), count, step)


def test_every_pass_draws_every_task_once_in_an_order_of_its_own() -> None:
    drawn = [task.id for step in range(5) for task in drawn_of(TASKS, 4, step, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_a_draw_is_a_function_of_its_step_and_seed() -> None:
    ids = [[task.id for task in drawn_of(TASKS, 4, step, seed=0)] for step in range(6)]
    assert [[task.id for task in drawn_of(TASKS, 4, step, seed=0)] for step in reversed(range(6))] == ids[::-1]
    assert [[task.id for task in drawn_of(TASKS, 4, step, seed=1)] for step in range(6)] != ids
    # the batch size cuts the same endless sequence elsewhere
    assert [t.id for t in drawn_of(TASKS, 2, 0, 0) + drawn_of(TASKS, 2, 1, 0)] == ids[0]


def test_the_order_of_one_file_is_that_of_recorded_runs() -> None:
    order = [[5, 4, 3, 2, 0, 7, 9], [1, 6, 8, 4, 7, 1, 3], [5, 0, 8, 2, 6, 9, 9]]
    assert [[task.id for task in drawn_of(TASKS, 7, step, seed=3)] for step in range(3)] == order
    assert [[task.id for task in drawn_of(TASKS, 7, step, 3, weights=[0.5])] for step in range(3)] == order


FILES = [
    Task(id=file * 2**32 + n, question=f"{file} {n}", file=file)
    for file, size in enumerate((12, 3, 5))
    for n in range(size)
]


def test_weights_share_each_epoch_out_and_every_file_goes_on_where_it_was() -> None:
    drawn = [task for step in range(30) for task in drawn_of(FILES, 4, step, 0, weights=[1, 2, 1])]  # 6 epochs of 20
    for epoch in range(6):
        files = [task.file for task in drawn[20 * epoch : 20 * (epoch + 1)]]
        assert [files.count(file) for file in range(3)] == [5, 10, 5] and files != sorted(files)
    # endless passes: no question comes twice more often than another of its file
    for file, size in enumerate((12, 3, 5)):
        counts = Counter(task.id for task in drawn if task.file == file)
        assert len(counts) == size and max(counts.values()) - min(counts.values()) <= 1


def test_draws_by_weight_are_a_function_of_their_step_and_seed() -> None:
    ids = [[t.id for t in drawn_of(FILES, 8, step, 0, weights=[3, 1, 1])] for step in range(6)]
    assert [[t.id for t in drawn_of(FILES, 8, step, 0, weights=[3, 1, 1])] for step in reversed(range(6))] == ids[::-1]
    assert [[t.id for t in drawn_of(FILES, 8, step, 1, weights=[3, 1, 1])] for step in range(6)] != ids
    assert [t.id for t in drawn_of(FILES, 4, 1, 0, weights=[3, 1, 1])] == ids[0][4:]


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.2, 0.1], [1e-3, 1, 1]])
def test_shares_are_whole_and_within_one_of_the_weights(weights: list[float]) -> None:
    for epoch in range(3):
        files = [task.file for task in drawn_of(FILES, 20, epoch, 0, weights)]
        for file, weight in enumerate(weights):
            assert abs(files.count(file) - 20 * weight / sum(weights)) < 1


def test_files_without_weights_are_one_pool() -> None:
    assert sorted(task.id for task in drawn_of(FILES, 20, 3, 0)) == [task.id for task in FILES]


def test_occurrences_number_the_draws_of_each_task() -> None:
    assert occurrences([TASKS[n] for n in (3, 3, 1, 3, 1)]) == [0, 1, 0, 2, 1]
    # where two passes meet within a step
    drawn = drawn_of(TASKS, 16, 0, seed=0)
    assert sorted(occurrences(drawn)) == [0] * 10 + [1] * 6
    assert len(set(zip([t.id for t in drawn], occurrences(drawn), strict=True))) == 16
