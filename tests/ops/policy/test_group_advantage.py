"""group_advantage against a loop over the groups in fp64."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from cases import RTOL, assert_at_most_twice_as_far, offsets, relative_error
from torch import Tensor

from triton_kernels import group_advantage
from triton_kernels._register import OPS
from triton_kernels.policy.group_advantage import Scale, group_advantage_reference

SCALES = get_args(Scale)


def loop(reward_S: Tensor, group_cu: Tensor, scale: str) -> Tensor:
    """The definition, one group after the other."""
    reward_S = reward_S.double()
    advantage_S = torch.zeros_like(reward_S)
    batch_std = reward_S.std() if reward_S.numel() > 1 else 0
    for begin, end in pairwise(group_cu.tolist()):
        group = reward_S[begin:end]
        for i in range(begin, end):
            if len(group) == 1:
                continue
            mean_of_others = (group.sum() - reward_S[i]) / (len(group) - 1)
            advantage_S[i] = {
                "std": (reward_S[i] - group.mean()) / (group.std() + 1e-6),
                "none": reward_S[i] - group.mean(),
                "loo": reward_S[i] - mean_of_others,
                "batch": (reward_S[i] - group.mean()) / (batch_std + 1e-6),
            }[scale]
    return advantage_S


@pytest.mark.parametrize("scale", SCALES)
# No group; only empty groups; a group of one; ragged with an empty one; a group larger than a block of 256.
@pytest.mark.parametrize("sizes", [[], [0, 0], [1], [3, 0, 1, 5], [600, 4]])
def test_matches_definition(sizes: list[int], scale: Scale, device: torch.device) -> None:
    reward_S = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)).to(device)
    group_cu = offsets(sizes, device)
    expected_S = loop(reward_S, group_cu, scale)
    advantage_S = group_advantage(reward_S, group_cu, scale)
    assert advantage_S.dtype == torch.float32
    assert relative_error(advantage_S, expected_S) <= RTOL
    assert relative_error(group_advantage(reward_S.double(), group_cu, scale), expected_S) <= 1e-12
    assert relative_error(group_advantage_reference(reward_S.double(), group_cu, scale), expected_S) <= 1e-12


def test_by_hand(device: torch.device) -> None:
    reward_S, group_cu = torch.tensor([1.0, 0, 0, 1, 3.0, 1.0], device=device), offsets([4, 2], device)
    # Deviations: sqrt(4 * 0.25 / 3), sqrt(2).
    a, b = 0.5 / (1 / 3) ** 0.5, 1 / 2**0.5
    expected = {"std": [a, -a, -a, a, b, -b], "none": [0.5, -0.5, -0.5, 0.5, 1, -1]}
    expected["loo"] = [2 / 3, -2 / 3, -2 / 3, 2 / 3, 2, -2]
    expected["batch"] = [x / 1.2**0.5 for x in expected["none"]]
    for scale, values in expected.items():
        torch.testing.assert_close(group_advantage(reward_S, group_cu, scale), torch.tensor(values, device=device))


def test_equal_rewards_give_exactly_zero(device: torch.device) -> None:
    # The mean of three times 0.1 is not 0.1 in floating point.
    reward_S, group_cu = torch.full((7,), 0.1, device=device), offsets([3, 1, 3], device)
    for scale in ("std", "batch"):
        assert torch.equal(group_advantage(reward_S, group_cu, scale), torch.zeros(7, device=device))
    reward_S[-1] = 1.0
    advantage_S = group_advantage(reward_S, group_cu)
    assert torch.equal(advantage_S[:4], torch.zeros(4, device=device)) and (advantage_S[4:] != 0).all()


def test_large_rewards_that_lie_close(device: torch.device) -> None:
    reward_S, group_cu = 1000 + torch.tensor([0.0, 0.25, 0.5, 0.125, 0.75], device=device), offsets([5], device)
    assert relative_error(group_advantage(reward_S, group_cu), loop(reward_S, group_cu, "std")) <= RTOL


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, scale: Scale, device: torch.device) -> None:
    reward_S = torch.randn(20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    group_cu = offsets([8, 12], device)
    reference_S = group_advantage_reference(reward_S, group_cu, scale)
    assert_at_most_twice_as_far(
        group_advantage(reward_S, group_cu, scale), reference_S, loop(reward_S, group_cu, scale)
    )


def test_noncontiguous_integer_and_detached(device: torch.device) -> None:
    reward_S, group_cu = torch.arange(12, device=device) % 5, offsets([2, 4], device)
    expected_S = group_advantage(reward_S[::2].float(), group_cu)
    assert torch.equal(group_advantage(reward_S[::2], group_cu), expected_S)
    advantage_S = group_advantage(reward_S[::2].float().requires_grad_(), group_cu)
    assert torch.equal(advantage_S, expected_S) and not advantage_S.requires_grad


def test_nan_stays_in_its_group(device: torch.device) -> None:
    reward_S = torch.tensor([1.0, torch.nan, 0.0, 1.0], device=device)
    assert group_advantage(reward_S, offsets([2, 2], device)).isnan().tolist() == [True, True, False, False]


@pytest.mark.no_interpret  # what opcheck asks does not depend on what serves the op
@pytest.mark.parametrize("scale", SCALES)
def test_opcheck(scale: Scale, device: torch.device) -> None:
    torch.library.opcheck(OPS["group_advantage"], (torch.rand(6, device=device), offsets([4, 2], device), scale))


def test_errors() -> None:
    reward_S, cpu = torch.rand(4), torch.device("cpu")
    with pytest.raises(ValueError, match="variance"):
        group_advantage(reward_S, offsets([4], cpu), "variance")
    with pytest.raises(ValueError, match="end at 4"):
        group_advantage(reward_S, offsets([2, 1], cpu))
    with pytest.raises(ValueError, match="int32"):
        group_advantage(reward_S, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"\[S\]; got \[2, 2\]"):
        group_advantage(reward_S.view(2, 2), offsets([4], cpu))
