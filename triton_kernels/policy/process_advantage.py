"""Process supervision: a token's advantage sums the normalised rewards of the steps that end at or after it.

r~_j = (r_j - mean(R)) / (std(R) + 1e-6), R all step rewards of the group;  A_t = sum over j with end_j >= t of r~_j
(DeepSeekMath section 4.1.3).

J steps, T loss rows, S responses, P prompts (groups), K steps of a response, padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels._checks import IDS, NUMBERS, check_offsets, check_tensor, readable
from triton_kernels._common import segment_ids
from triton_kernels._register import custom_op
from triton_kernels.policy.group_advantage import group_advantage_reference


def process_advantage(
    step_reward_J: Tensor, step_end_J: Tensor, step_cu: Tensor, response_cu: Tensor, group_cu: Tensor
) -> Tensor:
    """Advantage of each loss row, fp32 (fp64 for fp64 rewards), detached: [response_cu[-1]].

    Response s has the steps step_cu[s]:step_cu[s + 1] and the loss rows response_cu[s]:response_cu[s + 1]; group p has
    the responses group_cu[p]:group_cu[p + 1]. `step_end_J` is the last loss row of each step, counted from 0 within its
    response, in order. Rows after the last step get 0, as do groups of equal step rewards and groups of one step. On a
    GPU this waits for the number of rows.

    Raises `ValueError` for shapes and dtypes that do not fit; on the CPU also for steps that end elsewhere.
    """
    check_tensor("step_reward_J", step_reward_J, ("J",), dtypes=NUMBERS)
    check_tensor("step_end_J", step_end_J, (len(step_reward_J),), like=step_reward_J, dtypes=IDS)
    check_offsets("response_cu", response_cu, step_reward_J)
    check_offsets("step_cu", step_cu, step_reward_J, total=len(step_reward_J))
    if step_cu.shape != response_cu.shape:
        raise ValueError(
            f"step_cu and response_cu must have one offset per response, and one more; got {list(step_cu.shape)} and "
            f"{list(response_cu.shape)}"
        )
    T = int(response_cu[-1])
    check_offsets("response_cu", response_cu, step_reward_J, total=T)
    check_offsets("group_cu", group_cu, step_reward_J, total=len(response_cu) - 1)
    if readable(step_end_J):
        _check_ends(step_end_J, step_cu, response_cu)
    return process_advantage_op(step_reward_J.detach(), step_end_J, step_cu, response_cu, group_cu, T)


def _check_ends(step_end_J: Tensor, step_cu: Tensor, response_cu: Tensor) -> None:
    response_J = segment_ids(step_cu, step_end_J.numel())
    rows_J = (response_cu[1:] - response_cu[:-1])[response_J]
    wrong = (step_end_J < 0) | (step_end_J >= rows_J)
    if wrong.any():
        j = int(wrong.nonzero()[0])
        raise ValueError(
            f"step_end_J[{j}] must lie in 0..{int(rows_J[j]) - 1}, the loss rows of response {int(response_J[j])}; "
            f"got {int(step_end_J[j])}"
        )
    back = (step_end_J[1:] < step_end_J[:-1]) & (response_J[1:] == response_J[:-1])
    if back.any():
        j = int(back.nonzero()[0]) + 1
        raise ValueError(
            f"steps must be in order; step_end_J[{j}] is {int(step_end_J[j])} after {int(step_end_J[j - 1])}"
        )


def process_advantage_reference(
    step_reward_J: Tensor, step_end_J: Tensor, step_cu: Tensor, response_cu: Tensor, group_cu: Tensor, T: int
) -> Tensor:
    """The formulas in plain PyTorch. Responses are summed apart, so that a NaN stays in its group."""
    J = step_reward_J.numel()
    normalised_J = group_advantage_reference(step_reward_J, step_cu[group_cu.long()], "std")
    if T == 0 or J == 0:
        return normalised_J.new_zeros(T)
    response_J, response_T = segment_ids(step_cu, J), segment_ids(response_cu, T)
    steps_S = step_cu[1:] - step_cu[:-1]
    # One more column than the longest response has steps: what follows the last step is 0.
    remaining_SK = normalised_J.new_zeros(len(steps_S), int(steps_S.max()) + 1)
    remaining_SK[response_J, torch.arange(J, device=step_cu.device) - step_cu[response_J]] = normalised_J
    remaining_SK = remaining_SK.flip(1).cumsum(1).flip(1)
    end_row_J = response_cu[response_J] + step_end_J
    first_step_T = torch.searchsorted(end_row_J, torch.arange(T, device=end_row_J.device, dtype=end_row_J.dtype))
    step_T = torch.minimum(first_step_T, step_cu[response_T + 1]) - step_cu[response_T]
    return remaining_SK[response_T, step_T]


def _empty(
    step_reward_J: Tensor, step_end_J: Tensor, step_cu: Tensor, response_cu: Tensor, group_cu: Tensor, T: int
) -> Tensor:
    dtype = torch.float64 if step_reward_J.dtype == torch.float64 else torch.float32
    return step_reward_J.new_empty(T, dtype=dtype)


process_advantage_op = custom_op("process_advantage", process_advantage_reference)
process_advantage_op.register_fake(_empty)
