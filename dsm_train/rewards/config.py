"""Configuration of rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the parts that make up a response's reward."""

    numeric: float = 1.0
    """Weight of stating the gold answer, exactly."""
    format: float = 0.0
    """Weight of ending in one line "#### number" that states the answer for the only time."""
    unfinished: Literal["zero", "keep"] = "zero"
    """Responses that the length limit cut off earn nothing and count as wrong in evaluation ("#### 12" may be the
    beginning of "#### 125"), or are graded as they stand (keep)."""

    def __post_init__(self) -> None:
        """Refuse weights under which nothing can be learned."""
        for name, weight in (("numeric", self.numeric), ("format", self.format)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} must be a finite weight of at least 0, got {weight}")
        if self.numeric == self.format == 0:
            raise ValueError("numeric and format are both 0: raise one, or nothing can be learned")
