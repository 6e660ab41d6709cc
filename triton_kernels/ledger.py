"""The kernel ledger: what every Triton kernel costs on each GPU, read off the compiled kernel without a GPU.

    python -m triton_kernels.ledger                 compile all, write docs/kernels.md
    python -m triton_kernels.ledger --check         compile all, compare with docs/kernels.md
    python -m triton_kernels.ledger --kernel NAME   compile and print one kernel

It exits with 1 if a kernel spills, needs more shared memory than a block may have, does not compile or stands in no
`variants()`, and `--check` also if the table is stale. A kernel joins by its name, which ends in `_kernel`, and an
entry in `variants()` of a module of this package.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton_kernels
from triton_kernels._common import INTERPRET
from triton_kernels._register import Variant
from triton_kernels._triton import HAS_TRITON, LAUNCH_OPTIONS, triton

TABLE = Path(__file__).parent.parent / "docs" / "kernels.md"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one block may have, by capability: CUDA C++ programming guide, "Technical Specifications"."""
REQUIRED = (80, 90)
"""Capabilities for which every kernel has to compile; for the others the table says whether it does."""
_RESERVED = {80: 0, 90: 1024, 100: 1024}
"""Bytes of static shared memory in every cubin that are the driver's own; the limit does not count them."""

_HEAD = """# Kernels

What every Triton kernel costs on each GPU, at the tiles and types it is launched with, as the compiler gives it.
Written by `python -m triton_kernels.ledger`, which needs no GPU. With `--check` it says what has changed, and so does
`tests/ops/test_ledger.py`, which CI runs for sm_80 and sm_90.

A cell is **registers per thread / bytes per thread in local memory / bytes of shared memory per block**. There are at
most 255 registers per thread and 65536 per block; what does not fit is spilled to local memory, whose frame grows in
steps of 8 bytes. A spill is an error unless the kernel's entry in `variants()` allows it, and so is more shared memory
than a block may have: {limits}. Where the compiler adds warps of its own, the cell says how many there are. `warps`
and `stages` are those of the launch. `-` is Triton's default; in the column of a GPU, that the kernel is not launched
there.

The specialisation names compile-time constants, absent tensors, types other than fp32 and i32, and integers that are
multiples of 16 (`16n`). Tensors are aligned to 16 bytes.

Made with Triton {version}.
Other versions allocate other registers, so cells are compared with that version alone; the limits hold with every
version.
"""


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs: per thread, and shared memory and warps per block."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int


@dataclass(frozen=True)
class Row:
    """One specialisation, under the op whose module ships it, and its `Usage`, or why there is none, by capability."""

    op: str
    variant: Variant
    usage: Mapping[int, Usage | str]

    def __str__(self) -> str:
        return _name(self.key)

    @property
    def key(self) -> tuple[str, ...]:
        """The cells that name the specialisation."""
        return key(self.variant)

    def cell(self, capability: int) -> str:
        """How the table says it; `capability` was measured, or the kernel is not launched on it."""
        usage = self.usage.get(capability, "-")
        if isinstance(usage, str):
            return usage if usage == "-" else "does not compile"
        split = "" if usage.warps == self.variant.options["num_warps"] else f" ({usage.warps} warps)"
        return f"{usage.registers} / {usage.spill_bytes} / {usage.shared_bytes}{split}"


def modules() -> list[ModuleType]:
    """Every Python module of this package."""
    found = pkgutil.walk_packages(triton_kernels.__path__, "triton_kernels.")
    return [importlib.import_module(module.name) for module in found if module.name != "triton_kernels._C"]


def collect(modules: Iterable[ModuleType]) -> dict[str, list[Variant]]:
    """Each module's name with what it ships; what several modules ship stands with the first."""
    seen: set[tuple[str, ...]] = set()
    ops: dict[str, list[Variant]] = {}
    for module in modules:
        for variant in module.variants() if hasattr(module, "variants") else ():
            if key(variant) not in seen:
                seen.add(key(variant))
                ops.setdefault(module.__name__.split(".")[-1].lstrip("_"), []).append(variant)
    return ops


def forgotten(modules: Iterable[ModuleType], ops: dict[str, list[Variant]]) -> list[str]:
    """One sentence for each kernel that no `variants()` names."""
    kernels = {
        value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction)
    }
    kernels -= {variant.kernel for list_ in ops.values() for variant in list_}
    return sorted(f"{kernel.__module__}.{kernel.__name__} is in no variants()" for kernel in kernels)


def key(variant: Variant) -> tuple[str, ...]:
    """(kernel, specialisation, warps, stages) as the table has them."""
    constants, options = variant.constants, variant.options
    types = {name: variant.signature[name].lstrip("*") for name in variant.kernel.arg_names if name not in constants}
    words = [f"{name}={value}" for name, value in constants.items() if value is not None]
    words += [f"no {_tensor(name)}" for name, value in constants.items() if value is None]
    words += [f"{_tensor(name)}:{type_}" for name, type_ in types.items() if type_ not in ("fp32", "i32")]
    words += [f"{name}=16n" for name in variant.multiples_of_16]
    usual = {"num_warps", "num_stages"} | {name for name in options if options[name] == LAUNCH_OPTIONS.get(name)}
    words += [f"{name}={value}" for name, value in options.items() if name not in usual]
    stages = str(options.get("num_stages", "-"))
    return f"`{variant.kernel.__name__}`", ", ".join(words), str(options["num_warps"]), stages


def _name(key: tuple[str, ...]) -> str:
    """Of a row, for messages."""
    kernel, specialisation, warps, _ = key
    return f"{kernel.strip('`')} [{', '.join(filter(None, (specialisation, f'{warps} warps')))}]"


