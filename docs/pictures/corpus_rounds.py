"""Steps of the corpus, and the loop of a round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from style import MARK, QUIET, ROLLOUT, SCORE, UPDATE, arrow, box, canvas, save, step, text

WIDTH, HEIGHT, GAP = 1.95, 1.05, 0.3


def draw_row(
    axes: Axes, left: float, y: float, steps: Sequence[tuple[str, str, str]], colour: str, height: float = HEIGHT
) -> None:
    """Draw steps (title, words, file) from left to right, with an arrow between neighbours."""
    for index, (title, words, file) in enumerate(steps):
        x = left + index * (WIDTH + GAP)
        step(axes, x, y, WIDTH, height, colour, title, words, file)
        if index:
            arrow(axes, (x - GAP, y + HEIGHT / 2), (x, y + HEIGHT / 2))


def draw(path: Path) -> None:
    """Draw the straight line above, the rounds below it, the end below those."""
    figure, axes = canvas(11.8, 6.3)
    left, top = 0.35, 5.0
    before = (
        ("extract", "WARC and WET files to\ntext, mathematics as LaTeX", "text/extract.py"),
        ("dedup", "one page of each URL, text\nand near-duplicate group", "cleaning/dedup.py"),
    )
    draw_row(axes, left, top, before, ROLLOUT)
    right = left + 2 * (WIDTH + GAP) + 0.1
    text(axes, right, top + 0.75, "40 billion pages in the paper.", ha="left", fontsize=9)
    words = (
        "A step is a list of tasks, one per shard; a task is done\n"
        "when its counts file exists, so a killed run resumes."
    )
    text(axes, right, top + 0.36, words, ha="left", fontsize=9, linespacing=1.4)

    box(axes, left - 0.15, 1.75, 11.4, 2.85, "#fafafa", ls="--")
    text(axes, left, 4.38, "rounds: four in the paper", ha="left", fontsize=11, weight="bold")
    text(axes, 11.45, 4.38, "mining/rounds.py", ha="right", fontsize=8, color=QUIET, family="monospace")
    loop = (
        ("examples", "positives: seed, annotated\npages; negatives: random", "mining/round_steps.py"),
        ("train", "fastText on BPE tokens,\nfolded to one number\nper feature", "mining/classifier.py"),
        ("score", "log-odds of every page", "mining/round_steps.py"),
        ("cut", "radix selection: best\npages within a budget\nof tokens", "mining/select.py"),
        ("domains", "sites of which more than\n10 % was collected", "mining/domains.py"),
    )
    y = 3.05
    draw_row(axes, left, y, loop, SCORE, HEIGHT + 0.1)
    arrow(axes, (left + 1.5 * WIDTH + GAP, top), (left + 1.5 * WIDTH + GAP, 4.62))
    last, y_annotate = left + 4 * (WIDTH + GAP), 1.9
    annotate = ("annotate", "a person in a browser, or rules", "mining/annotate.py")
    step(axes, last - 0.55, y_annotate, WIDTH + 0.55, 0.88, UPDATE, *annotate)
    arrow(axes, (last + WIDTH / 2, y), (last + WIDTH / 2, y_annotate + 0.9))
    style = {"color": MARK, "lw": 1.6}
    arrow(
        axes,
        (last - 0.58, y_annotate + 0.45),
        (left + WIDTH / 2, y),
        connectionstyle="angle,angleA=0,angleB=90,rad=8",
        **style,
    )
    words = "pages under annotated prefixes that were missed become positives of the next round"
    text(axes, left + WIDTH / 2 + 0.15, y_annotate + 0.62, words, ha="left", fontsize=8.5, color=MARK)

    after = (
        ("decontaminate", "no page with 10 words in a\nrow of a benchmark", "cleaning/decontaminate.py"),
        ("tokenise", "Megatron's indexed dataset\nand a manifest", "tokenise.py"),
    )
    draw_row(axes, left + 3 * (WIDTH + GAP), 0.3, after, ROLLOUT)
    x = left + 3.2 * (WIDTH + GAP)
    arrow(axes, (x, y), (x, 0.3 + HEIGHT))
    text(axes, x - 0.1, 1.55, "collected pages of the last round", ha="right", fontsize=8.5)
    save(figure, path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
