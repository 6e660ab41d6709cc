"""The output head without logits: a chunk of rows at a time, its gradient written over its logits."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from style import INK, MARK, NEUTRAL, PROMPT, QUIET, RESPONSES, SCORE, UPDATE, arrow, box, canvas, cell, save, text

ROWS, VOCABULARY, CHUNK = 8192, 151936, 2**31
"""Shape of the figures: rows of a micro-batch, an 8B model's head, a workspace of 2 GiB."""


def draw(path: Path) -> None:
    """Left: all logits. Right: the five steps of a chunk."""
    logits, chunk = 4 * ROWS * VOCABULARY / 2**30, CHUNK // (4 * VOCABULARY)
    figure, axes = canvas(11.6, 4.6)
    text(axes, 0.4, 4.3, "The usual way", ha="left", fontsize=11, weight="bold")
    cell(axes, 0.4, 1.3, 0.3, 2.6, PROMPT, "hidden", rotation=90, fontsize=8)
    cell(axes, 0.9, 1.3, 2.1, 2.6, "#f2d5d1", "")
    text(axes, 1.95, 2.75, "logits  T x V", fontsize=10, weight="bold", color=MARK)
    text(axes, 1.95, 2.4, f"{ROWS:,} x {VOCABULARY:,}", fontsize=9)
    text(axes, 1.95, 2.1, f"{logits:.1f} GiB in fp32,", fontsize=9)
    text(axes, 1.95, 1.85, "and once more for", fontsize=9)
    text(axes, 1.95, 1.6, "their gradient", fontsize=9)
    text(axes, 0.4, 1.05, "stored from forward to backward", ha="left", fontsize=8.5, color=QUIET)
    draw_chunk(axes, 3.7, chunk)
    save(figure, path)


def draw_chunk(axes: Axes, x: float, chunk: int) -> None:
    """Draw the five steps on a chunk of rows; `chunk`: rows that a workspace of 2 GiB holds."""
    text(
        axes,
        x,
        4.3,
        "linear_grpo_loss: one chunk of rows after the other, in a workspace",
        ha="left",
        fontsize=11,
        weight="bold",
    )
    cell(axes, x, 1.3, 0.3, 2.6, PROMPT)
    cell(axes, x, 3.3, 0.3, 0.6, RESPONSES[0], "C", fontsize=8)
    text(axes, x + 0.15, 1.12, "hidden", fontsize=8, color=QUIET)
    steps = (
        ("1  GEMM", "logits of C rows,\nfp32 from bf16", "C x V in the\nworkspace", "logits"),
        ("2  statistics", "max, sum, target,\nentropy per row", "C x 4, merged over\ntensor-parallel ranks", None),
        ("3  objective", "ratio, clip, KL in\nclosed form: dloss\nby each logprob", "C x 2", None),
        ("4  gradient", "written over the\nlogits, rounded once", "C x V, the same\nmemory", "gradient"),
        ("5  two GEMMs", "dhidden of the chunk,\ndweight summed in\nfp32 over chunks", "C x D and V x D", None),
    )
    width, gap, top = 1.34, 0.15, 3.9
    for index, (title, words, kept, memory) in enumerate(steps):
        left = x + 0.5 + index * (width + gap)
        box(axes, left, 2.55, width, top - 2.55, UPDATE if index in (0, 4) else SCORE)
        text(axes, left + 0.09, top - 0.2, title, ha="left", fontsize=9, weight="bold")
        text(axes, left + 0.09, top - 0.42, words, ha="left", va="top", fontsize=8, linespacing=1.4)
        box(axes, left, 1.3, width, 1.0, NEUTRAL if memory is None else RESPONSES[0], ec="none")
        text(axes, left + width / 2, 1.8, kept, fontsize=8, color=INK, linespacing=1.4)
        if index:
            arrow(axes, (left - gap, 3.25), (left, 3.25))
    names = "Workspace set by workspace_bytes, independent of T x V: "
    text(axes, x + 0.5, 0.95, f"{names}2 GiB hold {chunk:,} of these rows.", ha="left", fontsize=8.5)
    text(
        axes,
        x + 0.5,
        0.68,
        "Three GEMMs in all, which nobody can avoid; with a ratio per token no logit is computed twice.",
        ha="left",
        fontsize=8.5,
    )
    text(
        axes,
        x + 0.5,
        0.41,
        "All of it in the forward pass: the backward pass multiplies by the factor from above.",
        ha="left",
        fontsize=8.5,
    )


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
