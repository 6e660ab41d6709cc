"""The benchmark of the corpus: a run from the command line to its rows, and the arguments it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.corpus import StepRow, compare_extraction, html_pages, main, with_growth
from dsm_train.corpus.demo.synthetic_web import make

STEPS = ["extract", "dedup url, exact", "dedup near", "round", "decontaminate", "tokenise"]


def test_every_step_has_a_row_with_what_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = main(["--pages", "500", "--only", "steps", "--out", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == STEPS
    given = [row["pages"] for row in rows]
    assert given[0] == 500 and given == sorted(given, reverse=True) and given[-1] > 50
    assert all(row["cpu_seconds"] > 0 and row["worker_bytes"] > 2**24 and row["versions"]["datatrove"] for row in rows)
    assert path.with_suffix(".png").stat().st_size > 10_000
    told = capsys.readouterr()
    assert all(step in told.out for step in STEPS) and "500 pages took" in told.err


def test_both_extract_the_same_pages(tmp_path: Path) -> None:
    make(tmp_path, 0, 500)
    pages = html_pages(sorted((tmp_path / "warc").glob("*")), 20)
    ours, plain = compare_extraction("synthetic", pages, 3)
    assert (ours.contender, ours.pages, ours.ratio_to_ours, len(ours.repetitions)) == ("ours", 20, 1.0, 3)
    assert plain.pages == 20 and plain.ratio_to_ours > 0
    assert ours.page_bytes == plain.page_bytes == sum(map(len, pages)) / 20


def test_growth_is_the_exponent_between_neighbours() -> None:
    row = StepRow("extract", 1000, 1000, 0.0, 2.0, 0.0, 0.0, 0)
    larger = [replace(row, web_pages=10_000, pages=10_000, cpu_seconds=20.0), replace(row, web_pages=100_000)]
    larger[1] = replace(larger[1], pages=100_000, cpu_seconds=2000.0)
    assert [grown.growth for grown in with_growth([row, *larger])] == [None, pytest.approx(1.0), pytest.approx(2.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--pages", "100"], "--pages: at least 500, got 100"), (["--warc", "nowhere.warc"], "no file 'nowhere.warc'")],
)
def test_what_cannot_work_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
