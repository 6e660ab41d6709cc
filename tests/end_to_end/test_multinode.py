"""Several nodes, through the scripts of launch/: two torchrun agents on this machine, each with a folder of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import GRPO, metrics

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"


def environment(**more: str) -> dict[str, str]:
    """Of a node: without what a launcher around the tests has set, and with the package in reach of any folder."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))}
    return own | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_node(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir()
    return subprocess.Popen(
        [LAUNCH / "torchrun.sh", *arguments], cwd=folder, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ends(nodes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of every node."""
    try:
        printed = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, *texts) for node, texts in zip(nodes, printed, strict=True)]


OFF = "checkpoint.every_minutes=null"  # the nodes have no disk in common


def test_two_nodes_train_together(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    folders = [tmp_path / "first", tmp_path / "second"]
    (first, second) = ends([
        start_node(folder, "2", str(rank), address, "1", "--", "grpo", *GRPO, "run.out=runs/x", OFF)
        for rank, folder in enumerate(folders)
    ])  # fmt: skip
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "dp 2" in first[1] and "held-out accuracy" in first[1]
    steps = [row["step"] for row in metrics(folders[0] / "runs/x") if row["phase"] == "grpo" and "loss" in row]
    assert steps == [1, 2] and (folders[0] / "runs/x/weights/model.safetensors").exists()
    # the first node writes all files; the second has nothing to say
    assert second[1] == "" and not list(folders[1].rglob("*.jsonl"))


@pytest.mark.parametrize("arguments", [[], ["2", "0", "host", "8", "grpo"], ["2", "zero", "host", "8", "--", "grpo"]])
def test_the_script_explains_itself(arguments: list[str], tmp_path: Path) -> None:
    ((status, out, err),) = ends([start_node(tmp_path / "node", *arguments)])
    assert (status, out) == (2, "") and "NODES NODE_RANK HOST[:PORT] RANKS_PER_NODE -- STAGE" in err


SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[7-8]" ]] && printf 'node7\\nnode8\\n'
"""
SRUN = """#!/usr/bin/env bash
# Stands for Slurm: runs the command once per node, with what Slurm tells a task.
while [[ $1 == --* ]]; do echo "srun $1"; shift; done
for node in 0 1; do SLURM_NODEID=$node "$@"; done
"""
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "python" "$@"
"""


def test_slurm_starts_one_torchrun_per_node(tmp_path: Path) -> None:
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "123456", "JOB_NODELIST": "node[7-8]", "NNODES": "2", "GPUS_ON_NODE": "8", "CPUS_ON_NODE": "96"}
    env = environment(**{f"SLURM_{name}": value for name, value in slurm.items()}, SLURM_SUBMIT_DIR=str(ROOT))
    env["PATH"] = os.pathsep.join([str(tmp_path), env["PATH"]])
    del env["PYTHON"]
    hard_to_quote = ["prompts=[a b, $HOME]", "run.out=it's here"]
    result = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "generate", *hard_to_quote], env=env, cwd=tmp_path,
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    options, *nodes = result.stdout.split("python\n")
    assert "srun --cpus-per-task=96" in options and "srun --kill-on-bad-exit=1" in options
    assert [node.splitlines() for node in nodes] == [
        ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "8",
         "--master-addr", "node7", "--master-port", "23456", "-m", "dsm_train", "generate", *hard_to_quote]
        for rank in range(2)
    ]  # fmt: skip
