"""Configuration of rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dsm_train.config import require


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the parts that make up a response's reward."""

    numeric: float = 1.0
    """Weight of stating the gold answer, exactly."""
    format: float = 0.0
    """Weight of ending in one line "#### number" that states the answer for the only time."""
    unfinished: Literal["zero", "mask", "keep"] = "zero"
    """Responses that the length limit cut off: zero (no reward), mask (left out of advantages and loss) or keep (graded
    as they are). Evaluation counts them as wrong, unless they are kept."""

    def __post_init__(self) -> None:
        for name, weight in (("numeric", self.numeric), ("format", self.format)):
            require(0 <= weight < math.inf, name, "a finite weight of at least 0", weight)
        require(self.numeric + self.format > 0, "numeric", "above 0 when format is 0, or nothing can be learned", 0)
