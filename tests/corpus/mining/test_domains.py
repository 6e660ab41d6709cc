"""Base URLs, prefixes and their counts, against counting in a dictionary."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dsm_train.corpus.engine.engine import Task
from dsm_train.corpus.engine.page import Page, page_id, write_pages
from dsm_train.corpus.mining import domains
from dsm_train.corpus.mining.domains import (
    Count,
    CountDomains,
    CountPrefixes,
    Index,
    Merge,
    base_url,
    folders,
    mathematical,
    read_counts,
    url_prefixes,
    write_counts,
)
from dsm_train.corpus.mining.select import Cut, ScoreRow, write_scores

URLS = [
    ("https://www.MathOverflow.net:443/questions/1", "mathoverflow.net"),
    ("http://user:word@Example.org./a@b", "example.org"),
    ("//cdn.example.org/x", "cdn.example.org"),
    ("example.org?q=http://other.org", "example.org"),
    ("http://[2001:db8::1]:8080/x", "[2001:db8::1]"),
    ("http://例え.jp/路径", "例え.jp"),
    ("http://www.www.org", "www.org"),
    ("/only/a/path", ""),
    ("", ""),
]


@pytest.mark.parametrize(("url", "host"), URLS)
def test_base_url(url: str, host: str) -> None:
    assert base_url(url) == host


def test_prefixes_go_step_by_step_and_leave_the_query_out() -> None:
    url = "https://www.a.org//b/c/?x=/d#e/f"
    assert list(url_prefixes(url)) == ["a.org", "a.org/b", "a.org/b/c"]
    assert list(url_prefixes("https://a.org")) == ["a.org"]


def test_folders_leave_the_page_itself_out() -> None:
    assert folders("http://a.org/b/c.html") == ["a.org", "a.org/b"]
    assert folders("http://a.org/b/c/?x=1") == ["a.org", "a.org/b", "a.org/b/c"]
    assert folders("http://a.org/1/2/3/4/5/6") == ["a.org", "a.org/1", "a.org/1/2", "a.org/1/2/3"]
    assert folders("http://a.org/") == folders("http://a.org") == folders("http://a.org/page") == ["a.org"]


def make_shards(folder: Path, shards: int, parts: int) -> tuple[list[Task], Cut, list[tuple[str, bool]]]:
    """Shards of pages, indexed, with scores of which the positive ones are collected; the tasks to count them."""
    rng = random.Random(0)
    truth, tasks = [], []
    cut = Cut(0.0, 0, 0, 0)
    for index in range(shards):
        urls = [
            f"http://www.site{rng.randrange(12)}.org/{rng.choice(['a', 'b/c', 'b'])}/{rng.randrange(9)}"
            for _ in range(70)
        ]
        scores = [rng.choice([-1.0, 1.0]) for _ in urls]
        truth += [(url, score > 0) for url, score in zip(urls, scores, strict=True)]
        pages = [Page(page_id(url, str(n)), url, "text", "en", str(n)) for n, url in enumerate(urls)]
        paths = [
            folder / kind / f"{index:05d}.{suffix}"
            for kind, suffix in (("p", "jsonl"), ("i", "parquet"), ("s", "parquet"))
        ]
        write_pages(paths[0], pages)
        assert Index()(Task(index, (paths[0],), paths[1])) == {"pages": 70}
        write_scores(paths[2], (ScoreRow(int(p.id, 16), 1, s) for p, s in zip(pages, scores, strict=True)))
        tasks.append(Task(index, (paths[1], paths[2]), folder / "by-shard" / f"{index:05d}.parquet"))
    return tasks, cut, truth


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("rows", [10, 1 << 22])  # 10: tables are summed before all are read
def test_counts_are_those_of_a_dictionary(
    parts: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domains, "_ROWS", rows)
    tasks, cut, truth = make_shards(tmp_path, 3, parts)
    pages, collected = Counter(base_url(url) for url, _ in truth), Counter(base_url(url) for url, yes in truth if yes)
    for task in tasks:
        CountDomains(cut, parts)(task)
    merged = [tmp_path / f"merged-{part}.parquet" for part in range(parts)]
    for part, path in enumerate(merged):
        Merge(len(tasks))(Task(part, (tmp_path / "by-shard",), path))
    found = {count.prefix: count for count in read_counts(merged)}
    assert found == {site: Count(site, pages[site], collected[site]) for site in pages}
    if parts > 1:
        assert all(0 < len(list(read_counts([path]))) < len(pages) for path in merged)


def test_prefixes_are_counted_in_the_given_domains_only(tmp_path: Path) -> None:
    tasks, cut, truth = make_shards(tmp_path, 2, 2)
    write_counts(tmp_path / "domains.parquet", [Count("site1.org", 1, 1), Count("site2.org", 1, 1)])
    for task in tasks:
        CountPrefixes(cut, 2, tmp_path / "domains.parquet", 0.1, 1)(task)
    merged = [tmp_path / f"merged-{part}.parquet" for part in range(2)]
    for part, path in enumerate(merged):
        Merge(len(tasks), min_pages=4)(Task(part, (tmp_path / "by-shard",), path))
    wanted = [(url, yes) for url, yes in truth if base_url(url) in ("site1.org", "site2.org")]
    pages = Counter(prefix for url, _ in wanted for prefix in folders(url))
    collected = Counter(prefix for url, yes in wanted if yes for prefix in folders(url))
    expected = {prefix: Count(prefix, n, collected[prefix]) for prefix, n in pages.items() if n >= 4}
    assert {count.prefix: count for count in read_counts(merged)} == expected
    assert {"site1.org", "site1.org/b", "site1.org/b/c"} <= expected.keys()


def test_a_domain_is_mathematical_above_the_share_and_the_most_to_gain_comes_first() -> None:
    counts = [
        Count("ten-percent.org", 100, 10),
        Count("above.org", 100, 11),
        Count("large.org", 1000, 200),
        Count("all.org", 20, 20),
        Count("small.org", 9, 9),
        Count("", 50, 50),
    ]
    assert [domain.prefix for domain in mathematical(counts, 0.10, 10)] == ["large.org", "above.org", "all.org"]


def test_parts_grow_with_the_pages() -> None:
    assert domains.num_parts(1000) == 1
    assert domains.num_parts(40_000_000_000) == 256


def test_scores_and_index_of_other_pages_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    page = Page(page_id("u", ""), "http://a.org", "", "", "")
    write_pages(tmp_path / "p.jsonl", [page])
    Index()(Task(0, (tmp_path / "p.jsonl",), tmp_path / "i.parquet"))
    write_scores(tmp_path / "s.parquet", [ScoreRow(1, 1, np.nan)] * 2)
    with pytest.raises(ValueError):
        CountDomains(Cut(0.0, 0, 0, 0), 1)(
            Task(0, (tmp_path / "i.parquet", tmp_path / "s.parquet"), tmp_path / "o.parquet")
        )
