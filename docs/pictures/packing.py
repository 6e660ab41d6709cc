"""Packing of a group: its prompt once, positions, loss rows and attention; all read off the code that packs."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from style import INK, MARK, PROMPT, QUIET, RESPONSES, canvas, cell, save, text

from dsm_train.packing.microbatch import MicroBatch
from dsm_train.types import Sequences
from triton_kernels import packed_attention

LENGTHS, PROMPT_LENGTH = (3, 4, 2), 5
CELL = 0.36


def draw(path: Path) -> None:
    """Repeated form, packed form with the loss rows, and the mask of the packed form."""
    batch = MicroBatch.of(group(), 0, torch.device("cpu"))
    repeated = sum(PROMPT_LENGTH + length - 1 for length in LENGTHS)
    figure, axes = canvas(11.4, 5.5)
    left = 0.4
    text(axes, left, 5.3, f"Prompts repeated: {repeated} tokens", ha="left", fontsize=11, weight="bold")
    x = left
    for response, length in enumerate(LENGTHS):
        for place in range(PROMPT_LENGTH + length - 1):
            color = PROMPT if place < PROMPT_LENGTH else RESPONSES[response]
            cell(axes, x, 4.7, CELL * 0.87, CELL, color, str(place), fontsize=8)
            x += CELL * 0.87
        x += 0.1

    text(
        axes, left, 4.15, f"Packed: {len(batch.token_N)} tokens, the prompt once", ha="left", fontsize=11, weight="bold"
    )
    owner = owners()
    starts = {name: owner.index(name) for name in dict.fromkeys(owner)}
    for name, start in starts.items():
        label = "prompt" if name < 0 else f"r{name + 1}"
        text(axes, left + (start + owner.count(name) / 2) * CELL, 3.88, label, fontsize=9, color=QUIET)
    for n, position in enumerate(batch.position_N.tolist()):
        cell(axes, left + n * CELL, 3.4, CELL, CELL, color_of(owner[n]), str(position), fontsize=9)
    text(axes, left + len(owner) * CELL + 0.1, 3.58, "position", ha="left", fontsize=8.5, color=QUIET)

    response_T = [s for s, length in enumerate(LENGTHS) for _ in range(length)]
    first = [sum(LENGTHS[:s]) for s in range(len(LENGTHS))]
    shift = left + CELL
    for t, state in enumerate(batch.states.state_T.tolist()):
        shared = owner[state] < 0
        line = {"color": MARK if shared else QUIET, "lw": 1.6 if shared else 0.9}
        axes.plot([left + (state + 0.5) * CELL, shift + (t + 0.5) * CELL], [3.38, 2.2], **line)
        token = t - first[response_T[t]]
        words = f"{'abc'[response_T[t]]}{token + 1}"
        cell(axes, shift + t * CELL, 1.82, CELL, CELL, color_of(response_T[t]), words, fontsize=8.5)
    text(
        axes, shift + len(response_T) * CELL + 0.1, 2.0, "token that is predicted", ha="left", fontsize=8.5, color=QUIET
    )
    text(
        axes, left, 1.42, f"{len(response_T)} loss rows: one per response token", ha="left", fontsize=11, weight="bold"
    )
    words = (
        "The prompt's last state predicts the first token of every response (red);\n"
        "its gradient is the sum of those rows, in a fixed order, in fp32.\n"
        "A response's last token predicts nothing, so it is no input."
    )
    text(axes, left, 1.22, words, ha="left", va="top", fontsize=9, linespacing=1.5)
    mask(axes, batch, owner)
    save(figure, path)


def group() -> Sequences:
    """One prompt with three responses."""
    prompt, words = list(range(PROMPT_LENGTH)), list(range(sum(LENGTHS)))
    return Sequences.from_lists([prompt], [words[:length] for length in LENGTHS], group_size=len(LENGTHS))


def owners() -> list[int]:
    """Response of each packed token; -1 for the prompt."""
    return [-1] * PROMPT_LENGTH + [s for s, length in enumerate(LENGTHS) for _ in range(length - 1)]


def color_of(response: int) -> str:
    return PROMPT if response < 0 else RESPONSES[response]


def mask(axes: Axes, batch: MicroBatch, owner: list[int]) -> None:
    """Tokens that each token sees, read off the attention op: queries and keys of zero see all of them alike."""
    count, head = len(owner), 16
    zero_THK, one_THK = torch.zeros(count, 1, head), torch.eye(count, head)[:, None]
    seen_TT = packed_attention(zero_THK, zero_THK, one_THK, batch.layout)[:, 0, :count] > 0
    size, left, bottom = 0.3, 7.7, 1.0
    text(axes, left, bottom + count * size + 0.3, "Attention: row sees column", ha="left", fontsize=11, weight="bold")
    for query in range(count):
        y = bottom + (count - 1 - query) * size
        for key in range(count):
            color = color_of(owner[key]) if seen_TT[query, key] else "#f7f7f7"
            cell(axes, left + key * size, y, size, size, color)
    text(axes, left, bottom - 0.2, "a response sees the prompt and itself", ha="left", fontsize=9, color=INK)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
