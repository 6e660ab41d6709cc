"""The grader: reward and correctness of a response, for training and for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from dsm_train.data.tasks import Task
from dsm_train.rewards import RewardConfig, RewardFunction
from dsm_train.rewards.built_in import BUILT_IN
from dsm_train.rewards.config import BuiltIn
from dsm_train.rewards.grader import Grader, Verdict

TASK = Task(id=1, question="70+2=", answer="72", solution=None)
NUMERIC = RewardFunction("numeric")
Make = Callable[..., Grader]


def both(numeric: float, form: float) -> RewardConfig:
    return RewardConfig((RewardFunction("numeric", weight=numeric), RewardFunction("format", weight=form)))


def verdict(config: RewardConfig, response: str, finished: bool = True) -> Verdict:
    (only,) = Grader(config).grade([response], [TASK], [finished])
    return only


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make a grader with a user's function of this body, after the numeric reward unless it comes first."""
    graders: list[Grader] = []

    def with_function(body: str, *, first: bool = False, weight: float = 1.0, **named: object) -> Grader:
        (tmp_path / "mine.py").write_text(f"import math, time\n\ndef f(completions, tasks):\n    {body}\n")
        function = RewardFunction(call="mine:f", weight=weight)
        functions = (function, NUMERIC) if first else (NUMERIC, function)
        graders.append(Grader(RewardConfig(functions, **named), [str(tmp_path)]))  # type: ignore[arg-type]
        return graders[-1]

    yield with_function
    for grader in graders:
        grader.close()


@pytest.mark.parametrize(
    ("response", "numeric", "form"),
    [("#### 72", 1, 1), ("72", 1, 0), ("#### 71", 0, 1), ("71", 0, 0)],
)
def test_the_reward_is_a_weighted_sum_and_correct_is_what_the_first_function_says(
    response: str, numeric: int, form: int
) -> None:
    assert verdict(RewardConfig(), response) == Verdict(numeric, numeric == 1, (numeric,))
    parts = (numeric, form)
    assert verdict(both(2.0, 0.5), response) == Verdict(2.0 * numeric + 0.5 * form, numeric == 1, parts)
    assert verdict(both(0.0, 0.5), response) == Verdict(0.5 * form, numeric == 1, parts)
    turned = RewardConfig((RewardFunction("format"), NUMERIC))
    assert verdict(turned, response) == Verdict(numeric + form, form == 1, (form, numeric))


def test_a_response_that_was_cut_off_earns_nothing_unless_it_is_kept() -> None:
    config = both(1.0, 0.5)
    assert verdict(config, "#### 72", finished=False) == Verdict(0.0, False, (0.0, 0.0))  # the beginning of 725?
    assert verdict(RewardConfig(unfinished="mask"), "#### 72", finished=False) == Verdict(0.0, False, (0.0,))
    kept = RewardConfig(config.functions, unfinished="keep")
    assert verdict(kept, "#### 72", finished=False) == verdict(config, "#### 72") == Verdict(1.5, True, (1.0, 1.0))


def test_responses_are_judged_beside_their_tasks() -> None:
    other = Task(id=2, question="1+1=", answer="2", solution=None)
    graded = Grader(RewardConfig()).grade(["2", "2", "72"], [TASK, other, TASK], [True] * 3)
    assert [v.correct for v in graded] == [False, True, True]
    with pytest.raises(ValueError, match="zip"):
        Grader(RewardConfig()).grade(["2"], [TASK, other], [True])


def test_a_function_of_the_user_s_sees_whole_tasks_and_finished_responses_alone(make: Make) -> None:
    task = Task(3, "Which?", "b", fields={"choices": ["a", "b"]})
    grader = make(
        "return [len(c) + t.fields['choices'].index(t.answer) for c, t in zip(completions, tasks)]", weight=-2
    )
    numeric = Task(4, "1+1", "2", fields=task.fields | {"choices": ["2"]})
    graded = grader.grade(["2", "2222", "222"], [numeric] * 3, [True, False, True])
    assert [(v.reward, v.parts) for v in graded] == [(1 - 2, (1, 1)), (0, (0, 0)), (0 - 6, (0, 3))]
    # and nothing is asked about nothing
    assert grader.grade([], [], []) == [] and grader.grade(["2"], [numeric], [False]) == [graded[1]]


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("return [None, 0.5]", (math.nan, 0.5)),
        ("return [math.nan, 2]", (math.nan, 2.0)),
        ("return [0.0, -math.inf]", (0.0, math.nan)),
        ("return [1e300, True]", (math.nan, 1.0)),  # beyond fp32
        ("return [0.0, 10**400]", (math.nan, math.nan)),
        ("return [0.0]", (math.nan, math.nan)),
        ("raise RuntimeError", (math.nan, math.nan)),
    ],
)
def test_what_is_no_finite_number_is_no_verdict_and_never_0(body: str, parts: tuple[float, float], make: Make) -> None:
    graded = make(body).grade(["72", "72"], [TASK] * 2, [True] * 2)
    assert [v.parts for v in graded] == [pytest.approx((1.0, part), nan_ok=True) for part in parts]
    assert [v.reward for v in graded] == pytest.approx([1.0 + part for part in parts], nan_ok=True)
    assert all(v.correct for v in graded)  # the first function gave its verdict
    zero = make(body, no_verdict="zero").grade(["72", "72"], [TASK] * 2, [True] * 2)
    assert [v.reward for v in zero] == pytest.approx([0.0 if math.isnan(part) else 1 + part for part in parts])
    assert [v.parts for v in zero] == [v.parts for v in graded] or any(map(math.isnan, parts))


