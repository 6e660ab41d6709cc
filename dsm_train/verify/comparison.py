"""Comparison of replays in two layouts: loss, gradient norm, every gradient, updated weights; and a table of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsm_train.losses import Stats


@dataclass(frozen=True)
class Step:
    """One optimizer step; tensors are full, by canonical name, on the main rank's CPU."""

    loss: float
    terms: float
    """Sum of the absolute terms of the loss, by which a difference of losses is judged: they may cancel."""
    grad_norm: float
    lr: float
    gradient: dict[str, Tensor]
    before: dict[str, Tensor]
    """Weights before the update."""
    after: dict[str, Tensor]
    """Weights after it."""
    apart: float
    """The largest difference between two ranks' copies of the same gradient or weight; copies are equal to the bit."""
    stats: Stats
    num_responses: int
    num_tokens: int
    near_edge: int
    """Number of tokens whose ratio is so close to where it clips that rounding may decide."""


@dataclass(frozen=True)
class Replayed:
    """The exploration stages that were replayed in one layout, on the main rank."""

    steps: list[Step]
    """Optimizer steps, in order."""
    logprobs: list[dict[str, Tensor]]
    """Old and reference log-probabilities [T] of each exploration stage's batch, as this layout computed them."""


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the difference between two layouts."""

    relative: float
    """Bound on loss, gradient norm and gradients, relative to their sizes."""
    counted: float
    """A weight counts where its gradient is above this share of the tensor's typical one."""
    edge: float
    """A ratio within this of where it clips may fall on either side."""
    update: float = 1e-3
    """Bound on the weights' updates, relative to the largest of a tensor."""

    @property
    def later(self) -> Tolerance:
        """Bounds from the second optimizer step on.

        Adam's first step is the gradient's sign, so that weights whose gradient is rounding alone have moved apart, and
        gradients with them.
        """
        return replace(self, relative=min(100 * self.relative, 0.3), update=10 * self.update)


TOLERANCES = {"fp32": Tolerance(1e-5, 1e-3, 1e-4), "bf16": Tolerance(3e-2, 0.3, 1e-2)}


@dataclass(frozen=True)
class Line:
    """One quantity in both layouts."""

    name: str
    here: float
    there: float
    difference: float
    tolerance: float
    worst: str = ""
    """The weight that differs most."""

    @property
    def holds(self) -> bool:
        """True where the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance


def compare(here: Replayed, there: Replayed, tolerance: Tolerance) -> list[Line]:
    """Compare the log-probabilities of each exploration stage, and each optimizer step; a line per quantity."""
    lines = []
    for number, (ours, theirs) in enumerate(zip(here.logprobs, there.logprobs, strict=True), start=1):
        of_stage = f" of stage {number}" if len(here.logprobs) > 1 else ""
        bound = (tolerance if number == 1 else tolerance.later).relative
        for name, logprob_T in theirs.items():
            difference = ((ours[name] - logprob_T).abs() / (1 + logprob_T.abs())).max() if len(logprob_T) else 0.0
            mean, other = (float(values.mean()) if len(values) else 0.0 for values in (ours[name], logprob_T))
            lines.append(Line(f"{name} log-probability{of_stage}", mean, other, float(difference), bound))
    for number, (ours, theirs) in enumerate(zip(here.steps, there.steps, strict=True), start=1):
        prefix = f"step {number}: " if len(here.steps) > 1 else ""
        bound = tolerance if number == 1 else tolerance.later
        lines += [replace(line, name=prefix + line.name) for line in compare_step(ours, theirs, bound)]
    return lines


def compare_step(here: Step, there: Step, tolerance: Tolerance) -> list[Line]:
    """Compare one optimizer step; gradients by kind of weight, with the worst tensor of each."""
    assert here.gradient.keys() == there.gradient.keys(), here.gradient.keys() ^ there.gradient.keys()
    limit = tolerance.relative
    lines = [
        Line("loss", here.loss, there.loss, _ratio(abs(here.loss - there.loss), there.terms), limit),
        Line(
            "gradient norm",
            here.grad_norm,
            there.grad_norm,
            _ratio(abs(here.grad_norm - there.grad_norm), there.grad_norm),
            limit,
        ),
    ]
    kinds: dict[str, list[str]] = {}
    for name in there.gradient:
        kinds.setdefault(_kind(name), []).append(name)
    for kind, names in kinds.items():
        differences = {name: gradient_difference(here.gradient[name], there.gradient[name]) for name in names}
        ours, theirs = (float(sum(_norm(step.gradient[name]) ** 2 for name in names)) ** 0.5 for step in (here, there))
        worst = _largest(differences)
        lines.append(Line(f"gradient {kind}", ours, theirs, differences[worst], limit, worst))
    lines.append(Line("learning rate", here.lr, there.lr, abs(here.lr - there.lr), 0.0))
    updates = {name: update_difference(name, here, there, tolerance.counted) for name in there.gradient}
    worst = _largest(updates)
    ours, theirs = (float(_rms(step.after[worst] - step.before[worst])) for step in (here, there))
    lines.append(Line("updated weights", ours, theirs, updates[worst], tolerance.update, worst))
    apart = float(torch.tensor([here.apart, there.apart]).max())  # NaN, if either is
    lines.append(Line("copies on several ranks", here.apart, there.apart, apart, 0.0))
    return lines


def gradient_difference(here: Tensor, there: Tensor) -> float:
    """Relative Frobenius norm of the difference; rows that only pad one layout's vocabulary must be 0."""
    rows = max(len(here), len(there))
    here, there = (_padded(value, rows) for value in (here, there))
    return _ratio(float(_norm(here - there)), float(_norm(there)))


