"""Decontamination: equal words, removed and merely reported pages, and the step's report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from peak import printed_by

from dsm_train.corpus.cleaning.benchmark_sets import Benchmarks, Item, Match, Words
from dsm_train.corpus.cleaning.decontaminate import clean, decontaminate
from dsm_train.corpus.config import DecontaminateConfig, EngineConfig
from dsm_train.corpus.engine.page import Page, read_pages, shards, write_pages

QUESTION = "Tom's farm has 1,200 hens and half as many ducks; how many birds are there in all?"
ANSWER = "Half of 1,200 is 1200/2=<<1200/2=600>>600 ducks.\nSo 1200+600=<<1200+600=1800>>1800 birds in all.\n#### 1800"
CHINESE = "小明有12个苹果,小红比他多5个,两人一共有多少个苹果?"
ITEMS = [
    {"question": QUESTION, "answer": ANSWER},
    {"question": CHINESE, "answer": "29"},
    {"question": "What is 2+2?", "answer": 4},
    {"problem": "Compute $\\left(\\frac{a}{b}\\right)$ twice now", "solution": "no"},
]
SEGMENT = DecontaminateConfig(benchmarks=("b.jsonl",))
PAGE = DecontaminateConfig(benchmarks=("b.jsonl",), level="page")
FILLER = "nothing here belongs to any benchmark at all since it was written for this very test"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmarks") / "b.jsonl"
    path.write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in ITEMS) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def benchmarks(file: Path) -> Benchmarks:
    return Benchmarks.from_files([file])


def check(benchmarks: Benchmarks, text: str) -> list[Match]:
    return benchmarks.check(Words.of(text))[0]


def by_expression(text: str) -> list[str]:
    """Words the plain way, without LaTeX."""
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.lower()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "one",
        "Tom’s 1,200 hens, 12,34 and 1,2345; a_1=3.5!",
        "小明有12个apples和5pears",
        "naïve ÉCOLE Ωmega straße",
        "line one\nline\ttwo\r\nthree\u2028four",
        "\U0010ffff\ud800 odd \x00 characters",
    ],
)
def test_words_are_those_of_a_regular_expression(text: str) -> None:
    words = Words.of("before", text, "behind 小")
    assert words.list(1) == by_expression(text)
    assert words.lengths().tolist() == [1, len(by_expression(text)), 2]
    first, end = words.first_P[1], words.first_P[2] - 1
    assert np.array_equal(words.hashes()[first:end], Words.of(text).hashes()[:-1])  # wherever the text stands
    assert sum((Words.of(line).list(0) for line in text.split("\n")), []) == words.list(1)


def test_hashes_do_not_depend_on_blocks_nor_memory_on_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words.of("a page, then   another" + " " * 50, "", "小明有12个apples " + "x" * 40 + " y")
    whole = words.hashes()
    for block in (1, 7, 30):
        monkeypatch.setattr("dsm_train.corpus.cleaning.benchmark_sets._BLOCK", block)
        assert np.array_equal(words.hashes(), whole)
    code = """