def test_a_function_that_only_measures_takes_no_verdict_away(make: Make) -> None:
    (judged,) = make("return [None]", weight=0.0).grade(["72"], [TASK], [True])
    assert judged.reward == 1 and judged.correct and math.isnan(judged.parts[1])
    (judged,) = make("return [1e300]", weight=0.0, no_verdict="zero").grade(["72"], [TASK], [True])
    assert judged.reward == 1
    (judged,) = make("return [None]", first=True, weight=0.0).grade(["72"], [TASK], [True])
    assert judged.reward == 1 and not judged.correct


def test_a_response_without_a_verdict_of_the_first_function_is_not_correct(make: Make) -> None:
    (judged,) = make("return [None]", first=True).grade(["72"], [TASK], [True])
    assert not judged.correct and math.isnan(judged.reward)


def test_the_reason_of_the_last_failure_is_kept(make: Make) -> None:
    grader = make("return [1 / len(completions[0])]")
    assert not math.isnan(grader.grade(["72"], [TASK], [True])[0].reward) and grader.trouble is None
    grader.grade([""], [TASK], [True])
    assert grader.trouble is not None and grader.trouble.startswith("mine:f: ")
    assert grader.trouble.endswith("mine.py:4: ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("72", None),
        ("1,234.5", None),
        ("", "has no answer"),
        (" \n", "has no answer"),
        ("seventy", "answer must be a number or end in '#### number', got 'seventy'"),
        ("0,5", "got '0,5': write a decimal point; a comma separates thousands"),
    ],
)
def test_gold_answers_that_the_numeric_reward_cannot_read_are_told(answer: str, reason: str | None) -> None:
    task = Task(1, "q", answer)
    told = Grader(RewardConfig()).unreadable(task)
    assert told is None if reason is None else told is not None and told.endswith(reason)
    others = RewardConfig((RewardFunction("format"), RewardFunction(call="mine:f")))
    assert Grader(others).unreadable(task) is None
    if reason is not None:
        with pytest.raises(ValueError, match="gold answer must be a number"):
            Grader(RewardConfig()).grade(["72"], [task], [True])


def test_the_names_of_the_configuration_are_those_of_the_table() -> None:
    assert get_args(BuiltIn) == tuple(BUILT_IN)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ((), "functions must be a list of at least one function; got []"),
        ((NUMERIC, NUMERIC), "functions must be functions of different names: they name the metrics; got numeric"),
        ((NUMERIC, RewardFunction(call="m:std")), "functions must be functions of different names: they name the"),
        ((RewardFunction("format", weight=0),), "functions must be weighted other than 0, one at least"),
    ],
)
def test_lists_of_functions_that_cannot_be(functions: tuple[RewardFunction, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        RewardConfig(functions)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name must be given or call, one of the two; got name = None, call = None"),
        ({"name": "numeric", "call": "a:b"}, "name must be given or call, one of the two; got name = numeric, call = "),
        ({"call": "my_rewards.py:f"}, "call must be module:function: write my_rewards:f; got my_rewards.py:f"),
        ({"call": "my_rewards"}, "call must be module:function, such as my_rewards:length_penalty; got my_rewards"),
        ({"call": "my rewards:f"}, "call must be module:function"),
        ({"call": "a:"}, "call must be module:function"),
        ({"name": "numeric", "weight": math.inf}, "weight must be finite; got inf"),
        ({"name": "numeric", "weight": -1.0}, "weight must be at least 0 for a built-in reward; got -1.0"),
        ({"call": "a.b:c.d", "weight": -1.0}, None),
    ],
)
def test_functions_that_cannot_be(fields: dict[str, object], message: str | None) -> None:
    if message is None:
        assert RewardFunction(**fields).label in ("f", "c.d")  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError) as error:
        RewardFunction(**fields)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
