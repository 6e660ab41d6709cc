"""Path of a token through a GRPO step, with the files it passes."""

from __future__ import annotations

from pathlib import Path

from style import ROLLOUT, SCORE, UPDATE, arrow, canvas, save, step, text

WIDTH, HEIGHT, GAP = 2.15, 1.12, 0.27
PHASES = (
    (
        "rollout",
        ROLLOUT,
        (
            ("question", "drawn by (seed, step):\n47+38=", "data/source.py"),
            ("tokens", "prompt as token ids", "data/tokenizer.py"),
            ("prefill, decode", "the model, its layers, the\ncache of keys and values", "rollout/embedded.py"),
            ("sample", "inverse CDF of a counter:\ntoken, rollout_logprob", "rollout/sampling.py"),
        ),
    ),
    (
        "score",
        SCORE,
        (
            ("grade", "reward of each response:\n1 if the answer is 85", "rewards/"),
            ("pack", "[prompt | r1 | ... | rG],\nthe one shift by one", "packing/microbatch.py"),
            ("hidden states", "packed attention, no\npadding, in any layout", "megatron/layers.py"),
            ("log-probabilities", "old_logprob, ref_logprob,\nno logits", "explore.py, linear_logprob"),
        ),
    ),
    (
        "update",
        UPDATE,
        (
            ("advantage, weight", "group-normalised reward;\nshare in the mean", "grpo.py, rows.py"),
            ("balance, pack", "even cost per replica,\nthen micro-batches again", "balance.py, packing/"),
            ("loss", "ratio, clip, KL, gradient\nof the hidden states", "losses.py, linear_grpo_loss"),
            ("optimizer step", "gradients summed over\nranks, clipped, AdamW", "update.py, megatron/step.py"),
        ),
    ),
)


def draw(path: Path) -> None:
    """Three phases from top to bottom, four steps each from left to right."""
    figure, axes = canvas(11.2, 4.85)
    left = 1.25
    for row, (phase, color, steps) in enumerate(PHASES):
        y = 3.45 - row * (HEIGHT + 0.42)
        text(axes, 0.2, y + HEIGHT / 2 + 0.1, phase, ha="left", fontsize=12, weight="bold")
        text(axes, 0.2, y + HEIGHT / 2 - 0.15, "train.py", ha="left", fontsize=7.5, color="#707070", family="monospace")
        for index, (title, words, file) in enumerate(steps):
            x = left + index * (WIDTH + GAP)
            step(axes, x, y, WIDTH, HEIGHT, color, title, words, file)
            if index:
                arrow(axes, (x - GAP, y + HEIGHT / 2), (x, y + HEIGHT / 2))
        if row:
            end = left + 3 * (WIDTH + GAP) + WIDTH / 2
            bend = y + HEIGHT + 0.21
            axes.plot([end, end, left + WIDTH / 2], [y + HEIGHT + 0.42, bend, bend], color="#707070", lw=1.1)
            arrow(axes, (left + WIDTH / 2, bend), (left + WIDTH / 2, y + HEIGHT))
    save(figure, path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
