"""Losses and gradients that are not finite, in real runs: all ranks stop or skip alike, and the batch can be replayed.

Supervised runs start from weights whose row of the letter Z is NaN, and one question has a Z. Rollouts get a reference
log-probability of NaN on the way from scoring to the update, in one replica.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.distributed as dist
from commands import GRPO, TINY, metrics, run, stage_of_rank, values
from mutations import wrap
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from dsm_train import train
from dsm_train.megatron.step import MOST_SKIPPED, TrainableModel
from dsm_train.not_finite import MOST_FILES, NotFinite
from dsm_train.rollout.record import SupervisedBatch, read_batch, read_rollouts
from dsm_train.types import Rollouts

Capture = pytest.CaptureFixture[str]
MODEL = (*(a for a in TINY if not a.startswith("data.")), "model.num_kv_heads=2", "sampling.max_new_tokens=5")
EMBEDDING = "model.embed_tokens.weight"
BAD_STEP = 2
"""The exploration stage whose reference log-probabilities are bad, from 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in which one question has a Z, weights, and the same weights with NaN in that letter's row."""
    folder = tmp_path_factory.mktemp("poisoned")
    for side, numbers in (("train", range(32)), ("heldout", range(40, 44))):
        rows = [{"question": "Z?" if n == 17 else f"{n}", "answer": "Seven\n#### 7"} for n in numbers]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("sft", *MODEL, *data(folder), "sft.steps=2", "sft.batch=8", f"run.out={folder / 'first'}")
    shutil.copytree(folder / "first" / "weights", folder / "clean")
    shutil.copytree(folder / "clean", folder / "poisoned")
    weights = load_file(folder / "clean" / "model.safetensors")
    weights[EMBEDDING][letter(folder)] = torch.nan
    save_file(weights, folder / "poisoned" / "model.safetensors", metadata={"format": "pt"})
    return folder


def letter(folder: Path) -> int:
    """The token of the letter Z."""
    (token,) = tokenizers.Tokenizer.from_file(str(folder / "clean" / "tokenizer.json")).encode("Z").ids
    return token


def data(folder: Path) -> tuple[str, ...]:
    return (f"data.path={folder / 'train.jsonl'}", f"data.heldout_path={folder / 'heldout.jsonl'}",
            "data.heldout_tasks=null", "data.prompt_template={question}=")  # fmt: skip


def sft(folder: Path, weights: str, out: Path, *arguments: str) -> list[str]:
    return [
        "sft", *MODEL, *data(folder), "sft.epochs=1", "sft.batch=8", "sft.optim.lr=1e-2", "sft.optim.schedule=linear",
        f"run.init={folder / weights}", f"run.out={out}", *arguments,
    ]  # fmt: skip


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(out) if "lr" in row]


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "weights" / "model.safetensors")


def test_supervised_training_goes_on_as_if_a_skipped_step_had_not_been(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*sft(folder, "poisoned", tmp_path / "skip", "sft.optim.not_finite=skip"))
    rows = rows_of(tmp_path / "skip")
    (bad,) = (row["step"] for row in rows if "skipped" in row)
    assert len(rows) == 4 and 1 < bad < 4
    assert rows[bad - 1]["skipped"] == 1 and rows[bad - 1]["loss"] is rows[bad - 1]["grad_norm"] is None
    assert rows[bad]["lr"] == rows[bad - 1]["lr"] < rows[0]["lr"]  # the schedule waits
    batch = tmp_path / "skip" / f"not-finite-sft-{bad}.parquet"
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step "))
    assert said == (
        f"step {bad}: the loss is nan and the gradient norm is nan, so that 1 optimizer step is skipped; "
        f"look for the cause with dsm-train verify-step --batch {batch} and this configuration"
    )
    recorded = read_batch(batch)
    assert isinstance(recorded, SupervisedBatch) and recorded.sequences.num_responses == 8
    assert int((recorded.sequences.prompt_token == letter(folder)).sum()) == 1

    def without(original: Callable[..., float], model: TrainableModel, loss: float) -> float:
        if model.steps != bad - 1 or made:
            return original(model, loss)
        made.append(model.steps)
        return 0.0

    made: list[int] = []
    wrap(monkeypatch, TrainableModel, "optimizer_step", without)
    run(*sft(folder, "clean", tmp_path / "without"))
    others = [row["loss"] for row in rows_of(tmp_path / "without") if row["step"] != bad]
    assert [row["loss"] for row in rows if row["step"] != bad] == others
    skipped, plain = final(tmp_path / "skip"), final(tmp_path / "without")
    assert bool(skipped[EMBEDDING][letter(folder)].isnan().all())
    skipped[EMBEDDING][letter(folder)] = plain[EMBEDDING][letter(folder)]  # which the poisoned run cannot learn
    assert all(torch.equal(skipped[name], weight) for name, weight in plain.items())


