"""Configuration of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsm_train.config import above, at_least


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, in run.out/checkpoints: the same command continues from the newest after a kill or a crash.

    Written in the background while training goes on, and at the end of each loop. Without every, every_minutes and
    best none are written.
    """

    every: int | None = None
    """Write one every so many steps."""
    every_minutes: float | None = 10.0
    """Write one when the last is so old, at the end of a step."""
    keep: int = 2
    """Keep so many, the newest ones."""
    best: str | None = None
    """Also write and keep the one of the step with the best value of this metric, such as heldout_accuracy."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of checkpoint.best is the best."""

    def __post_init__(self) -> None:
        at_least(1, self, "every", "keep")
        above(0, self, "every_minutes")

    @property
    def wanted(self) -> bool:
        """True when checkpoints are written at all."""
        return self.every is not None or self.every_minutes is not None or self.best is not None
