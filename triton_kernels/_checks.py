"""Checks of what a user passes to an op: each raises one `ValueError` with the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IDS = (torch.int32, torch.int64)
NUMBERS = (*FLOATS, *IDS, torch.int8, torch.int16, torch.uint8, torch.bool)

Shape = tuple[int | str, ...]
"""Length of each dimension; a letter where any will do."""


def check_tensor(
    name: str, x: object, shape: Shape, *, like: Tensor | None = None, dtypes: Sequence[torch.dtype] = FLOATS
) -> None:
    """Raise unless `x` is a tensor of this shape, of one of `dtypes`, on the device of `like`."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(x).__name__}: torch.as_tensor makes one")
    if x.dim() != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, x.shape, strict=True)):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have the shape [{expected}]; got {list(x.shape)}")
    if x.dtype not in dtypes:
        names = "numbers" if dtypes is NUMBERS else ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must hold {names}; got {x.dtype}: convert it with .to(dtype)")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors; got {x.device}: move it there")


def check_offsets(name: str, cu: object, like: Tensor, total: int | None = None) -> None:
    """Raise unless `cu` holds int32 offsets on the device of `like`: first 0, never decreasing, last `total`.

    The values are looked at where that is free (see `readable`); elsewhere they are the caller's promise.
    """
    check_tensor(name, cu, ("n + 1",), like=like, dtypes=(torch.int32,))
    assert isinstance(cu, Tensor)
    if cu.numel() == 0:
        raise ValueError(f"{name} must hold one offset more than segments, and at least [0]; got []")
    if total is None or not readable(cu):
        return
    if int(cu[0]) != 0 or int(cu[-1]) != total or bool((cu[1:] < cu[:-1]).any()):
        raise ValueError(
            f"{name} must start at 0, never decrease and end at {total}; got {cu.tolist()[:8]}...{int(cu[-1])}"
        )


def readable(x: Tensor) -> bool:
    """True where the values of `x` can be read for free: on the CPU, outside of compilation and fake tensors."""
    return (
        x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, torch._subclasses.FakeTensor)
    )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    optional: bool = False,
) -> None:
    """Raise unless `value` is a finite number in the range, or None where that means off."""
    if value is None and optional:
        return
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    fits = math.isfinite(number) and (above is None or number > above)
    if not fits or (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        bounds = {"above": above, "at least": at_least, "at most": at_most}
        wanted = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)
        off = ", or None for off" if optional else ""
        raise ValueError(f"{name} must be a finite number{wanted and ' ' + wanted}{off}; got {value!r}")


def check_bytes(name: str, value: object) -> None:
    """Raise unless `value` is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a whole number of bytes above 0, or None for the default; got {value!r}")
