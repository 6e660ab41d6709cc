"""Executors of shards: datatrove's for this machine, Slurm and Ray, made to notice killed workers and full disks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import errno
import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats

from dsm_train.corpus.config import EngineConfig

Job = Callable[[], None]
_PRELOADED = [
    *(f"dsm_train.corpus.{name}" for name in ("cleaning.dedup", "text.extract", "mining.rounds")),
    "fasttext",
    "pyarrow.parquet",
]
"""Slow imports that workers need, done once by the process they are forked from."""
_FAILURES_AT_START = 16
"""Number of failed shards, without a finished one, after which the remaining shards are not tried."""
_SLURM_SECONDS = 10.0
"""Time between two questions to Slurm whether the job is still there."""


class WorkerKilled(Exception):
    """A worker ended without an exception: it was killed, most often because memory ran out."""


def disk_is_full(error: OSError) -> bool:
    """True for an error that says that nothing more can be written: disk full, quota, limit of file size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute(name: str, jobs: Sequence[Job], config: EngineConfig, logs: Path) -> None:
    """Call each job in a worker and return when all have ended; their logs and tracebacks are files in `logs`.

    A job that raises is not reported here, and does not stop the others, unless the first ones all raise. Raises
    OSError at once when a local worker finds the disk full, WorkerKilled when one is killed, and ValueError when Slurm
    or Ray is configured and missing.
    """
    step = _Jobs(dict(enumerate(jobs)))
    if config.executor == "slurm":
        _slurm(name, step, config, logs).run()
    elif config.executor == "ray":
        _run_on_ray(step, config, logs)
    else:
        workers = min(config.workers or cores(), len(jobs))
        _Local([step], tasks=len(jobs), workers=workers, logging_dir=str(logs), skip_completed=False).run()


class _Jobs(PipelineStep):
    """Step as datatrove sees it: the job of rank r is to call `jobs[r]`."""

    type, name = "corpus", "shard"

    def __init__(self, jobs: Mapping[int, Job]) -> None:
        super().__init__()
        self.jobs = jobs

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        self.jobs[rank]()
        return data


class _Local(LocalPipelineExecutor):
    """Local executor on a pool of processes.

    datatrove's own waits for ever for a worker that was killed, and leaves workers behind when it is killed itself.
    """

    def run(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # Imported once, by the process that workers are forked from, instead of once per worker.
        context.set_forkserver_preload(["__main__", *_PRELOADED])
        ends, held = context.Pipe(duplex=False)
        with (
            held,
            concurrent.futures.ProcessPoolExecutor(self.workers, context, _prepare_worker, (ends,)) as pool,
        ):
            ranks = [pool.submit(self._alone(rank).run_rank, rank) for rank in range(self.tasks)]
            failed, succeeded = 0, False
            try:
                for future in concurrent.futures.as_completed(ranks):
                    error = future.exception()
                    failed, succeeded = failed + bool(error), succeeded or not error
                    if failed == _FAILURES_AT_START and not succeeded:
                        pool.shutdown(wait=False, cancel_futures=True)
                        break
                    if isinstance(error, BrokenProcessPool):
                        raise WorkerKilled("a worker was killed") from error
                    if isinstance(error, OSError) and disk_is_full(error):
                        raise error
            except BaseException:
                held.close()  # ends the workers; without it the pool waits until they have finished their shards
                raise

    def run_rank(self, rank: int) -> None:
        """Run one rank in a worker, whose errors go to its log alone."""
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            self._run_for_rank(rank, local_rank=1)

    def _alone(self, rank: int) -> _Local:
        """This executor with one rank's job in it, so that the message to a worker does not grow with the step."""
        alone = copy.copy(self)
        alone.pipeline = [_Jobs({rank: self.pipeline[0].jobs[rank]})]  # type: ignore[union-attr]
        return alone


def _prepare_worker(ends: Connection) -> None:
    """End the worker when its parent stops it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one decides

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            ends.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Slurm(SlurmPipelineExecutor):
    """Slurm executor that waits for its job, so that steps follow each other as on one machine.

    The job outlives the process that waits for it: a run started again waits for the job that is there.
    """

    def run(self) -> None:
        if "SLURM_ARRAY_TASK_ID" in os.environ:  # on a node: do the shards of this element of the array
            super().run()
            return
        waiting = Path(self.logging_dir.path) / "job"
        if not (waiting.exists() and _in_queue(waiting.read_text())):
            super().run()
            waiting.write_text(str(self.job_id))
        while _in_queue(waiting.read_text()):
            time.sleep(_SLURM_SECONDS)
        waiting.unlink()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        except Exception:  # it is in the log, and must not stop the other shards of this element of the array
            return PipelineStats()

    def launch_merge_stats(self) -> None:
        """The counts of the shards are the statistics; datatrove's are not needed."""


def _slurm(name: str, step: _Jobs, config: EngineConfig, logs: Path) -> _Slurm:
    if shutil.which("sbatch") is None:
        raise ValueError("engine.executor=slurm needs sbatch, which is not here: run on a login node of the cluster")
    asked = config.slurm
    return _Slurm(
        pipeline=[step],
        tasks=len(step.jobs),
        time=asked.time,
        partition=asked.partition,
        qos=asked.qos,
        mem_per_cpu_gb=config.memory_gb,
        workers=config.workers or -1,
        job_name=f"corpus-{name.replace(' ', '-').replace('/', '-')}",
        env_command=asked.setup or f"export PATH={Path(sys.executable).parent}:$PATH",
        max_array_size=asked.max_array,
        tasks_per_job=asked.tasks_per_job,
        logging_dir=str(logs.resolve()),
        skip_completed=False,
    )


def _in_queue(job: str) -> bool:
    """True while Slurm has the job; a query that fails for another reason counts as yes."""
    answer = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True)
    if answer.returncode:
        return "Invalid job id" not in answer.stderr
    return bool(answer.stdout.strip())


def _run_on_ray(step: _Jobs, config: EngineConfig, logs: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        raise ValueError("engine.executor=ray needs Ray: pip install 'datatrove[ray]', or set engine.executor=local")
    import ray  # type: ignore[import-not-found]
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        ray.init()  # the cluster of RAY_ADDRESS, or this machine
    RayPipelineExecutor(
        pipeline=[step],
        tasks=len(step.jobs),
        workers=config.workers or -1,
        mem_per_cpu_gb=config.memory_gb,
        logging_dir=str(logs.resolve()),
        skip_completed=False,
    ).run()
