"""Registration of ops with PyTorch's dispatcher, which is the only registry, and the table of what serves them.

`torch.library.custom_op` registers the plain PyTorch reference as the default of every device. C++ (csrc) overrides it
on the CPU when it is built; `register_triton` overrides it on CUDA, and on the CPU when `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import CustomOpDef

from triton_kernels._common import INTERPRET
from triton_kernels._triton import HAS_TRITON, LAUNCH_OPTIONS


@dataclass(frozen=True)
class Variant:
    """One specialisation of a Triton kernel that an op launches; the ledger compiles it ahead of time.

    signature: Triton type of each argument ("*fp32", "i32", ...).
    constants: value of each constexpr, and None for each absent tensor.
    options: those of the launch.
    multiples_of_16: integer arguments that are multiples of 16 in the launches that matter. Triton compiles these
        apart, with wider loads; pointers are always taken to be aligned.
    capabilities: the GPUs that launch it, 90 for sm_90.
    max_spill_bytes: local memory per thread. Spilled registers go through the cache, so 0 is the rule; an attention
        kernel whose tile fills the registers may be fastest with a few spilled outside of its inner loop.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    options: Mapping[str, int] = field(default_factory=lambda: LAUNCH_OPTIONS)
    multiples_of_16: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = (80, 90, 100)
    max_spill_bytes: int = 0


REFERENCE = "PyTorch reference"
OPS: dict[str, CustomOpDef] = {}
"""Every registered op by its name without the namespace."""
DEFAULTS: dict[str, str] = {}
"""Name of an op's default implementation, which serves where neither C++ nor Triton does."""


def custom_op(
    name: str,
    reference: Callable[..., Any],
    *,
    mutates: tuple[str, ...] = (),
    schema: str | None = None,
    default: str = REFERENCE,
) -> CustomOpDef:
    """Register `reference` as `dsm::name`; `default` is its name in the table of implementations.

    schema: for arguments that the reference takes as `*objective`; None: inferred from its signature.
    """
    OPS[name] = torch.library.custom_op(f"dsm::{name}", reference, mutates_args=mutates, schema=schema)
    DEFAULTS[name] = default
    return OPS[name]


def register_triton(op: CustomOpDef, launch: Callable[..., Any]) -> None:
    """Let `launch` serve CUDA tensors; with `TRITON_INTERPRET=1` also CPU tensors."""

    @functools.wraps(launch)
    def launch_on_its_device(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device, wherever the tensors are
            return launch(*args)

    if HAS_TRITON or INTERPRET:
        op.register_kernel("cuda")(launch_on_its_device)
    if INTERPRET:
        op.register_kernel("cpu")(launch)


def register_saved_gradient(op: CustomOpDef) -> None:
    """Autograd of an op (x, ...) -> (value, dvalue/dx, ...) whose forward pass computes the gradient by x.

    The backward pass multiplies it by the upstream gradient, in its dtype and on its device, and does not synchronise.
    `value` is a scalar or has the shape of x. Only x, the first input, receives a gradient.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.dtype, ctx.num_inputs = inputs[0].dtype, len(inputs)

    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        dx = None if grad is None else (grad * ctx.saved_tensors[0]).to(ctx.dtype)
        return dx, *[None] * (ctx.num_inputs - 1)

    op.register_autograd(backward, setup_context=setup_context)


@contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Switch autograd on inside an op, where the dispatcher has switched it off, and leave inference mode."""
    key = torch._C.DispatchKey
    with (
        torch.inference_mode(False),
        torch._C._SetExcludeDispatchKeyGuard(key.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(key.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def load_cpp() -> None:
    """Load csrc if it was built. Under `TRITON_INTERPRET=1` the Triton kernels serve the CPU instead."""
    if not INTERPRET and importlib.util.find_spec("triton_kernels._C") is not None:
        importlib.import_module("triton_kernels._C")


def implementations() -> dict[str, dict[str, str]]:
    """Name of the implementation of each op on each device ("cpu", "cuda"), read off the dispatcher.

    "C++", "Triton", "Triton (interpreter)", "PyTorch reference" or the pieces that an op is composed of.
    Triton leaves fp64 tensors to the reference.
    """
    return {name: {device: implementation(name, device) for device in ("cpu", "cuda")} for name in OPS}


@functools.cache
def implementation(name: str, device: str) -> str:
    """Name of the implementation that serves op `name` on "cpu" or "cuda". Call it after everything is loaded."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dsm::{name}", device.upper()):
        return DEFAULTS[name]
    registrations = torch._C._dispatch_dump(f"dsm::{name}").splitlines()
    kernel = next(line for line in registrations if line.startswith(f"{device.upper()}:"))
    if ".cpp" in kernel:
        return "C++"
    return "Triton (interpreter)" if INTERPRET else "Triton"
