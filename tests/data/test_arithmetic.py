"""Generated tasks: right, varied, reproducible, and never on both sides of the split."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from dsm_train.data.arithmetic import KINDS, arithmetic_tasks
from dsm_train.data.tasks import Task
from dsm_train.rewards import numeric_reward

ALL = [*arithmetic_tasks(KINDS, "train"), *arithmetic_tasks(KINDS, "heldout")]


def operands(task: Task) -> tuple[int, int]:
    """The two numbers of a prompt, ascending."""
    low, high = sorted(map(int, re.findall(r"\d+", task.question)))
    return low, high


# sub alone has the 90 differences 0..89, and a tenth of 720 products has fewer than 100 tasks
@pytest.mark.parametrize("kinds", [("add",), ("word",), ("sub", "word"), KINDS])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_many_and_none_is_frequent(kinds: tuple[str, ...], split: str) -> None:
    tasks = arithmetic_tasks(kinds, split)
    counts = Counter(task.answer for task in tasks)
    assert len(counts) >= 100
    assert max(counts.values()) <= 0.05 * len(tasks)


@pytest.mark.parametrize("kind", ["sub", "mul"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_no_answer_of_a_small_kind_is_frequent(kind: str, split: str) -> None:
    tasks = arithmetic_tasks([kind], split)
    assert max(Counter(task.answer for task in tasks).values()) <= 0.05 * len(tasks)


def test_no_pair_of_operands_is_on_both_sides() -> None:
    # across kinds, seeds and numbers of digits: each side is drawn with its own arguments
    train = {operands(task) for task in arithmetic_tasks(KINDS, "train", seed=1)}
    heldout = {operands(task) for task in arithmetic_tasks(["sub"], "heldout", seed=2, digits=3)}
    heldout |= {operands(task) for task in arithmetic_tasks(KINDS, "heldout", seed=3)}
    assert train and heldout
    assert not train & heldout
    assert 0.08 < len(heldout & {(a, b) for b in range(10, 100) for a in range(10, b + 1)}) / 4095 < 0.12


def test_both_splits_together_are_everything_once() -> None:
    assert len({task.id for task in ALL}) == len({task.question for task in ALL}) == len(ALL)
    bare = {task.question for task in ALL if task.question.endswith("=")}
    sums = {f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)}
    differences = {f"{a}-{b}=" for a in range(10, 100) for b in range(10, a + 1)}
    products = {f"{a}*{b}=" for a in range(10, 100) for b in range(2, 10)}
    assert bare == sums | differences | products
    assert len({re.sub(r"\d+", "", task.question) for task in ALL} - {"+=", "-=", "*="}) >= 8


def test_answers_are_right() -> None:
    for task in ALL:
        if task.question.endswith("="):
            a, operator, b = re.fullmatch(r"(\d+)(.)(\d+)=", task.question).groups()  # type: ignore[union-attr]
            assert int(task.answer) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
        else:
            low, high = operands(task)
            assert int(task.answer) in (low + high, high - low)
        assert task.solution == task.answer


# three digits borrow twice in a row; sums of three digits carry as those of two do, and are a million
@pytest.mark.parametrize(("kinds", "digits"), [(KINDS, 2), (("sub", "mul"), 3)])
def test_every_line_of_the_steps_is_true_and_they_end_in_the_answer(kinds: tuple[str, ...], digits: int) -> None:
    for task in arithmetic_tasks(kinds, "heldout", count=200, style="steps", digits=digits):
        assert task.solution is not None
        _, *lines, last = task.solution.split("\n")
        assert last == f"#### {task.answer}"
        for line in lines:
            left, right = line.split("=")
            assert re.fullmatch(r"[\d+*-]+", left)
            assert eval(left) == int(right)  # noqa: S307
        assert numeric_reward(task.solution, task.answer) == 1.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("add", [("86+17=", "\n6+7=13\n8+1+1=10\n#### 103"), ("94+95=", "\n4+5=9\n9+9=18\n#### 189")]),
        ("sub", [("92-34=", "\n12-4=8\n9-3-1=5\n#### 58"), ("96-88=", "\n16-8=8\n9-8-1=0\n#### 8")]),
        (
            "mul",
            [("63*7=", "\n3*7=21\n60*7=420\n21+420=441\n#### 441"), ("16*2=", "\n6*2=12\n10*2=20\n12+20=32\n#### 32")],
        ),
    ],
)
def test_the_same_tasks_on_every_machine(kind: str, expected: list[tuple[str, str]]) -> None:
    tasks = arithmetic_tasks([kind], "train", count=3, style="steps")
    assert [(task.question, task.solution) for task in tasks[:2]] == expected


def test_seed_draws_and_ids_stay() -> None:
    first, again, other = (arithmetic_tasks(KINDS, "train", count=200, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    prompt_by_id = {task.id: task.question for task in ALL}
    assert all(prompt_by_id[task.id] == task.question for task in first)


def test_count_is_shared_evenly_and_small_kinds_give_what_they_have() -> None:
    def kinds(count: int) -> Counter[str]:
        tasks = arithmetic_tasks(["word", "mul", "add"], "heldout", count=count)
        return Counter("word" if "?" in task.question else task.question.strip("0123456789=") for task in tasks)

    products = len(arithmetic_tasks(["mul"], "heldout"))
    assert kinds(30) == {"word": 10, "*": 10, "+": 10}
    assert kinds(products + 1000) == {"word": 500, "*": products, "+": 500}


def test_too_many_names_how_many_there_are() -> None:
    available = len(arithmetic_tasks(["add"], "heldout"))
    assert len(arithmetic_tasks(["add"], "heldout", count=available)) == available
    with pytest.raises(ValueError, match=f"1 to {available}.*got {available + 1}"):
        arithmetic_tasks(["add"], "heldout", count=available + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ["divide"]}, "kinds must.*add, sub, mul, word.*divide"),
        ({"kinds": []}, "kinds must"),
        ({"kinds": ["add", "add"]}, "different"),
        ({"kinds": "add"}, "must be a list"),
        ({"split": "test"}, "train, heldout.*'test'"),
        ({"style": "cot"}, "answer, steps.*'cot'"),
        ({"digits": 1}, "2 or 3, got 1"),
        ({"count": 0}, "got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic_tasks(**({"kinds": ["add"], "split": "train"} | arguments))  # type: ignore[arg-type]
