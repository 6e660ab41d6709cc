"""The tasks of a run, and the order in which they are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsm_train.data.config import DataConfig
from dsm_train.data.source import draw, load_tasks, make_tokenizer, occurrences
from dsm_train.data.tasks import Task

TASKS = [Task(id=i, prompt=f"{i}", answer=str(i), solution=None) for i in range(10)]


def write_jsonl(path: Path, numbers: range) -> Path:
    rows = [
        {"question": f"What is {n} + {n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_pass_draws_every_task_once_in_an_order_of_its_own() -> None:
    drawn = [task.id for step in range(5) for task in draw(TASKS, 4, step, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_a_draw_is_a_function_of_its_step_and_seed() -> None:
    ids = [[task.id for task in draw(TASKS, 4, step, seed=0)] for step in range(6)]
    assert [[task.id for task in draw(TASKS, 4, step, seed=0)] for step in reversed(range(6))] == ids[::-1]
    assert [[task.id for task in draw(TASKS, 4, step, seed=1)] for step in range(6)] != ids
    # the batch size cuts the same endless sequence elsewhere
    assert [t.id for t in draw(TASKS, 2, 0, 0) + draw(TASKS, 2, 1, 0)] == ids[0]


def test_occurrences_number_the_draws_of_each_task() -> None:
    assert occurrences([TASKS[n] for n in (3, 3, 1, 3, 1)]) == [0, 1, 0, 2, 1]
    # where two passes meet within a step
    drawn = draw(TASKS, 16, 0, seed=0)
    assert sorted(occurrences(drawn)) == [0] * 10 + [1] * 6
    assert len(set(zip([t.id for t in drawn], occurrences(drawn), strict=True))) == 16


def test_generated_tasks_take_what_was_asked() -> None:
    tasks = load_tasks(DataConfig(kinds=("add", "word"), train_tasks=50, heldout_tasks=20, style="steps"))
    assert (len(tasks.train), len(tasks.heldout)) == (50, 20)
    assert not {t.prompt for t in tasks.train} & {t.prompt for t in tasks.heldout}
    assert load_tasks(DataConfig(train_tasks=5, seed=1)) != load_tasks(DataConfig(train_tasks=5, seed=2))


def test_a_file_is_split_by_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", range(30))
    tasks = load_tasks(DataConfig(path=path, heldout_tasks=8))
    assert (len(tasks.train), len(tasks.heldout)) == (22, 8)
    assert {t.answer for t in (*tasks.train, *tasks.heldout)} == {str(2 * n) for n in range(30)}
    assert load_tasks(DataConfig(path=path, heldout_tasks=8)) == tasks
    assert load_tasks(DataConfig(path=path, heldout_tasks=8, seed=1)).heldout != tasks.heldout
    assert tasks.train[0].prompt.startswith("Question: What is ") and tasks.train[0].prompt.endswith("\nAnswer:")


def test_held_out_questions_never_train(tmp_path: Path) -> None:
    train, heldout = write_jsonl(tmp_path / "a.jsonl", range(20)), write_jsonl(tmp_path / "b.jsonl", range(15, 40))
    tasks = load_tasks(DataConfig(path=train, heldout_path=heldout, heldout_tasks=10))
    assert len(tasks.heldout) == 10 and len(tasks.train) == 15
    assert not {t.prompt for t in tasks.train} & {t.prompt for t in tasks.heldout}


def test_a_split_that_leaves_nothing_raises(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(5))
    with pytest.raises(ValueError, match=r"heldout_tasks = 5 leaves nothing .* 5 tasks"):
        load_tasks(DataConfig(path=path, heldout_tasks=5))
    with pytest.raises(ValueError, match="every task"):
        load_tasks(DataConfig(path=path, heldout_path=path))


def test_the_tokenizer_comes_from_the_configuration_then_the_weights_then_the_tasks(tmp_path: Path) -> None:
    tasks = load_tasks(DataConfig(kinds=("word",), train_tasks=200)).train
    made = make_tokenizer(DataConfig(vocab_size=300), None, tasks)
    assert made.vocab_size == 300 and made.decode(made.encode(tasks[0].prompt)) == tasks[0].prompt
    for folder, size in (("given", 280), ("init", 290)):
        make_tokenizer(DataConfig(vocab_size=size), None, tasks).save(tmp_path / folder)
    assert make_tokenizer(DataConfig(), tmp_path / "init", tasks).vocab_size == 290
    assert make_tokenizer(DataConfig(tokenizer=tmp_path / "given"), tmp_path / "init", tasks).vocab_size == 280
