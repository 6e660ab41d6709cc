"""Runs with reward functions of the user's: in training, in evaluation, on several ranks; and functions that fail."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import GRPO, TINY, metrics, refused, run, run_on_ranks
from ranks import run_ranks

from dsm_train.config import ParallelConfig
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import train_tokenizer
from dsm_train.megatron import parallel
from dsm_train.rewards import RewardConfig, RewardFunction
from dsm_train.rewards.grader import Grader
from dsm_train.rollout.grading import shuffle_rewards, verdicts, with_rewards
from dsm_train.rollout.record import read_rollouts
from dsm_train.types import Rollouts, Sequences

MINE = """
import os, random

def length(completions, tasks):
    assert all(str(eval(task.question.rstrip("="))) == task.answer for task in tasks if task.question[0].isdigit())
    return [len(completion) for completion in completions]

def even(completions, tasks):
    return [1.0 if len(completion) % 2 == 0 else None for completion in completions]

def silent(completions, tasks):
    return [None] * len(completions)

def late(completions, tasks):
    return [1.0 / (len(completions) == 2) for _ in completions]

def process(completions, tasks):
    return [os.getpid() + random.random() for _ in completions]

def short(completions, tasks):
    return [1.0]
"""
KEEP = ("rewards.unfinished=keep", "algorithm.kl_coef=0")  # random weights hardly end a response
Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of reward functions."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def functions(*parts: str) -> str:
    return f"rewards.functions=[{', '.join(parts)}]"


def test_a_function_is_learnt_from_measured_and_written_down(mine: Path) -> None:
    weighted = functions("{name: numeric}", "{call: mine:length, weight: -0.5}")
    run("grpo", *GRPO, *KEEP, weighted, "run.out=run", f"record={mine / 'step.parquet'}")
    steps = [row for row in metrics(mine / "run") if "loss" in row]
    for row in steps:
        assert row["reward"] == pytest.approx(row["reward_numeric"] - 0.5 * row["reward_length"], rel=1e-5)
        assert row["reward_length"] > 0 and row["no_verdict"] == 0 and "no_verdict_length" not in row
        assert row["grad_norm"] > 0
    samples = [json.loads(line) for line in (mine / "run" / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert sample["parts"]["length"] == len(sample["response"]) and sample["parts"].keys() == {"numeric", "length"}
        assert sample["reward"] == pytest.approx(sample["parts"]["numeric"] - 0.5 * sample["parts"]["length"])
    recorded = read_rollouts(mine / "step.parquet")
    assert recorded.reward_SF is not None and recorded.reward_SF.shape == (16, 2)
    assert float(recorded.reward_SF[:, 1].mean()) == pytest.approx(steps[0]["reward_length"])
    # what the run wrote loads back, from any folder: the module is found beside the recipe as well
    (mine / "run" / "mine.py").write_text(MINE)
    (mine / "mine.py").unlink()
    run("grpo", "--config=run/config.yaml", "run.out=again", "record=null")
    assert [row["loss"] for row in metrics(mine / "again") if "loss" in row] == [row["loss"] for row in steps]


def test_a_first_function_says_what_is_correct(mine: Path, capsys: Capsys) -> None:
    run("sft", *TINY, "run.out=sft", "sft.steps=1", "sampling.max_new_tokens=5", "rewards.unfinished=keep",
        functions("{call: mine:even}"))  # fmt: skip
    init = ("run.init=sft/weights", "run.threads=1", "data.heldout_tasks=12", "sampling.max_new_tokens=5", KEEP[0])
    capsys.readouterr()
    run("eval", *init, functions("{call: mine:length, weight: 2}", "{name: numeric, weight: 0}"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["greedy_accuracy"] == 1 and result["reward"] >= 2 and "no_verdict" not in result
    run("eval", *init, functions("{call: mine:late}"))
    *_, said, result = capsys.readouterr().out.splitlines()
    assert json.loads(result) == {"tasks": 12, "greedy_accuracy": 0.0, "reward": None, "no_verdict": 1.0}
    assert said.startswith("evaluation: 100.0% of the responses got no verdict, and count as wrong") and said.endswith(
        "ZeroDivisionError: float division by zero"
    )


def test_responses_without_a_verdict_are_learnt_from_by_nobody(mine: Path, capsys: Capsys) -> None:
    run("grpo", *GRPO, *KEEP, "run.out=silent", "steps=6", functions("{call: mine:length}", "{call: mine:silent}"))
    rows = [row for row in metrics(mine / "silent") if "loss" in row]
    for row in rows:
        assert row["no_verdict"] == row["no_verdict_silent"] == row["groups_without_spread"] == 1
        assert row["reward"] is None and row["reward_silent"] is None and row["reward_length"] > 0
        assert row["loss"] is None and row["grad_norm"] is None and row["ratio"] is None  # no optimizer step
    said = [line for line in capsys.readouterr().out.splitlines() if "no verdict" in line or "same reward" in line]
    why = "and count as wrong where the first reward function gave none"
    evaluated = f"evaluation: 100.0% of the responses got no verdict, {why}"
    assert said == [
        "item 2 of rewards.functions, mine:silent: no verdict on the answer it was tried with",
        evaluated,
        "5 steps to step 5: 100% of the responses got no verdict of silent",
        "100.0% of the responses of 6 steps got no verdict",
        evaluated,
    ]
    report = json.loads((mine / "silent" / "report.json").read_text())
    assert report["no_verdict_before"] == report["no_verdict_after"] == 1
    run("grpo", *GRPO, *KEEP, "run.out=zero", "steps=1", "rewards.no_verdict=zero",
        functions("{call: mine:length}", "{call: mine:silent}"))  # fmt: skip
    (row,) = (row for row in metrics(mine / "zero") if "loss" in row)
    assert row["reward"] == 0 and row["no_verdict"] == 1


def test_a_function_that_fails_in_training_is_told_of_and_the_run_goes_on(mine: Path, capsys: Capsys) -> None:
    run("grpo", *GRPO, *KEEP, "run.out=run", "steps=5", functions("{call: mine:late}"))
    assert len(metrics(mine / "run")) == 7
    lines = [line for line in capsys.readouterr().out.splitlines() if "no verdict" in line]
    _, first, share, said, _ = lines
    assert first.startswith("step 1: a reward function failed, and 100% of the responses got no verdict: mine:late: ")
    assert first.endswith("division by zero") and share == "100.0% of the responses of 5 steps got no verdict"
    assert f"got no verdict of late; the last failure: mine:late: {mine}/mine.py:" in said
    assert said.endswith("ZeroDivisionError: float division by zero")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("{call: mine:missing}", ["item 1 of rewards.functions, mine:missing", "mine.py) has no missing", "length"]),
        ("{call: nowhere:f}", ["nowhere:f: no module nowhere: looked in"]),
        ("{call: mine:short}", ["mine:short: returned 1 values for 2 completions"]),
        ("{call: mine}", ["item 1 of rewards.functions: call must be module:function", "got mine"]),
        ("{call: mine.py:length}", ["functions: call must be module:function: write mine:length; got mine.py:length"]),
        ("{name: numerical}", ["item 1 of rewards.functions: name: expected one of numeric, format", "'numerical'"]),
        ("{call: mine:length, weigth: 1}", ["item 1 of rewards.functions: unknown key 'weigth'", "'weight'"]),
        ("numeric", ["expected a list [{name: NAME, call: CALL, weight: WEIGHT}, ...]", "'[numeric]'"]),
    ],
)
def test_functions_that_cannot_serve_are_refused(function: str, words: list[str], mine: Path, capsys: Capsys) -> None:
    line = refused(capsys, "grpo", *GRPO, "run.out=run", functions(function))
    assert line.startswith("dsm-train grpo: ") and all(word in line for word in words), line
    assert not (mine / "run").exists()


def test_a_limit_longer_than_ranks_wait_is_refused(mine: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    # The functions are imported again after each that was stopped, in 240 s at most.
    line = refused(capsys, "grpo", *GRPO, "rewards.timeout_seconds=361", functions("{call: mine:length}"))
    assert "rewards.timeout_seconds = 361" in line and "raise parallel.timeout_minutes to 11," in line
    three = functions(*(f"{{call: mine:{name}}}" for name in ("length", "late", "silent")))
    assert "raise parallel.timeout_minutes to 15, or" in refused(capsys, "grpo", *GRPO, three)


def grade_on_ranks(rank: int, world: int, store: dist.Store, out: Path, tp: str) -> None:
    """A rank's rewards by a function that never says the same twice."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    ranks = parallel.start(ParallelConfig(tp=int(tp)), seed=0)
    grader = Grader(RewardConfig((RewardFunction(call="mine:process"),)), [str(out)])
    tasks = [Task(0, "1+1=", "2"), Task(1, "1+2=", "3")]
    tokenizer = train_tokenizer([task.question for task in tasks], 258)
    sequences = Sequences.from_lists([[1], [2]], [[3, 4], [5], [6], [7, 8, 9]], 2)
    nothing = [0.0] * sequences.response_token_T.numel()
    values_T, all_S = torch.tensor(nothing), torch.ones(4, dtype=torch.bool)
    rollouts = Rollouts(sequences, torch.tensor([0, 1]), values_T, values_T, all_S, 0)
    rollouts = with_rewards(rollouts, verdicts(rollouts, tasks, tokenizer, grader, ranks))
    rollouts = shuffle_rewards(rollouts, seed=0, step=0)
    assert rollouts.reward_S is not None
    everywhere = ranks.gather_over_ranks(rollouts.reward_S.tolist())
    processes = [{math.floor(reward) for reward in rewards} for rewards in everywhere]
    assert all(len(one) == 1 for one in processes)  # a replica has one process
    assert (everywhere[0] == everywhere[1]) == (processes[0] == processes[1]) == (tp == "2")
    grader.close()
    parallel.stop(ranks)


