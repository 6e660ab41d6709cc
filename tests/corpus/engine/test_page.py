"""Shards of pages: written and read back, and errors that name the damaged line."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from peak import printed_by

from dsm_train.corpus.engine.page import SUFFIXES, Page, id_number, page_id, read_pages, shards, write_pages

# Line ends of every kind, quotes, another script, nothing at all, and scores at both ends.
PAGES = [
    Page("00ff", "http://a.org/1", 'a\nb\r\n\u2028"c"\\d\x00', "en", "2024-01-01T00:00:00Z"),
    Page("01ff", "http://b.org/?q=数", "求证 $x^2$", "zh", "2024-01-02T00:00:00Z", tokens=7, score=0.25),
    Page("02ff", "http://c.org", "", "", "", tokens=0, score=-math.inf),
]


def pages(count: int) -> list[Page]:
    return [Page(f"{i:016x}", f"http://a.org/{i}", f"page {i * i * 7919} " * 20, "en", "") for i in range(count)]


def comparable(page: Page) -> str:
    return repr(page)  # NaN is not equal to itself


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pages_survive_a_round_trip_and_bytes_are_the_same_twice(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"00000{suffix}", tmp_path / "elsewhere" / f"00001{suffix}"
    assert write_pages(first, iter(PAGES)) == 3
    assert list(map(comparable, read_pages(first))) == list(map(comparable, PAGES))
    write_pages(second, PAGES)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_shard_may_be_empty(tmp_path: Path, suffix: str) -> None:
    assert write_pages(tmp_path / f"00000{suffix}", []) == 0
    assert list(read_pages(tmp_path / f"00000{suffix}")) == []


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_shard_cut_short_is_refused_wherever_it_was_cut(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"00000{suffix}"
    write_pages(path, pages(500))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"00000.*cut short.*delete it"):
        list(read_pages(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"00000{suffix}"
    write_pages(path, pages(500))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="delete it"):
        list(read_pages(path))


@pytest.mark.parametrize("line", ['{"id": "0"}', '{"text": null}', '{"text": 1}', "[]", "word", '{"id": 1'])
def test_what_is_no_page_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "00000.jsonl"
    write_pages(path, PAGES[:1])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"00000\.jsonl:3: not a shard of pages"):
        list(read_pages(path))


def test_shards_from_elsewhere_need_no_more_than_texts(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    dates = [datetime(2020, 2, 3, tzinfo=UTC), None]
    columns = {"text": ["one", "two"], "url": ["http://a.org", None], "date": dates, "metadata": ["{}", None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "0.parquet")
    (tmp_path / "0.jsonl").write_text('{"text": "a\\ud800b", "id": 7, "tokens": null}\n')
    one, two = read_pages(tmp_path / "0.parquet")
    assert one == replace(one, id=page_id("http://a.org", one.date), url="http://a.org", text="one", language="")
    assert one.date.startswith("2020-02-03") and (two.url, two.date) == ("", "") and two.id != one.id
    (three,) = read_pages(tmp_path / "0.jsonl")
    assert (three.text, three.id, three.tokens) == ("a?b", "7", 0)


def test_an_id_that_is_no_number_has_one() -> None:
    numbers = [id_number(replace(PAGES[0], id=name)) for name in ("00ff", "<urn:uuid:1>", "<urn:uuid:2>", "f" * 40)]
    assert numbers[0] == 255 and len(set(numbers)) == 4 and all(0 <= number < 2**64 for number in numbers)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def failing() -> Iterator[Page]:
        yield PAGES[0]
        raise RuntimeError("the source broke")

    path = tmp_path / "00000.jsonl.gz"
    write_pages(path, PAGES)
    with pytest.raises(RuntimeError, match="source broke"):
        write_pages(path, failing())
    assert len(list(read_pages(path))) == 3
    assert os.listdir(tmp_path) == ["00000.jsonl.gz"]


def test_half_a_surrogate_pair_does_not_stop_a_shard(tmp_path: Path) -> None:
    write_pages(tmp_path / "0.jsonl", [Page("0", "u", "a\ud800b", "en", "")])
    assert [page.text for page in read_pages(tmp_path / "0.jsonl")] == ["a?b"]


def test_names_that_say_no_format_and_folders_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.jsonl\.gz.*got 'pages\.txt'"):
        write_pages(tmp_path / "pages.txt", PAGES)
    with pytest.raises(ValueError, match=r"no folder of pages at '.*nowhere'"):
        shards(tmp_path / "nowhere")


def test_shards_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("100000.jsonl.gz", "99999.jsonl.gz", "00002.jsonl.gz", "00002.counts.json", "00003.jsonl.gz.tmp"):
        (tmp_path / name).touch()
    assert [path.name for path in shards(tmp_path)] == ["00002.jsonl.gz", "99999.jsonl.gz", "100000.jsonl.gz"]


def test_an_id_names_a_capture() -> None:
    ids = {page_id(url, date) for url in ("http://a.org", "http://b.org") for date in ("2024", "2025")}
    assert len(ids) == 4 and all(len(name) == 16 and int(name, 16) >= 0 for name in ids)
    assert page_id("http://a.org", "2024") == "cec96775596bea2d"  # in every run, on every machine


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pages_stream_so_memory_does_not_grow_with_them(tmp_path: Path, suffix: str) -> None:
    code = """
from pathlib import Path
from dsm_train.corpus.engine.page import Page, read_pages, write_pages
first, second = (Path(sys.argv[1]) / f"{i}{sys.argv[2]}" for i in (0, 1))
pages = lambda count: (Page(f"{i:x}", "u", f"page {i * i} " * 300, "en", "") for i in range(count))
peaks = []
for count in (10_000, 24_000):  # the first take what allocators keep
    write_pages(first, pages(count))
    assert write_pages(second, read_pages(first)) == count
    peaks.append(peak_kibibytes())
print(peaks[1] - peaks[0])
"""
    assert int(printed_by(code, tmp_path, suffix)) < 8_000  # of 56,000 KiB more of text


def test_long_pages_are_few_in_memory(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from dsm_train.corpus.engine.page import Page, read_pages, write_pages
path = Path(sys.argv[1]) / "0.parquet"
peaks = []
for count in (40, 200):
    write_pages(path, (Page(f"{i:x}", "u", f"{i} " * (1 << 19), "en", "") for i in range(count)))
    assert sum(1 for _ in read_pages(path)) == count
    peaks.append(peak_kibibytes())
print(peaks[1] - peaks[0])
"""
    assert int(printed_by(code, tmp_path)) < 50_000  # of 200,000 KiB more of text
