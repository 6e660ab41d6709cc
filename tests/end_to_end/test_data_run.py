"""Runs on files of questions: each draw of a task is answered anew, and no other questions are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import GRPO, refused, run, write_gsm8k

from dsm_train.rollout.record import read_rollouts

Capture = pytest.CaptureFixture[str]
RECIPE = Path(__file__).parents[2] / "recipes" / "gsm8k.yaml"


def test_one_question_that_fills_a_step_gets_other_responses_each_time(tmp_path: Path, capsys: Capture) -> None:
    data, heldout = write_gsm8k(tmp_path / "one.jsonl", 1), tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"question": "What is left?", "answer": "1"}))
    run("grpo", *GRPO, f"run.out={tmp_path / 'run'}", f"data.path={data}", f"data.heldout_path={heldout}",
        "data.heldout_tasks=null", "algorithm.prompts_per_step=8", "sampling.max_new_tokens=12", "steps=1",
        "model.max_length=200", "run.max_tokens=400", f"record={tmp_path / 'step.parquet'}")  # fmt: skip
    sequences = read_rollouts(tmp_path / "step.parquet").sequences
    assert sequences.num_prompts == 8
    assert len({tuple(sequences.response(s).tolist()) for s in range(32)}) == 32
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "training tasks for" in line)
    assert line.startswith("1 training tasks for algorithm.prompts_per_step = 8: each is asked 8 times a step")


def test_prompts_that_are_too_long_can_be_left_out(tmp_path: Path, capsys: Capture) -> None:
    data = write_gsm8k(tmp_path / "data.jsonl", 20)
    data.write_text(data.read_text() + json.dumps({"question": "12345" * 40, "answer": "1"}) + "\n")
    heldout = write_gsm8k(tmp_path / "heldout.jsonl", 22)
    heldout.write_text("".join(heldout.read_text().splitlines(keepends=True)[20:]))
    run("grpo", *GRPO, f"run.out={tmp_path / 'run'}", f"data.path={data}", f"data.heldout_path={heldout}", "steps=1",
        "data.heldout_tasks=null", "model.max_length=150", "run.max_tokens=1000", "data.too_long=skip")  # fmt: skip
    assert "1 of 21 training tasks and 0 of 2 held-out tasks are left out" in capsys.readouterr().out


def test_the_recipe_of_gsm8k_trains_on_no_other_questions(tmp_path: Path, capsys: Capture) -> None:
    line = refused(capsys, "grpo", "--config", str(RECIPE), f"run.out={tmp_path / 'run'}")
    assert line.endswith("data.path must be given, since data.source is file: add data.path=FILE.jsonl")
    assert not (tmp_path / "run").exists()
