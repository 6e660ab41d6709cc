"""WARC and WET files to pages: damaged records are counted, and the records around them are kept."""

from __future__ import annotations

import gzip
import io
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from peak import printed_by
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from dsm_train.corpus.config import CorpusConfig, CorpusRun, EngineConfig, ExtractConfig
from dsm_train.corpus.engine.page import Page, page_id, read_pages
from dsm_train.corpus.text import extract
from dsm_train.corpus.text.extract import extract_file, input_files

DATE = "2024-03-01T12:00:00Z"
TEXT = "The sum of the angles of a triangle in the plane is that of two right angles, and no more. " * 3
BODY = f"<html><body><p>{TEXT}</p></body></html>".encode()


def record(number: int, body: bytes = BODY, status: str = "200 OK", **headers: str) -> bytes:
    """A response as a crawler writes it, not compressed; `Content_Type` stands for Content-Type."""
    fields = [(name.replace("_", "-"), value) for name, value in ({"Content_Type": "text/html"} | headers).items()]
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    writer.write_record(
        writer.create_warc_record(
            f"http://a.org/{number}",
            "response",
            payload=io.BytesIO(body),
            http_headers=StatusAndHeaders(status, fields, protocol="HTTP/1.1"),
            warc_headers_dict={"WARC-Date": DATE},
        )
    )
    return out.getvalue()


def extracted(path: Path, data: bytes, config: ExtractConfig | None = None) -> tuple[list[Page], dict[str, int]]:
    path.write_bytes(data)
    counts: Counter[str] = Counter()
    pages = list(extract_file(path, config or ExtractConfig(), counts))
    counts["formulas"] += 0
    return pages, {name: count for name, count in counts.items() if count and name != "formulas"}


def numbers(pages: list[Page]) -> str:
    return "".join(page.url[-1] for page in pages)


def test_a_page(tmp_path: Path) -> None:
    (page,), counts = extracted(tmp_path / "a.warc.gz", gzip.compress(record(7)))
    assert page == Page(page_id("http://a.org/7", DATE), "http://a.org/7", TEXT.strip(), "en", DATE)
    assert counts == {"records": 1, "pages": 1}


def test_wet(tmp_path: Path) -> None:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    for text in (TEXT, "short", "\x00\x01\x02" * 100):
        headers = {"WARC-Date": DATE, "Content-Type": "text/plain"}
        payload = io.BytesIO(text.encode())
        writer.write_record(
            writer.create_warc_record("http://a.org/w", "conversion", payload, warc_headers_dict=headers)
        )
    pages, counts = extracted(tmp_path / "a.wet.gz", out.getvalue())
    assert [(page.text, page.language, page.date) for page in pages] == [(TEXT.strip(), "en", DATE)]
    assert counts == {"records": 3, "pages": 1, "too_short": 1, "no_text": 1}


