"""The grader: reward and correctness of a response, for training and for evaluation."""

from __future__ import annotations

import pytest

from dsm_train.data.tasks import Task
from dsm_train.rewards import RewardConfig
from dsm_train.rewards.grader import Grader, Verdict

TASK = Task(id=1, question="70+2=", answer="72", solution=None)


def verdict(config: RewardConfig, response: str, finished: bool = True) -> Verdict:
    (only,) = Grader(config).grade([response], [TASK], [finished])
    return only


@pytest.mark.parametrize(
    ("response", "numeric", "form"),
    [("#### 72", 1, 1), ("72", 1, 0), ("#### 71", 0, 1), ("71", 0, 0)],
)
def test_the_reward_is_a_weighted_sum_and_correct_is_the_answer_alone(response: str, numeric: int, form: int) -> None:
    assert verdict(RewardConfig(), response) == Verdict(numeric, numeric == 1)
    assert verdict(RewardConfig(numeric=2.0, format=0.5), response) == Verdict(2.0 * numeric + 0.5 * form, numeric == 1)
    assert verdict(RewardConfig(numeric=0.0, format=0.5), response) == Verdict(0.5 * form, numeric == 1)


def test_a_response_that_was_cut_off_earns_nothing_unless_it_is_kept() -> None:
    config = RewardConfig(format=0.5)
    assert verdict(config, "#### 72", finished=False) == Verdict(0.0, False)  # perhaps the beginning of 725
    assert verdict(RewardConfig(unfinished="mask"), "#### 72", finished=False) == Verdict(0.0, False)
    kept = RewardConfig(format=0.5, unfinished="keep")
    assert verdict(kept, "#### 72", finished=False) == verdict(config, "#### 72") == Verdict(1.5, True)


def test_responses_are_judged_beside_their_tasks() -> None:
    other = Task(id=2, question="1+1=", answer="2", solution=None)
    graded = Grader(RewardConfig()).grade(["2", "2", "72"], [TASK, other, TASK], [True] * 3)
    assert [v.correct for v in graded] == [False, True, True]
    with pytest.raises(ValueError, match="zip"):
        Grader(RewardConfig()).grade(["2"], [TASK, other], [True])


def test_a_gold_answer_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match="gold answer must be a number, got 'seventy'"):
        Grader(RewardConfig()).grade(["72"], [Task(1, "q", "seventy")], [True])
