"""Outcome supervision: a response's advantage is its reward relative to its group's (DeepSeekMath section 4.1.2).

S responses, P prompts (groups).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from triton_kernels._checks import NUMBERS, check_choice, check_offsets, check_tensor
from triton_kernels._common import at_least_fp32, segment_ids
from triton_kernels._register import Variant, custom_op, register_triton
from triton_kernels._triton import LAUNCH_OPTIONS, tl, triton

Scale = Literal["std", "none", "loo", "batch"]

EPS = 1e-6
"""Added to the standard deviation."""
BLOCK_S = 256


def group_advantage(reward_S: Tensor, group_cu: Tensor, scale: Scale = "std") -> Tensor:
    """Advantage of each response, fp32 (fp64 for fp64), detached. Group p is reward_S[group_cu[p]:group_cu[p + 1]].

    "std":   (r - mean) / (std + 1e-6), with the group's sample deviation.
    "none":  r - mean (Dr. GRPO, arXiv 2503.20783).
    "loo":   r - mean of the group's other rewards (leave one out, arXiv 2402.14740).
    "batch": (r - mean) / (std + 1e-6), with the sample deviation of all S rewards.

    A group of equal rewards gives exactly 0, infinite ones and a group of one included; a group may be empty. NaN makes
    its group NaN, and with "batch" all groups. Raises `ValueError` for an unknown scale and tensors that do not fit.
    """
    check_group_arguments(reward_S, group_cu, scale)
    return _group_advantage(reward_S.detach(), group_cu, scale)


def check_group_arguments(reward_S: Tensor, group_cu: Tensor, scale: str) -> None:
    """Raise `ValueError` unless rewards, offsets and scale fit together."""
    check_choice("scale", scale, get_args(Scale))
    check_tensor("reward_S", reward_S, ("S",), dtypes=NUMBERS)
    check_offsets("group_cu", group_cu, reward_S, total=len(reward_S))


def group_advantage_reference(reward_S: Tensor, group_cu: Tensor, scale: str) -> Tensor:
    """The formulas in plain PyTorch."""
    reward_S = at_least_fp32(reward_S)
    P, group_S = group_cu.numel() - 1, segment_ids(group_cu, reward_S.numel())

    def reduce(x_S: Tensor, how: str) -> Tensor:
        """Over each response's group, given back to each response."""
        return x_S.new_zeros(P).scatter_reduce(0, group_S, x_S, how, include_self=False)[group_S]

    size_S = (group_cu[1:] - group_cu[:-1])[group_S]
    flat_S = reduce(reward_S, "amax") == reduce(reward_S, "amin")
    centred_S = (reward_S - reduce(reward_S, "mean")).masked_fill(flat_S, 0)
    if scale == "none" or reward_S.numel() == 0:
        return centred_S
    if scale == "loo":
        # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
        return centred_S * size_S / (size_S - 1).clamp(min=1)
    if scale == "batch":
        deviation = reward_S.var(correction=min(1, reward_S.numel() - 1)).sqrt()
        return (centred_S / (deviation + EPS)).masked_fill(reward_S.amax() == reward_S.amin(), 0)
    return centred_S / ((reduce(centred_S**2, "sum") / (size_S - 1).clamp(min=1)).sqrt() + EPS)


_EPS = tl.constexpr(EPS)


