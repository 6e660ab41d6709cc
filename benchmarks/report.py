"""Where the numbers come from, and how they are shown: a table, JSON rows, a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from triton_kernels import implementations

RESULTS = Path(__file__).parent / "results"
FLOOR = "GEMMs alone"
"""The row of the GEMMs that nobody can avoid."""
_PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
_SERVING = ("logit_stats", "logit_gradient", "policy_logits", "linear_logprob_fwd", "grpo_loss")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, date, commit, versions, threads, and what serves our ops."""
    served = implementations()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "served_by": {name: served[name][device.type] for name in _SERVING if name in served},
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"model name\s*:\s*(.+)", text)
    return f"{match.group(1).strip() if match else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """With "+" where files that git tracks have changed; None outside of a checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed.strip())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """For the terminal: one op at one shape."""
    lines = [("contender", "ms", "x ours", "of floor", "extra MiB", "errors, or why there is no time")]
    for row in rows:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        extra = row["peak_extra_bytes"]
        note = row["reason"] if row["status"] == "measured" else f"{row['status']}: {row['reason']}"
        lines.append(
            (
                row["contender"],
                f"{1e3 * row['seconds']:.1f}" if row["seconds"] is not None else "-",
                f"{row['ratio_to_ours']:.2f}" if row["ratio_to_ours"] is not None else "-",
                f"{100 * row['floor_share']:.0f} %" if row["floor_share"] is not None else "-",
                f"{extra / 2**20:.1f}" if extra is not None else "-",
                "; ".join(part for part in (note, errors) if part),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    body = (
        "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, 5)), line[5]])
        for line in lines
    )
    return "\n".join([f"\n{rows[0]['op']} {rows[0]['shape']}", *body])


def path(out: Path | None, common: dict[str, Any]) -> Path:
    """Where the rows go: `out` as it is where it ends in .jsonl, else a file of the device and date in that folder."""
    out = RESULTS if out is None else out
    if out.suffix != ".jsonl":
        device = re.sub(r"[^a-z0-9]+", "-", common["device"].lower()).strip("-")
        out = out / f"ops-{device}-{common['date'][:10]}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """One row per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The plot, where matplotlib is installed."""
    print(f"\nrows: {path.with_suffix('.jsonl')}")
    try:
        plot(rows, path)
        print(f"plot: {path}")
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed; pip install matplotlib")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory per contender, and time against workspace of ours; a line of panels per op and shape."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["repetitions"]]
    panels = list(dict.fromkeys((row["op"], row["shape"]) for row in timed))
    figure = Figure(figsize=(15, 3.4 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(max(len(panels), 1), 3, squeeze=False)
    for (time_axis, memory_axis, sweep_axis), panel in zip(axes, panels, strict=False):
        here = [row for row in timed if (row["op"], row["shape"]) == panel]
        bars = [row for row in here if row["workspace_bytes"] is None and row["ratio_to_ours"] is not None][::-1]
        kinds = {"ours": "tab:orange", FLOOR: "tab:gray"}
        time_axis.barh(
            [row["contender"] for row in bars],
            [row["ratio_to_ours"] for row in bars],
            color=[kinds.get(row["contender"], "tab:blue") for row in bars],
        )
        time_axis.set_title(f"{panel[0]}\n{panel[1]}: time, ours = 1")
        memory_axis.barh(
            [row["contender"] for row in bars],
            [(row["peak_extra_bytes"] or 0) / 2**20 for row in bars],
            color=[kinds.get(row["contender"], "tab:blue") for row in bars],
        )
        memory_axis.set(title="memory beside inputs and results, MiB", yticklabels=[])
        sweep = sorted((row["workspace_bytes"], row["ratio_to_ours"]) for row in here if row["workspace_bytes"])
        if sweep:
            sweep_axis.plot([x / 2**20 for x, _ in sweep], [y for _, y in sweep], "o-", color="tab:orange")
            sweep_axis.set(title="time against workspace, default = 1", xlabel="MiB", xscale="log", ylim=(0, None))
        else:
            sweep_axis.set_axis_off()
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['threads']} threads, {rows[0]['date'][:10]}")
    figure.savefig(path, dpi=80)
