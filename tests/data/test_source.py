"""The tasks of a run, and the order in which they are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsm_train.data.arithmetic import count_tasks
from dsm_train.data.config import DataConfig
from dsm_train.data.format import PlainFormat
from dsm_train.data.source import (
    draw,
    load_tasks,
    make_tokenizer,
    occurrences,
    repetition_note,
    without_too_long,
)
from dsm_train.data.tasks import Task

TASKS = [Task(id=i, question=f"{i}", answer=str(i), solution=None) for i in range(10)]


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
    assert not {t.question for t in tasks.train} & {t.question for t in tasks.heldout}
    assert load_tasks(DataConfig(train_tasks=5, seed=1)) != load_tasks(DataConfig(train_tasks=5, seed=2))


def test_generated_tasks_hold_out_500_or_all_there_are() -> None:
    assert len(load_tasks(DataConfig()).heldout) == 500
    few = load_tasks(DataConfig(kinds=("mul",))).heldout
    assert len(few) == count_tasks(["mul"], "heldout") < 500


@pytest.mark.parametrize("source", ["file", "generated"])
def test_no_other_data_than_the_source_says(source: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", range(30))
    if source == "file":
        with pytest.raises(ValueError, match="data.path must be given, since data.source is file"):
            load_tasks(DataConfig(source="file"))
        assert load_tasks(DataConfig(source="file", path=path)) == load_tasks(DataConfig(path=path))
    else:
        with pytest.raises(ValueError, match="^path must be left out when source is generated; got .*train.jsonl"):
            DataConfig(source="generated", path=path)
        assert load_tasks(DataConfig(source="generated")) == load_tasks(DataConfig())


def test_a_file_is_split_by_the_questions_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", range(30))
    tasks = load_tasks(DataConfig(path=path, heldout_tasks=8))
    assert (len(tasks.train), len(tasks.heldout)) == (22, 8)
    assert {t.answer for t in (*tasks.train, *tasks.heldout)} == {str(2 * n) for n in range(30)}
    # another seed, template or order of lines: training in another order, the same held-out questions
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[::-1]).replace("What is", "what  IS"))
    other = load_tasks(
        DataConfig(path=tmp_path / "other.jsonl", heldout_tasks=8, seed=1, prompt_template="{question} =")
    )
    assert [t.key for t in other.heldout] == [t.key for t in tasks.heldout]
    assert [t.key for t in other.train] != [t.key for t in tasks.train]
    assert load_tasks(DataConfig(path=path, heldout_tasks=3)).heldout == tasks.heldout[:3]  # fewer are a part of more


# a tenth, at least one, and never more than 500
@pytest.mark.parametrize(("lines", "heldout"), [(2, 1), (100, 10), (6000, 500)])
def test_a_share_of_a_file_is_held_out(lines: int, heldout: int, tmp_path: Path) -> None:
    tasks = load_tasks(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", range(lines))))
    assert (len(tasks.train), len(tasks.heldout)) == (lines - heldout, heldout)


def test_a_question_that_stands_in_a_file_twice_is_on_one_side(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(20))
    path.write_text(path.read_text() + path.read_text().replace("What is", "  WHAT is"))
    tasks = load_tasks(DataConfig(path=path, heldout_tasks=5))
    assert len(tasks.heldout) == 5 and not {t.key for t in tasks.train} & {t.key for t in tasks.heldout}


@pytest.mark.parametrize("evaluated", [None, 10])
def test_all_of_a_held_out_file_is_evaluated_and_none_of_it_trains(evaluated: int | None, tmp_path: Path) -> None:
    train, heldout = write_jsonl(tmp_path / "a.jsonl", range(700)), write_jsonl(tmp_path / "b.jsonl", range(100, 900))
    heldout.write_text(heldout.read_text().replace("What is", "What  is"))  # the same questions, typeset otherwise
    tasks = load_tasks(DataConfig(path=train, heldout_path=heldout, heldout_tasks=evaluated))
    assert len(tasks.heldout) == (evaluated or 800) and len(tasks.train) == 100
    assert {int(t.answer) for t in tasks.train} == set(range(0, 200, 2))


def test_a_split_that_leaves_nothing_raises(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(5))
    with pytest.raises(ValueError, match=r"the 5 held-out tasks leave nothing .* has 5: lower data.heldout_tasks"):
        load_tasks(DataConfig(path=path, heldout_tasks=5))
    with pytest.raises(ValueError, match="leave nothing to train on; give another data.heldout_path"):
        load_tasks(DataConfig(path=path, heldout_path=path))
    assert len(load_tasks(DataConfig(path=path, heldout_tasks=2, train_tasks=3)).train) == 3
    with pytest.raises(ValueError, match=r"train_tasks = 4, and .*a.jsonl has 3 that are not held out: lower it"):
        load_tasks(DataConfig(path=path, heldout_tasks=2, train_tasks=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_tasks": -1}, "train_tasks must be at least 1; got -1"),
        ({"train_tasks": 0}, "train_tasks must be at least 1; got 0"),
        ({"heldout_tasks": 0}, "heldout_tasks must be at least 1; got 0"),
        ({"heldout_path": "x"}, "heldout_path must be given with path; got x"),
        ({"tokenizer": "x", "vocab_size": 500}, "vocab_size must be left out beside tokenizer = x.*; got 500"),
        ({"prompt_template": "Q"}, "prompt_template must be text with {question} in it; got 'Q'"),
        ({"prompt_template": r"{question}\nAnswer:"}, r"prompt_template must be text whose line breaks are real: \$'"),
        ({"prompt_template": r"{question}\n"}, "prompt_template must be text whose line breaks are real"),
    ],
)
def test_what_cannot_be_heeded_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DataConfig(**arguments)


@pytest.mark.parametrize("template", ["{question}\n", r"{question} \neq \boxed{}", r"\nu: {question}"])
def test_line_breaks_and_latex_are_templates(template: str) -> None:
    assert DataConfig(prompt_template=template).prompt_template == template


def test_tasks_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(20))
    long = {"question": "How " + "very " * 50 + "long?", "answer": "1"}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    tasks = load_tasks(DataConfig(path=path, heldout_path=write_jsonl(tmp_path / "b.jsonl", range(30, 40))))
    format = PlainFormat(make_tokenizer(DataConfig(), None, tasks.train[:3]), "Question: {question}\nAnswer:")
    left, line = without_too_long(tasks, format, longest=60)
    assert len(left.train) == 20 and left.heldout == tasks.heldout
    assert line is not None and "1 of 21 training tasks and 0 of 10 held-out tasks are left out" in line
    assert without_too_long(left, format, longest=60) == (left, None)
    with pytest.raises(ValueError, match="every prompt of the training tasks has more than 3 tokens: raise model.max"):
        without_too_long(tasks, format, longest=3)


def test_a_file_smaller_than_a_step_is_said() -> None:
    assert repetition_note(TASKS, 10) is None
    line = repetition_note(TASKS[:4], 10)
    assert line is not None and "4 training tasks for algorithm.prompts_per_step = 10" in line and "2.5 times" in line


def test_the_tokenizer_comes_from_the_configuration_then_the_weights_then_the_tasks(tmp_path: Path) -> None:
    tasks = load_tasks(DataConfig(kinds=("word",), train_tasks=200)).train
    made = make_tokenizer(DataConfig(vocab_size=300), None, tasks)
    assert made.vocab_size == 300 and made.decode(made.encode(tasks[0].question)) == tasks[0].question
    for folder, size in (("given", 280), ("init", 290)):
        make_tokenizer(DataConfig(vocab_size=size), None, tasks).save(tmp_path / folder)
    assert make_tokenizer(DataConfig(), tmp_path / "init", tasks).vocab_size == 290
    assert make_tokenizer(DataConfig(tokenizer=tmp_path / "given"), tmp_path / "init", tasks).vocab_size == 280
    # a bound that the weights' tokenizer keeps is heeded, and one that it does not is refused
    assert make_tokenizer(DataConfig(vocab_size=290), tmp_path / "init", tasks).vocab_size == 290
    with pytest.raises(ValueError, match=r"vocab_size = 289 cannot be heeded: .*init has 290 tokens; set .*=null"):
        make_tokenizer(DataConfig(vocab_size=289), tmp_path / "init", tasks)
