"""Runs that are killed and continued by the same command end as one never killed, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import torchrun
from killing import LAYOUTS, STAGES, Moment, Run, kill_at_random

DECODE = "dsm_train.rollout.embedded:_Decoding.decode"
WRITE_ITEM = "megatron.core.dist_checkpointing.strategies.filesystem_async:_write_item"
UPDATE, AFTER = "dsm_train.train:update", "dsm_train.checkpoint.keeper:Keeper.after"
EXPLORE = "dsm_train.train:explore"
SAVED = f"{UPDATE} 2 done, dsm_train.checkpoint.keeper:Keeper._save 1 done"

BEFORE_THE_FIRST_CHECKPOINT = {
    "before the run has its folder": "dsm_train.run:begin 1",
    "while it makes room in its folder": "dsm_train.run:begin 1 done",
    "in the first step of the warm-up": "dsm_train.supervise:optimizer_step 1",
    "in the second step of the warm-up": "dsm_train.supervise:optimizer_step 2",
}
IN_A_STEP = {
    "in a decoding step": f"{EXPLORE} 4, {DECODE} 3",
    "before rollouts are recorded": f"{EXPLORE} 4, dsm_train.rollout.book:write_rollouts 1",
    "while rollouts are recorded": f"{EXPLORE} 4, pyarrow.parquet:write_table 1 done",
    "after rollouts": f"{EXPLORE} 4 done",
    "in grading": "dsm_train.train:grade 4, dsm_train.rewards.worker:Worker.call 1",
    "after grading": "dsm_train.train:grade 4 done",
    "in scoring": "dsm_train.train:with_logprobs 4, dsm_train.megatron.step:Model.head 2",
    "between two micro-batches": f"{UPDATE} 4, dsm_train.megatron.step:Model.head 2",
    "before the optimizer steps": f"{UPDATE} 4, dsm_train.megatron.step:TrainableModel.optimizer_step 1",
    "between two minibatches": f"{UPDATE} 4, dsm_train.update:optimizer_step 2",
    "before the metrics": f"{UPDATE} 4 done",
    "between metrics and samples": f"{UPDATE} 4, dsm_train.reporting.metrics:Samples.log 1",
    "between metrics and checkpoint": f"{UPDATE} 4, {AFTER} 1",
}
IN_A_SAVE = {
    "before its folder is there": f"{UPDATE} 4, dsm_train.checkpoint.keeper:Saver.start 1",
    "before the first file": f"{UPDATE} 4, {WRITE_ITEM} 1",
    "in the middle of a file": f"{UPDATE} 4, {WRITE_ITEM} 5",
    "before a file's checksum": f"{UPDATE} 4, dsm_train.megatron.checkpoint:sha256 1",
    "before the index": f"{UPDATE} 4, dsm_train.megatron.checkpoint:Writing.finish 1",
    "before the place": f"{UPDATE} 4, dsm_train.checkpoint.keeper:Place.write 1",
    "before SHA256SUMS": f"{UPDATE} 4, dsm_train.checkpoint.keeper:Place.write 1 done",
    "before the rename": f"{UPDATE} 4, pathlib:Path.rename 1",
    "after the rename": f"{UPDATE} 4, pathlib:Path.rename 1 done",
    "before pruning": f"{UPDATE} 4, dsm_train.checkpoint.keeper:Keeper._prune 1",
    "in the middle of pruning": f"{UPDATE} 4, dsm_train.checkpoint.keeper:Keeper._prune 1, shutil:rmtree 1",
    "after pruning": f"{UPDATE} 4, dsm_train.checkpoint.keeper:Keeper._prune 1 done",
}
AROUND_THE_LOOP = {
    "in the last save of the warm-up": f"dsm_train.supervise:optimizer_step 3, {AFTER} 1, {WRITE_ITEM} 3",
    "after the warm-up": f"dsm_train.supervise:optimizer_step 3, {AFTER} 1 done",
    "in the evaluation before grpo": f"dsm_train.stages.grpo:before_grpo 1, {DECODE} 2",
    "after the evaluation before grpo": "dsm_train.stages.grpo:before_grpo 1 done",
    "in the last save": f"{UPDATE} 6, {AFTER} 1, dsm_train.checkpoint.keeper:Place.write 1 done",
    "in the final evaluation": f"{UPDATE} 6, {AFTER} 1 done, {DECODE} 2",
    "after the final evaluation": f"{UPDATE} 6, {AFTER} 1 done, dsm_train.run:Job.save 1",
    "while weights are written": "dsm_train.hf.writer:_append 3",
    "before weights appear": "dsm_train.run:Job.save 1, pathlib:Path.rename 1",
    "before the report": "dsm_train.stages.grpo:write_report 1",
    "before the curve": "dsm_train.stages.grpo:learning_curve 1",
    "before the run is noted as finished": "dsm_train.run:RunFolder.finish 1",
}
GRPO = BEFORE_THE_FIRST_CHECKPOINT | IN_A_STEP | IN_A_SAVE | AROUND_THE_LOOP
SFT = {
    "before the first checkpoint": "dsm_train.supervise:optimizer_step 2",
    "between two micro-batches": "dsm_train.supervise:optimizer_step 4, dsm_train.megatron.step:Model.head 2",
    "in validation": "dsm_train.supervise:mean_loss 1",
    "in evaluation": f"dsm_train.supervise:mean_loss 1 done, {DECODE} 2",
    "between metrics and checkpoint": f"dsm_train.supervise:optimizer_step 4, {AFTER} 1",
    "in the middle of a file": f"dsm_train.supervise:optimizer_step 4, {WRITE_ITEM} 5",
    "before SHA256SUMS": "dsm_train.supervise:optimizer_step 4, dsm_train.checkpoint.keeper:Place.write 1 done",
    "between the rename and pruning": "dsm_train.supervise:optimizer_step 6, "
    "dsm_train.checkpoint.keeper:Keeper._prune 1",
    "in the last save": "dsm_train.supervise:optimizer_step 7, dsm_train.checkpoint.keeper:Place.write 1",
    "while weights are written": "dsm_train.hf.writer:_append 3",
    "before the run is noted as finished": "dsm_train.run:RunFolder.finish 1",
}
ON_RANKS = (
    "in the second step of the warm-up", "in a decoding step", "after rollouts", "in grading",
    "between two micro-batches", "between two minibatches", "between metrics and checkpoint", "in the middle of a file",
    "before the index", "before SHA256SUMS", "after the rename", "in the final evaluation", "while weights are written",
)  # fmt: skip
COLD = ("warmup.steps=0",)
"""The reference is the initial model, which no checkpoint holds."""
RENEWED = ("algorithm.reference_every=2",)

Make = Callable[..., Run]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Runs that were never killed, one of each kind."""
    made: dict[tuple[str, ...], Run] = {}

    def make(layout: str, stage: str, *more: str) -> Run:
        key = (layout, stage, *more)
        if key not in made:
            made[key] = Run(tmp_path_factory.mktemp("reference"), layout, (stage, *STAGES[stage], *more))
            made[key].start()
        return made[key]

    return make


