"""Every Triton kernel that the ops launch compiles for the GPUs we ship to, on a machine without one.

A new kernel joins by its name, which ends in `_kernel`, and an entry in its file's `shipped()`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import triton_kernels
from triton_kernels._register import Shipped

triton = pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.no_interpret

MODULES = [
    importlib.import_module(f"triton_kernels.{module.name}")
    for module in pkgutil.iter_modules(triton_kernels.__path__)
    if module.name != "_C"
]
SHIPPED = [shipped for module in MODULES if hasattr(module, "shipped") for shipped in module.shipped()]


def name(shipped: Shipped) -> str:
    return "-".join([shipped.kernel.__name__, *(f"{key}={value}" for key, value in shipped.constants.items())])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shipped", SHIPPED, ids=name)
def test_compiles(shipped: Shipped, capability: int) -> None:
    constants = shipped.constants
    signature = {arg: "constexpr" if arg in constants else shipped.signature[arg] for arg in shipped.kernel.arg_names}
    source = triton.compiler.ASTSource(shipped.kernel, signature, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    assert triton.compile(source, target=target, options=shipped.options).asm["cubin"]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_kernel_is_forgotten(module: ModuleType) -> None:
    kernels = {value for key, value in vars(module).items() if key.endswith("_kernel")}
    assert kernels <= {shipped.kernel for shipped in SHIPPED}
