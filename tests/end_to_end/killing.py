"""Runs that are killed and started again by the same command, and how they differ from one that was never killed.

python tests/end_to_end/killing.py --stage grpo --layout tp2 --kills 20 --seed 0

A rank kills itself at a moment: a function of the program that is wrapped in its process, at a call of it. At random
moments all ranks are killed from outside. Nothing in the program knows of it.

A moment is written as calls that follow each other, module:function and a number, each counted from the one before:
"dsm_train.train:update 4, dsm_train.update:optimizer_step 2" is the second minibatch of the fourth update of this
start. The rank dies before the last of them, or after it with "done" behind it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

if __name__ == "__main__":  # pytest has it there
    sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from commands import TINY, WARMUP, stage_of_rank, values
from ranks import Ranks

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, ("parallel.tp=2", "parallel.sp=true", "model.num_kv_heads=2")),
    "pp2": (2, ("parallel.pp=2",)),
    "dp2": (2, ("parallel.distributed_optimizer=true",)),
}
"""Number of ranks, and arguments, by name."""
STAGES: dict[str, tuple[str, ...]] = {
    "sft": (
        *TINY,
        "sampling.max_new_tokens=5",
        "sft.steps=7",
        "sft.batch=16",
        "sft.optim.lr=1e-2",
        "checkpoint.every=2",
        "eval.every=3",
    ),
    "grpo": (
        *TINY,
        *WARMUP,
        "steps=6",
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=4",
        "algorithm.minibatches=2",
        "algorithm.kl_coef=0.04",
        "sampling.max_new_tokens=5",
        "optim.lr=1e-3",
        "rewards.functions=[{call: digits:digits}]",
        "rewards.unfinished=keep",
        "checkpoint.every=2",
        "eval.every=3",
    ),
}
"""Arguments of each stage."""
SECONDS = 300.0
"""Limit of a start."""
Around = Callable[..., Any]
"""Function that is called with the one it replaces, and the arguments."""


@dataclass(frozen=True)
class Moment:
    """Moment of a kill."""

    calls: str = ""
    """Calls of functions, at the last of which a rank kills itself."""
    seconds: float | None = None
    """Seconds after start-up, instead."""
    rank: int | None = None
    """The rank that is killed, and whose end the others notice; None: all of them."""


@dataclass(frozen=True)
class Start:
    """A start of a run, and how it ended."""

    statuses: tuple[int | None, ...]
    """Exit status of each rank."""
    printed: str
    """Output of the ranks."""
    sampled: tuple[int, ...]
    """Steps whose rollouts were sampled, from 0."""
    graded: tuple[int, ...]
    """Steps whose rollouts were graded."""
    seconds: float
    """Seconds after start-up until all had ended."""

    @property
    def finished(self) -> bool:
        """True when the run ended well."""
        return not any(self.statuses)

    @property
    def place(self) -> str:
        """Name the place at which the run went on."""
        found = re.search(r"^continued from .*: (.*)$", self.printed, re.MULTILINE)
        return found[1] if found else "its begin"


@dataclass
class Run:
    """A run in a folder, started as often as it takes."""

    folder: Path
    layout: str
    arguments: tuple[str, ...]
    """Stage, then key=value."""
    starts: list[Start] = field(default_factory=list)
    recorded: dict[int, bool] = field(default_factory=dict)
    """Steps whose rollouts the last start left recorded, and True for those with rewards."""
    wrong: list[str] = field(default_factory=list)
    """Lines about starts that did again what was recorded."""

    @property
    def out(self) -> Path:
        """Folder that the run writes."""
        return self.folder / "run"

    @property
    def finished(self) -> bool:
        """True when the run has noted that it did all it was asked for."""
        return (self.out / "run.json").exists() and bool(read_json(self.out / "run.json").get("finished"))

    def start(self, moment: Moment | None = None) -> Start:
        """Start the run, and kill it at a moment.

        Raises AssertionError where a rank ends in another way.
        """
        moment = moment or Moment()
        world, split = LAYOUTS[self.layout]
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"work-{len(self.starts) + 1}"
        os.mkfifo(fifo := log.with_suffix(".begun"))
        begun = os.open(fifo, os.O_RDWR)  # without O_RDWR it would wait for the ranks
        ranks = Ranks(
            rank_until, world, self.folder, json.dumps([moment.calls, moment.rank]), str(log), *self.arguments, *split,
            f"run.out={self.out}", timeout=SECONDS,
        )  # fmt: skip
        try:
            in_time = ranks.wait(SECONDS, news=begun)
            since = time.monotonic()
            if moment.seconds is None:
                in_time = in_time and ranks.wait(SECONDS)
            elif in_time and not ranks.wait(moment.seconds):
                ranks.kill(moment.rank)
            if moment.rank is not None:
                in_time = in_time and ranks.wait(SECONDS, others=True)
            assert in_time, f"{SECONDS:g} s\n" + "\n".join(ranks.printed())
        finally:
            ranks.kill()
            os.close(begun)
        work = [line.split() for line in (log.read_text().splitlines() if log.exists() else ())]
        start = Start(
            statuses=tuple(ranks.statuses),
            printed="\n".join(ranks.printed()),
            sampled=tuple(int(step) for what, step in work if what == "sampled"),
            graded=tuple(int(step) for what, step in work if what == "graded"),
            seconds=time.monotonic() - since,
        )
        self._check(start, moment)
        self.starts.append(start)
        self.recorded = recorded(self.out / "rollouts")
        return start

    def _check(self, start: Start, moment: Moment) -> None:
        """Find what should not have been done again, or ended in another way than it did."""
        shown = f"{moment}: {start.statuses}\n{start.printed}"
        killed = -signal.SIGKILL in start.statuses
        assert killed or start.finished, shown
        assert not moment.calls or killed, shown
        assert killed <= bool(moment.calls or moment.seconds is not None), shown
        if killed and moment.rank is not None:
            assert start.statuses.count(-signal.SIGKILL) == 1, shown  # the others have ended by themselves
        again = [f"sampled step {step + 1} again" for step in start.sampled if step in self.recorded]
        again += [f"graded step {step + 1} again" for step in start.graded if self.recorded.get(step)]
        self.wrong += [f"start {len(self.starts) + 1} {line}" for line in again]

    def differences(self, expected: Run) -> list[str]:
        """List what differs from a run that was never killed."""
        return self.wrong + differences(expected.out, self.out)


def recorded(folder: Path) -> dict[int, bool]:
    """List the steps whose rollouts lie in a folder, and True for those with rewards."""
    from dsm_train.rollout.record import read_rollouts

    files = [path for path in folder.glob("*.parquet")] if folder.is_dir() else []
    return {int(path.stem): read_rollouts(path).reward_S is not None for path in files}


def rank_until(rank: int, world: int, store: dist.Store, out: Path, moment: str, log: str, *arguments: str) -> None:
    """Run a rank's part of a stage until a moment; log: file of what is sampled and graded."""
    calls, which = json.loads(moment)
    if calls and which in (None, rank):
        kill_at(calls)
    if rank == 0:
        tell_work(Path(log))
    if world > 1:
        return stage_of_rank(rank, world, store, out, *arguments)
    from dsm_train.__main__ import main

    main([*arguments])


