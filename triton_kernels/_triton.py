"""Triton if it is installed; otherwise names with which the kernels can be declared but not launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import triton.language as tl

    triton: Any
    HAS_TRITON: bool
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
    except ImportError:
        HAS_TRITON = False

        class _MissingKernel:
            def __init__(self, fn: Any) -> None:
                self.name = fn.__name__

            def __getitem__(self, grid: Any) -> NoReturn:
                raise RuntimeError(f"{self.name} is a Triton kernel and Triton is not installed: pip install triton")

        triton = SimpleNamespace(jit=_MissingKernel, cdiv=lambda a, b: -(-a // b))
        tl = SimpleNamespace(constexpr=lambda value: value)

LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""Options of a launch, unless a kernel has its own. enable_fp_fusion is explicit: its default differs between versions
of Triton."""

__all__ = ["HAS_TRITON", "LAUNCH_OPTIONS", "tl", "triton"]
