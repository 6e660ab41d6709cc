"""Runs of supervised training: epochs, tokens per step, what is left out, validation, recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import GRPO, TINY, metrics, refused, run, run_on_ranks, write_gsm8k

from dsm_train.cli import load_config
from dsm_train.configs import SftConfig

Capture = pytest.CaptureFixture[str]
RECIPES = Path(__file__).parents[2] / "recipes"
SFT = (*TINY, "sampling.max_new_tokens=5", "model.max_length=200", "run.max_tokens=400")


def test_epochs_make_the_schedule_and_the_last_step_takes_what_is_left(tmp_path: Path, capsys: Capture) -> None:
    data = write_gsm8k(tmp_path / "data.jsonl", 40)
    run("sft", *SFT, f"run.out={tmp_path / 'run'}", f"data.path={data}", "data.heldout_tasks=6", "eval.every=4",
        "sft.epochs=1.5", "sft.batch=8", "sft.optim.lr=1e-2", "sft.optim.schedule=linear")  # fmt: skip
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]  # 51 examples of 34
    assert rows[-1]["epoch"] == 1.5 and rows[0]["epoch"] == pytest.approx(8 / 34)
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * (1 - step / 7) for step in range(7)])
    assert rows[-1]["learnt_tokens"] < 0.6 * rows[0]["learnt_tokens"]
    assert [row["step"] for row in rows if "heldout_loss" in row and "heldout_accuracy" in row] == [4, 7]
    assert rows[6]["heldout_loss"] < rows[3]["heldout_loss"] < rows[0]["loss"]
    said = capsys.readouterr().out
    assert "supervised training: 34 examples of " in said and "7 steps, 1.5 epochs; 6 held-out examples" in said
    first = said.partition("the first example, its loss mask in ⟦ ⟧:\n")[2]
    assert first.startswith("Question: Ann has") and "\nAnswer:⟦She has " in first
    assert first.partition("⟧")[0].endswith("<eos>")
    # the written configuration repeats the run
    run("sft", f"--config={tmp_path / 'run' / 'config.yaml'}", f"run.out={tmp_path / 'again'}")
    assert [row["loss"] for row in metrics(tmp_path / "again")] == [row["loss"] for row in rows]


def test_examples_that_are_too_long_are_left_out_and_counted(tmp_path: Path, capsys: Capture) -> None:
    """Training examples may be longer than a prompt that leaves room for a response."""
    data = write_gsm8k(tmp_path / "data.jsonl", 30)
    heldout = write_gsm8k(tmp_path / "heldout.jsonl", 34)
    heldout.write_text("".join(heldout.read_text().splitlines(keepends=True)[30:]))
    long = ({"question": "How long?", "answer": "12345" * times + "\n#### 1"} for times in (60, 80))
    data.write_text(data.read_text() + "".join(json.dumps(row) + "\n" for row in long))
    common = (*SFT, f"run.out={tmp_path / 'run'}", f"data.path={data}", f"data.heldout_path={heldout}",
              "data.heldout_tasks=null")  # fmt: skip
    line = refused(capsys, "sft", *common)
    assert (
        "model.max_length = 200 is less than prompt and solution of " in line
        and "data.jsonl:3" in line
        and "too_long=skip" in line
    )
    run("sft", *common, "data.too_long=skip", "sft.steps=2", "sampling.max_new_tokens=100")
    said = capsys.readouterr().out
    assert "data.too_long = skip: 2 of 32 training examples are left out; the longest has " in said
    assert "data.jsonl:32)" in said


def test_conversations_without_gold_answers_are_trained_on_without_accuracy(tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "data.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count from {n}."},
                {"role": "assistant", "content": f"{n} {n + 1}"},
            ]
        }
        for n in range(30)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("sft", *SFT, f"run.out={tmp_path / 'run'}", f"data.path={data}", "data.answer_field=null", "sft.steps=2",
        "sft.batch=16", "data.heldout_tasks=4")  # fmt: skip
    (row,) = (row for row in metrics(tmp_path / "run") if "heldout_loss" in row)
    assert "heldout_accuracy" not in row and (tmp_path / "run" / "curve.png").exists()
    assert "accuracy is measured on 0 of 4 held-out tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "arguments", "words"),
    [
        ("sft", ["sft.steps=3", "sft.epochs=1"], "sft.epochs must be left out beside steps = 3, or steps set to null"),
        ("sft", ["sft.batch=8", "sft.batch_tokens=99"], "sft.batch_tokens must be left out beside batch = 8"),
        ("sft", ["sft.epochs=1", "sft.optim.warmup_steps=1"], "sft.optim.warmup_steps must be below steps = 1"),
        ("sft", ["sft.optim.warmup_steps=500"], "sft.optim.warmup_steps must be below steps = 500"),
        ("sft", ["sft.batch_tokens=5"], "sft.batch_tokens = 5 is less than prompt and solution of task"),
        ("sft", ["sft.optim.schedule=multistep", "sft.optim.min_lr=1e-6"], "sft.optim.min_lr must be 0 with schedule"),
        ("grpo", ["warmup.epochs=1", "warmup.steps=2"], "warmup.epochs must be left out beside steps = 2"),
        ("grpo", ["warmup.epochs=1", "warmup.batch=1000", "warmup.optim.warmup_steps=99"], "warmup.optim.warmup_steps"),
    ],
)
def test_what_cannot_be_is_refused(
    stage: str, arguments: list[str], words: str, tmp_path: Path, capsys: Capture
) -> None:
    common = (*TINY, "data.train_tasks=200", "sampling.max_new_tokens=5")
    line = refused(capsys, stage, *(common if stage == "sft" else (*GRPO, "data.train_tasks=200")),
                   f"run.out={tmp_path / 'run'}", *arguments)  # fmt: skip
    assert words in line, line
    assert not (tmp_path / "run").exists()


def test_a_step_has_an_example_for_each_replica(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    common = (*TINY, f"run.out={tmp_path / 'run'}", "sampling.max_new_tokens=5", "data.train_tasks=200")
    line = refused(capsys, "sft", *common, "sft.batch=6")
    assert "the batch of supervised training must be a multiple" in line and line.endswith("got 6")
    line = refused(capsys, "sft", *common, "sft.batch_tokens=20")
    assert "sft.batch_tokens must be at least data-parallel replicas x tokens of the longest example = 4 x " in line


def test_replicas_train_what_one_rank_does(tmp_path: Path) -> None:
    """Four replicas with whole examples up to a budget of tokens: the last step has fewer examples than replicas."""
    data = write_gsm8k(tmp_path / "data.jsonl", 29)
    common = (*SFT, f"data.path={data}", "data.heldout_tasks=4", "sft.epochs=1", "sft.batch_tokens=320",
              "sft.optim.lr=1e-3", "eval.every=1")  # fmt: skip
    run("sft", *common, f"run.out={tmp_path / 'one'}")
    run_on_ranks(4, tmp_path, "sft", *common, f"run.out={tmp_path / 'four'}", "parallel.distributed_optimizer=true")
    one, four = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    assert len(one) == len(four) > 2
    for row, other in zip(one, four, strict=True):
        for name in ("loss", "grad_norm", "heldout_loss"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
        for name in ("epoch", "learnt_tokens", "lr"):
            assert row[name] == other[name], name


def keys(recipe: str) -> set[str]:
    """Dotted names of the values of a recipe."""

    def flat(section: dict[str, object], prefix: str) -> set[str]:
        parts = (flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k} for k, v in section.items())
        return set().union(*parts)

    return flat(yaml.safe_load((RECIPES / recipe).read_text()), "")


def test_the_papers_recipe_has_the_papers_constants() -> None:
    recipe = str(RECIPES / "deepseekmath-7b-sft.yaml")
    config = load_config(SftConfig, ["--config", recipe], prog="dsm-train sft", description="")
    sft = config.sft
    assert (sft.steps, sft.epochs, sft.batch, sft.batch_tokens) == (500, None, None, 256 * 4096)
    assert (sft.optim.lr, sft.optim.schedule, sft.optim.warmup_steps) == (5e-5, "constant", 0)
    assert config.model.max_length == 4096
    assert config.data.prompt_template == "User: {question}\n\nAssistant:"


def test_the_twin_has_the_same_keys_and_learns(tmp_path: Path) -> None:
    shape = {"model.num_layers", "model.hidden_size", "model.num_heads", "model.num_kv_heads", "model.ffn_size"}
    assert keys("sft-mini.yaml") == keys("deepseekmath-7b-sft.yaml") | shape | {"data.kinds", "data.style"}
    run("sft", "--config", str(RECIPES / "sft-mini.yaml"), f"run.out={tmp_path}", "run.threads=1", "sft.steps=16",
        "eval.every=0", "eval.tasks=10", "model.num_layers=1")  # fmt: skip
    rows = metrics(tmp_path)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and "heldout_accuracy" in rows[-1]


def test_a_file_without_solutions_has_no_weight_in_supervised_training(tmp_path: Path, capsys: Capture) -> None:
    good, bare = write_gsm8k(tmp_path / "good.jsonl", 40), tmp_path / "bare.jsonl"
    bare.write_text("".join(f'{{"question": "{n}+1=", "answer": {n + 1}}}\n' for n in range(20)))
    data = (f"data.path=[{good},{bare}]", "data.weights=[1,1]", "data.heldout_tasks=4")
    line = refused(capsys, "sft", *SFT, f"run.out={tmp_path / 'run'}", *data)
    assert f"data.weights: no task of {bare} is left to train on" in line
    # its questions serve GRPO, whose warm-up does without them
    run("grpo", *GRPO, f"run.out={tmp_path / 'grpo'}", *data, "steps=1", "warmup.steps=1")
