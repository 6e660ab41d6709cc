"""Whole runs of the stages at tiny size."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import GRPO, TINY, WARMUP, metrics, refused, run, run_apart, values, write_gsm8k, write_sevens

from dsm_train.rollout.record import read_rollouts

PRESETS = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]


def run_sevens(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """GRPO from a warm-up after which a third of the responses are right; what it logged of each step."""
    data = write_sevens(out.with_suffix(".jsonl"))
    run("grpo", *GRPO, *WARMUP, f"run.out={out}", f"data.path={data}", "data.prompt_template={question}=",
        "warmup.steps=10", *arguments)  # fmt: skip
    return [row for row in metrics(out) if row["phase"] == "grpo" and "loss" in row]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run as a user starts it: warm-up, GRPO, pass@k."""
    out = tmp_path_factory.mktemp("runs") / "first"
    result = run_apart("grpo", *GRPO, *WARMUP, f"run.out={out}", "eval.samples=2", "eval.every=1")
    assert result.returncode == 0, result.stderr
    return out, result


def test_a_run_leaves_everything_to_look_at(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = first_run
    report = json.loads((out / "report.json").read_text())
    assert 0 <= report["accuracy_before"] <= 1 and 0 <= report["accuracy_after"] <= 1
    assert report["seconds"] > 0 and report["warmup_examples"] == 40
    assert list(report["pass_at_k"]) == ["1", "2"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (out / "weights").iterdir()) == [
        "config.json", "dsm.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1] * 4 + [2] * 4
    assert all(sample["prompt"].endswith("=") and sample["finish"] in ("stop", "length") for sample in samples)


def test_metrics_tell_of_every_step(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = first_run
    rows = metrics(out)
    assert [(row["phase"], row["step"]) for row in rows if "loss" in row] == [
        ("sft", 1), ("sft", 2), ("sft", 3), ("grpo", 1), ("grpo", 2),
    ]  # fmt: skip
    losses = [row["loss"] for row in rows if row["phase"] == "sft"]
    assert losses[-1] < losses[0]
    steps = [row for row in rows if row["phase"] == "grpo" and "loss" in row]
    for row in steps:
        assert row["grad_norm"] >= 0 and row["entropy"] > 0 and row["lr"] == 1e-3 and row["tokens_per_second"] > 0
        phases = ("rollout_seconds", "score_seconds", "update_seconds")
        assert row["step_seconds"] == pytest.approx(sum(row[name] for name in phases))
        assert row["ratio"] == pytest.approx(1.0) and row["clipped_low"] == row["clipped_high"] == 0  # on-policy
        assert 1 <= row["response_tokens"] <= 5
    # the reference is the policy as GRPO begins
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    accuracies = [row["step"] for row in rows if row["phase"] == "grpo" and "heldout_accuracy" in row]
    assert accuracies == [0, 1, 2]


def test_the_start_up_table_names_what_serves_each_op(
    first_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, result = first_run
    table = dict(line.split("  ", 1) for line in result.stdout.splitlines() if "  " in line)
    served = {what.strip(): by.strip() for what, by in table.items()}
    ops = {what.removeprefix("op "): by for what, by in served.items() if what.startswith("op ")}
    for name in (
        "group_advantage",
        "process_advantage",
        "token_kl",
        "grpo_loss",
        "group_grpo_loss",
        "linear_logprob_fwd",
        "linear_logprob_bwd",
        "logit_stats",
        "logit_gradient",
        "policy_logits",
        "packed_attention_fwd",
        "packed_attention_bwd",
    ):
        assert name in ops
    if not torch.cuda.is_available():
        cpp = ("group_advantage", "token_kl", "grpo_loss", "group_grpo_loss", "logit_stats", "logit_gradient")
        assert {ops[n] for n in (*cpp, "packed_attention_fwd", "packed_attention_bwd")} == {"C++"}
        assert ops["policy_logits"] == "logit ops and grpo_loss"
        assert {ops[f"linear_logprob_{way}"] for way in ("fwd", "bwd")} == {"library GEMM and logit ops"}
        assert served["device"] == "cpu, fp32, 1 thread(s)"
    assert {"layout", "transformer layers", "core attention", "norms", "optimizer", "rollouts"} <= served.keys()


def test_a_run_is_quiet_but_for_its_progress(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, result = first_run
    lines = result.stderr.splitlines()
    assert lines and all(line.startswith(("sft ", "grpo ")) for line in lines), result.stderr
    assert result.stdout.splitlines()[-1].startswith("held-out accuracy ")


def test_the_same_run_gives_the_same_bits(
    first_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    first, _ = first_run
    run("grpo", *GRPO, *WARMUP, f"run.out={tmp_path}", "eval.samples=2", "eval.every=1")
    assert values(tmp_path) == values(first)
    weights = "weights/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (first / weights).read_bytes()
    assert (tmp_path / "samples.jsonl").read_text() == (first / "samples.jsonl").read_text()
    run("grpo", *GRPO, *WARMUP, f"run.out={tmp_path}", "run.seed=1", "run.overwrite=true")
    assert values(tmp_path) != values(first)


def test_the_written_configuration_repeats_the_run(
    first_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    first, _ = first_run
    run("grpo", f"--config={first / 'config.yaml'}", f"run.out={tmp_path}")
    assert values(tmp_path) == values(first)


def test_a_step_without_anything_to_learn_from_leaves_the_policy(tmp_path: Path) -> None:
    """All rewards are 0, and no KL holds the policy: nothing is computed, and nothing is claimed of it."""
    run("grpo", *GRPO, f"run.out={tmp_path}", "algorithm.kl_coef=0", "steps=1")
    (row,) = (row for row in metrics(tmp_path) if "loss" in row)
    assert row["reward"] == row["loss"] == row["grad_norm"] == 0 and row["groups_without_spread"] == 1
    assert all(row[name] is None for name in ("ratio", "entropy", "ratio_max", "ratio_min"))


@pytest.mark.parametrize("reuse", [(), ("algorithm.epochs=2",)])
def test_a_recorded_step_is_what_the_update_saw(reuse: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "of" / "step.parquet"
    steps = run_sevens(tmp_path / "run", *reuse, f"record={file}", "record_step=2", "steps=2")
    rollouts = read_rollouts(file)
    assert rollouts.weight_version == 10 + 1 + len(reuse)  # optimizer steps of the warm-up and of the first stage
    assert float(rollouts.reward_S.mean()) == pytest.approx(steps[1]["reward"])
    assert float(rollouts.rollout_logprob_T.mean()) == pytest.approx(steps[1]["rollout_logprob"])
    assert rollouts.margin_T.numel() == rollouts.sequences.response_token_T.numel()
    assert rollouts.ref_logprob_T is not None and (rollouts.old_logprob_T is not None) == bool(reuse)


def test_a_finished_run_is_replaced_only_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("grpo", *GRPO, f"run.out={tmp_path}", "steps=2")
    assert "run.overwrite=true" in refused(capsys, "grpo", *GRPO, f"run.out={tmp_path}", "steps=1")
    assert len(metrics(tmp_path)) == 4
    run("grpo", *GRPO, f"run.out={tmp_path}", "steps=1", "run.overwrite=true")
    assert len(metrics(tmp_path)) == 3


@pytest.mark.parametrize(
    "reuse", [("algorithm.epochs=2",), ("algorithm.minibatches=2",), ("algorithm.epochs=2", "algorithm.minibatches=2")]
)
def test_reusing_rollouts_compares_with_the_log_probabilities_before(reuse: tuple[str, ...], tmp_path: Path) -> None:
    for step in run_sevens(tmp_path / "run", *reuse):
        assert step["ratio_max"] > 1.01 and step["ratio_min"] < 0.99


def test_sharing_prompts_changes_no_number(tmp_path: Path) -> None:
    """The first exploration stage, off-policy in its second pass; later ones sample from weights apart by rounding."""
    shared, repeated = (
        run_sevens(tmp_path / value, f"run.share_prompts={value}", "algorithm.epochs=2", "steps=1")[0]
        for value in ("true", "false")
    )
    timed = ("step", "rollout_seconds", "score_seconds", "update_seconds", "step_seconds", "tokens_per_second", "phase")
    assert shared.keys() == repeated.keys()
    for name in shared.keys() - set(timed):
        assert shared[name] == pytest.approx(repeated[name], rel=1e-4, abs=1e-6), name
    # the tokens of all sequences are counted, however they are stored
    tokens = [row["tokens_per_second"] * row["step_seconds"] for row in (shared, repeated)]
    assert tokens[0] == pytest.approx(tokens[1])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(preset: str, tmp_path: Path) -> None:
    (step,) = run_sevens(tmp_path / "run", f"algorithm.preset={preset}", "steps=1", "algorithm.epochs=2")
    assert step["loss"] is not None and step["grad_norm"] > 0  # neither NaN nor infinite, and there is a signal
    assert step["ratio_max"] > 1 > step["ratio_min"]


def test_a_new_reference_is_the_policy(tmp_path: Path) -> None:
    """Iterative GRPO: the KL is measured from the newest reference."""
    never, always = (
        [row["kl"] for row in run_sevens(tmp_path / every, f"algorithm.reference_every={every}", "steps=4")]
        for every in ("0", "2")
    )
    assert always[::2] == pytest.approx([0, 0], abs=1e-6) and min(always[1::2]) > 1e-4
    assert never[0] == pytest.approx(0, abs=1e-6) and min(never[1:]) > 1e-4


def test_files_in_gsm8ks_format_train_end_to_end(tmp_path: Path) -> None:
    data = write_gsm8k(tmp_path / "train.jsonl", 40)
    out = tmp_path / "run"
    run("grpo", *GRPO, *WARMUP, f"run.out={out}", f"data.path={data}", "data.heldout_tasks=6",
        "model.max_length=200", "run.max_tokens=400")  # fmt: skip
    (sample, *_) = (json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines())
    assert sample["prompt"].startswith("Question: Ann has") and sample["prompt"].endswith("\nAnswer:")
    assert int(sample["answer"]) % 2 == 1


def test_stages_follow_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Supervised training writes weights, from which evaluation, generation and GRPO start."""
    learnt = tmp_path / "sft"
    run("sft", *TINY, f"run.out={learnt}", "sft.steps=20", "sft.batch=32", "sft.examples=64", "sft.optim.lr=1e-2",
        "sampling.max_new_tokens=5")  # fmt: skip
    init = f"run.init={learnt / 'weights'}"
    assert (learnt / "curve.png").exists()
    accuracy = [row["heldout_accuracy"] for row in metrics(learnt) if "heldout_accuracy" in row][-1]

    capsys.readouterr()
    # nothing is said of the model: it comes with the weights
    run("eval", init, f"run.out={tmp_path / 'eval'}", "data.heldout_tasks=12", "sampling.max_new_tokens=5",
        "eval.samples=4", "run.threads=1")  # fmt: skip
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert (
        result["tasks"] == 12 and result["greedy_accuracy"] == accuracy and list(result["pass_at_k"]) == ["1", "2", "4"]
    )

    run("generate", init, f"run.out={tmp_path / 'gen'}", "prompts=[12+34=, 1+1=]", "num_samples=3",
        "sampling.max_new_tokens=5", "run.threads=1")  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("=")[0] for line in lines[-6:]] == ["12+34"] * 3 + ["1+1"] * 3

    run("grpo", *GRPO, init, f"run.out={tmp_path / 'grpo'}", "steps=1")
    before = next(row for row in metrics(tmp_path / "grpo") if row["phase"] == "grpo")
    assert before["heldout_accuracy"] == accuracy


def learn(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """A task that is half learnt by the warm-up and that GRPO can finish in seconds: which of two digits is larger."""
    data = out.with_suffix(".jsonl")
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    data.write_text(
        "".join(json.dumps({"question": f"{a} {b}", "answer": f"#### {max(a, b)}"}) + "\n" for a, b in pairs)
    )
    run("grpo", *TINY, f"run.out={out}", f"data.path={data}", "data.prompt_template={question}=",
        "data.heldout_tasks=10",
        "warmup.steps=60", "warmup.batch=32", "warmup.examples=12", "warmup.optim.lr=3e-3", "sampling.max_new_tokens=6",
        "algorithm.prompts_per_step=16", "algorithm.group_size=8", "optim.lr=1e-3", "steps=80", "run.max_tokens=4096",
        *arguments)  # fmt: skip
    return [row for row in metrics(out) if row["phase"] == "grpo" and "reward" in row]


@pytest.mark.slow
def test_reward_rises_and_shuffled_rewards_teach_nothing(tmp_path: Path) -> None:
    gains = {}
    for name, arguments in {"true": (), "shuffled": ("algorithm.shuffle_rewards=true",)}.items():
        reward = [row["reward"] for row in learn(tmp_path / name, *arguments)]
        gains[name] = sum(reward[-10:]) / 10 - sum(reward[:10]) / 10
    assert gains["true"] > 0.2
    assert gains["shuffled"] < 0.05


@pytest.mark.parametrize(("unfinished", "told"), [("zero", 1), ("keep", 0)])
def test_steps_that_teach_nothing_and_responses_that_are_cut_off_are_said_once(
    unfinished: str, told: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Random weights: no response is right, hardly one ends.
    run("grpo", *GRPO, f"run.out={tmp_path}", "steps=7", f"rewards.unfinished={unfinished}")
    said = capsys.readouterr().out.splitlines()
    flat = [line for line in said if "all responses to a question earned the same reward (mean 0)" in line]
    cut_off = [line for line in said if "of the responses were cut off at sampling.max_new_tokens = 5" in line]
    assert (len(flat), len(cut_off)) == (1, told)
    assert all("and rewards.unfinished = zero: raise sampling.max_new_tokens, or" in line for line in cut_off)
    assert flat[0].startswith("5 steps to step 5:") and "samples.jsonl" in flat[0]


def test_masked_responses_are_learnt_from_by_nobody(tmp_path: Path) -> None:
    run("grpo", *GRPO, f"run.out={tmp_path}", "steps=1", "rewards.unfinished=mask", "algorithm.kl_coef=0.04")
    (row,) = (row for row in metrics(tmp_path) if "loss" in row)
    assert row["finished"] < 0.5 and row["loss"] is not None  # random weights hardly end a response
    run("grpo", *GRPO, f"run.out={tmp_path / 'all'}", "steps=1", "sampling.max_new_tokens=1", "rewards.unfinished=mask")
    (row,) = (row for row in metrics(tmp_path / "all") if "loss" in row)
    assert row["finished"] == 0 and row["grad_norm"] == 0 and row["ratio"] is None