def killed(expected: Run, folder: Path, *moments: Moment) -> Run:
    """Start a run, kill it at one moment after the other, and let it finish: nothing differs."""
    run = Run(folder / "killed", expected.layout, expected.arguments)
    for moment in moments:
        run.start(moment)
    run.start()
    assert run.differences(expected) == []
    return run


def test_a_run_that_is_killed_in_every_phase_ends_as_one_never_killed(reference: Make, tmp_path: Path) -> None:
    moments = (
        BEFORE_THE_FIRST_CHECKPOINT["in the second step of the warm-up"],
        f"{EXPLORE} 2, {DECODE} 3",
        f"{UPDATE} 2, dsm_train.update:optimizer_step 2",
        f"{UPDATE} 2, {WRITE_ITEM} 5",
        f"{UPDATE} 2, {AFTER} 1",
        AROUND_THE_LOOP["while weights are written"],
    )
    run = killed(reference("one", "grpo"), tmp_path, *(Moment(calls) for calls in moments))
    assert run.starts[1].place == "its begin" and run.starts[-1].place == "step 6 of 6 of grpo"


def test_rollouts_that_were_recorded_are_not_sampled_again(reference: Make, tmp_path: Path) -> None:
    expected = reference("one", "grpo", *COLD, "checkpoint.every=3")
    assert expected.starts[0].sampled == expected.starts[0].graded == tuple(range(6))
    moments = (f"{UPDATE} 2, dsm_train.update:optimizer_step 2", "dsm_train.train:grade 3")
    run = killed(expected, tmp_path, *(Moment(calls) for calls in moments))
    first, second, third = run.starts
    assert first.place == second.place == "its begin"  # without a checkpoint, from what was recorded
    assert (first.sampled, first.graded) == ((0, 1), (0, 1))
    assert (second.sampled, second.graded) == ((2,), ())
    assert (third.sampled, third.graded) == ((3, 4, 5), (2, 3, 4, 5))


def test_supervised_training_that_is_killed_ends_as_one_never_killed(reference: Make, tmp_path: Path) -> None:
    moments = ("before the first checkpoint", "in the middle of a file", "while weights are written")
    killed(reference("one", "sft"), tmp_path, *(Moment(SFT[name]) for name in moments))


