"""Runs on files of questions: each draw of a task is answered anew, and no other questions are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import GRPO, TINY, refused, run, write_gsm8k

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
    assert "1 of 21 training tasks are left out" in capsys.readouterr().out


def test_rows_of_several_files_train_by_weight_and_are_found_again(tmp_path: Path, capsys: Capture) -> None:
    first = write_gsm8k(tmp_path / "a.jsonl", 16)
    first.write_text(first.read_text() + json.dumps({"question": "What is a pi?", "answer": "\\\\pi"}) + "\n")
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(first.read_text().splitlines(keepends=True)[:3]))
    rows = [{"question": f"{n}?", "answer": str(n), "id": f"row-{n}"} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    arguments = [*GRPO, f"run.out={tmp_path / 'run'}", f"data.path=[{first}, {tmp_path / 'b.parquet'}]",
                 "data.weights=[1, 3]", f"data.heldout_path={heldout}", "data.heldout_tasks=null",
                 "model.max_length=200", "run.max_tokens=1000"]  # fmt: skip
    line = refused(capsys, "grpo", *arguments)
    assert f"{first}:17: answer must be a number" in line and "1 of 18 training tasks" in line
    run("grpo", *arguments, "data.unreadable=skip", "steps=5")
    assert f"left out are 1 of 18 training tasks, the first at {first}:17" in capsys.readouterr().out
    samples = [json.loads(text) for text in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    asked = [sample["task"] for sample in samples]
    assert len(asked) == 20 and {task.split(":")[0] for task in asked} == {str(first), str(tmp_path / "b.parquet")}
    assert 13 <= sum("b.parquet" in task for task in asked) <= 16  # 13 of the first 17
    assert any(task == f"{tmp_path / 'b.parquet'}:3 (row-2)" for task in asked)


def test_a_model_that_learnt_conversations_answers_them(tmp_path: Path, capsys: Capture) -> None:
    """Questions without gold answers: no accuracy, and no error."""
    messages = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}] for n in range(30)]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"messages": rows}) + "\n" for rows in messages))
    run("sft", *TINY, f"run.out={tmp_path / 'run'}", f"data.path={data}", "data.heldout_tasks=5",
        "sampling.max_new_tokens=5", "sft.steps=2", "sft.batch=4")  # fmt: skip
    assert "accuracy is measured on 0 of 5 held-out tasks" in capsys.readouterr().out
    common = [*TINY, f"run.init={tmp_path / 'run' / 'weights'}", f"data.path={data}", "sampling.max_new_tokens=5",
              "data.heldout_tasks=5"]  # fmt: skip
    line = refused(capsys, "eval", *common)
    assert "5 of 5 held-out tasks" in line and "choose rewards.functions" in line
    run("generate", *common, "prompts=[]")
    assert "no prompts are given: held-out tasks are asked" in capsys.readouterr().err


def test_an_evaluation_on_a_part_of_the_training_file_says_so(tmp_path: Path, capsys: Capture) -> None:
    data = write_gsm8k(tmp_path / "a.jsonl", 20)
    common = [*TINY, f"data.path={data}", "sampling.max_new_tokens=5", "model.max_length=120", "run.max_tokens=1000"]
    run("sft", *common, f"run.out={tmp_path / 'run'}", "sft.steps=1", "sft.batch=4")
    assert "a part of" not in capsys.readouterr().err
    run("eval", *common, f"run.init={tmp_path / 'run' / 'weights'}")
    assert f"the held-out tasks are a part of {data}" in capsys.readouterr().err


def test_the_recipe_of_gsm8k_trains_on_no_other_questions(tmp_path: Path, capsys: Capture) -> None:
    line = refused(capsys, "grpo", "--config", str(RECIPE), f"run.out={tmp_path / 'run'}")
    assert line.endswith("data.path must be given, since data.source is file: add data.path=FILE.jsonl")
    assert not (tmp_path / "run").exists()
