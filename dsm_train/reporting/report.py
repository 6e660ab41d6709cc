"""Report of a run: report.json, curve.png and the table of implementations printed at start-up."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsm_train.reporting.metrics import json_safe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
TITLES = {"sft": "supervised warm-up", "grpo": "GRPO", "ppo": "PPO"}
"""Phases that are drawn, in this order."""
SUPERVISED, ALONE = "sft", "supervised fine-tuning"
"""Phase that is not reinforcement learning, and its title where it is no warm-up."""
NEGLIGIBLE = 1e-6
"""Largest value of a curve that is left out, such as a KL of 0."""


@dataclass(frozen=True, slots=True)
class Report:
    """Outcome of a run."""

    accuracy_before: float
    """Share of held-out tasks answered correctly before reinforcement learning, 0 to 1."""
    accuracy_after: float
    """The same after it."""
    seconds: float
    """Time spent training."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of report.json."""

    def __post_init__(self) -> None:
        for name in ("accuracy_before", "accuracy_after"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be a share between 0 and 1, got {getattr(self, name)}")


def write_report(folder: Path, report: Report) -> Path:
    """Write report.json, all or nothing: a reader never sees half of it. NaN becomes null."""
    row = {
        "accuracy_before": report.accuracy_before,
        "accuracy_after": report.accuracy_after,
        "seconds": report.seconds,
    }
    path = folder / "report.json"
    unfinished = folder / "report.json.tmp"
    unfinished.write_text(json.dumps(json_safe({**report.extra, **row}), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def startup_table(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out which implementation serves each op and layer, as two aligned columns of plain text."""
    table = [("what", "served by"), *rows]
    width = max(len(what) for what, _ in table)
    lines = [f"{what:<{width}}  {served_by}" for what, served_by in table]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read metrics.jsonl into rows by phase, in the order of steps; a step logged again (a resume) replaces the old."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a killed run may leave half a line
        rows.setdefault((row["phase"], row["step"]), {}).update(row)
    phases: dict[str, list[dict[str, Any]]] = {}
    for (phase, _), row in sorted(rows.items(), key=lambda item: item[0][1]):
        phases.setdefault(phase, []).append(row)
    return phases


def learning_curve(metrics_path: Path, out_path: Path) -> None:
    """Draw held-out accuracy and reward over the steps of each phase, with losses, length and KL below, to a PNG.

    Keys that were not logged are left out. Raises ValueError when nothing that it draws was logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = read_metrics(metrics_path)
    phases = [phase for phase in TITLES if phase in logged]
    if not phases:
        raise ValueError(f"{metrics_path} holds no step of {', '.join(TITLES)}: nothing to draw")
    figure = Figure(figsize=(10, 6.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2,
        len(phases),
        squeeze=False,
        sharex="col",
        gridspec_kw={"height_ratios": [2.4, 1], "width_ratios": [1 if phase == SUPERVISED else 2 for phase in phases]},
    )
    for column, phase in enumerate(phases):
        above, below = axes[0, column], axes[1, column]
        _draw_accuracy(above, logged[phase], TITLES[phase] if len(phases) > 1 or phase != SUPERVISED else ALONE)
        _draw_details(below, logged[phase])
        below.set_xlabel("step")
        first, last = logged[phase][0]["step"], logged[phase][-1]["step"]
        margin = 0.08 * max(1, last - first)  # room for the figures at both ends
        below.set_xlim(first - margin, last + margin)
    lows, highs = zip(*(above.get_ylim() for above in axes[0]), strict=True)
    for above in axes[0]:
        above.set_ylim(min(lows), max(highs))
    axes[0, 0].set_ylabel("held-out accuracy, mean reward")
    _title(figure, logged)
    figure.savefig(out_path)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps that logged a number under this key, and the numbers."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """Average over a trailing window of a tenth of the run."""
    window = max(1, len(values) // 10)
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def _draw_accuracy(axes: Axes, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    from matplotlib.patheffects import withStroke

    axes.set_title(title, loc="left", fontsize=11, color=GREY)
    steps, reward = _series(rows, "reward")
    if steps:
        axes.plot(steps, reward, color=ORANGE, alpha=0.3, linewidth=1)
        axes.plot(steps, _smooth(reward), color=ORANGE, linewidth=1.8, label="reward on training tasks")
    steps, accuracy = _series(rows, "heldout_accuracy")
    if steps:
        axes.plot(steps, accuracy, color=BLUE, linewidth=2.5, marker="o", markersize=5, label="held-out accuracy")
        for step, share, shift in ((steps[0], accuracy[0], -9), (steps[-1], accuracy[-1], 0))[-len(steps) :]:
            axes.annotate(
                f"{share:.0%}",
                (step, share),
                xytext=(shift, 9),
                textcoords="offset points",
                ha="center",
                color=BLUE,
                fontweight="bold",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    low, high = axes.get_ylim() if reward or accuracy else (0.0, 1.0)
    axes.set_ylim(min(0.0, low), max(1.08, high))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=False)


def _draw_details(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw response length and KL where there is any, each on its own axis; else the losses, as of a warm-up."""
    length = ("response tokens", GREEN, *_series(rows, "response_tokens"))
    kl = ("KL to the reference", GREY, *_series(rows, "kl"))
    drawn = [curve for curve in (length, kl) if any(abs(value) > NEGLIGIBLE for value in curve[-1])]
    loss = ("loss", GREY, *_series(rows, "loss"))
    drawn = drawn or ([loss] if loss[-1] else [])
    for index, (label, colour, steps, values) in enumerate(drawn):
        panel = axes.twinx() if index else axes
        panel.plot(steps, values, color=colour, linewidth=1.4, linestyle="--" if index else "-")
        panel.set_ylabel(label, color=colour)
        panel.tick_params(axis="y", labelcolor=colour)
        panel.set_ylim(bottom=min(0.0, *values))
    steps, values = _series(rows, "heldout_loss")
    if drawn == [loss] and steps:
        axes.plot(steps, values, color=BLUE, linewidth=1.8, marker="o", markersize=4, label="held-out loss")
        axes.legend(loc="upper right", frameon=False)
    axes.grid(alpha=0.25)
    if not drawn:
        axes.set_yticks([])


def _title(figure: Figure, logged: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Say in one line what reinforcement learning did."""
    for phase in TITLES:
        steps, accuracy = _series(logged.get(phase, ()), "heldout_accuracy")
        if len(steps) > 1 and phase != SUPERVISED:
            text = f"{TITLES[phase]}: held-out accuracy {accuracy[0]:.0%} → {accuracy[-1]:.0%} in {steps[-1]} steps"
            figure.suptitle(text, fontsize=14, fontweight="bold", x=0.01, ha="left")
            return