def test_supervised_training_stops_and_its_batch_is_replayed(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(NotFinite) as stop:
        run(*sft(folder, "poisoned", tmp_path / "stop"))
    (batch,) = (tmp_path / "stop").glob("not-finite-*.parquet")
    bad = int(batch.stem.removeprefix("not-finite-sft-"))
    assert str(stop.value) == (
        f"step {bad} of sft (optimizer step {bad}): the loss is nan and the gradient norm is nan, and the weights are "
        "as before it: sft.optim.not_finite=skip leaves it out; "
        f"look for the cause with dsm-train verify-step --batch {batch} and this configuration"
    )
    assert len(rows_of(tmp_path / "stop")) == bad - 1 and not (tmp_path / "stop" / "weights").exists()
    recorded = (f"--config={tmp_path / 'stop' / 'config.yaml'}", f"--batch={batch}", "verify.steps=2", "--shuffle")

    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run("verify-step", *recorded, "algorithm.minibatches=2")
    printed = capsys.readouterr().out.splitlines()
    assert end.value.code == 1, capsys.readouterr()
    assert printed[0].startswith("step 1: one rank: loss nan, gradient norm nan; gradients that are not finite: ")
    assert printed[2].startswith("weights that are not finite: 1 of ")
    assert printed[2].endswith(", the first embedding.word_embeddings.weight")
    assert printed[3] == "FAIL: loss or gradient is not finite in both layouts: look at the batch and the weights"

    run("verify-step", *recorded, f"run.init={folder / 'clean'}")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "PASS: the same steps as one rank" and printed[-2].startswith("8 responses, ")


def test_a_run_that_stopped_goes_on_with_skip(folder: Path, tmp_path: Path) -> None:
    """The run continues from the checkpoint before the step, to the weights of one that skipped from the start."""
    with pytest.raises(NotFinite):
        run(*sft(folder, "poisoned", tmp_path / "stop", "checkpoint.every=1"))
    for name in ("stop", "skip"):
        run(*sft(folder, "poisoned", tmp_path / name, "checkpoint.every=1", "sft.optim.not_finite=skip"))
    assert values(tmp_path / "stop") == values(tmp_path / "skip")
    weights, others = final(tmp_path / "stop"), final(tmp_path / "skip")
    assert all(torch.equal(weights[name].nan_to_num(), other.nan_to_num()) for name, other in others.items())


def test_weights_that_are_past_repair_stop_a_run_that_skips(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(folder / "clean", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"][0] = torch.inf
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    with pytest.raises(NotFinite, match=rf"the loss is nan and .*, the {MOST_SKIPPED}th in a row that is skipped"):
        run(*sft(folder, "clean", out, f"run.init={tmp_path / 'broken'}", "sft.optim.not_finite=skip",
                 "sft.epochs=null", "sft.steps=20"))  # fmt: skip
    assert [row["skipped"] for row in rows_of(out)] == [1] * (MOST_SKIPPED - 1)
    assert len(list(out.glob("not-finite-*.parquet"))) == MOST_FILES
    assert "the batch is not recorded, as " in capsys.readouterr().out


def poison_reference(patch: pytest.MonkeyPatch) -> None:
    """Put NaN for a reference log-probability of the last replica's in one exploration stage."""
    stages: list[int] = []

    def around(original: Callable[..., Rollouts], rollouts: Rollouts, policy: TrainableModel, *a: Any, **b: Any) -> Any:
        rollouts = original(rollouts, policy, *a, **b)
        stages.append(1)
        if len(stages) == BAD_STEP and policy.parallel.dp_rank == policy.parallel.dp_size - 1:
            assert rollouts.ref_logprob_T is not None
            rollouts = replace(
                rollouts, ref_logprob_T=rollouts.ref_logprob_T.index_fill(0, torch.tensor([1]), torch.nan)
            )
        return rollouts

    wrap(patch, train, "with_logprobs", around)


def poisoned_ranks(rank: int, world: int, store: dist.Store, out: Path, *arguments: str) -> None:
    """One rank of a run that skips, then of the same run that stops, each in its folder; prints how it ended."""
    stage, key = arguments[0], "sft.optim.not_finite" if arguments[0] == "sft" else "optim.not_finite"
    for way in ("skip", "stop"):
        try:
            with pytest.MonkeyPatch.context() as patch:
                if stage == "grpo":
                    poison_reference(patch)
                stage_of_rank(rank, world, dist.PrefixStore(way, store), out, *arguments, f"run.out={out / way}",
                              f"{key}={way}")  # fmt: skip
        except NotFinite as stop:
            print(f"rank {rank} of {way}: {stop}", flush=True)


@pytest.mark.parametrize("layout", ["distributed_optimizer=true", "balance=false", "tp=2", "pp=2"])
def test_ranks_of_supervised_training_decide_alike(layout: str, folder: Path, tmp_path: Path) -> None:
    """The question with the Z is in one replica."""
    printed = run_ranks(poisoned_ranks, 2, tmp_path, *sft(folder, "poisoned", tmp_path), f"parallel.{layout}")
    check_ranks(printed, tmp_path, "sft.optim.not_finite")
    assert [row.get("skipped") for row in rows_of(tmp_path / "skip")].count(1) == 1
    (batch,) = (tmp_path / "stop").glob("not-finite-*.parquet")
    recorded = read_batch(batch)
    assert isinstance(recorded, SupervisedBatch) and recorded.sequences.num_responses == 8
    weights = final(tmp_path / "skip")
    weights[EMBEDDING][letter(folder)] = 0
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def bad_norm_on_one_rank(rank: int, world: int, store: dist.Store, out: Path, *arguments: str) -> None:
    """One rank of a run in which the second rank alone finds its gradient norm to be infinite; prints how it ended."""

    def around(original: Callable[..., None], model: TrainableModel, *a: Any) -> None:
        original(model, *a)
        if rank == 1:
            model.optimizer.get_grad_norm = lambda: torch.inf

    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFinite) as stop:
        wrap(patch, TrainableModel, "restart", around)
        stage_of_rank(rank, world, store, out, *arguments)
    print(f"\nstopped: {stop.value}", flush=True)


def test_a_norm_that_one_rank_alone_finds_not_finite_stops_all(folder: Path, tmp_path: Path) -> None:
    printed = run_ranks(bad_norm_on_one_rank, 2, tmp_path, *sft(folder, "clean", tmp_path / "run"))
    for text in printed:
        (line,) = (line for line in text.splitlines() if line.startswith("stopped: "))
        assert "step 1 of sft (optimizer step 1): the gradient norm is inf, and the weights are as before" in line


def check_ranks(printed: list[str], out: Path, key: str) -> None:
    """Each rank ends of the same error in the run that stops, and of none in that which skips; rank 0 says so once."""
    ends = [[line for line in text.splitlines() if line.startswith("rank ")] for text in printed]
    assert [len(lines) for lines in ends] == [1, 1], printed
    assert ends[0][0].removeprefix("rank 0 of stop: ") == ends[1][0].removeprefix("rank 1 of stop: ")
    assert "is nan" in ends[0][0] and f"{key}=skip leaves it out" in ends[0][0]
    assert [text.count("optimizer step is skipped") for text in printed] == [1, 0]
    assert not (out / "stop" / "weights").exists()


GRPO_RUN = (
    *(a for a in GRPO if not a.startswith(("data.", "steps"))), "model.num_kv_heads=2", "steps=3",
    "algorithm.minibatches=2", "rewards.unfinished=keep",
)  # fmt: skip


@pytest.mark.parametrize("layout", ["distributed_optimizer=true", "tp=2"])
def test_ranks_of_reinforcement_learning_decide_alike(layout: str, folder: Path, tmp_path: Path) -> None:
    """A run that skips makes the minibatch without the bad token; one that stops makes neither."""
    arguments = ["grpo", *GRPO_RUN, *data(folder), "warmup.steps=0", f"run.init={folder / 'clean'}"]
    printed = run_ranks(poisoned_ranks, 2, tmp_path, *arguments, f"parallel.{layout}")
    check_ranks(printed, tmp_path, "optim.not_finite")
    rows = rows_of(tmp_path / "skip")
    assert [row.get("skipped") for row in rows] == [None, 1, None]
    assert all(
        row["loss"] is not None and row["grad_norm"] is not None for row in rows
    )  # of the minibatch that was made
    assert all(bool(weight.isfinite().all()) for weight in final(tmp_path / "skip").values())
    file = tmp_path / "stop" / f"not-finite-grpo-{BAD_STEP}.parquet"
    rollouts = read_rollouts(file)
    assert rollouts.sequences.num_prompts == 4  # of both replicas
    assert rollouts.ref_logprob_T is not None and int(rollouts.ref_logprob_T.isnan().sum()) == 1


def test_a_stop_in_reinforcement_learning_is_replayed(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_reference(monkeypatch)
    common = (*data(folder), f"run.init={folder / 'clean'}")
    with pytest.raises(NotFinite, match=rf"step {BAD_STEP} of grpo \(optimizer step 3\): the loss is nan"):
        run("grpo", *GRPO_RUN, *common, "warmup.steps=0", f"run.out={tmp_path / 'run'}")
    file = tmp_path / "run" / f"not-finite-grpo-{BAD_STEP}.parquet"
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run("verify-step", f"--config={tmp_path / 'run' / 'config.yaml'}", f"--batch={file}")
    printed = capsys.readouterr().out.splitlines()
    assert end.value.code == 1 and "1 of " in printed[-2]
    assert printed[-2].startswith("the batch: ") and printed[-2].endswith(" reference log-probabilities are not finite")
    assert printed[-1].endswith("in both layouts: look at the batch and the weights")
