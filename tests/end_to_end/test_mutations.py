"""The nets hold: every mistake of mutations.py, put into the running code, shows beside Algorithm 1.

verify-step finds those as well that are not the same in both of its layouts.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from commands import run
from mutations import CLIP, MUTATIONS, another_engine, two_ranks
from oracle import GRPO, OFF_POLICY, SMALL, Start, differences, make_start, read, recorded, trained
from ranks import run_ranks

BUSY = (
    *OFF_POLICY,
    "sampling.temperature=1.25",
    "algorithm.clip_low=0.1",
    "algorithm.clip_high=0.3",
    "algorithm.kl_coef=0.2",
    "algorithm.entropy_coef=0.05",
    "algorithm.reference_every=2",
    "optim.lr=3e-3",
    "optim.weight_decay=0.5",
    f"optim.clip_grad={CLIP}",
    "optim.warmup_steps=2",
    "optim.schedule=linear",
)
"""A recipe in which everything matters."""
ONCE_MISSED = (
    "old log-probabilities at temperature 1",
    "reference log-probabilities at temperature 1",
    "temperature 1 in the loss",
    "no temperature in the backward pass",
    "rollout in place of old log-probabilities",
    "reference in place of old log-probabilities",
    "the KL's sign",
    "the population's deviation",
)
"""Mistakes that an earlier net let through; others are slow tests."""
ALONE = [name for name, mutation in MUTATIONS.items() if not mutation.layout]
SPLIT = [name for name, mutation in MUTATIONS.items() if mutation.layout]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """The model that runs begin from."""
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def batch(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a stage's rollouts for verify-step."""
    out = tmp_path_factory.mktemp("batch")
    trained(start, out, *BUSY)
    return out / "step-2.parquet"


def verify(start: Start, batch: Path) -> tuple[str, ...]:
    """The command that verifies a step on the batch."""
    return "verify-step", *SMALL, *start.arguments, *BUSY, f"batch={batch}"


@pytest.fixture(scope="module")
def split(start: Start, batch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what each mistake came to on two ranks."""
    out = tmp_path_factory.mktemp("split")
    grpo = ("grpo", *GRPO, *start.arguments, *BUSY, "run.out=run", *recorded(Path("run")))
    run_ranks(two_ranks, 2, out, shlex.join(grpo), shlex.join((*verify(start, batch), "run.out=verify")))
    return out


def test_nothing_shows_without_a_mistake(start: Start, tmp_path: Path) -> None:
    assert differences(start, trained(start, tmp_path, *BUSY)) == {}


def test_log_probabilities_of_another_engine_change_nothing_else(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_engine(monkeypatch)
    assert differences(start, trained(start, tmp_path, *BUSY)).keys() == {"rollout_logprob"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONCE_MISSED else pytest.mark.slow) for name in ALONE]
)
def test_a_mistake_shows(name: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name].inject(monkeypatch)
    found = differences(start, trained(start, tmp_path, *BUSY))
    assert found.get(MUTATIONS[name].shows_in, 0) > 10, found


@pytest.mark.parametrize("name", SPLIT)
def test_a_mistake_on_two_ranks_shows(name: str, start: Start, split: Path) -> None:
    mutation = MUTATIONS[name]
    found = differences(start, read(split / name / "run"))
    assert found.get(mutation.shows_in, 0) > 10, found


@pytest.mark.parametrize("name", [name for name in ALONE if MUTATIONS[name].differs])
def test_verify_step_finds_a_mistake(
    name: str,
    start: Start,
    batch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    MUTATIONS[name].inject(monkeypatch)
    with pytest.raises(SystemExit) as end:
        run(*verify(start, batch), f"run.out={tmp_path}")
    assert end.value.code == 1
    assert MUTATIONS[name].differs in different(capsys.readouterr().out)


@pytest.mark.parametrize("name", [name for name in SPLIT if MUTATIONS[name].differs])
def test_verify_step_finds_a_mistake_on_two_ranks(name: str, split: Path) -> None:
    assert MUTATIONS[name].differs in different((split / name / "verify-step.txt").read_text())


def different(printed: str) -> list[str]:
    """The quantities that differ in verify-step's table, in any of its steps."""
    verdict = printed.splitlines()[-1]
    lines = verdict.removeprefix("FAIL: ").split(", ") if verdict.startswith("FAIL: ") else []
    return [line.split(": ")[-1] for line in lines]
