"""Real ranks for the distributed tests: processes on this machine that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent


def run_workers(script: Path, world: int, arguments: list[str], out: Path, timeout: float = 300) -> None:
    """Run `script RANK WORLD STORE OUT ARGUMENTS...` as each of `world` ranks; the first that fails ends all.

    STORE is a path for a `dist.FileStore` of this call's own. The script's folder and tests/ can be imported.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    env["CUDA_VISIBLE_DEVICES"] = ""  # gloo, whatever the machine has
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    store = out / f"store-{world}-{time.monotonic_ns()}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(world), str(store), str(out), *arguments],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    deadline = time.monotonic() + timeout
    try:
        while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
            assert time.monotonic() < deadline, f"the ranks took longer than {timeout} s"
            time.sleep(0.1)
        time.sleep(0.2 if any(worker.poll() for worker in workers) else 0)  # others may have something to say too
    finally:
        for worker in workers:
            worker.kill()
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(errors)
