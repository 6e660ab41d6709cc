"""process_advantage against its definition, token by token. J steps, T loss rows."""

from __future__ import annotations

import pytest
import torch
from cases import RTOL, offsets
from torch import Tensor

from triton_kernels import process_advantage
from triton_kernels.policy.process_advantage import process_advantage_op

pytestmark = pytest.mark.no_interpret  # it has no Triton kernel

# Per group, per response: its loss rows and the ends of its steps.
Groups = list[list[tuple[int, list[int]]]]
MIXED: Groups = [
    [(6, [1, 3, 5]), (4, [2]), (5, [])],  # steps to the end, rows after the last step, no step
    [(3, [2])],  # one step: advantage 0
    [],  # a prompt without responses
    [(0, []), (2, [0, 1]), (3, [2, 2])],  # no rows, a step per row, two steps with one end
]


def pack(groups: Groups, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The op's arguments, with random rewards."""
    responses = [response for group in groups for response in group]
    ends = [end for _, ends in responses for end in ends]
    rewards_J = torch.randn(len(ends), dtype=dtype, generator=torch.Generator().manual_seed(0)).to(device)
    step_cu, response_cu = (offsets(x, device) for x in ([len(e) for _, e in responses], [n for n, _ in responses]))
    ends_J = torch.tensor(ends, dtype=torch.int64, device=device)
    return rewards_J, ends_J, step_cu, response_cu, offsets([len(group) for group in groups], device)


def by_definition(groups: Groups, reward_J: Tensor) -> list[float]:
    rewards = iter(reward_J.double().cpu())
    advantage = []
    for group in groups:
        steps = [[next(rewards) for _ in ends] for _, ends in group]
        pool = torch.tensor([r for response in steps for r in response])
        flat = len(pool) < 2 or bool((pool == pool[0]).all())
        for (rows, ends), response in zip(group, steps, strict=True):
            normalised = [0.0 if flat else float((r - pool.mean()) / (pool.std() + 1e-6)) for r in response]
            advantage += [sum(a for a, end in zip(normalised, ends, strict=True) if end >= t) for t in range(rows)]
    return advantage


LARGE: Groups = [[(63, [7 * i + 6 for i in range(9)])] * 7, [(1000, list(range(0, 1000, 10)))] * 2]


@pytest.mark.parametrize("groups", [MIXED, LARGE, [], [[(1, [0])]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_its_definition(groups: Groups, dtype: torch.dtype, device: torch.device) -> None:
    arguments = pack(groups, device, dtype)
    advantage_T = process_advantage(*arguments)
    expected_T = torch.tensor(by_definition(groups, arguments[0]), dtype=torch.float64, device=device)
    assert advantage_T.dtype == dtype
    torch.testing.assert_close(advantage_T.double(), expected_T, rtol=RTOL, atol=RTOL)


def test_by_hand(device: torch.device) -> None:
    # Rewards 0, 1, 0, 1: mean 1/2, sample deviation sqrt(1/3), so -+ sqrt(3)/2.
    _, ends_J, step_cu, response_cu, group_cu = pack([[(4, [1, 3]), (3, [0, 1])]], device)
    advantage_T = process_advantage(
        torch.tensor([0.0, 1.0, 0.0, 1.0], device=device), ends_J, step_cu, response_cu, group_cu
    )
    a = 3**0.5 / 2
    expected_T = torch.tensor([0, 0, a, a, 0, a, 0], device=device)
    torch.testing.assert_close(advantage_T, expected_T, rtol=1e-5, atol=1e-5)


def test_equal_rewards_give_exactly_zero(device: torch.device) -> None:
    reward_J, *rest = pack(MIXED, device)
    assert not process_advantage(torch.full_like(reward_J, 0.1), *rest).any()


def test_nan_stays_in_its_group(device: torch.device) -> None:
    reward_J, *rest = pack(MIXED, device)
    clean_T = process_advantage(reward_J, *rest)
    reward_J[0] = torch.nan
    rows = 6 + 4 + 5
    assert torch.equal(process_advantage(reward_J, *rest)[rows:], clean_T[rows:])


def test_no_gradient(device: torch.device) -> None:
    reward_J, *rest = pack(MIXED, device)
    assert not process_advantage(reward_J.requires_grad_(), *rest).requires_grad


@pytest.mark.no_interpret  # what opcheck asks does not depend on what serves the op
@pytest.mark.parametrize("groups", [MIXED, []])
def test_opcheck(groups: Groups, device: torch.device) -> None:
    arguments = pack(groups, device)
    torch.library.opcheck(process_advantage_op, (*arguments, int(arguments[3][-1])))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([1, 3, 6], r"step_end_J\[2\] must lie in 0..5, the loss rows of response 0; got 6"),
        ([-1, 3, 5], r"step_end_J\[0\] must lie in 0..5"),
        ([3, 1, 5], r"steps must be in order; step_end_J\[1\] is 1 after 3"),
    ],
)
def test_misplaced_steps(ends: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_advantage(*pack([[(6, ends)]], torch.device("cpu")))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, torch.zeros(2, dtype=torch.int64), r"step_end_J must have the shape \[3\]"),
        (1, torch.zeros(3), "step_end_J must hold int32, int64"),
        (2, torch.tensor([0, 2], dtype=torch.int32), "step_cu must start at 0, never decrease and end at 3"),
        (2, torch.tensor([0, 3]), "step_cu must hold int32"),
        (3, torch.tensor([0, 3, 6], dtype=torch.int32), "one offset per response"),
        (4, torch.tensor([0, 2], dtype=torch.int32), "group_cu must start at 0, never decrease and end at 1"),
    ],
)
def test_errors(index: int, value: Tensor, message: str) -> None:
    arguments = list(pack([[(6, [1, 3, 5])]], torch.device("cpu")))
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        process_advantage(*arguments)
