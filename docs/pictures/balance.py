"""Cut of a line of responses into parts of even cost, computed by the code that shares work out over replicas."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from style import MARK, PROMPT, QUIET, RESPONSES, canvas, cell, save, text

from dsm_train.packing.cost import Cost, cut_evenly

OWN = (5, 4, 6, 6, 8, 5, 7, 3, 4, 2)
PROMPTS, GROUPS, REPLICAS = (6, 4, 5), (0, 3, 7, 10), 3
UNIT = 0.135


def draw(path: Path) -> None:
    """The line of responses with its cuts above, the shares of the replicas below."""
    cost = Cost(torch.tensor(OWN), torch.tensor(PROMPTS), torch.tensor(GROUPS))
    cuts = cut_evenly(cost, REPLICAS)
    group_S = [group for group, (first, last) in enumerate(pairwise(GROUPS)) for _ in range(first, last)]
    begin, end = cost.sums
    figure, axes = canvas(10.2, 4.3)
    left = 0.4
    text(
        axes, left, 4.05, "Responses of all replicas, in one line: width = cost", ha="left", fontsize=11, weight="bold"
    )
    x, where = left, [left]
    for response, own in enumerate(OWN):
        if response in GROUPS:
            cell(axes, x, 3.3, PROMPTS[group_S[response]] * UNIT, 0.42, PROMPT, "prompt", fontsize=6.5)
            x += PROMPTS[group_S[response]] * UNIT
        cell(axes, x, 3.3, own * UNIT, 0.42, RESPONSES[group_S[response]], str(own), fontsize=8)
        x += own * UNIT
        where.append(x)
    for cut in cuts[1:-1]:
        axes.plot([where[cut]] * 2, [3.12, 3.88], color=MARK, lw=1.8)
        text(axes, where[cut], 3.02, "cut", fontsize=8, color=MARK)

    text(axes, left, 2.6, "Shares of the replicas", ha="left", fontsize=11, weight="bold")
    shares = [end[last] - begin[first] for first, last in pairwise(cuts)]
    for replica, (first, last) in enumerate(pairwise(cuts)):
        x, y = left + 0.85, 2.08 - 0.5 * replica
        text(axes, left, y + 0.18, f"replica {replica}", ha="left", fontsize=9)
        shown: set[int] = set()
        for response in range(first, last):
            group = group_S[response]
            if group not in shown:
                again = response not in GROUPS
                cell(axes, x, y, PROMPTS[group] * UNIT, 0.36, PROMPT, "again" if again else "prompt", fontsize=6.5)
                x += PROMPTS[group] * UNIT
                shown.add(group)
            cell(axes, x, y, OWN[response] * UNIT, 0.36, RESPONSES[group], str(OWN[response]), fontsize=8)
            x += OWN[response] * UNIT
        text(axes, left + 0.95 + max(shares) * UNIT, y + 0.18, f"cost {shares[replica]}", ha="left", fontsize=9)
    limit = left + 0.85 + max(shares) * UNIT
    axes.plot([limit, limit], [1.0, 2.52], color=QUIET, lw=0.9, ls=":")
    words = (
        "Binary search over the largest share; greedy fill tests whether a bound is feasible: the largest share\n"
        "is the least possible. A group that is cut has its prompt in both parts, and that cost is counted.\n"
        "Weights are global already, so moving a response to another replica changes no number."
    )
    text(axes, left, 0.85, words, ha="left", va="top", fontsize=8.5, linespacing=1.45)
    save(figure, path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