def test_a_run_that_is_killed_at_random_ends_as_one_never_killed(tmp_path: Path) -> None:
    lines: list[str] = []
    assert kill_at_random(tmp_path, "one", ("grpo", *STAGES["grpo"], *RENEWED), 2, seed=0, say=lines.append) == []
    assert sum(": kill " in line for line in lines) == 2


@pytest.mark.slow
@pytest.mark.parametrize("moment", GRPO)
def test_a_kill_at_any_moment_changes_nothing(moment: str, reference: Make, tmp_path: Path) -> None:
    killed(reference("one", "grpo", *RENEWED), tmp_path, Moment(GRPO[moment]))


@pytest.mark.slow
@pytest.mark.parametrize("moment", {**IN_A_STEP, **IN_A_SAVE})
def test_a_reference_that_no_checkpoint_holds_is_the_initial_model(
    moment: str, reference: Make, tmp_path: Path
) -> None:
    killed(reference("one", "grpo", *COLD), tmp_path, Moment(GRPO[moment]))


@pytest.mark.slow
@pytest.mark.parametrize("moment", SFT)
def test_a_kill_at_any_moment_of_supervised_training_changes_nothing(
    moment: str, reference: Make, tmp_path: Path
) -> None:
    killed(reference("one", "sft"), tmp_path, Moment(SFT[moment]))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ON_RANKS)
@pytest.mark.parametrize("layout", [name for name, (ranks, _) in LAYOUTS.items() if ranks > 1])
def test_a_kill_of_all_ranks_changes_nothing(layout: str, moment: str, reference: Make, tmp_path: Path) -> None:
    killed(reference(layout, "grpo", *RENEWED), tmp_path, Moment(GRPO[moment]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name, (ranks, _) in LAYOUTS.items() if ranks > 1])
def test_supervised_training_on_ranks_that_are_killed_ends_as_one_never_killed(
    layout: str, reference: Make, tmp_path: Path
) -> None:
    moments = ("between two micro-batches", "in the middle of a file", "before SHA256SUMS", "while weights are written")
    killed(reference(layout, "sft"), tmp_path, *(Moment(SFT[name].replace(" 4", " 1")) for name in moments))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name, (ranks, _) in LAYOUTS.items() if ranks > 1])
@pytest.mark.parametrize(
    ("moment", "rank"),
    [
        ("in a decoding step", 1),
        ("between two micro-batches", 0),
        ("between two minibatches", 1),
        ("in the middle of a file", 1),
        ("before SHA256SUMS", 0),
        ("in the final evaluation", 1),
        ("while weights are written", 0),
    ],
)
def test_one_rank_that_is_killed_takes_the_others_with_it(
    moment: str, rank: int, layout: str, reference: Make, tmp_path: Path
) -> None:
    killed(reference(layout, "grpo"), tmp_path, Moment(GRPO[moment], rank=rank))


@pytest.mark.slow
def test_weights_that_a_kill_left_between_two_names_are_there_in_the_end(reference: Make, tmp_path: Path) -> None:
    replaced = "dsm_train.run:Job.save 1, pathlib:Path.rename 1 done"  # those of a start before have another name
    moments = (AROUND_THE_LOOP["before the report"], replaced, replaced.replace("1 done", "2"))
    killed(reference("one", "grpo"), tmp_path, *(Moment(calls) for calls in moments))


AS_A_PROGRAM = """
import os, sys
sys.path[:0] = {path}
from killing import kill_at
from dsm_train.__main__ import main

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and {kills}:
    kill_at({calls!r})
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1], ids=["by the same command", "by torchrun"])
def test_ranks_of_torchrun_are_continued(restarts: int, reference: Make, tmp_path: Path) -> None:
    expected = reference("dp2", "grpo")
    run = Run(tmp_path, expected.layout, expected.arguments)
    for kills in (True, False)[: 2 - restarts]:
        calls = GRPO["between two minibatches"]
        program = AS_A_PROGRAM.format(path=sys.path, kills=kills, calls=calls)
        result = torchrun(
            2, f"--max-restarts={restarts}", "--no-python", sys.executable, "-c", program, *run.arguments,
            *LAYOUTS["dp2"][1], f"run.out={run.out}",
        )  # fmt: skip
        assert ("exitcode  : -9" in result.stderr) == (kills and not restarts), result.stderr
        assert run.finished == (restarts == 1 or not kills), result.stdout + result.stderr
    assert "continued from" in result.stdout
    assert run.differences(expected) == []
