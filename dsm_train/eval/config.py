"""Configuration of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from dsm_train.config import at_least


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out tasks; rewards.unfinished says how it takes responses that were cut off."""

    every: int = 0
    """Evaluate every so many steps (greedy accuracy); 0: only before and after."""
    tasks: int | None = None
    """Evaluate on this many held-out tasks during training; none: on all."""
    samples: int = 0
    """Samples per task for pass@k at the end; 0: greedy accuracy alone."""

    def __post_init__(self) -> None:
        at_least(0, self, "every", "samples")
        at_least(1, self, "tasks")
