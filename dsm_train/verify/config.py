"""Configuration of the verification."""

from __future__ import annotations

from dataclasses import dataclass

from dsm_train.config import at_least


@dataclass(frozen=True)
class VerifyConfig:
    """Extent of the verification."""

    steps: int = 1
    """Exploration stages that are replayed, each of minibatches x epochs optimizer steps; moments and schedules show
    from the second optimizer step on."""

    def __post_init__(self) -> None:
        at_least(1, self, "steps")
