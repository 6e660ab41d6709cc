"""Signals, at any moment: the run saves, says how it goes on, and ends as if nothing had been when it has gone on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from commands import run
from failing import RUN, Result, ended, happening, ranks_ended, state, undisturbed, write_reward

from dsm_train.checkpoint import stop
from dsm_train.checkpoint.stop import SIGNALS

SIGTERM, SIGUSR1, SIGINT, SIGHUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP
WITHIN_STEPS = [
    ("dsm_train.supervise:optimizer_step", 2, SIGUSR1, "step 2 of 3 of sft"),
    ("dsm_train.rollout.embedded:EmbeddedEngine.sync", 3, SIGTERM, "step 2 of 4 of grpo"),
    ("dsm_train.rewards.worker:Worker.call", 7, SIGINT, "step 2 of 4 of grpo"),
    ("dsm_train.train:update", 3, SIGTERM, "step 3 of 4 of grpo"),
    ("dsm_train.checkpoint.keeper:Keeper._save", 3, SIGHUP, "step 2 of 4 of grpo"),
    ("dsm_train.checkpoint.keeper:Keeper._publish", 4, SIGTERM, "step 4 of 4 of grpo"),
]
BETWEEN = [
    ("dsm_train.run:begin", 1, SIGTERM, None),
    ("dsm_train.stages.grpo:before_grpo", 1, SIGINT, "step 3 of 3 of sft"),
    ("dsm_train.stages.grpo:Evaluator.greedy", 4, SIGUSR1, "step 4 of 4 of grpo"),
    ("dsm_train.run:weights.save_weights", 1, SIGTERM, "step 4 of 4 of grpo"),
    ("dsm_train.stages.grpo:write_report", 1, SIGTERM, "step 4 of 4 of grpo"),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (*WITHIN_STEPS[::2], *BETWEEN[::2], BETWEEN[3])]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that no signal came to."""
    return undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("where", "call", "number", "place"), [*WITHIN_STEPS[1::2], BETWEEN[1], *SLOW])
def test_a_run_saves_at_a_signal_and_goes_on_exactly(
    where: str,
    call: int,
    number: signal.Signals,
    place: str | None,
    expected: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_reward(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in SIGNALS]
    command = (*RUN, f"run.out={tmp_path / 'run'}")
    with happening(where, call, lambda: os.kill(os.getpid(), number)):
        status, lines, _ = ended(capsys, *command)
    how = f"stopped by {number.name} " + ("before the first checkpoint" if place is None else f"after {place}")
    assert status == 75
    assert lines == [f"dsm-train grpo: {how}; the same command continues"]
    assert state(tmp_path / "run")["ended"] == how
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not [*(tmp_path / "run").glob(".*"), *(tmp_path / "run/checkpoints").glob(".*")]
    run("grpo", *command)
    assert (f": {place}\n" in capsys.readouterr().out) == (place is not None)
    assert Result.of(tmp_path / "run") == expected


def test_a_second_ctrl_c_ends_a_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reward(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stop, "_ECHO", 0.1)

    def twice() -> None:
        os.kill(os.getpid(), SIGINT)
        os.kill(os.getpid(), SIGINT)  # torchrun's, of the same key
        time.sleep(0.2)
        os.kill(os.getpid(), SIGINT)
        pytest.fail("the run went on")

    with happening("dsm_train.train:update", 2, twice):
        status, lines, _ = ended(capsys, *RUN, f"run.out={tmp_path / 'run'}")
    how = "stopped by SIGINT at once: what was not saved is lost"
    assert (status, lines) == (130, [f"dsm-train grpo: {how}; the same command continues"])
    assert state(tmp_path / "run")["ended"] == how


@pytest.mark.parametrize(
    ("layout", "which", "where", "number", "place"),
    [
        (("parallel.distributed_optimizer=true",), (1,), "dsm_train.train:update", 3, "step 3 of 4 of grpo"),
        pytest.param(
            ("parallel.tp=2",), (0, 1), "dsm_train.rollout.embedded:EmbeddedEngine.sync", 3, "step 2 of 4 of grpo",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("parallel.tp=2",), (1,), "dsm_train.stages.grpo:before_grpo", 1, "step 3 of 3 of sft",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("parallel.pp=2",), (0,), "dsm_train.run:weights.save_weights", 1, "step 4 of 4 of grpo",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_all_ranks_stop_at_a_signal_to_some(
    layout: tuple[str, ...], which: tuple[int, ...], where: str, number: int, place: str, tmp_path: Path
) -> None:
    write_reward(tmp_path)
    command = (*RUN, "model.num_kv_heads=2", *layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        at = {rank: (where, number, "SIGTERM") for rank in which}
        statuses, printed = ranks_ended(2, tmp_path, at, *command, f"run.out={tmp_path / 'run'}")
        assert statuses == [75, 75], printed
        assert printed.count(f"stopped by SIGTERM after {place}") == 1 and "Traceback" not in printed, printed
        assert state(tmp_path / "run")["ended"].startswith(f"stopped by SIGTERM after {place}")
        statuses, printed = ranks_ended(2, tmp_path, {}, *command, f"run.out={tmp_path / 'run'}")
        assert statuses == [0, 0] and f": {place}\n" in printed, printed
        statuses, printed = ranks_ended(2, tmp_path, {}, *command, f"run.out={tmp_path / 'whole'}")
    assert statuses == [0, 0] and Result.of(tmp_path / "run") == Result.of(tmp_path / "whole")
