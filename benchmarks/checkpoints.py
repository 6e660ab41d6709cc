"""Cost of checkpoints: blocks of a run's steps that begin with one and that do not, in turn, in one run.

python -m benchmarks.checkpoints --config recipes/quickstart.yaml eval.every=0 run.out=runs/cost

takes a recipe of grpo and key=value as `dsm-train grpo` does. A block is 10 steps. It counts the CPU seconds of the
whole process, so those of the thread that writes as well, and the wall seconds; the rest of a loop is left out. The row
on the last line has, for each loop, medians of both kinds of blocks, the cost as a share of a block without, and the
time that training waited for a checkpoint (`stall_seconds`, median); `cost_share` beside them is the whole run's, had
each of its blocks begun with a checkpoint. With --jsonl FILE the row is appended there, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as dsm-train has it, before torch is imported

import torch

from benchmarks.report import environment
from dsm_train import run
from dsm_train.__main__ import main as dsm_train
from dsm_train.checkpoint.keeper import Keeper
from dsm_train.megatron import platform

STEPS = 10
"""Steps of a block: a checkpoint at every = 10."""


@dataclass(frozen=True)
class Block:
    """Some steps of a loop, and what they took."""

    loop: str
    with_checkpoint: bool
    cpu_seconds: float
    wall_seconds: float
    stall_seconds: float


class Alternating(Keeper):
    """Keeper that writes a checkpoint at the begin of every other block."""

    _begun: tuple[float, float, float, bool] | None = None

    def after(self, step: int, values: Mapping[str, float]) -> None:
        """End a block and begin the next."""
        block, within = divmod(step, STEPS)
        if within == 0:
            now = time.process_time(), time.perf_counter(), self.kept.stall_seconds
            if self._begun is not None:
                *before, written = self._begun
                spent = (b - a for a, b in zip(before, now, strict=True))
                BLOCKS.append(Block(self._label, written, *spent))
            self._begun = *now, block % 2 == 1
            if block % 2:
                self._save(step, values)
        elif within == STEPS - 1:
            self._finish()  # within its block
        if step == self._steps:
            self._finish()
            self._base, self._begun = self._base + step, None


BLOCKS: list[Block] = []


def summary(loop: str, blocks: Sequence[Block]) -> dict[str, Any]:
    """Compare the two kinds of blocks of a loop."""
    kinds = {kind: [b for b in blocks if b.loop == loop and b.with_checkpoint == kind] for kind in (True, False)}
    cpu = {kind: median(b.cpu_seconds for b in kinds[kind]) for kind in kinds}
    return {
        "blocks": len(kinds[True]),
        "cpu_seconds_with": round(cpu[True], 4),
        "cpu_seconds_without": round(cpu[False], 4),
        "cost_share": round(cpu[True] / cpu[False] - 1, 4),
        "wall_seconds_with": round(median(b.wall_seconds for b in kinds[True]), 4),
        "wall_seconds_without": round(median(b.wall_seconds for b in kinds[False]), 4),
        "stall_seconds": round(median(b.stall_seconds for b in kinds[True]), 4),
    }


def main(arguments: Sequence[str]) -> None:
    """Run the recipe with blocks of both kinds, and print what they took."""
    arguments, file = list(arguments), None
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    if "--jsonl" in arguments:
        at = arguments.index("--jsonl")
        file = Path(arguments[at + 1])
        del arguments[at : at + 2]
    run.Keeper = Alternating
    dsm_train(["grpo", *arguments])
    row: dict[str, Any] = {loop: summary(loop, BLOCKS) for loop in dict.fromkeys(block.loop for block in BLOCKS)}
    blocks = {loop: sum(block.loop == loop for block in BLOCKS) for loop in row}
    spent = {kind: sum(blocks[loop] * row[loop][f"cpu_seconds_{kind}"] for loop in row) for kind in ("with", "without")}
    row["cost_share"] = round(spent["with"] / spent["without"] - 1, 4)
    row |= {"command": arguments, **environment(torch.device(platform.device().type))}
    text = json.dumps(row)
    print(text)
    if file is not None:
        with file.open("a") as rows:
            rows.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
