"""Where the numbers come from, and how they are shown: a table, JSON rows, a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import FLOOR
from triton_kernels import implementations

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "flash-attn-3")
_SERVING = (
    "logit_stats", "logit_gradient", "policy_logits", "linear_logprob_fwd", "grpo_loss",
    "packed_attention_fwd", "packed_attention_bwd",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """Device, date, commit, versions, threads, and what serves our ops."""
    served = implementations()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device_type": device.type,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "served_by": {name: served[name][device.type] for name in _SERVING if name in served},
    }


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"model name\s*:\s*(.+)", text)
    return f"{match.group(1).strip() if match else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """With "+" where files that git tracks have changed; None outside of a checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed.strip())


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """For the terminal: one op at one shape, without the columns that are empty."""
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("ms", "seconds", lambda x: f"{1e3 * x:.2f}"),
        ("x ours", "ratio_to_ours", lambda x: f"{x:.2f}"),
        ("of floor", "floor_share", lambda x: f"{100 * x:.0f} %"),
        ("TFLOP/s", "tflops", lambda x: f"{x:.3g}"),
        ("of peak", "peak_share", lambda x: f"{100 * x:.0f} %"),
        ("extra MiB", "peak_extra_bytes", lambda x: f"{x / 2**20:.1f}"),
    ]
    columns = [column for column in columns if any(row[column[1]] is not None for row in rows)]
    lines = [("contender", *(title for title, _, _ in columns), "errors, or why there is no time")]
    for row in rows:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        note = row["reason"] if row["status"] == "measured" else f"{row['status']}: {row['reason']}"
        cells = ("-" if row[key] is None else text(row[key]) for _, key, text in columns)
        lines.append((row["contender"], *cells, "; ".join(part for part in (note, errors) if part)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    body = (
        "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, len(widths))), line[-1]])
        for line in lines
    )
    return "\n".join([f"\n{rows[0]['op']} {rows[0]['shape']}", *body])


def path(out: Path | None, common: dict[str, Any], name: str) -> Path:
    """Where the rows go: `out` as it is where it ends in .jsonl, else a file in it of name, device and date."""
    out = RESULTS if out is None else out
    if out.suffix != ".jsonl":
        device = re.sub(r"[^a-z0-9]+", "-", common["device"].lower()).strip("-")
        out = out / f"{name}-{device}-{common['date'][:10]}.jsonl"
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
        names = [row["contender"] for row in bars]
        kinds = {"ours": "tab:orange", FLOOR: "tab:gray"}
        color = [kinds.get(name.split(",")[0], "tab:blue") for name in names]
        time_axis.barh(names, [row["ratio_to_ours"] for row in bars], color=color)
        time_axis.set_title(f"{panel[0]}\n{panel[1]}: time, ours = 1")
        if any(row["peak_extra_bytes"] for row in bars):
            memory_axis.barh(names, [(row["peak_extra_bytes"] or 0) / 2**20 for row in bars], color=color)
            memory_axis.set(title="memory beside inputs and results, MiB", yticklabels=[])
        else:
            memory_axis.set_axis_off()
        sweep = sorted((row["workspace_bytes"], row["ratio_to_ours"]) for row in here if row["workspace_bytes"])
        if sweep:
            sweep_axis.plot([x / 2**20 for x, _ in sweep], [y for _, y in sweep], "o-", color="tab:orange")
            sweep_axis.set(title="time against workspace, default = 1", xlabel="MiB", xscale="log", ylim=(0, None))
        else:
            sweep_axis.set_axis_off()
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['threads']} threads, {rows[0]['date'][:10]}")
    figure.savefig(path, dpi=80)