def kill_at(calls: str) -> None:
    """Have this process kill itself at a moment."""
    parts = [part.split() for part in calls.split(", ")]
    reached = 0  # so many of them have been

    def reach() -> None:
        nonlocal reached
        reached += 1
        if reached == len(parts):
            os.kill(os.getpid(), signal.SIGKILL)

    def counting(index: int, number: int, done: bool) -> Around:
        seen = 0

        def around(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            nonlocal seen
            seen += reached == index
            now = reached == index and seen == number
            if now and not done:
                reach()
            result = original(*arguments, **named)
            if now and done:
                reach()
            return result

        return around

    for index, (where, number, *done) in enumerate(parts):
        wrap(where, counting(index, int(number), bool(done)))


def tell_work(log: Path) -> None:
    """Tell that the run begins, and write down which steps' rollouts are sampled, and which are graded."""
    now = -1

    def tell(what: str, step: int) -> None:
        with log.open("a") as file:
            file.write(f"{what} {step}\n")

    def begin(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        log.with_suffix(".begun").write_text("begun")
        return original(*arguments, **named)

    def explore(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal now
        now = inspect.signature(original).bind(*arguments, **named).arguments["step"]
        return original(*arguments, **named)

    def generate(original: Callable[..., Any], *arguments: Any, step: int) -> Any:
        if arguments[-1].temperature:  # evaluation is greedy
            tell("sampled", step)
        return original(*arguments, step=step)

    def verdicts(original: Callable[..., Any], *arguments: Any) -> Any:
        tell("graded", now)
        return original(*arguments)

    wrap("dsm_train.run:begin", begin)
    wrap("dsm_train.train:explore", explore)
    wrap("dsm_train.rollout.embedded:EmbeddedEngine.generate", generate)
    wrap("dsm_train.explore:verdicts", verdicts)


def wrap(where: str, around: Around) -> None:
    """Call `around(original, ...)` in place of the function at module:name, for those who look it up there."""
    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    @wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def differences(expected: Path, actual: Path) -> list[str]:
    """List what differs between the folders of two runs, bit for bit; times aside."""
    lines = list(_different_files(expected, actual))
    then, now = values(expected), values(actual)
    if then != now:
        row = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now)))
        lines.append(f"metrics.jsonl: {len(then)} and {len(now)} rows, row {row + 1}: {then[row : row + 1]} and "
                     f"{now[row : row + 1]}")  # fmt: skip
    then, now = (timeless(read_json(out / "report.json")) if (out / "report.json").exists() else None
                 for out in (expected, actual))  # fmt: skip
    if then != now:
        lines.append(f"report.json: {then} and {now}")
    lines += _different_checkpoints(newest(expected), newest(actual))
    left = [path.name for path in (*actual.glob(".*"), *(actual / "checkpoints").glob(".*"))]
    if left:
        lines.append(f"left behind: {', '.join(left)}")
    if not read_json(actual / "run.json").get("finished"):
        lines.append("run.json: not finished")
    return lines


