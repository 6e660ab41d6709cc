"""group_grpo_loss against group_advantage and grpo_loss in fp64, one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from cases import OBJECTIVES, RTOL, Rows, make_rows, offsets, oracle, relative_error
from torch import Tensor

from triton_kernels import LossOutput, Objective, group_grpo_loss
from triton_kernels._register import OPS
from triton_kernels.policy.group_advantage import Scale, group_advantage_reference
from triton_kernels.policy.objective import objective_arguments

SCALES = get_args(Scale)


def rewards(S: int, device: torch.device) -> Tensor:
    """Rewards of either sign, the last two equal."""
    reward_S = torch.randn(S, generator=torch.Generator().manual_seed(3))
    reward_S[-2:] = 0.1
    return reward_S.to(device)


def loss_and_gradient(
    rows: Rows, reward_S: Tensor, group_cu: Tensor, objective: Objective, scale: Scale = "std"
) -> tuple[LossOutput, Tensor]:
    """Output and gradient of the op for the rows; their advantage is not used."""
    leaf_T = rows.logprob_T.detach().clone().requires_grad_()
    arguments = (leaf_T, rows.old_logprob_T, rows.ref_logprob_T, reward_S, rows.weight_T, rows.response_cu, group_cu)
    out = group_grpo_loss(*arguments, objective, scale)
    (3 * out.loss).backward()
    return out, leaf_T.grad


def assert_matches_oracle(rows: Rows, sizes: list[int], objective: Objective, scale: Scale) -> None:
    device = rows.logprob_T.device
    reward_S, group_cu = rewards(sum(sizes), device), offsets(sizes, device)
    out, gradient_T = loss_and_gradient(rows, reward_S, group_cu, objective, scale)
    advantage_S = group_advantage_reference(reward_S.double(), group_cu, scale)
    advantage_T = advantage_S.repeat_interleave(rows.response_cu.diff())
    loss, exact_T, stats_N, absolute_terms = oracle(replace(rows, advantage_T=advantage_T), objective)
    assert abs(float(out.loss.detach()) - float(loss)) <= RTOL * float(absolute_terms)
    assert relative_error(gradient_T, 3 * exact_T) <= RTOL
    stats = torch.cat([out.stats.sums, out.stats.maxima, out.stats.minima])
    torch.testing.assert_close(stats.double(), stats_N, rtol=RTOL, atol=RTOL * max(1.0, float(stats_N[0])))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("objective", OBJECTIVES[::6])
def test_every_scale(objective: Objective, scale: Scale, device: torch.device) -> None:
    assert_matches_oracle(make_rows([5, 0, 20, 18], device), [2, 2], objective, scale)


# One group; empty groups at either end and between; groups of one; so many groups that the search takes several steps.
@pytest.mark.parametrize("sizes", [[6], [0, 2, 0, 4, 0], [1, 1, 2, 2], [1, 0, 1, 1, 0, 0, 1, 1, 1]])
def test_every_grouping(sizes: list[int], device: torch.device) -> None:
    assert_matches_oracle(make_rows([3, 4, 0, 2, 1, 5], device), sizes, Objective(), "std")


def test_long_response_and_large_group(device: torch.device) -> None:
    # More rows than a block of 512; more responses in a group than a block of 256, most of them empty.
    assert_matches_oracle(make_rows([700] + [0] * 8 + [30], device), [10], Objective(ratio="sequence"), "std")


@pytest.mark.no_interpret
def test_group_larger_than_a_block(device: torch.device) -> None:
    assert_matches_oracle(make_rows([2] * 300, device), [2, 298], Objective(), "std")


def test_without_old_and_reference(device: torch.device) -> None:
    rows = replace(make_rows([5, 0, 20, 18], device), old_logprob_T=None, ref_logprob_T=None)
    assert_matches_oracle(rows, [2, 2], Objective(kl_coef=0.0), "std")


def test_equal_rewards_leave_only_the_kl(device: torch.device) -> None:
    rows, reward_S = make_rows([5, 3, 4], device), torch.full((3,), 0.1, device=device)
    _, gradient_T = loss_and_gradient(rows, reward_S, offsets([3], device), Objective(kl_coef=0.0))
    assert torch.equal(gradient_T, torch.zeros_like(gradient_T))


def test_no_rows(device: torch.device) -> None:
    empty = torch.zeros(0, device=device)
    out, gradient_T = loss_and_gradient(make_rows([], device), empty, offsets([], device), Objective())
    assert out.loss == 0 and gradient_T.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    # The arithmetic is fp32, so what is rounded is the gradient alone: to half the spacing of dtype.
    rows = make_rows([5, 0, 20, 18], device).to(dtype)
    arguments = (rewards(4, device), offsets([2, 2], device), Objective())
    out, gradient_T = loss_and_gradient(rows, *arguments)
    exact, exact_T = loss_and_gradient(rows.to(torch.float64), *arguments)
    assert gradient_T.dtype == dtype and out.loss.dtype == torch.float32
    assert relative_error(out.loss.detach(), exact.loss.detach()) <= RTOL
    assert relative_error(gradient_T, exact_T) <= torch.finfo(dtype).eps / 2 + RTOL


@pytest.mark.no_interpret  # what opcheck asks does not depend on what serves the op
@pytest.mark.parametrize("scale", ["std", "batch"])
def test_opcheck(scale: Scale, device: torch.device) -> None:
    rows = make_rows([3, 4], device, garbage=False)
    rows.logprob_T.requires_grad_()
    group = (torch.tensor([1.0, 0.0], device=device), rows.weight_T, rows.response_cu, offsets([2], device), scale)
    arguments = (*rows.args()[:3], *group, *objective_arguments(Objective()))
    torch.library.opcheck(OPS["group_grpo_loss"], arguments)


def test_errors() -> None:
    cpu = torch.device("cpu")
    rows = make_rows([3, 4], cpu)
    with pytest.raises(ValueError, match="one reward per response of response_cu, 2; got 3"):
        loss_and_gradient(rows, torch.rand(3), offsets([3], cpu), Objective())
    with pytest.raises(ValueError, match="group_cu must start at 0, never decrease and end at 2"):
        loss_and_gradient(rows, torch.rand(2), offsets([3], cpu), Objective())
    with pytest.raises(ValueError, match="scale must be one of"):
        loss_and_gradient(rows, torch.rand(2), offsets([2], cpu), Objective(), "median")
    with pytest.raises(ValueError, match="kl_coef"):
        loss_and_gradient(replace(rows, ref_logprob_T=None), torch.rand(2), offsets([2], cpu), Objective())
