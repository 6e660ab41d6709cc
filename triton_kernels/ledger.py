"""The kernel ledger: what every Triton kernel costs on each GPU, read off the compiled kernel without a GPU.

    python -m triton_kernels.ledger                 compile all, write docs/kernels.md
    python -m triton_kernels.ledger --check         compile all, compare with docs/kernels.md
    python -m triton_kernels.ledger --kernel NAME   compile one kernel, print its rows

An installed package has no docs/kernels.md: the table goes to standard output, and `--check` needs a checkout.

The exit status is 1 if a kernel spills, needs more shared memory than a block may have, does not compile or stands in
no `variants()`, and with `--check` also if the table is stale. A kernel joins by its name, which ends in `_kernel`, and
an entry in `variants()` of a module of this package.
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
"""The table of the checkout; an installed package has none."""
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most bytes of a block, by capability: CUDA C++ programming guide, "Technical Specifications"."""
REQUIRED = (80, 90)
"""Capabilities for which every kernel has to compile; a failure on another is a cell of the table."""
_RESERVED = {80: 0, 90: 1024, 100: 1024}
"""Static shared memory that the driver adds to every cubin, in bytes; the limit does not count it."""

_HEAD = """# Kernels

Cost of every Triton kernel on each GPU, at the tiles and types of its launches, read off the compiled kernel.
`python -m triton_kernels.ledger` writes this table without a GPU; with `--check` it reports what has changed, and so do
the slow tests of `tests/ops/test_ledger.py` for sm_80 and sm_90.

A cell is **registers per thread / bytes of local memory per thread / bytes of shared memory per block**. A thread has
at most 255 registers and a block 65536; the compiler spills the rest to local memory, whose frame grows in steps of 8
bytes. A spill is an error unless the kernel's entry in `variants()` allows it. So is more shared memory than a block
may have: {limits}. The warps in a cell are those of the kernel where the
compiler adds its own. `warps` and `stages` are those of the launch. `-` stands for Triton's default, and in a GPU's
column for a kernel that is not launched there.

The specialisation names compile-time constants, absent tensors, types other than fp32 and i32, and integers that are
multiples of 16 (`16n`). Tensors are aligned to 16 bytes.

Made with Triton {version}.
Other versions allocate other registers, so cells are compared with that version alone; the limits hold with every
version.
"""


@dataclass(frozen=True)
class Usage:
    """Resources of a compiled kernel: registers and spilled bytes per thread, shared memory and warps per block."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int


@dataclass(frozen=True)
class Row:
    """A variant, its module, and by capability its `Usage` or the compiler's message."""

    module: str
    variant: Variant
    usage: Mapping[int, Usage | str]

    def __str__(self) -> str:
        return _name(self.key)

    @property
    def key(self) -> tuple[str, ...]:
        """The cells that name the specialisation."""
        return key(self.variant)

    def cell(self, capability: int) -> str:
        """Cell of a capability in the table; "-" where the kernel is not launched."""
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
    """Variants by module ("head/logits"); those of several modules stand with the first."""
    seen: set[tuple[str, ...]] = set()
    found: dict[str, list[Variant]] = {}
    for module in modules:
        for variant in module.variants() if hasattr(module, "variants") else ():
            if key(variant) not in seen:
                seen.add(key(variant))
                name = module.__name__.removeprefix("triton_kernels.").replace(".", "/")
                found.setdefault(name, []).append(variant)
    return found


def forgotten(modules: Iterable[ModuleType], variants: dict[str, list[Variant]]) -> list[str]:
    """A sentence for each kernel that no `variants()` names."""
    kernels = {
        value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction)
    }
    kernels -= {variant.kernel for of_module in variants.values() for variant in of_module}
    return sorted(f"{kernel.__module__}.{kernel.__name__} is in no variants()" for kernel in kernels)


def key(variant: Variant) -> tuple[str, ...]:
    """First four cells of a row: kernel, specialisation, warps, stages."""
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
    """A row's name in messages."""
    kernel, specialisation, warps, _ = key
    return f"{kernel.strip('`')} [{', '.join(filter(None, (specialisation, f'{warps} warps')))}]"


def _tensor(argument: str) -> str:
    return argument.removesuffix("_ptr")


