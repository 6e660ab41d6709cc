"""NaN in a row that counts reaches loss, gradient and statistics; in a row of weight 0 it reaches nothing.

Tested on the op, which C++ or Triton serves, and on the reference in plain PyTorch. T loss rows, S responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from cases import Rows, make_rows, offsets
from torch import Tensor

from triton_kernels import Objective, group_advantage, group_grpo_loss
from triton_kernels._register import OPS
from triton_kernels.policy.group_advantage import Scale, group_advantage_reference
from triton_kernels.policy.grpo_loss import grpo_loss_reference
from triton_kernels.policy.objective import KL, objective_arguments

LENGTHS = [5, 0, 4, 3]
ROW, RESPONSE = 6, slice(5, 9)
"""A row that counts, and the rows of its response."""

Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]
LOSSES = {"op": lambda *args: OPS["grpo_loss"](*args), "reference": grpo_loss_reference}
# Each in the middle of its range, clipped, or at a bound: NaN must not be taken for "clipped".
OBJECTIVES = [
    Objective(),
    Objective(ratio="sequence"),
    Objective(surrogate="cispo"),
    Objective(surrogate="cispo", ratio="sequence"),
    Objective(dual_clip=3.0),
    Objective(delta=4.0),
]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.surrogate}-{o.ratio}-{o.dual_clip}-{o.delta}")
@pytest.mark.parametrize("field", ["logprob_T", "old_logprob_T", "ref_logprob_T", "advantage_T"])
def test_nan_in_a_row_that_counts(field: str, objective: Objective, loss: Loss, device: torch.device) -> None:
    rows = make_rows(LENGTHS, device)
    getattr(rows, field)[ROW] = torch.nan
    assert rows.weight_T[ROW] != 0
    value, gradient_T, stats_N = loss(*rows.args(), *objective_arguments(objective))
    whole_response = objective.ratio == "sequence" and (field != "advantage_T" or objective.surrogate == "clip")
    expected_T = torch.zeros(len(gradient_T), dtype=torch.bool, device=device)
    expected_T[RESPONSE if whole_response and field != "ref_logprob_T" else ROW] = True
    assert value.isnan()
    assert torch.equal(gradient_T.isnan(), expected_T & (rows.weight_T != 0))
    tokens, weight, kl, log_ratio, ratio, low, high, entropy, maximum, minimum = stats_N.isnan().tolist()
    of_ratio = field in ("logprob_T", "old_logprob_T")
    assert (tokens, weight, entropy) == (False, False, False)
    assert kl == (field in ("logprob_T", "ref_logprob_T"))
    assert log_ratio == ratio == maximum == minimum == of_ratio
    assert low == high == (of_ratio or field == "advantage_T")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("kl", get_args(KL))
def test_nan_of_the_reference_model_reaches_the_gradient_of_every_estimator(
    kl: KL, loss: Loss, device: torch.device
) -> None:
    rows = make_rows(LENGTHS, device)
    assert rows.ref_logprob_T is not None
    rows.ref_logprob_T[ROW] = torch.nan
    value, gradient_T, _ = loss(*rows.args(), *objective_arguments(Objective(kl=kl)))
    assert value.isnan() and gradient_T.isnan().nonzero().tolist() == [[ROW]]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_nan_on_policy(loss: Loss, device: torch.device) -> None:
    rows = replace(make_rows(LENGTHS, device), old_logprob_T=None)
    rows.logprob_T[ROW] = torch.nan
    value, gradient_T, stats_N = loss(*rows.args(), *objective_arguments(Objective()))
    assert value.isnan() and gradient_T.isnan().nonzero().tolist() == [[ROW]] and stats_N[-2:].isnan().all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=lambda o: f"{o.surrogate}-{o.ratio}")
def test_nan_in_rows_of_weight_0_reaches_nothing(objective: Objective, loss: Loss, device: torch.device) -> None:
    dirty = make_rows(LENGTHS, device)
    present_T = dirty.weight_T != 0
    clean = Rows(*(torch.where(present_T, x, 0) for x in dirty.args()[:5]), dirty.response_cu)
    results = [loss(*rows.args(), *objective_arguments(objective)) for rows in (dirty, clean)]
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*results, strict=True))


ADVANTAGES = {"op": group_advantage, "reference": group_advantage_reference}
Advantage = Callable[[Tensor, Tensor, Scale], Tensor]


@pytest.mark.parametrize("advantage", ADVANTAGES.values(), ids=ADVANTAGES)
@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("position", [0, 1, 4])  # first of a group and of the batch; not first; a group of one
def test_nan_reward_makes_its_group_nan_and_with_batch_all(
    position: int, scale: Scale, advantage: Advantage, device: torch.device
) -> None:
    reward_S = torch.tensor([1.0, 0.0, 2.0, 5.0, 3.0, 4.0, 4.0], device=device)
    reward_S[position] = torch.nan
    sizes = [2, 2, 1, 2]
    nan_S = advantage(reward_S, offsets(sizes, device), scale).isnan()
    group_S = torch.arange(4, device=device).repeat_interleave(torch.tensor(sizes, device=device))
    assert torch.equal(nan_S, torch.ones_like(nan_S) if scale == "batch" else group_S == group_S[position])


@pytest.mark.parametrize("advantage", ADVANTAGES.values(), ids=ADVANTAGES)
@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("reward", [0.1, float("inf"), float("-inf")])
def test_groups_of_equal_rewards_give_exactly_0(
    reward: float, scale: Scale, advantage: Advantage, device: torch.device
) -> None:
    reward_S = torch.full((6,), reward, device=device)
    assert torch.equal(advantage(reward_S, offsets([3, 1, 2], device), scale), torch.zeros(6, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_reward_reaches_loss_and_gradient(dtype: torch.dtype, device: torch.device) -> None:
    rows = make_rows(LENGTHS, device).to(dtype)
    leaf_T = rows.logprob_T.requires_grad_()
    reward_S = torch.tensor([1.0, 0.0, torch.nan, 2.0], device=device)
    of_loss = (leaf_T, rows.old_logprob_T, rows.ref_logprob_T, reward_S, rows.weight_T, rows.response_cu)
    output = group_grpo_loss(*of_loss, offsets([2, 2], device), Objective())
    output.loss.backward()
    assert leaf_T.grad is not None and output.loss.isnan() and output.stats.sums.isnan().any()
    second_group_T = torch.arange(len(leaf_T), device=device) >= 5
    assert torch.equal(leaf_T.grad.isnan(), second_group_T & (rows.weight_T != 0))
