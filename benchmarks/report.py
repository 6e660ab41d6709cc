"""Provenance of the numbers, and their forms: a table, JSON rows, a plot."""

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
_PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "flash-attn", "flash-attn-3")
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
    """Hash of the commit, with "+" if files of the checkout have changed; None outside of a checkout."""
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
    """Table for the terminal: one op at one shape, without empty columns."""
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
    """Path of the rows: `out` itself if it ends in .jsonl, else a file in it named by `name`, device and date."""
    out = RESULTS if out is None else out
    if out.suffix != ".jsonl":
        device = re.sub(r"[^a-z0-9]+", "-", common["device"].lower()).strip("-")
        out = out / f"{name}-{device}-{common['date'][:10]}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write one row per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the plot if matplotlib is installed."""
    print(f"\nrows: {path.with_suffix('.jsonl')}")
    try:
        plot(rows, path)
        print(f"plot: {path}")
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed; pip install matplotlib")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time (logarithmic) and memory per contender, time against our workspace; a line of panels per op and shape."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["repetitions"]]
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in timed:
        panels.setdefault((row["op"], row["shape"]), []).append(row)
    bars = {panel: _bars(here) for panel, here in panels.items()}
    heights = [0.9 + 0.27 * len(names) for names in bars.values()] or [1.0]
    figure = Figure(figsize=(13, sum(heights) + 0.5), layout="constrained")
    columns = 3 if any(row["workspace_bytes"] for row in timed) else 2
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    ratios = [row["ratio_to_ours"] for here in bars.values() for row in here]
    limits = min([0.7, *ratios]) * 0.9, max([2.0, *ratios]) * 1.6  # the same for all panels
    for (time_axis, memory_axis, *sweep_axis), panel in zip(axes, panels, strict=False):
        _draw_time(time_axis, bars[panel], limits)
        time_axis.set_title(f"{panel[0]} {panel[1]}: time, ours = 1", fontsize=9)
        _draw_memory(memory_axis, bars[panel])
        for axis in sweep_axis:
            _draw_sweep(axis, panels[panel])
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['threads']} threads, {rows[0]['date'][:10]}")
    figure.savefig(path, dpi=80)


def _bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that are compared with each other: all but those of the sweep over workspaces; the first comes last."""
    return [row for row in rows if row["workspace_bytes"] is None and row["ratio_to_ours"] is not None][::-1]


def _color(row: dict[str, Any]) -> str:
    return {"ours": "tab:orange", FLOOR: "tab:gray"}.get(row["contender"].split(",")[0], "tab:blue")


def _draw_time(axis: Any, bars: list[dict[str, Any]], limits: tuple[float, float]) -> None:
    """Distance from 1 on a logarithmic axis, with the ratio in figures: 1.1 and 100 can both be read."""
    ratios, places = [row["ratio_to_ours"] for row in bars], range(len(bars))
    colors = [_color(row) for row in bars]
    axis.hlines(places, 1, ratios, color=colors, linewidth=3)
    axis.scatter(ratios, places, color=colors, zorder=3)
    for place, ratio in zip(places, ratios, strict=True):
        axis.annotate(
            f"{ratio:.2f}", (max(ratio, 1), place), (8, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlim=limits, ylim=(-0.6, len(bars) - 0.4))
    axis.set_yticks(places, [row["contender"] for row in bars], fontsize=8)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if limits[0] <= tick <= limits[1]]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axis.minorticks_off()


def _draw_memory(axis: Any, bars: list[dict[str, Any]]) -> None:
    if not any(row["peak_extra_bytes"] for row in bars):
        axis.set_axis_off()
        return
    mib = [(row["peak_extra_bytes"] or 0) / 2**20 for row in bars]
    drawn = axis.barh(range(len(bars)), mib, color=[_color(row) for row in bars], height=0.55)
    axis.bar_label(drawn, [f"{x:.3g}" if x else "" for x in mib], padding=3, fontsize=8)
    axis.set(yticks=[], xlim=(0, 1.15 * max(mib)), ylim=(-0.6, len(bars) - 0.4))
    axis.set_title("memory beside inputs and results, MiB", fontsize=9)


def _draw_sweep(axis: Any, rows: list[dict[str, Any]]) -> None:
    sweep = sorted((row["workspace_bytes"] / 2**20, row["ratio_to_ours"]) for row in rows if row["workspace_bytes"])
    if not sweep:
        axis.set_axis_off()
        return
    axis.plot([x for x, _ in sweep], [y for _, y in sweep], "o-", color="tab:orange")
    axis.set(xlabel="workspace, MiB", xscale="log", ylim=(0, 1.15 * max(y for _, y in sweep)))
    axis.set_title("ours: time against workspace, default = 1", fontsize=9)
