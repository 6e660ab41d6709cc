"""Imports go one way: no circles, no arrow from a lower floor to a higher one."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("dsm_train", "triton_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
}
CORPUS = ("config", "engine", "text cleaning", "mining", "tokenise", "demo", "stage")
"""Floors of the corpus from the lowest to the highest; neighbours on a floor do not import each other."""


TRAINER = (
    "installed",
    "config",
    "types",
    "rows checkpoint.config data.config eval.config rewards.config rollout.config verify.config",
    "configs",
    "stages.table",
    "cli",
    "watchdog",
    "data.tasks",
    "rewards",
    "data hf packing",
    "megatron",
    "losses grpo balance examples",
    "course",
    "update",
    "reporting.metrics reporting.record",
    "reporting.report reporting.folder",
    "rollout",
    "eval not_finite",
    "prepare",
    "checkpoint",
    "loop",
    "run reporting.journal reporting.runs",
    "explore",
    "train supervise",
    "verify",
    "stages corpus",
    "__main__",
)
"""Floors of the trainer, likewise; a room's own modules may import each other."""


def imported(path: Path) -> Iterator[str]:
    """Names of modules that a file imports, inside functions too; types that only checkers read are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (module if module in FILES else node.module for module in modules)


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: {other for other in imported(path) if other in FILES} for name, path in FILES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_trainer_is_built_in_floors() -> None:
    floor = {room: height for height, rooms in enumerate(TRAINER) for room in rooms.split()}

    def room_of(module: str) -> str | None:
        parts = module.split(".")[1:]
        return next((room for n in (2, 1) if (room := ".".join(parts[:n])) in floor), None)

    for name, path in FILES.items():
        if not name.startswith("dsm_train.") or name.startswith("dsm_train.corpus.") or path.name == "__init__.py":
            continue
        room = room_of(name)
        assert room is not None, f"{name} stands on no floor"
        for module in imported(path):
            other = room_of(module) if module.startswith("dsm_train.") else None
            assert other in (None, room) or floor[other] < floor[room], f"{name} imports {module}"


def test_the_corpus_is_built_in_floors() -> None:
    floor = {room: height for height, rooms in enumerate(CORPUS) for room in rooms.split()}
    for name, path in FILES.items():
        if not name.startswith("dsm_train.corpus."):
            continue
        room = name.split(".")[2]
        for module in imported(path):
            other = module.split(".")[2] if module.startswith("dsm_train.corpus.") else room
            assert other == room or floor[other] < floor[room], f"{name} imports {module}"