@triton.jit
def mean_and_scale(reward_ptr, begin, end, BLOCK_S: tl.constexpr):
    """(first, mean - first, flat, scale) of rewards begin..end; scale: 1 / (std + eps), or 0 where all are equal."""
    # Relative to the first reward: differences survive in fp32 when the rewards are large and close together.
    first = tl.load(reward_ptr + begin, begin < end, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    differing = tl.zeros([BLOCK_S], tl.int32)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        reward = tl.load(reward_ptr + s, s < end, other=0.0).to(tl.float32)
        total += tl.where(s < end, reward - first, 0.0)
        differing += ((s < end) & (reward != first)).to(tl.int32)  # NaN differs from everything
    mean = tl.sum(total) / tl.maximum(end - begin, 1)
    squares = tl.zeros([BLOCK_S], tl.float32)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        reward = tl.load(reward_ptr + s, s < end, other=0.0).to(tl.float32)
        centred = tl.where(s < end, reward - first - mean, 0.0)
        squares += centred * centred
    variance = tl.sum(squares) / tl.maximum(end - begin - 1, 1)
    flat = tl.sum(differing) == 0
    return first, mean, flat, tl.where(flat, 0.0, 1 / (tl.sqrt(variance) + _EPS))


@triton.jit
def normalise(reward, first, mean, flat, scale, size, SCALE: tl.constexpr):
    """Advantage of `reward` in a group of `size` with the statistics of `mean_and_scale`."""
    centred = tl.where(flat, 0.0, reward - first - mean)
    if SCALE == "loo":
        return centred * (size / tl.maximum(size - 1, 1))
    elif SCALE == "none":
        return centred
    else:
        return centred * scale


@triton.jit
def batch_scale_kernel(reward_ptr, scale_ptr, S, BLOCK_S: tl.constexpr):
    """One program: the scale of the whole batch."""
    end = tl.cast(S, tl.int64)
    _first, _mean, _flat, scale = mean_and_scale(reward_ptr, end - end, end, BLOCK_S)
    tl.store(scale_ptr, scale)


@triton.jit
def group_advantage_kernel(
    reward_ptr, group_cu_ptr, batch_scale_ptr, advantage_ptr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr
):
    """One program per group. batch_scale_ptr is None unless SCALE is "batch"."""
    p = tl.program_id(0)
    begin = tl.load(group_cu_ptr + p).to(tl.int64)
    end = tl.load(group_cu_ptr + p + 1).to(tl.int64)
    first, mean, flat, scale = mean_and_scale(reward_ptr, begin, end, BLOCK_S)
    if batch_scale_ptr is not None:
        scale = tl.load(batch_scale_ptr)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        reward = tl.load(reward_ptr + s, s < end, other=0.0).to(tl.float32)
        tl.store(advantage_ptr + s, normalise(reward, first, mean, flat, scale, end - begin, SCALE), s < end)


def batch_scale_triton(reward_S: Tensor, scale: str) -> Tensor | None:
    """The scale of the whole batch, [1]; None unless `scale` is "batch"."""
    if scale != "batch":
        return None
    out = reward_S.new_empty(1, dtype=torch.float32)
    batch_scale_kernel[(1,)](reward_S, out, reward_S.numel(), BLOCK_S=BLOCK_S, **LAUNCH_OPTIONS)
    return out


def _group_advantage_triton(reward_S: Tensor, group_cu: Tensor, scale: str) -> Tensor:
    if reward_S.dtype == torch.float64:
        return group_advantage_reference(reward_S, group_cu, scale)
    reward_S, group_cu = reward_S.contiguous(), group_cu.contiguous()
    advantage_S = _empty(reward_S, group_cu, scale)
    P = group_cu.numel() - 1
    if P:
        batch_scale = batch_scale_triton(reward_S, scale)
        group_advantage_kernel[(P,)](
            reward_S, group_cu, batch_scale, advantage_S, SCALE=scale, BLOCK_S=BLOCK_S, **LAUNCH_OPTIONS
        )
    return advantage_S


def _empty(reward_S: Tensor, group_cu: Tensor, scale: str) -> Tensor:
    dtype = torch.float64 if reward_S.dtype == torch.float64 else torch.float32
    return reward_S.new_empty(reward_S.shape, dtype=dtype)


_group_advantage = custom_op("group_advantage", group_advantage_reference)
_group_advantage.register_fake(_empty)
register_triton(_group_advantage, _group_advantage_triton)


def variants() -> list[Variant]:
    """The kernels this op launches."""
    signature = {"reward_ptr": "*fp32", "group_cu_ptr": "*i32", "batch_scale_ptr": "*fp32", "advantage_ptr": "*fp32"}
    block = {"BLOCK_S": BLOCK_S}
    return [
        Variant(group_advantage_kernel, signature, {"SCALE": "std", "batch_scale_ptr": None} | block),
        Variant(group_advantage_kernel, signature, {"SCALE": "loo", "batch_scale_ptr": None} | block),
        Variant(group_advantage_kernel, signature, {"SCALE": "batch"} | block),
        Variant(batch_scale_kernel, {"reward_ptr": "*fp32", "scale_ptr": "*fp32", "S": "i32"}, block),
    ]
