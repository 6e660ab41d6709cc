"""The ledger on small kernels and, slow, all kernels of the ops against the limits and docs/kernels.md.

No GPU is needed. A new kernel joins by its name, which ends in `_kernel`, and an entry in its file's `variants()`; then
`python -m triton_kernels.ledger` writes the table.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from triton_kernels import ledger
from triton_kernels._register import Variant
from triton_kernels._triton import tl, triton
from triton_kernels.ledger import Row, Usage

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.no_interpret


@triton.jit
def tiny_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1.0)


@triton.jit
def hungry_kernel(x_ptr, BLOCK: tl.constexpr):
    """Hold the whole block in registers until its sum is known."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x / tl.sum(x))


@triton.jit
def deep_kernel(x_ptr, out_ptr, N, stride, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Prefetch STAGES - 1 blocks into shared memory, if loads are wide enough to be asynchronous."""
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(0, N, num_stages=STAGES):
        total += tl.load(x_ptr + row * stride + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def broken_kernel(x_ptr):
    tl.static_assert(False, "not for this GPU")


TINY = Variant(tiny_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 128})
HUNGRY = Variant(hungry_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 8192}, {"num_warps": 1})  # 256 registers for x alone
DEEP = Variant(
    deep_kernel,
    {"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32", "stride": "i32"},
    {"BLOCK": 8192, "STAGES": 7},  # 6 blocks of 32 KiB
    {"num_warps": 8},
)
BROKEN = Variant(broken_kernel, {"x_ptr": "*fp32"}, {})


def module(*variants: Variant, **names: Any) -> Any:
    """Stand-in for a module of the package."""
    return SimpleNamespace(__name__="triton_kernels.op", variants=lambda: list(variants), **names)


def compiled(variant: Variant, *capabilities: int) -> Row:
    [row] = ledger.rows({"op": [variant]}, capabilities)
    return row


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(ledger.rows(ledger.collect(ledger.modules()), ledger.REQUIRED))


@pytest.mark.slow
def test_every_kernel_compiles_within_the_limits(rows: list[Row]) -> None:
    assert rows
    found = [problem for row in rows for problem in ledger.problems(row)]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_the_table_is_current(rows: list[Row]) -> None:
    found = ledger.stale(ledger.TABLE.read_text(encoding="utf-8"), rows)
    assert not found, "\n".join([*found, "Write it anew: python -m triton_kernels.ledger"])


def test_the_table_lists_every_variant() -> None:
    """Compare names alone: nothing is compiled."""
    found = ledger.collect(ledger.modules())
    rows = [Row(module, variant, {}) for module, of_module in found.items() for variant in of_module]
    table = ledger.TABLE.read_text(encoding="utf-8")
    assert not (problems := ledger.stale(table, rows)), "\n".join(problems)
    assert [line.removeprefix("## ") for line in table.splitlines() if line.startswith("## ")] == list(found)


def test_no_kernel_is_forgotten() -> None:
    modules = ledger.modules()
    assert not (found := ledger.forgotten(modules, ledger.collect(modules))), "\n".join(found)


def test_a_forgotten_kernel_is_reported() -> None:
    modules = [module(TINY, tiny_kernel=tiny_kernel, hungry_kernel=hungry_kernel)]
    [problem] = ledger.forgotten(modules, ledger.collect(modules))
    assert "hungry_kernel is in no variants()" in problem


def test_a_variant_of_two_modules_is_listed_once() -> None:
    other = replace(TINY, options={"num_warps": 8, "enable_fp_fusion": True})
    assert ledger.collect([module(TINY), module(TINY, other)]) == {"op": [TINY, other]}


def test_a_spill_is_reported_unless_it_is_allowed() -> None:
    row = compiled(HUNGRY, 80, 90)
    for capability, usage in row.usage.items():
        assert isinstance(usage, Usage) and usage.registers == 255 and usage.spill_bytes > 0
        assert f"sm_{capability} spills {usage.spill_bytes} bytes" in "\n".join(ledger.problems(row))
    most = max(usage.spill_bytes for usage in row.usage.values() if isinstance(usage, Usage))
    assert ledger.problems(replace(row, variant=replace(HUNGRY, max_spill_bytes=most))) == []
    assert ledger.problems(replace(row, variant=replace(HUNGRY, max_spill_bytes=most - 1))) != []


def test_shared_memory_over_the_limit_is_reported() -> None:
    row = compiled(DEEP, 80, 90)
    assert {usage.shared_bytes for usage in row.usage.values() if isinstance(usage, Usage)} == {6 * 32 * 1024}
    [problem] = ledger.problems(row)  # 192 KiB: more than sm_80 has, less than sm_90 has
    assert "sm_80 needs 196608 bytes of shared memory, a block has 166912" in problem


@pytest.mark.parametrize(("multiples_of_16", "is_asynchronous"), [((), False), (("stride",), True)])
def test_alignment_reaches_the_compiler(multiples_of_16: tuple[str, ...], is_asynchronous: bool) -> None:
    """Rows of bf16 with an unaligned stride are loaded 2 bytes at a time, too few for asynchronous copies."""
    variant = replace(DEEP, signature={**DEEP.signature, "x_ptr": "*bf16"}, multiples_of_16=multiples_of_16)
    usage = ledger.measure(variant, 90)
    assert isinstance(usage, Usage) and (usage.shared_bytes >= 6 * 16 * 1024) == is_asynchronous


def test_a_kernel_that_does_not_compile_is_reported_where_it_must() -> None:
    row = compiled(BROKEN, 90, 100)
    [problem] = ledger.problems(row)
    assert "sm_90 does not compile" in problem and "not for this GPU" in problem
    assert row.cell(100) == "does not compile" and row.cell(80) == "-"


def test_a_row_names_everything_that_distinguishes_it() -> None:
    variant = Variant(
        deep_kernel,
        {"x_ptr": "*bf16", "N": "i64", "stride": "i32"},
        {"BLOCK": 8, "STAGES": 2, "out_ptr": None},
        {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False},
        multiples_of_16=("stride",),
    )
    specialisation = "BLOCK=8, STAGES=2, no out, x:bf16, N:i64, stride=16n, enable_fp_fusion=False"
    assert ledger.key(variant) == ("`deep_kernel`", specialisation, "8", "2")


def test_a_stale_row_is_reported() -> None:
    usage = {80: Usage(32, 0, 16, 4), 90: Usage(40, 0, 16, 4)}
    row, other = Row("op", TINY, usage), Row("op", HUNGRY, {90: Usage(255, 8, 0, 1)})
    assert ledger.stale(ledger.render([nameless := Row("op", BROKEN, {})]), [nameless]) == []
    table = ledger.render([row, other])
    assert ledger.stale(table, [row, other]) == []
    changed = replace(row, usage=usage | {90: Usage(41, 0, 16, 12)})
    [problem] = ledger.stale(table, [changed, other])
    assert problem.endswith("on sm_90 is 41 / 0 / 16 (12 warps), the table says 40 / 0 / 16")
    # Another version of Triton may allocate other registers, but it compiles the same kernels.
    table_of_another = table.replace(f"Made with Triton {triton.__version__}.", "Made with Triton 0.0.")
    assert ledger.stale(table_of_another, [changed, other]) == []
    [problem] = ledger.stale(table_of_another, [row])
    assert problem == "hungry_kernel [BLOCK=8192, 1 warps] is in the table and no longer compiled"
    assert ledger.stale(table, [row], kernel="tiny_kernel") == []
    [problem] = ledger.stale(ledger.render([other]), [row, other])
    assert problem == "tiny_kernel [BLOCK=128, 4 warps] is not in the table"


def test_the_command_checks_what_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "kernels.md"
    table.write_text("", encoding="utf-8")
    monkeypatch.setattr(ledger, "TABLE", table)
    monkeypatch.setattr(ledger, "modules", lambda: [module(TINY, tiny_kernel=tiny_kernel)])
    assert ledger.main([]) == 0 and ledger.main(["--check"]) == 0
    text = table.read_text(encoding="utf-8")
    assert "## op" in text and len([line for line in text.splitlines() if line.startswith("| `tiny_kernel` | ")]) == 1
    table.write_text(text.replace("BLOCK=128", "BLOCK=256"), encoding="utf-8")
    capsys.readouterr()
    assert ledger.main(["--check"]) == 1
    assert "tiny_kernel [BLOCK=128, 4 warps] is not in the table" in capsys.readouterr().err
    assert ledger.main(["--kernel", "tiny_kernel"]) == 0 and "BLOCK=256" in table.read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith("tiny_kernel [BLOCK=128, 4 warps]  sm_80 ")
    with pytest.raises(SystemExit, match="2"):
        ledger.main(["--kernel", "other_kernel"])
    monkeypatch.setattr(ledger, "modules", lambda: [module(HUNGRY)])
    assert ledger.main([]) == 1
    assert "spills" in capsys.readouterr().err


def test_without_a_checkout_the_table_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "TABLE", tmp_path / "docs" / "kernels.md")
    monkeypatch.setattr(ledger, "modules", lambda: [module(TINY, tiny_kernel=tiny_kernel)])
    assert ledger.main([]) == 0
    written = capsys.readouterr()
    assert written.out.startswith("# Kernels\n") and "\n| `tiny_kernel` | BLOCK=128 | 4 | - | " in written.out
    assert written.err.startswith("tiny_kernel [BLOCK=128, 4 warps]  sm_80 ")  # progress is no part of the table
    assert not any(tmp_path.iterdir())


def test_an_installed_package_refuses_to_check_before_it_compiles(tmp_path: Path) -> None:
    shutil.copytree(Path(ledger.__file__).parent, tmp_path / "triton_kernels", ignore=lambda *_: ["__pycache__"])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "triton_kernels.ledger", "--check"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and not (tmp_path / "cache").exists()
    assert f"of a checkout; {tmp_path / 'docs' / 'kernels.md'} does not exist" in run.stderr