@pytest.mark.parametrize("tp", ["1", "2"], ids=["dp2", "tp2"])
def test_the_ranks_of_a_replica_agree_about_what_one_of_them_heard(tp: str, mine: Path) -> None:
    run_ranks(grade_on_ranks, 2, mine, tp)


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2", "parallel.tp=1"], ids=["tp2", "pp2", "dp2"])
def test_rewards_do_not_depend_on_the_layout(layout: str, mine: Path) -> None:
    """Functions of the user's and built-in ones, and some responses without a verdict."""
    common = (*GRPO, *KEEP, "model.num_kv_heads=2", "steps=1",
              functions("{name: format}", "{call: mine:length}", "{call: mine:even, weight: 2}"))  # fmt: skip
    run("grpo", *common, f"run.out={mine / 'one'}")
    run_on_ranks(2, mine, "grpo", *common, f"run.out={mine / 'two'}", layout)
    one, two = (next(row for row in metrics(mine / name) if "loss" in row) for name in ("one", "two"))
    assert 0 < one["no_verdict"] < 1
    names = [name for name in one if "reward" in name or "verdict" in name] + [
        "loss",
        "grad_norm",
        "groups_without_spread",
    ]
    assert {name: one[name] for name in names} == pytest.approx({name: two[name] for name in names}, rel=1e-4, abs=1e-6)
