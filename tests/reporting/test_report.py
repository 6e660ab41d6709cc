"""Tests of report and learning curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dsm_train.reporting.metrics import Metrics
from dsm_train.reporting.report import Report, learning_curve, read_metrics, startup_table, write_report

Row = tuple[int, str, dict[str, float]]


def write(folder: Path, rows: list[Row]) -> Path:
    metrics = Metrics(folder)
    for step, phase, values in rows:
        metrics.log(step, phase, values)
    metrics.close()
    return folder / "metrics.jsonl"


def test_report_is_valid_json_and_leaves_nothing_else(tmp_path: Path):
    write_report(tmp_path, Report(0.0, 0.5, 1.0))
    extra = {"seed": 1, "kl": math.nan, "pass_at": {"1": 0.5, "8": math.inf}}
    path = write_report(tmp_path, Report(0.5, 0.9, 12.5, extra))  # replaces the first
    assert json.loads(path.read_text()) == {
        "accuracy_before": 0.5,
        "accuracy_after": 0.9,
        "seconds": 12.5,
        "seed": 1,
        "kl": None,
        "pass_at": {"1": 0.5, "8": None},
    }
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("accuracy", [-0.1, 93.0, math.nan])  # 93.0: a percentage
def test_report_refuses_what_is_no_share(accuracy: float):
    with pytest.raises(ValueError, match="accuracy_after must be a share between 0 and 1"):
        Report(0.5, accuracy, 1.0)


def test_read_metrics_after_a_resume_and_a_kill(tmp_path: Path):
    path = write(
        tmp_path,
        [
            (1, "grpo", {"reward": 0.1}),
            (2, "grpo", {"reward": 0.2}),
            (2, "grpo", {"heldout_accuracy": 0.5}),  # the evaluation of a step may have a line of its own
            (3, "grpo", {"reward": 9.0}),
            (3, "grpo", {"reward": 0.3}),  # step 3 ran again
            (1, "sft", {"loss": 1.0}),
        ],
    )
    with path.open("a") as file:
        file.write('{"step": 4, "phase": "gr')
    phases = read_metrics(path)
    assert [(row["step"], row["reward"]) for row in phases["grpo"]] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert phases["grpo"][1]["heldout_accuracy"] == 0.5
    assert phases["sft"][0]["loss"] == 1.0


CURVES: dict[str, list[Row]] = {
    "all keys": [
        *((step, "sft", {"loss": 1 / (step + 1), "heldout_accuracy": 0.1 * step}) for step in range(6)),
        *((step, "grpo", {"reward": 0.5, "heldout_accuracy": 0.6, "kl": 0.1, "response_tokens": 9}) for step in (1, 2)),
    ],
    "no evaluation": [(step, "grpo", {"reward": 0.5}) for step in range(3)],
    "one evaluation, NaN else": [(0, "grpo", {"heldout_accuracy": 0.5, "reward": math.nan})],
    "rewards beyond 0 to 1": [(step, "grpo", {"reward": -2.0 + step, "kl": 1.0}) for step in range(5)],
    "critic": [(step, "ppo", {"reward": 0.1 * step, "loss": 1.0}) for step in range(5)],
}


@pytest.mark.parametrize("rows", CURVES.values(), ids=CURVES)
def test_learning_curve_draws_what_there_is(tmp_path: Path, rows: list[Row]):
    out = tmp_path / "curve.png"
    learning_curve(write(tmp_path, rows), out)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_learning_curve_shows_the_numbers(tmp_path: Path):
    # the text of an SVG can be read back; the drawing is the same
    rows: list[Row] = [(0, "grpo", {"heldout_accuracy": 0.54}), (260, "grpo", {"heldout_accuracy": 0.93})]
    out = tmp_path / "curve.svg"
    learning_curve(write(tmp_path, rows), out)
    assert "GRPO: held-out accuracy 54% → 93% in 260 steps" in out.read_text(encoding="utf-8")


def test_supervised_training_alone_shows_both_losses(tmp_path: Path):
    rows: list[Row] = [(step, "sft", {"loss": 1 / step, "heldout_loss": 1.1 / step}) for step in (1, 2, 3)]
    out = tmp_path / "curve.svg"
    learning_curve(write(tmp_path, rows), out)
    page = out.read_text(encoding="utf-8")
    assert "supervised fine-tuning" in page and "held-out loss" in page


@pytest.mark.parametrize(("kl", "drawn"), [(0.01, True), (0.0, False), (1e-9, False)])
def test_there_is_an_axis_of_kl_where_there_is_kl(kl: float, drawn: bool, tmp_path: Path):
    rows: list[Row] = [(step, "grpo", {"reward": 0.5, "response_tokens": 9.0, "kl": kl}) for step in range(3)]
    out = tmp_path / "curve.svg"
    learning_curve(write(tmp_path, rows), out)
    page = out.read_text(encoding="utf-8")
    assert ("KL to the reference" in page) is drawn and "response tokens" in page


def test_learning_curve_of_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no step of sft, grpo, ppo"):
        learning_curve(write(tmp_path, [(0, "eval", {"heldout_accuracy": 0.5})]), tmp_path / "curve.png")


def test_startup_table_aligns():
    table = startup_table([("group_advantage", "triton"), ("attention", "reference (PyTorch)")])
    what, rule, *lines = table.splitlines()
    assert what.index("served by") == lines[0].index("triton") == lines[1].index("reference")
    assert set(rule) == {"-"} and len(rule) == max(map(len, lines))