@pytest.mark.parametrize(
    "reason, body, headers",
    [
        ("status", BODY, {"status": "404 Not Found"}),
        ("not_html", b"%PDF-1.4", {"Content_Type": "application/pdf"}),
        ("empty", b" \n", {}),
        ("no_text", b"<html><script>var x = 1;</script></html>", {}),
        ("no_text", bytes(range(1, 32)) * 100, {}),
        ("too_short", b"<p>Hello.</p>", {}),
        ("too_deep", b"<div>" * 100_000 + b"x", {}),
        ("too_large", b"<p>x" * (1 << 19), {}),
        ("language", f"<p>{'Jede stetige Funktion hat ein Maximum. ' * 5}</p>".encode(), {}),
        ("broken", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff", {"Content_Encoding": "gzip"}),
    ],
)
def test_what_is_no_page_is_counted(tmp_path: Path, reason: str, body: bytes, headers: dict[str, str]) -> None:
    data = record(1) + record(2, body, **headers) + record(3)
    pages, counts = extracted(tmp_path / "a.warc", data, ExtractConfig(max_html_mb=1, languages=("en",)))
    assert numbers(pages) == "13" and counts == {"records": 3, "pages": 2, reason: 1}


def test_bodies_are_decoded_where_the_headers_are_true(tmp_path: Path) -> None:
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    data = [
        record(1, gzip.compress(BODY), Content_Encoding="gzip"),
        record(2, BODY, Content_Encoding="gzip", Transfer_Encoding="chunked"),  # as Common Crawl has them
        record(3, chunked, Transfer_Encoding="chunked"),
        record(4, gzip.compress(BODY)[:-12], Content_Encoding="gzip"),  # cut: what there is
    ]
    pages, counts = extracted(tmp_path / "a.warc", b"".join(data))
    assert [page.text for page in pages[:3]] == [TEXT.strip()] * 3 and TEXT.startswith(pages[3].text[:50])
    assert counts == {"records": 4, "pages": 4}


def test_charset_of_the_header_and_of_the_page(tmp_path: Path) -> None:
    russian = "Множество называется открытым, если каждая его точка является внутренней. " * 3
    body = f"<p>{russian}</p>"
    data = [
        record(1, body.encode("cp1251"), Content_Type="text/html; charset=windows-1251"),
        record(2, body.encode("utf-8"), Content_Type="text/html; charset=windows-1251"),  # the header is wrong
        record(3, b"<meta charset=koi8-r>" + body.encode("koi8_r"), Content_Type="text/html; charset=bogus"),
    ]
    pages, _ = extracted(tmp_path / "a.warc", b"".join(data))
    assert [(page.text, page.language) for page in pages] == [(russian.strip(), "ru")] * 3


def plain(data: bytes) -> bytes:
    return data


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": plain, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_file_gives_what_can_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.warc{suffix}"
    parts = [COMPRESS[suffix](record(number)) for number in range(5)]
    whole = b"".join(parts)
    assert numbers(extracted(path, whole)[0]) == "01234"

    pages, counts = extracted(path, whole[:-30])
    assert numbers(pages) == "0123" and counts["truncated"] == 1 and "damaged" not in counts

    overwritten = b"\xff" * 60 + parts[1][60:]
    pages, counts = extracted(path, parts[0] + overwritten + b"".join(parts[2:]))
    assert numbers(pages) == "0234" and counts == {"records": 4, "pages": 4, "damaged": 1}

    pages, counts = extracted(path, parts[0][40:] + parts[1] + bytes(100_000) + b"".join(parts[2:]))
    assert numbers(pages)[-3:] == "234" and counts["damaged"] >= 1 and "truncated" not in counts


def test_a_member_lost_in_the_middle(tmp_path: Path) -> None:
    parts = [gzip.compress(record(number)) for number in range(6)]
    data = b"".join([parts[0], parts[1][:100], parts[2], parts[3][:150], *parts[4:]])
    pages, counts = extracted(tmp_path / "a.warc.gz", data)
    assert numbers(pages) == "0245" and counts == {"records": 4, "pages": 4, "damaged": 2}


@pytest.mark.parametrize("data", [b"", gzip.compress(b"")])
def test_an_empty_file(tmp_path: Path, data: bytes) -> None:
    assert extracted(tmp_path / "a.warc.gz", data) == ([], {})


@pytest.mark.parametrize("data", [b"garbage" * 10_000, b"\x1f\x8b\x08\x00" * 2000, b"\x1f\x8b"])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    assert extracted(tmp_path / "a.warc.gz", data) == ([], {"truncated": 1})


def test_a_disk_that_fails_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        list(extract_file(tmp_path, ExtractConfig(), Counter()))


def test_a_page_of_100_mb_takes_little_memory_and_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    squeeze = zlib.compressobj(1, wbits=31)
    block = b"<p>x" + b" the words " * 100_000
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
    length = len(head) + 100 * len(block)
    header = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.org/1\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {length}\r\n\r\n"
    )
    with open(path, "wb") as file:
        file.write(squeeze.compress(header.encode() + head))
        for _ in range(100):
            file.write(squeeze.compress(block))
        file.write(squeeze.compress(b"\r\n\r\n") + squeeze.flush() + gzip.compress(record(2)))
    code = """
from collections import Counter
from dsm_train.corpus.config import ExtractConfig
from dsm_train.corpus.text import extract
parsed, html_to_text = [], extract.html_to_text
def counted(html, **options):
    parsed.append(len(html))
    return html_to_text(html, **options)
extract.html_to_text = counted
before, counts = peak_kibibytes(), Counter()
pages = [page.url for page in extract.extract_file(sys.argv[1], ExtractConfig(), counts)]
print(len(pages), counts["too_large"], peak_kibibytes() - before, *parsed)
"""
    pages, too_large, kibibytes, *parsed = map(int, printed_by(code, path).split())
    assert (pages, too_large) == (1, 1)
    assert kibibytes < 64 * 1024 and len(parsed) == 1 and parsed[0] < 10_000  # the other page of the file


def test_inputs(tmp_path: Path) -> None:
    for name in ("b.warc.gz", "a/c.wet.gz", "a/d.warc", "a/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*names: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in input_files(tuple(f"{tmp_path}/{n}" for n in names))]

    assert found("") == ["a/c.wet.gz", "a/d.warc", "b.warc.gz"]
    assert found("b.warc.gz", "*.gz") == ["b.warc.gz"]
    assert found("a/*") == ["a/c.wet.gz", "a/d.warc"]
    for name in ("missing.warc.gz", "*.zip", "a/readme.txt"):
        with pytest.raises(ValueError, match="names no WARC or WET file"):
            found(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="names no WARC or WET file"):
        found("empty")


def test_the_step_resumes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.warc.gz").write_bytes(gzip.compress(record(1)) + gzip.compress(record(2)))
    (tmp_path / "in" / "2.warc.gz").write_bytes(gzip.compress(record(3)) + gzip.compress(record(4))[:-20])
    config = CorpusConfig(
        run=CorpusRun(tmp_path / "out"),
        engine=EngineConfig(workers=1),
        extract=ExtractConfig(inputs=(str(tmp_path / "in"),)),
    )
    report = extract.run(config)
    shards = sorted((tmp_path / "out" / "extract").glob("*.jsonl.gz"))
    assert [numbers(list(read_pages(shard))) for shard in shards] == ["12", "3"]
    assert report.counts["pages"] == 3 and report.counts["truncated"] == 1

    first = shards[0].stat().st_mtime_ns
    for lost in ("00001.jsonl.gz", "00001.counts.json", "report.json"):
        shards[1].with_name(lost).unlink()
    again = extract.run(config)
    assert again.counts == report.counts and shards[0].stat().st_mtime_ns == first
    assert numbers(list(read_pages(shards[1]))) == "3"