def measure(variant: Variant, capability: int) -> Usage | str:
    """Compile for `capability` and read the kernel's resources; the compiler's message if it does not compile."""
    constants, names = variant.constants, variant.kernel.arg_names
    signature = {name: "constexpr" if name in constants else variant.signature[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in variant.multiples_of_16]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(variant.kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(variant.options))
    except Exception as error:  # errors of the front end, the passes and ptxas share no base class
        return f"{type(error).__name__}: {error}"
    registers, stack, static, local = _resources(compiled.asm["cubin"], compiled.metadata.name)
    shared = compiled.metadata.shared + max(0, static - _RESERVED[capability])
    return Usage(registers, stack + local, shared, compiled.metadata.num_warps)


def _resources(cubin: bytes, name: str) -> tuple[int, ...]:
    """(registers, stack bytes, static shared bytes, local bytes), read by Triton's `cuobjdump`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pattern = rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    if (found := re.search(pattern, text)) is None:
        raise RuntimeError(f"cuobjdump reports no resources of {name}:\n{text}")
    return tuple(int(number) for number in found.groups())


def rows(variants: dict[str, list[Variant]], capabilities: Iterable[int]) -> Iterator[Row]:
    """Compile all variants on two threads and yield their rows in order. The compiler releases Python's lock."""
    capabilities = tuple(capabilities)
    with ThreadPoolExecutor(2) as pool:
        futures = [
            (module, variant, {c: pool.submit(measure, variant, c) for c in capabilities if c in variant.capabilities})
            for module, of_module in variants.items()
            for variant in of_module
        ]
        for module, variant, usage in futures:
            yield Row(module, variant, {capability: future.result() for capability, future in usage.items()})


def problems(row: Row) -> list[str]:
    """A sentence for each limit that `row` breaks."""
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
    """A sentence for each difference between `rows` and `table`, the text of docs/kernels.md.

    Resources are compared for the capabilities in `rows`, if the same version of Triton made the table. kernel: the
    only kernel of `rows`, or None if they are all.
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
    """Version of Triton that made `table`, or ""."""
    found = re.search(r"^Made with Triton (\S+)\.$", table, re.MULTILINE)
    return found[1] if found else ""


def render(rows: Iterable[Row]) -> str:
    """Text of docs/kernels.md."""
    limits = ", ".join(f"{size // 1024} KiB on sm_{capability}" for capability, size in SHARED_LIMIT.items())
    lines = [_HEAD.format(limits=limits, version=triton.__version__)]
    for module, of_module in itertools.groupby(rows, lambda row: row.module):
        columns = ["kernel", "specialisation", "warps", "stages", *(f"sm_{capability}" for capability in SHARED_LIMIT)]
        lines += [f"## {module}\n", _line(columns), "|---" * len(columns) + "|"]
        lines += [_line([*row.key, *(row.cell(capability) for capability in SHARED_LIMIT)]) for row in of_module]
        lines.append("")
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Progress goes to standard error."""
    parser = argparse.ArgumentParser(prog="python -m triton_kernels.ledger", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with docs/kernels.md, write nothing")
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel; writes nothing")
    options = parser.parse_args(arguments)
    if not HAS_TRITON or INTERPRET:
        parser.error("needs Triton's compiler: pip install triton, and unset TRITON_INTERPRET")
    table = TABLE if TABLE.is_file() else None
    if options.check and table is None:
        parser.error(f"--check compares with docs/kernels.md of a checkout; {TABLE} does not exist")
    everything = modules()
    variants = collect(everything)
    found = forgotten(everything, variants)
    if options.kernel:
        variants = {name: [x for x in list_ if x.kernel.__name__ == options.kernel] for name, list_ in variants.items()}
        if not any(variants.values()):
            parser.error(f"no variants() names a kernel {options.kernel}")
    measured: list[Row] = []
    for row in rows(variants, SHARED_LIMIT):
        measured.append(row)
        cells = (f"sm_{capability} {row.cell(capability)}" for capability in SHARED_LIMIT)
        print(row, *cells, sep="  ", file=sys.stdout if options.kernel else sys.stderr, flush=True)
        found += problems(row)
    if options.check and table is not None:
        found += stale(table.read_text(encoding="utf-8"), measured, options.kernel)
    elif table is not None and not options.kernel:
        table.write_text(render(measured), encoding="utf-8")
    elif not options.kernel:
        print(render(measured), end="")
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