def _tensor(argument: str) -> str:
    return argument.removesuffix("_ptr")


def measure(variant: Variant, capability: int) -> Usage | str:
    """Compile for `capability` and read what the kernel needs; the compiler's message if it does not compile."""
    constants, names = variant.constants, variant.kernel.arg_names
    signature = {name: "constexpr" if name in constants else variant.signature[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in variant.multiples_of_16]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(variant.kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(variant.options))
    except Exception as error:  # of the front end, a pass or ptxas: they share no base class
        return f"{type(error).__name__}: {error}"
    registers, stack, static, local = _resources(compiled.asm["cubin"], compiled.metadata.name)
    shared = compiled.metadata.shared + max(0, static - _RESERVED[capability])
    return Usage(registers, stack + local, shared, compiled.metadata.num_warps)


def _resources(cubin: bytes, name: str) -> tuple[int, ...]:
    """(registers, stack bytes, static shared bytes, local bytes) by `cuobjdump`, which Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pattern = rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    if (found := re.search(pattern, text)) is None:
        raise RuntimeError(f"cuobjdump does not say what {name} uses:\n{text}")
    return tuple(int(number) for number in found.groups())


def rows(ops: dict[str, list[Variant]], capabilities: Iterable[int]) -> Iterator[Row]:
    """Compile everything, two at a time, in the order of `ops`. The compiler lets go of Python's lock."""
    capabilities = tuple(capabilities)
    with ThreadPoolExecutor(2) as pool:
        usages = {
            key(variant): {
                capability: pool.submit(measure, variant, capability)
                for capability in capabilities
                if capability in variant.capabilities
            }
            for list_ in ops.values()
            for variant in list_
        }
        for op, list_ in ops.items():
            for variant in list_:
                usage = usages[key(variant)]
                yield Row(op, variant, {capability: future.result() for capability, future in usage.items()})


def problems(row: Row) -> list[str]:
    """One sentence for each limit that `row` breaks."""
    found: list[str] = []
    for capability, usage in row.usage.items():
        name, limit = f"{row} on sm_{capability}", SHARED_LIMIT[capability]
        if isinstance(usage, str):
            found += [f"{name} does not compile: {usage}"] if capability in REQUIRED else []
            continue
        if usage.spill_bytes > (allowed := row.variant.max_spill_bytes):
            found.append(f"{name} spills {usage.spill_bytes} bytes per thread, {allowed} are allowed: smaller tiles?")
        if usage.shared_bytes > limit:
            found.append(
                f"{name} needs {usage.shared_bytes} bytes of shared memory, a block has {limit}: fewer stages?"
            )
    return found


def stale(table: str, rows: list[Row], kernel: str | None = None) -> list[str]:
    """One sentence for each row in which docs/kernels.md, of text `table`, and `rows` differ; then write it anew.

    Of what the kernels need only the capabilities in `rows` are compared, and only if the same version of Triton made
    the table. kernel: the only one in `rows`.
    """
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    written = {tuple(cells[:4]): dict(zip(SHARED_LIMIT, cells[4:], strict=True)) for cells in lines}
    same_version = version(table) == triton.__version__
    found: list[str] = []
    for row in rows:
        cells = written.pop(row.key, None)
        if cells is None:
            found.append(f"{row} is not in the table")
        elif same_version:
            changed = [capability for capability in row.usage if row.cell(capability) != cells[capability]]
            found += [f"{row} on sm_{c} is {row.cell(c)}, the table says {cells[c]}" for c in changed]
    gone = [key for key in written if kernel in (None, key[0].strip("`"))]
    return found + [f"{_name(key)} is in the table and no longer compiled" for key in gone]


def version(table: str) -> str:
    """The version of Triton that made `table`; "" if it does not say."""
    found = re.search(r"^Made with Triton (\S+)\.$", table, re.MULTILINE)
    return found[1] if found else ""


def render(rows: Iterable[Row]) -> str:
    """docs/kernels.md."""
    limits = ", ".join(f"{size // 1024} KiB on sm_{capability}" for capability, size in SHARED_LIMIT.items())
    lines = [_HEAD.format(limits=limits, version=triton.__version__)]
    for op, of_op in itertools.groupby(rows, lambda row: row.op):
        columns = ["kernel", "specialisation", "warps", "stages", *(f"sm_{capability}" for capability in SHARED_LIMIT)]
        lines += [f"## {op}\n", _line(columns), "|---" * len(columns) + "|"]
        lines += [_line([*row.key, *(row.cell(capability) for capability in SHARED_LIMIT)]) for row in of_op]
        lines.append("")
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m triton_kernels.ledger", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with docs/kernels.md, write nothing")
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel; writes nothing")
    options = parser.parse_args(arguments)
    if not HAS_TRITON or INTERPRET:
        parser.error("needs Triton's compiler: pip install triton, and unset TRITON_INTERPRET")
    everything = modules()
    ops = collect(everything)
    found = forgotten(everything, ops)
    if options.kernel:
        ops = {op: [x for x in list_ if x.kernel.__name__ == options.kernel] for op, list_ in ops.items()}
        if not any(ops.values()):
            parser.error(f"no variants() names a kernel {options.kernel}")
    measured: list[Row] = []
    for row in rows(ops, SHARED_LIMIT):
        measured.append(row)
        print(row, *(f"sm_{capability} {row.cell(capability)}" for capability in SHARED_LIMIT), sep="  ", flush=True)
        found += problems(row)
    if options.check:
        found += stale(TABLE.read_text(encoding="utf-8"), measured, options.kernel)
    elif not options.kernel:
        TABLE.write_text(render(measured), encoding="utf-8")
    print(*found, sep="\n", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