def _different_files(expected: Path, actual: Path) -> Iterator[str]:
    names = ["samples.jsonl", *(f"weights/{path.name}" for path in sorted((expected / "weights").iterdir()))]
    for name in names:
        then, now = (out / name if (out / name).exists() else None for out in (expected, actual))
        if (then and then.read_bytes()) != (now and now.read_bytes()):
            yield f"{name}: the bytes differ"


def _different_checkpoints(expected: Path, actual: Path) -> Iterator[str]:
    if expected.name != actual.name:
        yield f"checkpoints: {expected.name} and {actual.name}"
        return
    then, now = tensors(expected), tensors(actual)
    if then.keys() != now.keys():
        yield f"checkpoint: tensors {sorted(then.keys() ^ now.keys())}"
    differ = [name for name in then.keys() & now.keys() if not same_bits(then[name], now[name])]
    if differ:
        yield f"checkpoint: {len(differ)} of {len(then)} tensors differ, such as {min(differ)}"
    for name, read in (("common.pt", plain), ("state.json", place)):
        a, b = read(expected), read(actual)
        if a != b:
            yield f"checkpoint, {name}: {a} and {b}"


def newest(out: Path) -> Path:
    """Find the last checkpoint of a run."""
    return max(path for path in (out / "checkpoints").iterdir() if path.name[:1].isdigit())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint: weights and optimizer, of all models."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert any("exp_avg_sq" in name for name in state)
    with warnings.catch_warnings(action="ignore"):  # it says that there are no ranks
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bit for bit: NaN with NaN, 0 with -0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def plain(checkpoint: Path) -> Any:
    """Read the values of a checkpoint that are no tensors."""
    return torch.load(checkpoint / "common.pt", weights_only=False)


