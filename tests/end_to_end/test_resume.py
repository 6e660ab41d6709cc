"""The same command again: it continues the run that its folder holds, or says in one line why it does not."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from commands import GRPO, TINY, metrics, run, run_on_ranks, stage_of_rank, values
from commands import refused as refused_by_a_process
from damage import cut, flip
from megatron.core import parallel_state
from ranks import run_ranks

from dsm_train.checkpoint.place import checkpoints
from dsm_train.cli import errors
from dsm_train.megatron.checkpoint import sha256

RUN = (*TINY, "sampling.max_new_tokens=5", "sft.steps=4", "sft.batch=8", "sft.examples=40", "sft.optim.lr=1e-2",
       "eval.every=2", "checkpoint.every=1", "checkpoint.keep=9")  # fmt: skip
RESULTS = ("weights", "report.json", "curve.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted, with a checkpoint after each step."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run("sft", *RUN, f"run.out={out}")
    return out


@pytest.fixture
def broken_off(finished: Path, tmp_path: Path) -> Path:
    """The same run as a kill between the third checkpoint and the next leaves it."""
    return break_off(finished, tmp_path / "run", step=3)


def break_off(finished: Path, folder: Path, step: int) -> Path:
    shutil.copytree(finished, folder)
    for name in RESULTS:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in checkpoints(folder):
        if int(path.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(path)
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | {"finished": None}))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line of a start that ends with an error; its process would leave groups and lock by ending."""
    try:
        return refused_by_a_process(capsys, *arguments)
    finally:
        gc.collect()
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def checkpoint(folder: Path, step: int) -> Path:
    (found,) = (folder / "checkpoints").glob(f"*-sft-{step}")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> bytes:
    return (folder / "weights/model.safetensors").read_bytes()


