"""The policy-gradient objective as data: every member of the GRPO family is one `Objective`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from triton_kernels._checks import check_choice, check_number

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
    """The importance ratio is clipped below at 1 - clip_low; 1 is no bound."""
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
            check_choice(name, getattr(self, name), get_args(choices))
        check_number("clip_low", self.clip_low, at_least=0, at_most=1)  # a ratio is never below 0
        check_number("clip_high", self.clip_high, at_least=0)
        check_number("kl_coef", self.kl_coef, at_least=0)
        check_number("dual_clip", self.dual_clip, above=1, optional=True)
        check_number("delta", self.delta, above=1, optional=True)
        check_number("tis_clip", self.tis_clip, above=0, optional=True)
        check_number("entropy_coef", self.entropy_coef)
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(f"delta must be above 1 + clip_high = {1 + self.clip_high}; got {self.delta}")
        if self.dual_clip is not None and self.delta is not None:
            raise ValueError("dual_clip and delta both bound large ratios; give one of them")
        if self.surrogate == "cispo" and (self.dual_clip is not None or self.delta is not None):
            raise ValueError("cispo has no dual_clip and no delta: its ratio is clipped already")


def _schema_type(hint: Any) -> str:
    """Type of a field in the schema of a registered op."""
    if get_origin(hint) is Literal:
        return "str"
    return {float: "float", float | None: "float?"}[hint]


_FIELDS = get_type_hints(Objective)
OBJECTIVE_SCHEMA = ", ".join(f"{_schema_type(hint)} {name}" for name, hint in _FIELDS.items())
"""The fields as arguments of a registered op, in their order. csrc/policy/policy_loss.h has the same types."""


def objective_arguments(objective: Objective) -> tuple[Any, ...]:
    """The fields as a registered op takes them; `Objective(*arguments)` is the way back."""
    return tuple(getattr(objective, name) for name in _FIELDS)


def check_objective(objective: object) -> None:
    """Raise `ValueError` unless this is an `Objective`."""
    if not isinstance(objective, Objective):
        kind = type(objective).__name__
        raise ValueError(f"objective must be an Objective; got {kind}: write Objective(kl_coef=0.0, ...)")
