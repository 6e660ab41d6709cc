"""Preparation: tasks that a stage can answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsm_train.config import ModelConfig
from dsm_train.configs import EvaluateConfig, GrpoConfig, StageConfig
from dsm_train.data.config import DataConfig
from dsm_train.data.format import PlainFormat
from dsm_train.data.source import Tasks
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import train_tokenizer
from dsm_train.prepare import usable, without_too_long
from dsm_train.rewards import RewardConfig
from dsm_train.rewards.grader import Grader
from dsm_train.rollout.config import SamplingConfig

FORMAT = PlainFormat(train_tokenizer([], 258), "{question}")  # a token per byte
SHORT, LONG = Task(1, "1+1=", "2", place="a.jsonl:1"), Task(2, "one and one, that is", "2", place="a.jsonl:2")
TASKS = Tasks((SHORT, LONG), (SHORT,))
SAMPLING = SamplingConfig(max_new_tokens=6)
GRADER = Grader(RewardConfig())
SKIP = DataConfig(too_long="skip")


def config(stage: type[StageConfig] = GrpoConfig, data: DataConfig = SKIP, **model: int) -> StageConfig:
    made = object.__new__(stage)  # eval insists on weights, which play no part here
    made.__dict__.update(vars(replace(GrpoConfig(), data=data, model=ModelConfig(**{"max_length": 16} | model))))
    return made


def test_tasks_that_are_too_long_are_left_out_and_counted() -> None:
    left, line = without_too_long(config(), SAMPLING, TASKS, FORMAT)
    assert left == Tasks((SHORT,), (SHORT,))
    assert line is not None and "1 of 2 training tasks are left out, whose prompts have more than 10 tokens" in line
    assert without_too_long(config(), SAMPLING, left, FORMAT) == (left, None)
    with pytest.raises(ValueError, match="every prompt of the training tasks has more than 2 tokens: raise model.max"):
        without_too_long(config(max_length=8), SAMPLING, TASKS, FORMAT)


def test_a_file_whose_tasks_are_all_left_out_may_have_no_weight() -> None:
    data = DataConfig(path=(Path("a.jsonl"), Path("b.jsonl")), weights=(1, 1), unreadable="skip")
    tasks = Tasks((SHORT, Task(2**32 + 1, "x?", "x^2", file=1)), (SHORT,))
    with pytest.raises(ValueError, match="^data.weights: no task of b.jsonl is left to train on"):
        usable(config(data=data), None, tasks, FORMAT, GRADER)
    left, _ = usable(config(data=replace(data, weights=())), None, tasks, FORMAT, GRADER)
    assert left.train == (SHORT,)


def test_a_task_that_is_too_long_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"a.jsonl:2 has 20 tokens.*exceeds model.max_length = 16: .*too_long=skip"):
        without_too_long(config(data=DataConfig()), SAMPLING, TASKS, FORMAT)


def test_prompts_that_a_stage_does_not_ask_are_not_looked_at() -> None:
    for data in (SKIP, DataConfig()):
        assert without_too_long(config(EvaluateConfig, data), SAMPLING, TASKS, FORMAT) == (TASKS, None)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="the prompt of a.jsonl:9 has no token"):
        without_too_long(config(), SAMPLING, Tasks((Task(9, "", place="a.jsonl:9"), SHORT), ()), FORMAT)
