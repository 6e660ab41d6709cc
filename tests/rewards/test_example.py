"""The example of docs/rewards.md is the file that it names, and works."""

from __future__ import annotations

import re
from pathlib import Path

from dsm_train.data.tasks import Task
from dsm_train.rewards.outcome import Returned
from dsm_train.rewards.worker import Worker

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_example() -> None:
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(shown) == 1 and (ROOT / "recipes" / "my_rewards.py").read_text(encoding="utf-8").endswith(shown[0])


def test_the_example_s_functions_judge_as_they_say() -> None:
    worker = Worker(["my_rewards:length_penalty", "my_rewards:right_choice"], [str(ROOT / "recipes")], 60)
    choice = Task(1, "Which is even?", "two", fields={"choices": ["one", "two"]})
    completions = ["It is two.", "It is one.", "two or one", "2"]
    tasks = [choice, choice, choice, Task(2, "1+1", "2")]
    assert worker.call(0, completions, tasks) == Returned((-0.01, -0.01, -0.01, -0.001))
    assert worker.call(1, completions, tasks) == Returned((1.0, 0.0, 0.0, None))
    worker.close()
