"""Whole runs of a split model; the first as a user starts it, with torchrun."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from commands import GRPO, WARMUP, metrics, run, run_on_ranks, torchrun, write_sevens

LAYOUTS = {
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "tp2_dp2": (4, ["parallel.tp=2", "parallel.distributed_optimizer=true"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_split_model_trains_and_its_weights_serve_one_rank(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, split = LAYOUTS[name]
    out = tmp_path / "run"
    data = (f"data.path={write_sevens(tmp_path / 'data.jsonl')}", "data.prompt_template={question}=")
    # old and reference log-probabilities are scored, and the second pass over the rollouts is off-policy
    arguments = (*GRPO, *WARMUP, *data, "warmup.steps=10", f"run.out={out}", *split, "model.num_kv_heads=2",
                 "algorithm.epochs=2", "algorithm.kl_coef=0.04")  # fmt: skip
    if name == "tp2_sp":
        result = torchrun(ranks, "-m", "dsm_train", "grpo", *arguments)
        assert result.returncode == 0, result.stderr
        printed = result.stdout + result.stderr
    else:
        printed = run_on_ranks(ranks, tmp_path, "grpo", *arguments)
    assert "Warning" not in printed
    config = dict(argument.split("=") for argument in split)
    tp, pp = (int(config.get(f"parallel.{key}", 1)) for key in ("tp", "pp"))
    assert f"{ranks} rank(s): tp {tp}, pp {pp}, dp {ranks // (tp * pp)}" in printed
    assert "op linear_logprob_fwd" in printed and "dsm packed_attention" in printed
    rows = [row for row in metrics(out) if row["phase"] == "grpo" and "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(value) for key, value in row.items() if key != "phase")
        assert row["grad_norm"] > 0 and row["entropy"] > 0 and row["kl"] > 0
        assert row["step_seconds"] > 0 and row["tokens_per_second"] > 0
        assert row["ratio_max"] > 1.0 > row["ratio_min"]

    # the weights know nothing of the layout: one rank evaluates them to what the split model said of itself
    after = json.loads((out / "report.json").read_text())["accuracy_after"]
    capsys.readouterr()
    run("eval", *[argument for argument in GRPO if not argument.startswith(("algorithm", "optim", "steps", "model."))],
        *data, f"run.out={tmp_path / 'eval'}", f"run.init={out / 'weights'}")  # fmt: skip
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["greedy_accuracy"] == pytest.approx(after)