def same_end(folder: Path, finished: Path) -> bool:
    return (
        weights(folder) == weights(finished)
        and values(folder) == values(finished)
        and (folder / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    )


def test_the_same_command_continues(broken_off: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (broken_off / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "pha')  # half a row, and the row of step 4 before it
    run("sft", *RUN, f"run.out={broken_off}")
    printed = capsys.readouterr().out
    assert f"continued from {checkpoint(broken_off, 3)}: step 3 of 4 of sft" in printed
    assert "rounding" not in printed and "missing" not in printed
    assert same_end(broken_off, finished)
    line = refused(capsys, "sft", *RUN, f"run.out={broken_off}")
    assert "holds a run that finished" in line and "run.overwrite=true" in line


def test_overwriting_continues_an_unfinished_run_and_replaces_a_finished_one(
    broken_off: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for continues in (True, False):
        run("sft", *RUN, f"run.out={broken_off}", "run.overwrite=true")
        assert ("continued from" in capsys.readouterr().out) == continues
        assert same_end(broken_off, finished)
    assert not list(broken_off.glob("unfinished-*"))


def test_another_configuration_is_refused_and_nothing_is_touched(
    broken_off: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(broken_off)
    line = refused(capsys, "sft", *RUN, f"run.out={broken_off}", "sft.optim.lr=2e-2", "run.seed=1")
    assert "holds an unfinished run of another configuration" in line
    assert "run.seed was 0, and is 1" in line and "sft.optim.lr was 0.01, and is 0.02" in line
    assert "run.resume=never" in line
    assert contents(broken_off) == before


@pytest.mark.parametrize("asked", [("run.overwrite=true", "sft.optim.lr=2e-2"), ("run.resume=never",)])
def test_a_run_that_is_not_continued_is_moved_aside(asked: tuple[str, ...], broken_off: Path) -> None:
    before = contents(broken_off)
    run("sft", *RUN, f"run.out={broken_off}", *asked)
    (aside,) = broken_off.glob("unfinished-*")
    assert contents(aside) == {name: data for name, data in before.items() if name != "run.json"}
    assert [row["step"] for row in metrics(broken_off)] == [row["step"] for row in metrics(aside)]


def test_keys_that_change_nothing_pass_and_those_that_change_rounding_are_told(
    broken_off: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("checkpoint.keep=2", "run.weights_dtype=bf16", "eval.samples=0", "parallel.timeout_minutes=7")
    run("sft", *RUN, f"run.out={broken_off}", *where, "run.max_tokens=90", "sft.optim.not_finite=skip")
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "equal to rounding" in line]
    assert line.endswith("bit for bit: run.max_tokens was 100, and is 90")
    assert "valid from here on: sft.optim.not_finite was stop, and is skip" in printed
    assert "keep" not in printed and "timeout" not in printed
    assert len(values(broken_off)) == len(values(finished))


@pytest.mark.parametrize(
    ("new", "ended"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_going_back_to_an_older_checkpoint(
    new: bool, ended: bool, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    shutil.copytree(finished, old) if ended else break_off(finished, old, step=3)
    out, before = tmp_path / "new" if new else old, contents(old)
    overwrite = ("run.overwrite=true",) if ended and not new else ()
    run("sft", *RUN, f"run.out={out}", f"run.resume={checkpoint(old, 1)}", *overwrite)
    assert f"continued from {old}/checkpoints/00000001-sft-1: step 1 of 4 of sft" in capsys.readouterr().out
    assert same_end(out, finished)
    assert len(checkpoints(out)) == 4  # a new run has the one that it began at
    if new:
        assert contents(old) == before


def test_the_same_command_continues_a_run_that_began_at_a_named_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    command = (*RUN, f"run.out={out}", f"run.resume={checkpoint(finished, 1)}")
    run("sft", *command)
    broken = break_off(out, tmp_path / "broken", step=2)
    shutil.rmtree(out)
    broken.rename(out)
    capsys.readouterr()
    run("sft", *command)
    assert f"continued from {checkpoint(out, 2)}" in capsys.readouterr().out
    assert same_end(out, finished)


def test_a_run_that_is_not_there_to_continue(
    broken_off: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no checkpoint/checkpoints").mkdir(parents=True)
    before = contents(broken_off)
    for path, words in (
        (tmp_path / "gone", "is no folder"),
        (tmp_path / "empty", "is neither a checkpoint nor a run"),
        (tmp_path / "no checkpoint", "is a run without checkpoints"),
    ):
        line = refused(capsys, "sft", *RUN, f"run.out={tmp_path / 'out'}", f"run.resume={path}")
        assert f"run.resume = {path} {words}" in line
    line = refused(capsys, "sft", *RUN, f"run.out={broken_off}", f"run.resume={finished}")
    assert "holds an unfinished run" in line and "choose another run.out" in line
    line = refused(capsys, "sft", *RUN, "sft.steps=5", f"run.out={tmp_path / 'out'}", f"run.resume={finished}")
    assert "sft.steps was 4, and is 5" in line and f"run.init={finished}/weights" in line
    assert contents(broken_off) == before


def test_weights_that_were_replaced_make_another_run_and_moved_ones_do_not(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, moved = tmp_path / "first", tmp_path / "moved"
    shutil.copytree(finished / "weights", first)
    command = (*RUN[len(TINY) :], *TINY[:2], TINY[-1], f"run.out={tmp_path / 'out'}")
    run("sft", *command, f"run.init={first}")
    out = break_off(tmp_path / "out", tmp_path / "broken", step=3)
    command = (*command[:-1], f"run.out={out}")
    data = bytearray((first / "model.safetensors").read_bytes())
    first.rename(moved)
    shutil.copytree(moved, first)
    data[-2] ^= 1
    (first / "model.safetensors").write_bytes(data)
    line = refused(capsys, "sft", *command, f"run.init={first}")
    assert "the digest of the weights was" in line and "model" not in line.split("(")[1].split(")")[0]
    run("sft", *command, f"run.init={moved}")
    assert weights(out) == weights(tmp_path / "out")


def test_data_that_was_changed_makes_another_run_and_a_moved_file_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"question": f"{n} + 1 =", "answer": f"#### {n + 1}"}) + "\n" for n in range(40)]
    (tmp_path / "tasks.jsonl").write_text("".join(rows))
    (tmp_path / "moved.jsonl").write_text("".join(rows))
    (tmp_path / "other.jsonl").write_text("".join(rows[:-1]) + rows[-1].replace("#### ", "#### 1"))
    command = (*RUN, "data.prompt_template={question}", "sft.examples=20", "data.heldout_tasks=4")
    run("sft", *command, f"run.out={tmp_path / 'out'}", f"data.path={tmp_path / 'tasks.jsonl'}")
    out = break_off(tmp_path / "out", tmp_path / "broken", step=3)
    line = refused(capsys, "sft", *command, f"run.out={out}", f"data.path={tmp_path / 'other.jsonl'}")
    assert "data.path was" in line and "the digest of the tasks was" in line
    run("sft", *command, f"run.out={out}", f"data.path={tmp_path / 'moved.jsonl'}")
    assert weights(out) == weights(tmp_path / "out")


def test_a_reward_function_that_was_mended_is_told_and_the_best_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "def digits(completions, tasks):\n    return [float(sum(c.isdigit() for c in x)) for x in completions]\n"
    (tmp_path / "digits_reward.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    command = (
        *GRPO, "steps=3", "algorithm.prompts_per_step=2", "algorithm.group_size=2", "optim.lr=1e-2",
        "rewards.unfinished=keep", "rewards.functions=[{call: digits_reward:digits}]",
        "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.best=reward", "checkpoint.best_is=lowest",
    )  # fmt: skip
    run("grpo", *command, f"run.out={tmp_path / 'out'}")
    assert steps_kept(tmp_path / "out") == {best_step(tmp_path / "out"), 3}
    out = break_off(tmp_path / "out", tmp_path / "broken", step=3)
    (tmp_path / "digits_reward.py").write_text(f"# mended\n{source}")
    line = refused(capsys, "sft", *RUN, f"run.out={out}")
    assert "(the stage was grpo, and is sft; " in line
    run("grpo", *command, f"run.out={out}")
    printed = capsys.readouterr().out
    assert "valid from here on: the digest of the reward functions was" in printed
    assert steps_kept(out) == {best_step(out), 3} and values(out) == values(tmp_path / "out")


def best_step(folder: Path) -> int:
    rewards = {row["step"]: row["reward"] for row in metrics(folder) if "reward" in row}
    return min(rewards, key=lambda step: (rewards[step], step))


def steps_kept(folder: Path) -> set[int]:
    return {int(path.name.rsplit("-", 1)[1]) for path in checkpoints(folder)}


def test_the_newest_checkpoint_that_is_whole_is_taken_and_the_others_are_named(
    broken_off: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip("__0_0.distcp")(checkpoint(broken_off, 3))
    (checkpoint(broken_off, 2) / "common.pt").unlink()
    (broken_off / "checkpoints/.00000004-sft-4.writing").mkdir()
    run("sft", *RUN, f"run.out={broken_off}")
    printed = capsys.readouterr().out
    begin = f"skipped {broken_off}/checkpoints"
    assert f"{begin}/.00000004-sft-4.writing: it was being written when the run ended" in printed
    assert f"{begin}/00000003-sft-3: __0_0.distcp is damaged or cut off" in printed
    assert f"{begin}/00000002-sft-2: common.pt is missing" in printed
    assert f"continued from {checkpoint(broken_off, 1)}" in printed
    assert same_end(broken_off, finished)
    assert {path.name for path in checkpoints(broken_off)} == {f"{n:08}-sft-{n}" for n in range(1, 5)}


def test_without_a_whole_checkpoint_the_run_is_refused_and_nothing_is_touched(
    broken_off: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut("common.pt")(checkpoint(broken_off, 1))
    cut("state.json")(checkpoint(broken_off, 2))
    flip("SHA256SUMS")(checkpoint(broken_off, 3))
    before = contents(broken_off)
    line = refused(capsys, "sft", *RUN, f"run.out={broken_off}")
    assert all(f"0000000{step}-sft-{step}: " in line for step in (1, 2, 3)) and "run.resume=never" in line
    assert contents(broken_off) == before


def test_a_checkpoint_of_a_newer_version_is_refused(broken_off: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reseal(checkpoint(broken_off, 3), format=2, version="9.9")
    before = contents(broken_off)
    line = refused(capsys, "sft", *RUN, f"run.out={broken_off}")
    assert "00000003-sft-3 was written by dsm 9.9, in format 2" in line and "continue with that version" in line
    assert contents(broken_off) == before


def reseal(folder: Path, **change: object) -> None:
    """Change the state of a checkpoint, with its checksum."""
    state, sums = folder / "state.json", folder / "SHA256SUMS"
    before = sha256(state)
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    sums.write_text(sums.read_text().replace(before, sha256(state)))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"], ids=["empty", "half", "list", "zeros"])
def test_a_damaged_run_json_is_no_reason_to_begin_anew(
    text: str, broken_off: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (broken_off / "run.json").write_text(text)
    if text:
        assert "sft.steps was 4" in refused(capsys, "sft", *RUN, "sft.steps=5", f"run.out={broken_off}")
        return
    run("sft", *RUN, f"run.out={broken_off}")
    assert "continued from" in capsys.readouterr().out and same_end(broken_off, finished)


def test_records_that_became_shorter_are_told(broken_off: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (broken_off / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken_off / "metrics.jsonl").write_text(rows[0] + rows[1][:20])
    (broken_off / "samples.jsonl").unlink()
    run("sft", *RUN, f"run.out={broken_off}")
    printed = capsys.readouterr().out
    assert f"{broken_off}/metrics.jsonl has {len(rows[0]) + 20} bytes" in printed and "rows are missing" in printed
    assert [row["step"] for row in metrics(broken_off)] == [1, 4]


def test_two_ranks_agree_on_what_is_wrong_and_on_what_is_whole(broken_off: Path, tmp_path: Path) -> None:
    flip("metadata.json")(checkpoint(broken_off, 3))
    begin = f"skipped {broken_off}/checkpoints/00000003-sft-3: metadata.json is damaged"
    printed = run_on_ranks(2, tmp_path, "sft", *RUN, f"run.out={broken_off}")
    assert begin in printed and "the number of ranks was 1, and is 2" in printed
    for path in checkpoints(broken_off):
        (path / "state.json").write_text("{}")
    command = (*RUN, f"run.out={tmp_path / 'new'}", f"run.resume={broken_off}")
    first, second = run_ranks(status_of_rank, 2, tmp_path, "sft", *command)
    for printed in (first, second):
        line, status = printed.splitlines()
        assert "no checkpoint of" in line and "state.json is damaged" in line and status == "exit status 2"


def status_of_rank(rank: int, world: int, store: dist.Store, out: Path, *arguments: str) -> None:
    """A rank's part of a stage that is refused, and its exit status."""
    errors._PATIENCE = 0.0  # there is no launcher that ends the other ranks
    try:
        stage_of_rank(rank, world, store, out, *arguments)
    except SystemExit as end:
        print("exit status", end.code)
