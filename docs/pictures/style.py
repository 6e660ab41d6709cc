"""Shapes and colours that the pictures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PROMPT, RESPONSES = "#c6d3e3", ("#f6b26b", "#93c47d", "#b4a7d6", "#e6a0b4")
ROLLOUT, SCORE, UPDATE, NEUTRAL = "#dbe9f6", "#fde5cd", "#dcefd8", "#eeeeee"
INK, QUIET, MARK = "#222222", "#707070", "#c0392b"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Figure with one axis in units of inches, without frame."""
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, facecolor="white")


def text(axes: Axes, x: float, y: float, words: str, **options: Any) -> None:
    """Words at a place; centred, unless `ha` and `va` say otherwise."""
    axes.text(x, y, words, **({"ha": "center", "va": "center", "fontsize": 9, "color": INK} | options))


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, **options: Any) -> None:
    """Rounded box with its lower left corner at (x, y)."""
    shape = f"round,pad=0,rounding_size={min(0.08, height / 4)}"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=shape, fc=color, **({"ec": QUIET, "lw": 0.8} | options))
    )


def cell(
    axes: Axes, x: float, y: float, width: float, height: float, color: str, words: str = "", **options: Any
) -> None:
    """Rectangle with words in its middle."""
    axes.add_patch(Rectangle((x, y), width, height, fc=color, ec="white", lw=1.2))
    text(axes, x + width / 2, y + height / 2, words, **options)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **options: Any) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": QUIET, "lw": 1.1, "shrinkA": 0, "shrinkB": 0} | options
    axes.add_patch(FancyArrowPatch(start, end, **style))


def step(
    axes: Axes, x: float, y: float, width: float, height: float, color: str, title: str, words: str, file: str
) -> None:
    """Box of a flow: title, what happens, and the file where it does."""
    box(axes, x, y, width, height, color)
    text(axes, x + 0.1, y + height - 0.19, title, ha="left", fontsize=9.5, weight="bold")
    text(axes, x + 0.1, y + height - 0.36, words, ha="left", va="top", fontsize=8, linespacing=1.35)
    text(axes, x + 0.1, y + 0.14, file, ha="left", fontsize=7.2, color=QUIET, family="monospace")
