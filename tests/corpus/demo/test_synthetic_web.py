"""The synthetic web: one seed, the same bytes; WARC files that other tools read; the planted pages that it reports."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from warcio.archiveiterator import ArchiveIterator

from dsm_train.corpus.cleaning.fingerprints import normalise_url
from dsm_train.corpus.demo import synthetic_web
from dsm_train.corpus.demo.report import benchmark_texts, squashed
from dsm_train.corpus.demo.synthetic_html import MARKUPS, formula_html, parse_tex
from dsm_train.corpus.demo.synthetic_text import FORMULAS, Formula
from dsm_train.corpus.demo.synthetic_web import PageTruth, Truth, make
from dsm_train.corpus.demo.synthetic_words import CHINESE_MATHEMATICS, CHINESE_OTHER, MATHEMATICS, OTHER
from dsm_train.corpus.text.html import html_to_text

PAGES = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    make(folder, 3, PAGES)
    return folder


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    return Truth.load(folder / "truth.json")


@pytest.fixture(scope="module")
def bodies(folder: Path) -> dict[str, bytes]:
    """The body of every page by its id, read by warcio."""
    found = {}
    for path in sorted((folder / "warc").iterdir()):
        with open(path, "rb") as file:
            for record in ArchiveIterator(file, check_digests=True):
                status = record.http_headers and record.http_headers.get_statuscode()
                if record.rec_type == "response" and status == "200" and "html" in record.http_headers["Content-Type"]:
                    url, date = (record.rec_headers[name] for name in ("WARC-Target-URI", "WARC-Date"))
                    found[synthetic_web.page_id(url, date)] = record.content_stream().read()
    return found


@pytest.fixture(scope="module")
def texts(bodies: dict[str, bytes]) -> dict[str, str]:
    """The text of every page by its id."""
    return {id: html_to_text(body).text for id, body in bodies.items()}


def of_kind(truth: Truth, **wanted: object) -> list[PageTruth]:
    return [page for page in truth.pages if all(getattr(page, name) == value for name, value in wanted.items())]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 3), ("other", 4)):
        make(tmp_path / name, seed, PAGES)
    assert files(tmp_path / "same") == files(folder)
    other = files(tmp_path / "other")
    assert other.keys() == files(folder).keys() and all(other[name] != files(folder)[name] for name in other)


def test_warcio_reads_every_page_and_what_else_a_crawl_holds(folder: Path, truth: Truth, bodies: dict[str, bytes]):
    assert bodies.keys() == {page.id for page in truth.pages} and len(truth.pages) == PAGES
    kinds: Counter[str] = Counter()
    for path in (folder / "warc").iterdir():
        with open(path, "rb") as file:
            kinds.update(record.rec_type for record in ArchiveIterator(file))
    assert kinds["warcinfo"] == 1 and kinds["request"] > 0 and kinds["response"] > PAGES


def test_a_quarter_is_mathematics_in_two_languages_and_all_of_it_on_hidden_sites(truth: Truth) -> None:
    assert 0.2 < len(of_kind(truth, mathematics=True)) / PAGES < 0.3
    for page in truth.pages:
        known = CHINESE_MATHEMATICS | CHINESE_OTHER if page.language == "zh" else MATHEMATICS | OTHER
        assert page.topic in known and page.mathematics == (page.topic in MATHEMATICS | CHINESE_MATHEMATICS)
    assert len({page.topic for page in truth.pages}) > 25
    hidden = of_kind(truth, hidden=True)
    assert {urlsplit(page.url).netloc for page in hidden} == set(truth.hidden_sites) and len(truth.hidden_sites) >= 5
    assert all(page.mathematics for page in hidden) and {page.language for page in hidden} == {"en", "zh"}


def test_the_seed_knows_no_hidden_site_and_only_some_topics(truth: Truth) -> None:
    seed = of_kind(truth, seed=True)
    assert all(page.mathematics and not page.hidden and not page.copy and not page.damage for page in seed)
    assert len(seed) > 20 and len({page.topic for page in seed}) <= 5
    assert len({page.topic for page in truth.pages if page.hidden} - {page.topic for page in seed}) >= 8


def test_copies_are_what_they_say(truth: Truth, texts: dict[str, str]) -> None:
    known = {page.id: page for page in truth.pages}
    assert {kind: len(of_kind(truth, copy=kind)) for kind in ("url", "exact", "near")} == {
        "url": 9,
        "exact": 18,
        "near": 24,
    }
    for page in truth.pages:
        original = known[page.original]
        assert original.copy == "" and (page.id == original.id) == (page.copy == "")
        if page.copy:
            text, before = (re.findall(r"\w+", texts[one.id]) for one in (page, original))
            same_address = normalise_url(page.url) == normalise_url(original.url)
            assert same_address == (page.copy == "url") and page.date > original.date
            assert (text == before) == (page.copy == "exact")
            if page.copy == "near":
                assert len(set(text) & set(before)) > 0.85 * len(set(before))


def test_passages_of_the_benchmark_are_where_they_are_said_to_be(
    folder: Path, truth: Truth, texts: dict[str, str]
) -> None:
    passages = benchmark_texts(folder / "benchmark.jsonl")
    bare = {id: squashed(text) for id, text in texts.items()}
    contaminated = {page.id for page in of_kind(truth, contaminated=True)}
    assert {id for id, text in bare.items() if any(passage in text for passage in passages)} == contaminated
    near_misses = of_kind(truth, near_miss=True)
    assert (len(contaminated), len(near_misses)) == (9, 2)
    assert all("It was said that" in texts[page.id] for page in near_misses)
    assert not any(page.copy or page.damage == "script" for page in truth.pages if page.contaminated or page.near_miss)


def test_damaged_pages_are_damaged(truth: Truth, bodies: dict[str, bytes], texts: dict[str, str]) -> None:
    torn, script = of_kind(truth, damage="markup"), of_kind(truth, damage="script")
    assert torn and script and of_kind(truth, damage="charset")
    assert not any(b"</html>" in bodies[page.id] for page in torn)
    assert {page.id for page in script} == {id for id, text in texts.items() if len(text) < 100}


def test_every_formula_has_every_markup_and_is_read_back() -> None:
    for tex in {tex.replace("#", "7").replace("@", "x") for some in FORMULAS.values() for tex in some}:
        for markup in MARKUPS:
            text = html_to_text(f"<p>So we write {formula_html(Formula(tex), markup)} here.</p>".encode()).text
            if markup not in ("mathml", "html"):  # which have no TeX to give back
                assert f"${tex}$" in text, (markup, text)
            assert text.startswith("So we write ") and text.endswith(" here.") and len(text) > 18, (markup, text)


@pytest.mark.parametrize(
    ("tex", "message"), [("x}", "unbalanced"), (r"\nabla x", r"unknown command \\nabla"), ("x^", "argument is due")]
)
def test_tex_that_it_cannot_write_is_refused(tex: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tex(tex)


def test_a_web_of_few_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 500 pages, got 499"):
        make(tmp_path, 0, 499)


def test_padding_surrounds_a_page_and_leaves_its_text(folder: Path, bodies: dict[str, bytes], tmp_path: Path) -> None:
    make(tmp_path, 3, PAGES, padding=4000)
    assert len(files(tmp_path)["truth.json"]) == len(files(folder)["truth.json"])
    with open(tmp_path / "warc" / "synthetic-00000.warc.gz", "rb") as file:
        record = next(record for record in ArchiveIterator(file) if record.rec_type == "response")
        padded = record.content_stream().read()
        plain = bodies[synthetic_web.page_id(record.rec_headers["WARC-Target-URI"], record.rec_headers["WARC-Date"])]
    assert len(padded) > len(plain) + 4000 and html_to_text(padded).text == html_to_text(plain).text
