"""Inputs and the tolerance rule that the tests of the loss ops share. T loss rows, S responses, P groups.

The rule: in fp32 within 1e-5 of the fp64 reference, relative to the norm (gradients) or to the sum of the absolute
terms (sums). From bf16 and fp16 at most twice as far from it as the plain reference on the same inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triton_kernels import Objective
from triton_kernels.policy.grpo_loss import grpo_loss_reference, objective_arguments, policy_loss

RTOL = 1e-5

# One row; less than a block with an empty response; one response longer than a block of rows (512).
LENGTHS = ([1], [5, 0, 40, 18], [700, 0, 300])

OBJECTIVES = [
    Objective(surrogate=surrogate, ratio=ratio, kl=kl)
    for surrogate in ("clip", "cispo")
    for ratio in ("token", "sequence")
    for kl in ("k1", "k2", "k3", "k1+", "k3+")
] + [
    replace(bounded, ratio=ratio)
    for bounded in (Objective(dual_clip=1.1), Objective(delta=1.3), Objective(clip_low=0.1, clip_high=0.3, kl_coef=0.0))
    for ratio in ("token", "sequence")
]


def offsets(lengths: list[int], device: torch.device) -> Tensor:
    """[2, 3] gives int32 [0, 2, 5]."""
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


@dataclass(frozen=True)
class Rows:
    """The tensors of a policy loss in the order of its arguments."""

    logprob_T: Tensor
    old_logprob_T: Tensor | None
    ref_logprob_T: Tensor | None
    advantage_T: Tensor
    weight_T: Tensor
    response_cu: Tensor

    def args(self) -> tuple[Tensor | None, ...]:
        """The positional arguments."""
        return tuple(vars(self).values())

    def to(self, dtype: torch.dtype) -> Rows:
        """The same rows with log-probabilities, advantages and weights in `dtype`."""
        return Rows(*(x if x is None or x.dtype == torch.int32 else x.to(dtype) for x in self.args()))


def make_rows(lengths: list[int], device: torch.device, garbage: bool = True, seed: int = 0) -> Rows:
    """Log ratios of about 0.3; with `garbage` every fifth row is absent and holds NaN and infinities."""
    T = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    old_T = -3 * torch.rand(T, generator=generator)
    rows = [old_T + 0.3 * torch.randn(T, generator=generator), old_T, old_T + 0.3 * torch.randn(T, generator=generator)]
    advantage_T, weight_T = torch.randn(T, generator=generator), torch.rand(T, generator=generator) + 0.1
    if garbage:
        absent_T = torch.arange(T) % 5 == 2
        weight_T[absent_T] = 0
        for x_T, value in zip((*rows, advantage_T), (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
            x_T[absent_T] = value
    tensors = [x_T.to(device) for x_T in (*rows, advantage_T, weight_T)]
    return Rows(*tensors, offsets(lengths, device))


def oracle(rows: Rows, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fp64 reference: loss, gradient, statistics, and the sum of the absolute terms of the loss."""
    rows = rows.to(torch.float64)
    arguments = objective_arguments(objective)
    weight_T = rows.weight_T.clone().requires_grad_()
    loss, _ = policy_loss(*replace(rows, weight_T=weight_T).args(), *arguments)
    # The loss is linear in the weights, so its gradient by them holds the terms.
    (term_T,) = torch.autograd.grad(loss, weight_T)
    return *grpo_loss_reference(*rows.args(), *arguments), (rows.weight_T * term_T).abs().sum()


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm of the difference; absolute where `exact` is zero."""
    norm, error = (torch.linalg.vector_norm(y.double()) for y in (exact, x.double() - exact.double()))
    return float(error / norm if norm > 0 else error)


def assert_at_most_twice_as_far(ours: Tensor, reference: Tensor, exact: Tensor) -> None:
    """The rule for half precision; what both may lose to fp32 arithmetic is 1e-5."""
    assert relative_error(ours, exact) <= 2 * relative_error(reference, exact) + RTOL
