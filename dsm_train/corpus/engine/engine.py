"""Run a step over its shards, through datatrove, on this machine, on Slurm or on Ray.

    report = run_step("extract", shard_tasks(files, out, config.engine), Extract(config), config.engine, out)

A step is a list of tasks and a `work` that does one of them and returns its counts. A task is finished when
`00042.counts.json` stands beside its output: a killed run, started again, does the others. executors.py decides where
tasks run; this file decides, from the folder alone, what is finished and what made it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dsm_train.corpus.config import EngineConfig
from dsm_train.corpus.engine.executors import WorkerKilled, disk_is_full, execute
from dsm_train.corpus.engine.page import replacing, shards
from dsm_train.corpus.engine.progress import ShardProgress

_MILLISECONDS = "milliseconds"
"""The counter that every task has besides its own: how long it took."""
_CLAIM = "step.json"


class StepError(ValueError):
    """Failure of a step, in one line: the cause, what is kept, the remedy."""


@dataclass(frozen=True, slots=True)
class Task:
    """Shard of a step: the files it reads and the file it writes."""

    index: int
    inputs: tuple[Path, ...]
    output: Path


Work = Callable[[Task], Mapping[str, int]]
"""Function that does one task and returns its counts: a function of a module, or a callable frozen dataclass.

It writes `task.output` with `page.write_pages`, or inside `page.replacing`. A dataclass's fields are the configuration
of the step: a folder made with others is not resumed. `field(compare=False)` marks one that does not decide what comes
out.
"""


@dataclass(frozen=True)
class StepReport:
    """Result of a step; `report.json` in its folder."""

    step: str
    shards: int
    counts: Mapping[str, int]
    """Sums over the shards."""
    seconds: float
    """Time on the clock, of the run that finished the step."""
    worker_seconds: float
    """Time of the shards, summed over all runs: pages per second and core come from it."""
    key: str
    """Hash of the configuration and the inputs: steps with the same key have the same output."""


def shard_tasks(inputs: Sequence[Path], out: Path, config: EngineConfig) -> list[Task]:
    """Tasks of a step, one per input file; outputs are `out/00042.jsonl.gz`, in the configured format."""
    return [Task(index, (path,), out / f"{index:05d}.{config.format}") for index, path in enumerate(inputs)]


def run_step(name: str, tasks: Sequence[Task], work: Work, config: EngineConfig, out: Path) -> StepReport:
    """Run the tasks that are not finished, with progress on stderr; write and return the report.

    Raises StepError, in one line, for a folder that another configuration made or another process works in, when
    tasks fail, when a worker is killed and when the disk is full. A task that fails does not stop the others, and what
    is finished is kept in every case.
    """
    with _alone(name, out):
        key = claim(name, tasks, work, out)
        pending = [task for task in tasks if not counts_path(out, task).exists()]
        if not pending and (report := read_report(out)) is not None:
            return report
        started = time.monotonic()
        if pending:
            _run(name, tasks, pending, work, config, out)
        counts = _sum_counts(tasks, out)
        worker_seconds = counts.pop(_MILLISECONDS, 0) / 1000
        report = StepReport(name, len(tasks), counts, round(time.monotonic() - started, 3), worker_seconds, key)
        write_json(out / "report.json", asdict(report))
        return report


def read_report(out: Path) -> StepReport | None:
    """Report of a finished step; None for one that has not finished."""
    path = out / "report.json"
    return StepReport(**_read_json(path)) if path.exists() else None


def finished_shards(folder: Path) -> list[Path]:
    """Shards of pages in a folder. Raises StepError if there are none or the step that writes them has not finished.

    A folder that no step wrote is taken as it is.
    """
    found, report = shards(folder), read_report(folder)
    if (folder / _CLAIM).exists() and report is None:
        raise StepError(f"the step that writes {str(folder)!r} has not finished: run its command again first")
    if report is not None and len(found) < report.shards:
        raise StepError(
            f"{str(folder)!r} holds {len(found)} of the {report.shards} shards it was written with: delete the "
            ".counts.json of those that are missing and run the step that writes them again"
        )
    if not found:
        raise StepError(f"no shards of pages in {str(folder)!r}: run the step that writes them, or correct the path")
    return found


def collected_folder(out: Path) -> Path:
    """Folder of the pages that the last finished round collected. Raises ValueError where no round is finished."""
    finished = [path for path in out.glob("round-*/collected") if read_report(path) is not None]
    if not finished:
        raise ValueError(f"no round in {str(out)!r} has collected pages: run the step rounds first")
    return max(finished, key=lambda path: int(path.parent.name.removeprefix("round-")))


def counts_path(out: Path, task: Task) -> Path:
    """The file whose existence says that the task is finished; it holds the task's counts."""
    return out / f"{task.index:05d}.counts.json"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StepError(f"{path} is not JSON ({error}): delete it and run the same command again") from error


