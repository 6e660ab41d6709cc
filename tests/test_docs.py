"""The README and the pages of docs/: snippets run, paths exist, links lead somewhere, pictures can be drawn again."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PICTURES = [path for path in sorted((ROOT / "docs" / "pictures").glob("*.py")) if path.stem != "style"]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_readme_runs_when_it_is_pasted(snippet: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(snippet, "README.md", "exec"), {})
    assert printed.getvalue()


def test_every_path_of_the_map_exists() -> None:
    tree = README.split("## Map", 1)[1].split("```", 2)[1]
    folder, missing = ROOT, []
    for line in tree.strip().splitlines():
        names = re.match(r"\s*((?:[\w.]*[./][\w.]*\s*)+)", line)
        assert names is not None, line
        paths = names.group(1).split()
        if not line.startswith(" "):
            folder = ROOT / paths[0]
        missing += [name for name in paths if not ((folder if line.startswith(" ") else ROOT) / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_of_a_page_begins_with_a_word_that_hides_its_subject(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    hidden = re.findall(r"(?:^|[.!?:] |\| )(?:Of|What|Where|Whether) .{0,40}", text, re.MULTILINE)
    assert not hidden


def test_no_sentence_of_a_docstring_begins_with_a_word_that_hides_its_subject() -> None:
    hidden = []
    for package in ("dsm_train", "triton_kernels", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
                if isinstance(text, str) and re.search(r"(?:^|[.!?] +)(?:Of|What|Where|Whether) ", text):
                    hidden.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not hidden


@pytest.mark.parametrize("script", PICTURES, ids=lambda path: path.stem)
def test_a_picture_can_be_drawn_again(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script))["draw"](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert script.with_suffix(".png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left_in_a_page(page: Path) -> None:
    assert not re.search(r"^[A-Z_]{8,}$", page.read_text(encoding="utf-8"), re.MULTILINE)