def place(checkpoint: Path) -> Any:
    """Read where the run stood, without what is time: rows of metrics have times in them."""
    values = timeless(read_json(checkpoint / "state.json"))
    return {name: value for name, value in values.items() if name not in ("time", "metrics_bytes")} | {
        "identity": {name: value for name, value in values["identity"].items() if name != "run.out"}
    }


def timeless(value: Any) -> Any:
    """Leave out what is time."""
    if not isinstance(value, dict):
        return value
    return {name: timeless(item) for name, item in value.items() if not name.endswith("seconds")}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of JSON."""
    return json.loads(path.read_text())


def kill_at_random(
    folder: Path, layout: str, arguments: tuple[str, ...], kills: int, seed: int, say: Callable[[str], None] = print
) -> list[str]:
    """Kill a run again and again at random times, and others like it when it has finished; list what differs.

    Times are uniform over those of a run that is not killed, after start-up. Of several ranks, every third kill is of
    one alone.
    """
    drawn, world = random.Random(seed), LAYOUTS[layout][0]
    reference = Run(folder / "reference", layout, arguments)
    whole = reference.start()
    say(f"never killed: {whole.seconds:.1f} s after start-up")
    wrong, killed, number = reference.wrong, 0, 0
    while killed < kills:
        number += 1
        run = Run(folder / f"killed-{number}", layout, arguments)
        while not run.finished:
            rank = drawn.randrange(world) if world > 1 and killed % 3 == 2 else None
            moment = Moment(seconds=drawn.uniform(0, whole.seconds), rank=rank)
            start = run.start(moment if killed < kills else None)
            line = f"run {number}, from {start.place}"
            if any(start.statuses):
                killed += 1
                who = "" if rank is None else f" of rank {rank}"
                line += f": kill {killed}{who} after {moment.seconds:.2f} s: {standing(run)}"
            say(line if any(start.statuses) else f"{line}: finished")
        found = run.differences(reference)
        say(f"run {number}: {'differs' if found else 'bitwise equal'} after {len(run.starts)} starts")
        wrong += [f"run {number}: {line}" for line in found]
    return wrong


def standing(run: Run) -> str:
    """Say how far a run has come."""
    rows = values(run.out) if (run.out / "metrics.jsonl").exists() else []
    line = f"logged {rows[-1]['phase']} {rows[-1]['step']}" if rows else "nothing logged"
    if run.recorded:
        line += f", rollouts recorded of {', '.join(str(step + 1) for step in sorted(run.recorded))}"
    return line


def main() -> int:
    """Kill runs at random moments, as the command line says."""
    parser = argparse.ArgumentParser(
        description="Kill a run at random moments and start it again by the same command, until it has finished; then "
        "compare weights, optimizer state, metrics and samples, bit for bit, with a run that was never killed.",
        epilog="Example: python tests/end_to_end/killing.py --stage grpo --layout tp2 --kills 20 --seed 0 "
        "algorithm.reference_every=2",
    )
    parser.add_argument("--stage", choices=STAGES, default="grpo", help="stage that runs (default: %(default)s)")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="one",
        help="one rank; tensor-parallel, pipeline-parallel, or data-parallel ranks with the distributed optimizer "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their times (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder for the runs, which stay (default: a temporary one)")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="more of the stage's arguments")
    given = parser.parse_args()
    arguments = (given.stage, *STAGES[given.stage], *given.arguments)
    with tempfile.TemporaryDirectory() as temporary:
        wrong = kill_at_random(given.folder or Path(temporary), given.layout, arguments, given.kills, given.seed)
    for line in wrong:
        print(line)
    print("FAIL" if wrong else "PASS", f"{given.stage} {given.layout}: {given.kills} kills, seed {given.seed}")
    return bool(wrong)


if __name__ == "__main__":
    import killing  # ranks import what they run by its name

    sys.exit(killing.main())