from dsm_train.corpus.cleaning.benchmark_sets import Words
Words.of("word " * 100_000).hashes()
words, before = Words.of("word " * 2_000_000), peak_kibibytes()
words.hashes()
print(peak_kibibytes() - before)
"""
    assert int(printed_by(code)) < 50_000  # of 10,000,000 characters


def test_a_stretch_of_words_is_part_of_their_list() -> None:
    words = Words.of("one", "two 小明 three four", "five")
    assert words.list(1) == words.list(1, 0, 5) == ["two", "小", "明", "three", "four"]
    assert words.list(1, 1, 4) == ["小", "明", "three"] and words.list(2, 0, 1) == ["five"]


def test_layout_does_not_count() -> None:
    same = [
        r"$\left(\frac{1}{2}\right) \times 1{,}200$ is \text{Half} of <<1+1=2>>it",
        r"\dfrac 1 2 \cdot 1\,200 IS half of it",
        "½·1,200 is half … of it".replace("½", "1/2"),
    ]
    assert [Words.of(text).list(0) for text in same] == [["1", "2", "1200", "is", "half", "of", "it"]] * 3
    assert Words.of(r"\leftarrow \sinx").list(0) == ["leftarrow", "sinx"]  # other commands do


def test_what_is_indexed_is_counted(benchmarks: Benchmarks) -> None:
    counts = benchmarks.counts
    # Question, answer and solution of the first, the questions of the others; too short are "29", "4" and "no".
    assert (counts.items, counts.texts, counts.exact, counts.skipped) == (4, 6, 2, 3)
    assert counts.grams > 20


@pytest.mark.parametrize(
    ("text", "item"),
    [
        (QUESTION, Item("b", 1, "question")),
        (QUESTION.upper().replace(" ", "\n"), Item("b", 1, "question")),
        ("farm has $1{,}200$ hens and half as many ducks how", Item("b", 1, "question")),
        (ANSWER, Item("b", 1, "answer")),
        (re.sub("<<.*?>>", "", ANSWER), Item("b", 1, "answer")),
        (CHINESE, Item("b", 2, "question")),
        ("小红比他多5个两人一", Item("b", 2, "question")),
    ],
)
def test_ten_words_in_a_row_match(text: str, item: Item, benchmarks: Benchmarks) -> None:
    words = f"{FILLER} {text} {FILLER}"
    matches = check(benchmarks, words)
    assert matches and all(match.kind == "ngram" and match.item.benchmark == "b" for match in matches)
    assert matches[0].item == item
    length = Words.of(text).lengths()[0]
    start = Words.of(FILLER).lengths()[0]
    assert (matches[0].start, matches[-1].end) == (start, start + length)


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("farm has 1200 hens and half as many ducks", 9),
        ("has 1200 hens and half as many ducks", 8),
        ("红比他多5个两人", 8),
    ],
)
def test_eight_or_nine_words_are_a_near_miss(text: str, run: int, benchmarks: Benchmarks) -> None:
    (match,) = check(benchmarks, f"{FILLER} {text} {FILLER}")
    assert match.kind == "near" and match.end - match.start == run == Words.of(text).lengths()[0]


@pytest.mark.parametrize(
    "text", ["1200 hens and half as many ducks", "ducks many as half and hens 1200 has farm s", FILLER, ""]
)
def test_fewer_words_or_another_order_is_nothing(text: str, benchmarks: Benchmarks) -> None:
    assert check(benchmarks, text) == []


def test_short_texts_match_as_a_whole(benchmarks: Benchmarks) -> None:
    (match,) = check(benchmarks, f"{FILLER} what is 2 + 2 {FILLER}")
    assert match.kind == "exact" and match.item == Item("b", 3, "question") and match.end - match.start == 4
    assert check(benchmarks, "what is 2 and 2") == [] and check(benchmarks, "so it is 29, or 4") == []
    (match,) = check(benchmarks, "compute a / b twice now")
    assert match.item == Item("b", 4, "problem")


def test_texts_of_a_batch_do_not_run_into_each_other(benchmarks: Benchmarks) -> None:
    half = Words.of(QUESTION).list(0)
    words = Words.of(" ".join(half[:7]), " ".join(half[7:15]), QUESTION, "")
    assert [len(matches) for matches in benchmarks.check(words)] == [0, 1, 1, 0]
    assert [match.kind for match in benchmarks.check(words)[1]] == ["near"]


def make_page(text: str, number: int = 1) -> Page:
    return Page(f"{number:016x}", f"http://a.org/{number}", text, "en", "2024", tokens=99)


def test_the_segment_goes_and_the_rest_stays(benchmarks: Benchmarks) -> None:
    broken = QUESTION.replace("half", "half\n")  # a question over two lines
    page = make_page(f"{FILLER}\n\n{broken}\n{FILLER}")
    (cleaned,) = clean([page], benchmarks, SEGMENT)
    assert cleaned.page == Page(page.id, page.url, f"{FILLER}\n\n{FILLER}", "en", "2024", tokens=0)
    (removal,) = cleaned.removals
    assert (removal.action, removal.kind, removal.line, removal.field) == ("segment", "ngram", 1, "question")
    assert removal.text == broken and removal.words.startswith("tom s farm has 1200 hens")


def test_a_page_with_nothing_left_goes(benchmarks: Benchmarks) -> None:
    (cleaned,) = clean([make_page(f"Exercise 3\n{QUESTION}\nnext")], benchmarks, SEGMENT)
    assert cleaned.page is None and cleaned.removals[0].action == "page"


def test_level_page_removes_the_page(benchmarks: Benchmarks) -> None:
    pages = [make_page(f"{FILLER}\n{QUESTION}", 1), make_page(FILLER, 2)]
    cleaned = clean(pages, benchmarks, PAGE)
    assert cleaned[0].page is None and cleaned[0].removals[0].action == "page"
    assert cleaned[1].page is pages[1] and cleaned[1].removals == ()


def test_a_near_miss_changes_nothing(benchmarks: Benchmarks) -> None:
    page = make_page(f"{FILLER}\nfarm has 1200 hens and half as many ducks\n{FILLER}")
    for config in (SEGMENT, PAGE):
        (cleaned,) = clean([page], benchmarks, config)
        assert cleaned.page is page
        (removal,) = cleaned.removals
        assert (removal.action, removal.text) == ("near miss", "farm has 1200 hens and half as many ducks")


@pytest.mark.parametrize(("ngram", "first"), [(5, 3), (4, 4), (13, 1)])
def test_other_lengths(ngram: int, first: int, file: Path) -> None:
    benchmarks = Benchmarks.from_files([file], ngram, first)
    half = Words.of(QUESTION).list(0)
    assert [match.kind for match in check(benchmarks, " ".join(half[2 : 2 + ngram]))][:1] == ["ngram"]
    assert "ngram" not in [match.kind for match in check(benchmarks, " ".join(half[2 : 1 + ngram]))]
    assert (benchmarks.counts.skipped == 0) == (first == 1)


def test_the_step_writes_pages_and_a_report(file: Path, tmp_path: Path) -> None:
    near = "farm has 1200 hens and half as many ducks"
    texts = [f"{FILLER}\n{QUESTION}", FILLER, f"{FILLER}\n{near}", QUESTION, f"{FILLER} What is 2 + 2?\n{FILLER}"]
    pages = [make_page(text, number) for number, text in enumerate(texts)]
    for index in range(2):
        write_pages(tmp_path / "in" / f"{index:05d}.jsonl.gz", pages[index::2])
    config, out = DecontaminateConfig(benchmarks=(str(file),)), tmp_path / "out"
    report = decontaminate(config, EngineConfig(workers=1), shards(tmp_path / "in"), out)
    expected = {"pages": 5, "pages_removed": 1, "pages_cut": 2, "near_misses": 1}
    assert report.counts == expected
    kept = {page.id: page.text for path in shards(out) for page in read_pages(path)}
    assert [kept.get(page.id) for page in pages] == [FILLER, FILLER, texts[2], None, FILLER]
    assert sorted(path.name for path in (out / "report").iterdir()) == [
        "near_misses.jsonl",
        "removed.jsonl",
        "summary.json",
    ]
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["found_most"] == [["b:1 question", 2], ["b:3 question", 1]]
    assert (summary["ngram"], summary["exact"], summary["items"], summary["benchmarks"]["texts"]) == (2, 1, 2, 6)
    removed = [json.loads(line) for line in (out / "report" / "removed.jsonl").read_text().splitlines()]
    assert {(row["url"], row["action"]) for row in removed} == {
        ("http://a.org/0", "segment"),
        ("http://a.org/3", "page"),
        ("http://a.org/4", "segment"),
    }
    (miss,) = [json.loads(line) for line in (out / "report" / "near_misses.jsonl").read_text().splitlines()]
    assert miss["words"] == near and miss["action"] == "near miss"
    # Another benchmark in the same file's place would give other pages.
    copy = tmp_path / "copy.jsonl"
    copy.write_text(file.read_text())
    with pytest.raises(ValueError, match="another configuration"):
        decontaminate(DecontaminateConfig(benchmarks=(str(copy),)), EngineConfig(), shards(tmp_path / "in"), out)
    assert decontaminate(config, EngineConfig(), shards(tmp_path / "in"), out).counts == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a"}\n{broken', "b.jsonl:2: is not JSON"),
        ('{"query": "a"}', "b.jsonl:1: has no text under question or answer"),
        ("[1]", "b.jsonl:1: has no text under"),
    ],
)
def test_benchmarks_that_cannot_be_read_are_said(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        Benchmarks.from_files([tmp_path / "b.jsonl"])


def test_no_benchmarks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decontaminate.benchmarks"):
        Benchmarks.from_files([])
    with pytest.raises(ValueError, match="cannot be read.*check decontaminate.benchmarks"):
        Benchmarks.from_files([tmp_path / "none.jsonl"])
