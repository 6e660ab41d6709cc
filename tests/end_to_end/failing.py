"""Runs in which something happens at a moment, and what their folders have to hold in the end."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from commands import GRPO, WARMUP, run, stage_of_rank, values
from ranks import Ranks

from dsm_train.__main__ import main

RUN = (*GRPO, *WARMUP, "steps=4", "algorithm.minibatches=2", "rewards.unfinished=keep",
       "rewards.functions=[{call: reward_of_digits:digits}]", "checkpoint.every=2")  # fmt: skip
FUNCTION = (
    "def digits(completions, tasks):\n    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"
)
"""A reward that tiny models differ in."""
LIMIT = 200.0
"""Seconds that ranks may take."""


def write_reward(folder: Path) -> None:
    """Write the module of the reward function."""
    (folder / "reward_of_digits.py").write_text(FUNCTION)


@contextmanager
def happening(where: str, number: int, what: Callable[[], object]) -> Iterator[None]:
    """Have something happen before call `number` of the function at module:name."""
    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    @wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            what()
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield
    assert calls >= number, f"{where} was called {calls} times"


@dataclass(frozen=True)
class Result:
    """Results of a run that finished, times aside."""

    metrics: list[dict[str, Any]]
    samples: bytes
    weights: bytes

    @classmethod
    def of(cls, out: Path) -> Result:
        """Read them."""
        weights = (out / "weights/model.safetensors").read_bytes()
        assert state(out)["finished"]
        return cls(values(out), (out / "samples.jsonl").read_bytes(), weights)


def undisturbed(folder: Path, *arguments: str) -> Result:
    """Run GRPO to its end in an empty folder."""
    write_reward(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("grpo", *RUN, f"run.out={folder / 'run'}", *arguments)
    return Result.of(folder / "run")


def state(out: Path) -> dict[str, Any]:
    """Read run.json."""
    found, _ = json.JSONDecoder().raw_decode((out / "run.json").read_text())
    return found


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """Run GRPO, which does not finish: its exit status, the lines on stderr, and what is on stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["grpo", *arguments])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line and not line.startswith(("sft ", "grpo "))]
    assert isinstance(end.value.code, int)
    return end.value.code, lines, printed.out


def ranks_ended(world: int, out: Path, moments: dict[int, tuple[str, int, str]], *arguments: str) -> tuple[list, str]:
    """Run GRPO on ranks, where something happens on some of them: exit statuses, and all that they printed.

    moments: by rank, the function and its call before which it happens, and the name of a signal or "full".
    """
    ranks = Ranks(rank_of, world, out, json.dumps(moments), *arguments, timeout=LIMIT)
    try:
        ranks.wait(LIMIT, others=True)
    finally:
        ranks.kill()
    return ranks.statuses, "".join(ranks.printed())


def rank_of(rank: int, world: int, store: dist.Store, out: Path, moments: str, *arguments: str) -> None:
    """Run a rank's part, in which something may happen."""
    if (moment := json.loads(moments).get(str(rank))) is None:
        return stage_of_rank(rank, world, store, out, "grpo", *arguments)
    where, number, what = moment
    with happening(where, number, lambda: fill() if what == "full" else os.kill(os.getpid(), signal.Signals[what])):
        stage_of_rank(rank, world, store, out, "grpo", *arguments)


def fill(left: int = 0) -> None:
    """Have every write fail that goes beyond so many bytes of its file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
