"""The tasks of a run: where they come from, how they are split, and those that are left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsm_train.data.arithmetic import count_tasks
from dsm_train.data.config import DataConfig
from dsm_train.data.source import (
    Tasks,
    check_shares,
    load_tasks,
    make_tokenizer,
    readable,
    repetition_note,
    unreadable_note,
    without_unreadable,
)
from dsm_train.data.tasks import Task
from dsm_train.rewards import RewardConfig
from dsm_train.rewards.grader import Grader

TASKS = [Task(id=i, question=f"{i}", answer=str(i), solution=None) for i in range(10)]


def write_jsonl(path: Path, numbers: range) -> Path:
    rows = [
        {"question": f"What is {n} + {n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
        assert load_tasks(DataConfig(source="file", path=(path,))) == load_tasks(DataConfig(path=(path,)))
    else:
        with pytest.raises(ValueError, match="^path must be left out when source is generated; got .*train.jsonl"):
            DataConfig(source="generated", path=(path,))
        assert load_tasks(DataConfig(source="generated")) == load_tasks(DataConfig())


def test_a_file_is_split_by_the_questions_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", range(30))
    tasks = load_tasks(DataConfig(path=(path,), heldout_tasks=8))
    assert (len(tasks.train), len(tasks.heldout)) == (22, 8)
    assert {t.answer for t in (*tasks.train, *tasks.heldout)} == {str(2 * n) for n in range(30)}
    # another seed, template or order of lines: training in another order, the same held-out questions
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[::-1]).replace("What is", "what  IS"))
    other = load_tasks(
        DataConfig(path=(tmp_path / "other.jsonl",), heldout_tasks=8, seed=1, prompt_template="{question} =")
    )
    assert [t.key for t in other.heldout] == [t.key for t in tasks.heldout]
    assert [t.key for t in other.train] != [t.key for t in tasks.train]
    assert (
        load_tasks(DataConfig(path=(path,), heldout_tasks=3)).heldout == tasks.heldout[:3]
    )  # fewer are a part of more


# a tenth, at least one, and never more than 500
@pytest.mark.parametrize(("lines", "heldout"), [(2, 1), (100, 10), (6000, 500)])
def test_a_share_of_a_file_is_held_out(lines: int, heldout: int, tmp_path: Path) -> None:
    tasks = load_tasks(DataConfig(path=(write_jsonl(tmp_path / "a.jsonl", range(lines)),)))
    assert (len(tasks.train), len(tasks.heldout)) == (lines - heldout, heldout)


def test_a_question_that_stands_in_a_file_twice_is_on_one_side(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(20))
    path.write_text(path.read_text() + path.read_text().replace("What is", "  WHAT is"))
    tasks = load_tasks(DataConfig(path=(path,), heldout_tasks=5))
    assert len(tasks.heldout) == 5 and not {t.key for t in tasks.train} & {t.key for t in tasks.heldout}


@pytest.mark.parametrize("evaluated", [None, 10])
def test_all_of_a_held_out_file_is_evaluated_and_none_of_it_trains(evaluated: int | None, tmp_path: Path) -> None:
    train, heldout = write_jsonl(tmp_path / "a.jsonl", range(700)), write_jsonl(tmp_path / "b.jsonl", range(100, 900))
    heldout.write_text(heldout.read_text().replace("What is", "What  is"))  # the same questions, typeset otherwise
    tasks = load_tasks(DataConfig(path=(train,), heldout_path=(heldout,), heldout_tasks=evaluated))
    assert len(tasks.heldout) == (evaluated or 800) and len(tasks.train) == 100
    assert {int(t.answer) for t in tasks.train} == set(range(0, 200, 2))


def test_several_files_are_told_apart_and_held_out_questions_leave_all_of_them(tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", range(30)), write_jsonl(tmp_path / "b.jsonl", range(20, 40))
    heldout = write_jsonl(tmp_path / "h.jsonl", range(25, 35))
    tasks = load_tasks(DataConfig(path=(first, second), heldout_path=(heldout,)))
    rows = sorted((t.file, t.id, t.place) for t in tasks.train)
    assert rows == [(0, n + 1, f"{first}:{n + 1}") for n in range(25)] + [
        (1, 2**32 + n - 19, f"{second}:{n - 19}") for n in (*range(20, 25), *range(35, 40))
    ]
    assert [t.id for t in tasks.heldout] == list(range(1, 11))
    assert tasks.notes == ("5 training tasks ask a question of another file as well; all are kept",)
    # without a held-out file, a tenth of all questions
    tasks = load_tasks(DataConfig(path=(first, second)))
    assert len(tasks.heldout) == 5 and not {t.key for t in tasks.train} & {t.key for t in tasks.heldout}
    assert len({t.id for t in (*tasks.train, *tasks.heldout)}) == len(tasks.train) + 5
    assert len(load_tasks(DataConfig(path=(first, second), train_tasks=7)).train) == 7


def test_a_file_whose_weight_draws_nothing_is_refused(tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", range(30)), write_jsonl(tmp_path / "b.jsonl", range(30, 40))
    config = DataConfig(path=(first, second), weights=(2, 1), heldout_path=(second,))
    with pytest.raises(ValueError, match="data.weights: no task of .*b.jsonl is left to train on"):
        check_shares(load_tasks(config).train, config)
    config = replace(config, weights=(1000, 1), heldout_path=None)
    train = load_tasks(config).train
    with pytest.raises(ValueError, match=r"data.weights = \[1000, 1\] draw less than one task of .*b.jsonl in 36"):
        check_shares(train, config)
    for weights in ((2, 1), ()):
        check_shares(train, replace(config, weights=weights))


def test_more_held_out_tasks_than_their_file_has_are_refused(tmp_path: Path) -> None:
    train, heldout = write_jsonl(tmp_path / "a.jsonl", range(30)), write_jsonl(tmp_path / "b.jsonl", range(30, 35))
    with pytest.raises(ValueError, match="data.heldout_tasks must be at most 5, the number of .*b.jsonl; got 6"):
        load_tasks(DataConfig(path=(train,), heldout_path=(heldout,), heldout_tasks=6))


@pytest.mark.parametrize("key", ["path", "heldout_path"])
def test_errors_of_a_file_name_its_key(key: str, tmp_path: Path) -> None:
    good, bad = write_jsonl(tmp_path / "a.jsonl", range(30)), tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q"}')
    paths: dict[str, Any] = {"path": (good,), "heldout_path": (good,)} | {key: (good, bad)}
    with pytest.raises(ValueError, match=f"^data.{key}: .*bad.jsonl:1: has no field 'answer'"):
        load_tasks(DataConfig(**paths))


def unreadable_tasks() -> Tasks:
    gold = ["1", "1/2", "x^2", "0,5", "2"]
    train = [Task(id=n, question=f"{n}", answer=a, place=f"a.jsonl:{n}") for n, a in enumerate(gold, 1)]
    return Tasks(tuple(train[::-1]), (Task(id=1, question="h", answer="3", place="b.jsonl:1"),))


def test_gold_answers_that_no_reward_reads_end_the_start_or_are_left_out() -> None:
    tasks, grader = unreadable_tasks(), Grader(RewardConfig())
    with pytest.raises(ValueError, match=r"^a.jsonl:3: answer must be a number.*x\^2.* 2 of 5 training tasks.*=skip"):
        without_unreadable(tasks, grader, ("train", "heldout"), skip=False)
    left, line = without_unreadable(tasks, grader, ("train", "heldout"), skip=True)
    assert [task.id for task in left.train] == [5, 2, 1] and left.heldout == tasks.heldout
    assert line is not None and "left out are 2 of 5 training tasks, the first at a.jsonl:3: answer must" in line
    for skip in (False, True):  # the side that is not graded stays as it is
        assert without_unreadable(tasks, grader, ("heldout",), skip) == (tasks, None)
    none = Tasks(tasks.train[1:3], tasks.heldout)
    with pytest.raises(ValueError, match="a.jsonl:3: .* 2 of 2 training tasks: choose rewards.functions"):
        without_unreadable(none, grader, ("train",), skip=True)


def test_accuracy_is_measured_where_answers_are_read() -> None:
    tasks, grader = unreadable_tasks().train, Grader(RewardConfig())
    assert [task.id for task in readable(tasks, grader)] == [5, 2, 1]
    note = unreadable_note(tasks, grader)
    assert note is not None and note.startswith("accuracy is measured on 3 of 5 held-out tasks")
    assert unreadable_note(tasks[-2:], grader) is None


def test_a_split_that_leaves_nothing_raises(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(5))
    with pytest.raises(ValueError, match=r"the 5 held-out tasks leave nothing .* has 5: lower data.heldout_tasks"):
        load_tasks(DataConfig(path=(path,), heldout_tasks=5))
    with pytest.raises(ValueError, match="leave nothing to train on; give another data.heldout_path"):
        load_tasks(DataConfig(path=(path,), heldout_path=(path,)))
    assert len(load_tasks(DataConfig(path=(path,), heldout_tasks=2, train_tasks=3)).train) == 3
    with pytest.raises(ValueError, match=r"train_tasks = 4, and .*a.jsonl has 3 that are not held out: lower it"):
        load_tasks(DataConfig(path=(path,), heldout_tasks=2, train_tasks=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_tasks": -1}, "train_tasks must be at least 1; got -1"),
        ({"train_tasks": 0}, "train_tasks must be at least 1; got 0"),
        ({"heldout_tasks": 0}, "heldout_tasks must be at least 1; got 0"),
        ({"heldout_path": (Path("x"),)}, "heldout_path must be given with path; got x"),
        ({"tokenizer": "x", "vocab_size": 500}, "vocab_size must be left out beside tokenizer = x.*; got 500"),
        ({"path": ()}, "path must be a file, or a list of files; got an empty list"),
        ({"weights": (1.0,)}, "weights must be one number for each of the 0 files of path; got \\[1.0\\]"),
        ({"path": (Path("x"), Path("y")), "weights": (1.0, 0.0)}, "weights must be above 0; got"),
        (
            {"question_field": "q", "messages_field": "m"},
            "messages_field must be left out beside question_field = q; got m",
        ),
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
