"""Runs of the command line on a tiny configuration, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from dsm_train.__main__ import main

TINY = (
    "run.threads=1",
    "run.max_tokens=100",  # several micro-batches per step
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.ffn_size=48",
    "model.max_length=64",
    "data.heldout_tasks=12",
)
WARMUP = ("warmup.steps=3", "warmup.batch=16", "warmup.examples=40", "warmup.optim.lr=1e-2")
GRPO = (
    *TINY,
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "sampling.max_new_tokens=5",
    "optim.lr=1e-3",
    "steps=2",
)


def run(stage: str, *arguments: str) -> None:
    """A stage in this process."""
    main([stage, *arguments])


def run_apart(stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A stage in a process of its own, as a user starts it."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dsm_train", stage, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def run_on_ranks(ranks: int, out: Path, stage: str, *arguments: str) -> str:
    """A stage on several ranks, without torchrun's own seconds; returns what the first rank printed."""
    return run_ranks(stage_of_rank, ranks, out, stage, *arguments)[0]


def stage_of_odd_rank(rank: int, world: int, store: dist.Store, out: Path, *arguments: str) -> None:
    """Run a rank's part of a stage, where the last argument is the second rank's alone."""
    stage_of_rank(rank, world, store, out, *(arguments if rank == 1 else arguments[:-1]))


def stage_of_rank(rank: int, world: int, store: dist.Store, out: Path, *arguments: str) -> None:
    """A rank's part of a stage, joined with the others as torchrun would have it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    main([*arguments])


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """A script, or `-m` and a module, on several ranks of this machine, over gloo."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=env, timeout=300)


def refused(capsys: pytest.CaptureFixture[str], stage: str, *arguments: str, has_begun: bool = False) -> str:
    """The only line that a stage prints on stderr as it ends with an error; before its start-up table, or after."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([stage, *arguments])
    assert end.value.code not in (0, None)
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert bool(printed.out) == has_begun
    return line


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without anything that is time."""
    timed = ("time", "tokens_per_second")
    return [
        {key: value for key, value in row.items() if key not in timed and not key.endswith("seconds")}
        for row in metrics(folder)
    ]


def write_sevens(path: Path) -> Path:
    """Questions whose answer is always 7, which a few steps of supervised training half teach."""
    path.write_text("".join(json.dumps({"question": f"{n}", "answer": "#### 7"}) + "\n" for n in range(40)))
    return path


def write_gsm8k(path: Path, count: int) -> Path:
    """Questions in GSM8K's format."""
    rows = [
        {
            "question": f"Ann has {n} pens and buys {n + 1} more. How many pens has she?",
            "answer": f"She has {n}+{n + 1}=<<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1} pens.\n#### {2 * n + 1}",
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
