"""Stage `runs`: a table of the runs in a folder, or all that the folder of one run tells."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dsm_train.cli.errors import user_errors
from dsm_train.reporting.folder import STATE
from dsm_train.reporting.record import Record
from dsm_train.reporting.runs import DEPTH, Run, find_runs, seconds_of, split

WIDTH = 100
NAME = 16
"""Letters that the name of a run may have more than any other column."""
FEW = 3
"""Most commands below the table."""
NAMES = {
    "reward": "reward",
    "heldout_accuracy": "accuracy",
    "loss": "loss",
    "heldout_loss": "held-out loss",
    "kl": "kl",
    "response_tokens": "response tokens",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
}
"""Metrics worth seeing, and their names for people."""


@dataclass(frozen=True)
class RunsConfig:
    """Stage `runs`."""

    folder: Path = Path("runs")
    """Folder that holds runs, up to three levels down; or the folder of one run, which is shown whole."""


def show_runs(config: RunsConfig) -> None:
    """Print the runs of a folder, or one run whole."""
    folder = config.folder
    with user_errors("dsm-train runs"):
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ValueError(f"folder = {folder} {what}: name a folder that holds runs, or that of a run")
    if (folder / STATE).exists():
        lines = page(Run.read(folder))
    else:
        lines = listing(folder, sorted(map(Run.read, find_runs(folder)), key=lambda run: -run.time))
    encoding = sys.stdout.encoding or "utf-8"
    text = "".join(line + "\n" for line in lines).encode(encoding, "replace").decode(encoding)
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # `dsm-train runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def listing(folder: Path, found: Sequence[Run]) -> list[str]:
    """Write the table of runs, and below it the commands that continue them."""
    if not found:
        return [f"no runs in {_plain(folder)}, up to {DEPTH} levels down"]
    rows: list[Sequence[str]] = [("run", "state", "step", "last", "age", "continues from")]
    for run in found:
        origin = run.origin if isinstance(run.origin, str) else f"{run.origin.loop} {run.origin.step}"
        cells = (run.path.relative_to(folder), run.state, step(run), headline(run), age(run.time), origin)
        rows.append(tuple(map(_plain, cells)))
    lines, able = table(rows), [run for run in found if not isinstance(run.origin, str)]
    if len(able) > FEW:
        hint = f"dsm-train runs folder={shlex.quote(str(able[0].path))}"
        return [*lines, "", "for the command that continues a run, and all else about it:", f"  {hint}"]
    for run in able:
        lines += ["", f"to continue {_plain(run.path.relative_to(folder))}:", *continuing(run)]
    return lines


def page(run: Run) -> list[str]:
    """Write down all that a run's folder tells."""
    about, values = run.about, run.progress.values
    who = f", process {about.get('pid')} on {about.get('host')}" if run.state == "running" else ""
    ended = f": {about['ended']}" if about.get("ended") and run.state != "running" else ""
    metrics = [f"{name} {values[key]:.4g}" for key, name in NAMES.items() if key in values] if values else []
    lines = [_plain(run.path)]
    lines += entry("state", f"{run.state}{who}{ended}")
    lines += entry("started", f"{_day(about.get('started'))}; last sign of life {age(run.time)} ago")
    lines += entry("step", step(run) or "none")
    lines += entry("metrics", "cannot be read" if values is None else ", ".join(metrics) or "none")
    for number, start in enumerate(run.starts, 1):
        lines += ["", _plain(f"start {number}: {_day(start.time)} on {start.host}"), *about_start(start)]
    if run.checkpoints:
        lines += ["", "checkpoints"]
    for found in run.checkpoints:
        size = f"{found.bytes / 1e9:.3g} GB" if found.bytes >= 1e9 else f"{found.bytes / 1e6:.3g} MB"
        best = ", the best" if found.folder.name == run.best else ""
        what = f"{found.place}, {_day(found.place.time)}, {size}{best}" if found.place else f"no: {found.trouble}"
        lines += entry(found.folder.name, what)
    origin = run.origin
    return [*lines, "", "to continue", *([f"  {origin}"] if isinstance(origin, str) else continuing(run))]


def about_start(start: Record) -> list[str]:
    """Write down a start of a run."""
    if start.commit is None:
        code = "no git checkout"
    elif start.changed is None:
        code = f"{start.commit}, changed or not"
    else:
        changed = f"{start.changed} file(s) changed" + (f": {start.patch}" if start.patch else "")
        code = f"{start.commit}, {'clean' if start.clean else changed}"
    lines = entry("code", code)
    lines += entry("versions", ", ".join(f"{name} {version}" for name, version in start.versions.items() if version))
    lines += entry("layout", f"{start.layout}; seed {start.seed}")
    lines += entry("devices", ", ".join(start.devices))
    lines += entry("folder", start.directory or "not known")
    words = split(start.command)
    return lines + (entry("command", "not known") if words is None else shown([shlex.quote(word) for word in words]))


def continuing(run: Run) -> list[str]:
    """Write the command that continues a run, or that it is the one that the user has."""
    words = run.command()
    if words is None:
        return [f"  the command that started it, with run.out={shlex.quote(str(run.path))}"]
    nodes = run.starts[-1].layout.nodes or 1
    return shown(words) + (["  on each node, with the rendezvous that it had"] if nodes != 1 else [])


def step(run: Run) -> str:
    """Write the step that a run is at: grpo 120/190, or grpo: sft 12/40 in another loop than the stage's own."""
    stage, at = run.about.get("stage"), run.progress
    if at.step is None:
        return str(stage or "")
    within = f"{stage}: " if isinstance(stage, str) and stage != at.loop else ""
    return f"{within}{at.loop} {at.step}" + (f"/{run.steps}" if run.steps else "")


def headline(run: Run) -> str:
    """Write the two metrics that tell most."""
    values = run.progress.values
    if values is None:
        return "cannot be read"
    pairs = (("reward", "loss"), ("heldout_accuracy", "heldout_loss"))
    names = [next((name for name in pair if name in values), None) for pair in pairs]
    short = NAMES | {"heldout_accuracy": "acc"}
    return ", ".join(f"{short[name]} {values[name]:.3g}" for name in names if name is not None)


def age(when: float) -> str:
    """Write how long ago something was: 12s, 5m, 3h, 4d."""
    seconds = max(0.0, time.time() - when)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns; the widest is cut until a line fits, the first, which a person copies, after the others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[max(range(len(widths)), key=lambda i: widths[i] - (0 if i else NAME))] -= 1
    lines = []
    for row in rows:
        pairs = zip(row, widths, strict=True)
        cells = [(cell if len(cell) <= width else cell[: width - 2] + "..").ljust(width) for cell, width in pairs]
        lines.append("  ".join(cells).rstrip())
    return lines


def entry(name: str, text: object) -> list[str]:
    """Write a name and what is to say, in lines that fit."""
    begin = f"  {name:<8} "
    return textwrap.wrap(_plain(text), WIDTH, initial_indent=begin, subsequent_indent=" " * 11) or [begin.rstrip()]


def shown(words: Sequence[str]) -> list[str]:
    """Write a command in lines that fit and that a shell joins."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH - 8:
            lines.append("")
        lines[-1] += f"{word} "
    return "  {}".format(" \\\n    ".join(map(str.rstrip, lines))).splitlines()


def _day(text: object) -> str:
    seconds = seconds_of(text)
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="seconds") if seconds else "at no known time"


def _plain(text: object) -> str:
    """Replace what would break a line, or a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))
