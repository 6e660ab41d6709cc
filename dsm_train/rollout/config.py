"""Configuration of sampling."""

from __future__ import annotations

from dataclasses import dataclass

from dsm_train.config import at_least, require


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    temperature: float = 1.0
    """Sampling temperature; the trainer's log-probabilities use the same. 0 is greedy (evaluation only)."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with at least this probability."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all."""
    max_new_tokens: int = 512
    """Longest response, in tokens."""
    batch: int = 1024
    """Responses that are decoded together on a rank (whole groups): bounds the memory of the cache."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", "at least 0", self.temperature)
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        require(self.top_k >= 0, "top_k", "at least 0", self.top_k)
        at_least(1, self, "max_new_tokens", "batch")
