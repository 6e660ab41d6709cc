"""Annotations: the prefix a URL belongs to, files that people write, rules, and the page for the browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dsm_train.corpus.mining.annotate import (
    Annotations,
    Rule,
    apply_rules,
    from_decisions,
    load_rules,
    write_annotations,
)
from dsm_train.corpus.mining.annotate_page import Domain, Sample, write_annotation_page
from dsm_train.corpus.mining.domains import Count


def test_the_longest_prefix_decides() -> None:
    annotations = Annotations(("a.org", "b.org/x", "a.org/press/math"), ("a.org/press",))
    assert annotations.is_math("http://www.A.org/anything?q=1")
    assert not annotations.is_math("http://a.org/press/1")
    assert annotations.is_math("http://a.org/pressure")  # by steps of the path, not by letters
    assert annotations.is_math("http://a.org/press/math/2")
    assert annotations.is_math("http://b.org/x") and not annotations.is_math("http://b.org/y/x")
    assert not annotations.is_math("http://sub.a.org/") and not annotations.is_math("")


def test_what_a_person_writes_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "annotations.yaml"
    path.write_text(
        "# a comment\nmath:\n- https://www.MathOverflow.net/questions/*\n- 1.5\n# - example.org\n- a.org/路径\n"
        "- a.org\n- a.org/\nnot_math:\n"
    )
    assert Annotations.load(path) == Annotations(("mathoverflow.net/questions", "1.5", "a.org/路径", "a.org"), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("math: a.org", "math must be a list"),
        ("math: [{a: b}]", "math must be a list"),
        ("done: perhaps", "done must be true or false, got 'perhaps'"),
        ("maths: [a.org]", "unknown key 'maths'"),
        ("math: [/path]", "'/path' under math has no host"),
        ("math: [a.org]\nnot_math: [www.a.org]", "'a.org' is under math and under not_math"),
        ("math: [a.org", "not YAML"),
        ("- a.org", "must hold done, math, not_math"),
        ("", "must hold done, math, not_math"),
    ],
)
def test_what_a_person_gets_wrong_is_said(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "annotations.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Annotations.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read.*check the path"):
        Annotations.load(tmp_path / "none.yaml")


def test_suggestions_are_comments_and_uncommented_they_count(tmp_path: Path) -> None:
    path = tmp_path / "annotations.yaml"
    known = Annotations(("a.org", "odd: one.org/ 'x'"), ("a.org/press",), done=False)
    suggestions = [[Count("b.org", 10, 4), Count("b.org/x y", 6, 1)], [Count("a.org", 5, 5)]]
    write_annotations(path, known, "two\nlines", suggestions)
    text = path.read_text()
    assert Annotations.load(path) == known
    assert "# - b.org " in text and "# 10 pages, 40% collected, 6 to gain" in text
    assert text.count("a.org") == 2  # what is annotated is not suggested
    path.write_text(text.replace("# - ", "- ").replace("done: false", "done: true"))
    assert Annotations.load(path) == Annotations(("a.org", "odd: one.org/ 'x'", "b.org", "b.org/x y"), ("a.org/press",))


def test_the_last_rule_that_matches_decides_and_others_inherit(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(
        "rules:\n- {prefix: '*', min_share: 0.5, min_pages: 5}\n- {prefix: '*/shop', math: false}\n"
        "- {prefix: '*', max_share: 0.05, math: false}\n- {prefix: 'b.org/shop'}\n"
    )
    rules = load_rules(path)
    assert rules[1] == Rule("*/shop", math=False)
    counts = [
        Count("a.org", 10, 5),
        Count("a.org/shop", 6, 6),
        Count("a.org/x", 6, 2),  # goes with a.org
        Count("a.org/y", 20, 1),
        Count("b.org", 4, 4),  # too few pages for the first rule
        Count("b.org/shop", 4, 1),
        Count("c.org", 10, 4),
    ]
    found = apply_rules(rules, counts, Annotations(("d.org", "c.org"), ("a.org/z",)))
    assert found == Annotations(("a.org", "b.org/shop", "c.org", "d.org"), ("a.org/shop", "a.org/y", "a.org/z"))


def test_decisions_that_say_nothing_new_are_left_out() -> None:
    decided = {"a.org": True, "a.org/x": True, "a.org/x/y": False, "a.org/x/y/z": False, "b.org": False}
    assert from_decisions(decided) == Annotations(("a.org",), ("a.org/x/y",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: []", "write a list of rules"),
        ("rules: [{min_share: 0.5}]", "rule 1 must have a prefix"),
        ("rules: [{prefix: a, share: 1}]", "rule 1: unknown key 'share'"),
        ("rules: [{prefix: a}, {prefix: b, math: no}]", "rule 2: math must be true or false, got 'no'"),
        ("rules: [{prefix: a, min_share: half}]", "min_share must be a number, got 'half'"),
        ("rules: [{prefix: a, max_share: 20}]", "max_share is a share and must be in 0..1, got '20'"),
    ],
)
def test_rules_that_are_wrong_are_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rules(tmp_path / "rules.yaml")


HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \ud800"


@pytest.fixture
def page(tmp_path: Path) -> str:
    domains = [
        Domain(
            (Count("a.org", 10, 4), Count("a.org/x", 6, 1), Count("a.org/x/y", 3, 0)),
            (Sample("http://a.org/x", HOSTILE, False),),
        ),
        Domain((Count("b.org", 9, 2),), ()),
    ]
    path = tmp_path / "annotate.html"
    write_annotation_page(path, "Round 1", domains, Annotations(("a.org",), ("a.org/x/y",)))
    return path.read_text(encoding="utf-8")


def test_the_page_holds_its_data_and_hostile_text_stays_text(page: str) -> None:
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    record = json.loads(data[1])
    assert record["domains"][0]["samples"][0]["text"] == HOSTILE.replace("\ud800", "?")
    assert record["domains"][0]["counts"][1] == ["a.org/x", 6, 1]
    assert page.count("<script") == 2 and "<img" not in page


def test_the_page_needs_no_network(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:)?//""", re.sub(r'id="data">.*?</script>', "", page, flags=re.DOTALL)
    )
    assert "innerHTML" not in page and "fetch(" not in page


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_the_page_exports_the_file_that_is_read(page: str, tmp_path: Path) -> None:
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    script += """
const decisions = new Map([["a.org", true], ["a.org/x/y", false]]);
set(decisions, "b.org", true); set(decisions, "a.org/x", false); set(decisions, "a.org/x", true);
set(decisions, "odd one.org", true); set(decisions, "b.org", false);
const domains = [{counts: [["a.org", 10, 4], ["a.org/x", 6, 1], ["a.org/x/y", 3, 0]]}, {counts: [["b.org", 9, 2]]}];
console.log(JSON.stringify([toYaml(decisions), gained(decisions, domains), toYaml(new Map())]));
"""
    output = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True).stdout
    exported, gained, nothing = json.loads(output)
    path = tmp_path / "annotations.yaml"
    path.write_text(exported)
    assert Annotations.load(path) == Annotations(("a.org", "odd one.org"), ("a.org/x/y",))
    assert gained == 6 - 3
    path.write_text(nothing)
    assert Annotations.load(path) == Annotations()
