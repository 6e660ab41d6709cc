"""Configuration of sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsm_train.config import at_least, require


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    temperature: float = 1.0
    """Sampling temperature; the trainer's log-probabilities use the same. 0 is greedy (evaluation only)."""
    top_p: float = 1.0
    """Sample among the fewest tokens with this probability; log-probabilities stay those of the full distribution."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all. Log-probabilities stay those of the full distribution."""
    max_new_tokens: int = 512
    """Longest response, in tokens."""
    batch: int = 1024
    """Responses that are decoded together on a rank (whole groups): bounds the memory of the cache."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature < math.inf, "temperature", "at least 0 and finite", self.temperature)
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        at_least(0, self, "top_k")
        at_least(1, self, "max_new_tokens", "batch")

    def notes(self) -> list[str]:
        """List what a user should know at start: that truncated sampling is off the trained policy."""
        cut = [
            f"{name} = {value}"
            for name, value, off in (("top_p", self.top_p, 1), ("top_k", self.top_k, 0))
            if value != off
        ]
        if not cut or self.temperature == 0:
            return []
        return [
            f"sampling.{' and sampling.'.join(cut)}: tokens are sampled from a truncated distribution, and recorded "
            "with log-probabilities of the full one, as the trainer computes them"
        ]