@dataclass(frozen=True)
class _Once:
    """Do a task, and leave its counts or, when it fails, its error where the run that waits for it looks."""

    task: Task
    work: Work
    out: Path

    def __call__(self) -> None:
        started = time.monotonic()
        try:
            counts = dict(self.work(self.task))
        except Exception as error:
            with contextlib.suppress(OSError):  # on a full disk the error itself is all that is left
                write_json(_failure_path(self.out, self.task), f"{type(error).__name__}: {error}")
            raise
        counts[_MILLISECONDS] = round(1000 * (time.monotonic() - started))
        write_json(counts_path(self.out, self.task), counts)


def _run(
    name: str, tasks: Sequence[Task], pending: Sequence[Task], work: Work, config: EngineConfig, out: Path
) -> None:
    for task in pending:
        _failure_path(out, task).unlink(missing_ok=True)
    again = "run the same command again"
    try:
        with ShardProgress(name, [(counts_path(out, task), _input_bytes(task)) for task in pending], len(tasks)):
            execute(name, [_Once(task, work, out) for task in pending], config, out / "logs")
    except WorkerKilled as error:
        raise StepError(
            f"{name}: {error}; {_kept(tasks, out)}: {again}, with fewer engine.workers if memory ran out"
        ) from error
    except OSError as error:
        if not disk_is_full(error):
            raise
        where = f"no space left to write in {str(out)!r} ({error.strerror})"
        raise StepError(f"{name}: {where}; {_kept(tasks, out)}: free some and {again}") from error
    unfinished = [task for task in pending if not counts_path(out, task).exists()]
    if unfinished:
        failed = next((task for task in unfinished if _failure_path(out, task).exists()), unfinished[0])
        raise StepError(
            f"{name}: {len(unfinished)} of {len(tasks)} shards did not finish, such as {failed.output.name} "
            f"({_reason(out, failed)}); the others are kept, and tracebacks are in {str(out / 'logs')!r}: correct the "
            f"cause and {again}"
        )


def _reason(out: Path, task: Task) -> str:
    path = _failure_path(out, task)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return "it was killed, as happens when memory runs out: engine.memory_gb asks for more"


def _kept(tasks: Sequence[Task], out: Path) -> str:
    finished = sum(counts_path(out, task).exists() for task in tasks)
    return f"{finished} of {len(tasks)} shards are finished and kept"


def _sum_counts(tasks: Sequence[Task], out: Path) -> dict[str, int]:
    total: Counter[str] = Counter()
    for task in tasks:
        total.update(_read_json(counts_path(out, task)))
    return dict(total)


def _failure_path(out: Path, task: Task) -> Path:
    return out / f"{task.index:05d}.failed.json"


def _input_bytes(task: Task) -> int:
    return sum(path.stat().st_size for path in task.inputs if path.exists())


@contextlib.contextmanager
def _alone(name: str, out: Path) -> Iterator[None]:
    """Hold the folder while the block runs, so that the same command given twice does not work on the same shards."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepError(f"{name}: another process works in {str(out)!r}: wait for it, or stop it") from None
        yield


def claim(name: str, tasks: Sequence[Task], work: Work, out: Path) -> str:
    """Record in the folder the configuration that makes it, and return its hash.

    Raises StepError when the folder was made with another one.
    """
    settings, path = _settings(name, tasks, work), out / _CLAIM
    if not path.exists():
        write_json(path, settings)
        return _key(settings)
    made = _read_json(path)
    other = [setting for setting in sorted({*made, *settings}) if made.get(setting) != settings.get(setting)]
    if other:
        first, made_with = (
            ("work", "by another version of dsm-train") if "work" in other else (other[0], "with another configuration")
        )
        change = f"{first} was {made.get(first)!r:.100} and is {settings.get(first)!r:.100}"
        raise StepError(
            f"{name}: {str(out)!r} was made {made_with} ({change}): choose another run.out, or delete "
            "that folder to do the step anew"
        )
    return _key(settings)


def _settings(name: str, tasks: Sequence[Task], work: Work) -> dict[str, Any]:
    """Everything that decides the output of a step, under dotted names."""
    inputs = [path for task in tasks for path in task.inputs]
    names = hashlib.blake2b("\n".join(map(str, inputs)).encode(), digest_size=8).hexdigest()
    settings = {"step": name, "shards": len(tasks), "inputs": names, "work": _name_of(work)}
    for folder in sorted({path if path.is_dir() else path.parent for path in inputs}):
        made = folder / _CLAIM
        if made.exists():  # by a step, whose configuration counts as well
            settings[f"configuration of {folder}"] = _key(_read_json(made))
    if is_dataclass(work):
        decides = {field.name for field in fields(work) if field.compare}  # type: ignore[arg-type]
        settings |= _flat({k: v for k, v in asdict(work).items() if k in decides}, "")  # type: ignore[call-overload]
    return settings


def _name_of(work: Work) -> str:
    """Name of the work without its module, so that moving a file does not orphan what was made."""
    return (type(work) if is_dataclass(work) else work).__qualname__


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:  # as it reads back from JSON
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value, default=str))
    return flat


def _key(settings: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
