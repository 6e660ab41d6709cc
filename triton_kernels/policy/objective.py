"""The policy-gradient objective as data: every member of the GRPO family is one `Objective`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

KL = Literal["k1", "k2", "k3", "k1+", "k3+"]
Ratio = Literal["token", "sequence"]
Surrogate = Literal["clip", "cispo"]

LOG_RATIO_LIMIT = 20.0
"""Log ratios are clamped to +-20 before `exp`, so that no term overflows; the gradient beyond is zero."""


@dataclass(frozen=True)
class Objective:
    """loss = - sum_t weight_t * (surrogate_t - kl_coef * kl_t + entropy_coef * entropy_t).

    The defaults are DeepSeekMath's GRPO (arXiv 2402.03300, eq. 3 and 4; the paper gives no clip range, 0.2 is PPO's).
    Raises `ValueError` for values outside their range and for combinations that make no sense.
    """

    clip_low: float = 0.2
    """The importance ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The importance ratio is clipped above at 1 + clip_high."""
    kl_coef: float = 0.04
    """beta: the weight of the KL to the reference model; 0 needs no reference model."""
    kl: KL = "k3"
    """KL estimator; a "+" keeps the value and takes the gradient of k2 (straight-through)."""
    ratio: Ratio = "token"
    """Importance ratio per token (GRPO), or per sequence: exp of the mean log ratio (GSPO, arXiv 2507.18071)."""
    surrogate: Surrogate = "clip"
    """"clip": PPO's min(ratio A, clipped ratio A). "cispo": detached clipped ratio times A log p (arXiv 2506.13585)."""
    dual_clip: float | None = None
    """For A < 0 the surrogate is at least dual_clip * A (arXiv 1912.09729); None: unbounded."""
    delta: float | None = None
    """The unclipped ratio is bounded above by delta (INTELLECT-2, two-sided clipping); None: unbounded."""
    tis_clip: float | None = None
    """Truncated importance sampling of trainer over rollout engine, min(old / rollout, tis_clip); None: off."""
    entropy_coef: float = 0.0
    """The weight of the entropy bonus."""

    def __post_init__(self) -> None:
        for name, choices in (("kl", KL), ("ratio", Ratio), ("surrogate", Surrogate)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {getattr(self, name)!r}")
        for name in ("clip_low", "clip_high", "kl_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        for name in ("dual_clip", "delta"):
            value = getattr(self, name)
            if value is not None and not value > 1:
                raise ValueError(f"{name} must be above 1, or None for off; got {value}")
        if self.tis_clip is not None and not self.tis_clip > 0:
            raise ValueError(f"tis_clip must be above 0, or None for off; got {self.tis_clip}")
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(f"delta must be above 1 + clip_high = {1 + self.clip_high}; got {self.delta}")
        if self.dual_clip is not None and self.delta is not None:
            raise ValueError("dual_clip and delta both bound large ratios; give one of them")
        if self.surrogate == "cispo" and (self.dual_clip is not None or self.delta is not None):
            raise ValueError("cispo has no dual_clip and no delta: its ratio is clipped already")
