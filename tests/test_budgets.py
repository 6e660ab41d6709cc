"""Sizes of files and functions, and who may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("dsm_train", "triton_kernels") for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (n.split(".")[0] for n in [*names, getattr(node, "module", None) or ""] if n)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (130 if path.name == "train.py" else 400)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
            lines = node.end_lineno - node.lineno + 1 - docstring
            assert lines <= (100 if is_kernel else 60), f"{path.name}: {node.name} has {lines} lines"


def test_the_loop_of_algorithm_1_fits_a_glance() -> None:
    (loop,) = (node for node in ast.walk(parse(ROOT / "dsm_train" / "train.py")) if isinstance(node, ast.For))
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno + 1 <= 20


def test_only_the_megatron_package_imports_megatron() -> None:
    inside = ROOT / "dsm_train" / "megatron"
    assert [str(path) for path in FILES if inside not in path.parents and "megatron" in imported(path)] == []


def test_the_ops_stand_alone() -> None:
    kernels = [path for path in FILES if ROOT / "triton_kernels" in path.parents]
    assert kernels and not {"dsm_train", "megatron"} & {name for path in kernels for name in imported(path)}
