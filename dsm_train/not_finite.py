"""Optimizer steps that were not made, as loss or gradient was not finite: recorded, said, and in the end a stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsm_train.cli.errors import NOT_FINITE, Ended
from dsm_train.megatron.step import TrainableModel
from dsm_train.rollout.record import SupervisedBatch, write_rollouts, write_supervised
from dsm_train.types import Rollouts
from dsm_train.update import StepResult

MOST_FILES = 3
"""Batches that a run that skips keeps: they may be large, and the first ones tell as much as all."""


class NotFinite(Ended):
    """A loss or gradient that is not finite, where training stops; every rank raises it, with a line to print."""

    def __init__(self, line: str) -> None:
        super().__init__(NOT_FINITE, line)


@dataclass(frozen=True)
class Guard:
    """Watches over the optimizer steps of a loop."""

    model: TrainableModel
    out: Path
    """Folder for the batches of steps that were not made."""
    label: str
    """The loop, such as "grpo"."""
    key: str
    """The configuration's key that chose between stop and skip."""

    def check(
        self, step: int, results: Sequence[StepResult], batch: Rollouts | SupervisedBatch, say: Callable[[str], None]
    ) -> None:
        """Record and say what was not finite in step `step` (from 0) of the loop, if anything was. Collective.

        The batch goes to not-finite-LABEL-STEP.parquet: rollouts of this replica, or a supervised batch of all.
        Raises `NotFinite` on every rank when the model gives up.
        """
        model, bad = self.model, [result for result in results if not result.is_finite]
        if not bad:
            return
        what, number = _what(bad[0]), step + 1
        # All wait for the main rank's file: the first rank that ends of an error ends the others.
        kept = model.parallel.from_main(self._keep(self.out / f"not-finite-{self.label}-{number}.parquet", batch))
        if not model.gives_up:
            steps = "optimizer step is" if len(bad) == 1 else "optimizer steps are"
            say(f"step {number}: {what}, so that {len(bad)} {steps} skipped; {kept}")
            return
        where = f"step {number} of {self.label} (optimizer step {model.steps + 1})"
        if model.optim.not_finite == "skip":
            raise NotFinite(
                f"{where}: {what}, the {model.skipped}th in a row that is skipped, so that no batch will be learnt any "
                f"more: start again from earlier weights, with a smaller learning rate; {kept}"
            )
        raise NotFinite(f"{where}: {what}, and the weights are as before it: {self.key}=skip leaves it out; {kept}")

    def _keep(self, path: Path, batch: Rollouts | SupervisedBatch) -> str:
        """Record the batch, unless the run has kept enough; returns where it is, in the main rank's words."""
        parallel = self.model.parallel
        others = len({*path.parent.glob("not-finite-*.parquet")} - {path}) if parallel.is_main else 0
        if self.model.optim.not_finite == "skip" and parallel.from_main(others) >= MOST_FILES:
            return f"the batch is not recorded, as {path.parent} has {MOST_FILES} such ones"
        try:
            if isinstance(batch, Rollouts):
                write_rollouts(path, batch, parallel)
            elif parallel.is_main:
                write_supervised(path, batch)
        except OSError as error:  # on the main rank, of a full disk: the line matters more than the file
            return f"the batch could not be written to {path}: {error.strerror or error}"
        return f"look for the cause with dsm-train verify-step --batch {path} and this configuration"


def _what(result: StepResult) -> str:
    """Name what is not finite."""
    values = {"loss": result.loss, "gradient norm": result.grad_norm}
    return " and ".join(f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value))