def update_difference(name: str, here: Step, there: Step, counted: float) -> float:
    """Find the largest difference of a weight's update, less its last digit, relative to the largest update.

    Weights count where the gradient is above `counted` of its typical size, or exactly 0 in both: Adam's first step is
    the gradient's sign, and the sign of what should be 0 is rounding.
    """
    rows = min(len(here.after[name]), len(there.after[name]))
    slope, gradient = (step.gradient[name][:rows].double() for step in (here, there))
    matters = (gradient.abs() > counted * _rms(gradient)) | ((slope == 0) & (gradient == 0))
    if not matters.any():
        return 0.0
    ours, theirs = (step.after[name][:rows].double() - step.before[name][:rows].double() for step in (here, there))
    largest = torch.maximum(here.after[name][:rows].abs(), there.after[name][:rows].abs()).double()
    digit = largest * torch.finfo(there.after[name].dtype).eps
    beyond = ((ours - theirs).abs() - digit).clamp(min=0)[matters].max()
    return _ratio(float(beyond), float(theirs[matters].abs().max()))


def table(lines: Sequence[Line], here: Replayed, there: Replayed, here_name: str, there_name: str) -> str:
    """Lay the comparison out for people, ending with its verdict."""
    rows = [["", here_name, there_name, "difference", "tolerance", ""]]
    for line in lines:
        values = [f"{line.here:.6g}", f"{line.there:.6g}", f"{line.difference:.1e}", f"{line.tolerance:.0e}"]
        worst = line.worst if line.difference else ""
        rows.append([line.name, *values, worst if line.holds else f"DIFFERS {worst}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = []
    for name, *values, remark in rows:
        cells = [name.ljust(widths[0]), *(x.rjust(w) for x, w in zip(values, widths[1:-1], strict=True)), remark]
        text.append("  ".join(cells).rstrip())
    first = there.steps[0]
    text.append(
        f"{first.num_responses} responses, {first.num_tokens} tokens; {_shares(first.stats)}"
        f"sum of the loss's absolute terms {first.terms:.6g}"
    )
    if near := max(step.near_edge for step in (*here.steps, *there.steps)):
        text.append(f"{near} tokens have a ratio at the very edge of the clip range, where rounding decides")
    wrong = [line.name for line in lines if not line.holds]
    text.append(
        f"FAIL: {', '.join(wrong)}"
        if wrong
        else f"PASS: the same step{'s' if len(there.steps) > 1 else ''} as {there_name}"
    )
    return "\n".join(text)


def _shares(stats: Stats) -> str:
    """Statistics of the policy loss, in words; "" for the supervised one."""
    if "kl" not in stats.sums:
        return ""
    share = {name: stats.mean(name) for name in ("clipped_low", "clipped_high", "kl", "entropy")}
    return (
        f"clipped {share['clipped_low']:.1%} low, {share['clipped_high']:.1%} high; KL {share['kl']:.4g}, "
        f"entropy {share['entropy']:.4g}; "
    )


def _kind(name: str) -> str:
    """A weight's name without its layer: one class of parameters."""
    return re.sub(r"^decoder\.(layers\.\d+\.)?", "", name).removesuffix(".weight")


def _norm(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value, dtype=torch.float64)


def _rms(value: Tensor) -> Tensor:
    return _norm(value) / max(1, value.numel()) ** 0.5


def _ratio(difference: float, size: float) -> float:
    """difference / size; 0 where there is no difference, infinity where there is one of nothing."""
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def _largest(differences: dict[str, float]) -> str:
    """The name of the largest difference; NaN is larger than any."""
    return max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))


def _padded(value: Tensor, rows: int) -> Tensor:
    return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])
