"""Replays whose loss or gradient is not finite: in both layouts, or in one, and where it begins.

NaN is not compared: it would differ from itself, which says nothing of the layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from dsm_train.rollout.record import SupervisedBatch
from dsm_train.types import Rollouts
from dsm_train.verify.comparison import Replayed, Step


def not_finite(
    here: Replayed, there: Replayed, here_name: str, there_name: str, batch: Rollouts | SupervisedBatch
) -> str | None:
    """Describe the first step whose loss or gradient norm is not finite in a layout; None where all are.

    A layout that gave up after it has fewer steps than the other.
    """
    layouts = (here_name, there_name)
    for number, steps in enumerate(zip(here.steps, there.steps, strict=False), start=1):
        bad = [(name, step) for name, step in zip(layouts, steps, strict=True) if not _is_finite(step)]
        if not bad:
            continue
        prefix = f"step {number}: " if len(here.steps) > 1 else ""
        text = [f"{prefix}{name}: {_of_step(step)}" for name, step in bad]
        if broken := _first(steps[1].before):
            text.append(f"weights that are not finite: {broken}")
        text += [f"the batch: {values}" for values in broken_values(batch)]
        if len(bad) == 2:
            where = "in both layouts: look at the batch and the weights"
        else:
            name, other = layouts if _is_finite(steps[1]) else reversed(layouts)
            where = f"in {name} alone, and finite in {other}: look at the layout"
        return "\n".join([*text, f"FAIL: loss or gradient is not finite {where}"])
    return None


def broken_values(batch: Rollouts | SupervisedBatch) -> list[str]:
    """Count the recorded log-probabilities that are not finite, a line per kind that has any."""
    if isinstance(batch, SupervisedBatch):
        return []
    kinds = {"sampled": batch.rollout_logprob_T, "old": batch.old_logprob_T, "reference": batch.ref_logprob_T}
    bad = {name: int((~value_T.isfinite()).sum()) for name, value_T in kinds.items() if value_T is not None}
    total = batch.sequences.response_token_T.numel()
    return [f"{n} of {total} {name} log-probabilities are not finite" for name, n in bad.items() if n]


def _is_finite(step: Step) -> bool:
    return math.isfinite(step.loss) and math.isfinite(step.grad_norm)


def _of_step(step: Step) -> str:
    gradients = _first(step.gradient) or "none, it is their norm that overflows"
    return f"loss {step.loss:.6g}, gradient norm {step.grad_norm:.6g}; gradients that are not finite: {gradients}"


def _first(tensors: Mapping[str, Tensor]) -> str:
    """Count the tensors that are not finite, and name the first, in the model's order; "" where all are finite."""
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    return f"{len(bad)} of {len(tensors)}, the first {bad[0]}" if bad else ""
