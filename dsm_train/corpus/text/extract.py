"""Extraction of pages from WARC and WET files: the first step of the corpus.

    counts = Counter()
    for page in extract_file(Path("CC-MAIN-....warc.gz"), config.extract, counts): ...

Records stream by, one in memory at a time. A record that cannot be used is counted under the reason, and a file that
ends early gives the pages that could be read: no content of a file stops the step.
"""

from __future__ import annotations

import glob
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from resiliparse.parse.http import iterate_http_chunks

from dsm_train.corpus.config import CorpusConfig, ExtractConfig
from dsm_train.corpus.engine.engine import StepReport, Task, run_step, shard_tasks
from dsm_train.corpus.engine.page import Page, page_id, write_pages
from dsm_train.corpus.text.detect import decode, detect_language, printable
from dsm_train.corpus.text.html import NestedTooDeep, html_to_text

SUFFIXES = (".warc", ".warc.gz", ".warc.zst", ".wet", ".wet.gz", ".wet.zst")
_HTML = ("text/html", "application/xhtml+xml")
_MEGABYTE = 1 << 20
_WANTED = WarcRecordType.response | WarcRecordType.conversion
_RECORD = re.compile(rb"\x1f\x8b\x08[\x00\x04]|\x28\xb5\x2f\xfd|(?<![^\n\0])WARC/1\.")
"""First bytes of a record: gzip, Zstandard, or plain."""
_CHUNK = re.compile(rb"[0-9A-Fa-f]{1,8}\s*(?:;[^\r\n]*)?\r\n")


def run(config: CorpusConfig) -> StepReport:
    """Extract every file of `config.extract.inputs` to a shard of `run.out/extract`. Raises ValueError for no files."""
    out = config.run.out / "extract"
    tasks = shard_tasks(input_files(config.extract.inputs), out, config.engine)
    return run_step("extract", tasks, Extract(config.extract), config.engine, out)


def input_files(inputs: tuple[str, ...]) -> list[Path]:
    """The WARC and WET files that paths, folders and globs name, sorted. Raises ValueError for one that names none."""
    files: set[Path] = set()
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            named = path.rglob("*")
        else:
            named = [path] if path.is_file() else map(Path, glob.glob(name, recursive=True))
        found = [file for file in named if file.name.endswith(SUFFIXES)]
        if not found:
            raise ValueError(f"extract.inputs: {name!r} names no WARC or WET file ({', '.join(SUFFIXES)}): correct it")
        files.update(found)
    return sorted(files)


@dataclass(frozen=True)
class Extract:
    """Work of one task: its files to one shard of pages."""

    config: ExtractConfig

    def __call__(self, task: Task) -> Mapping[str, int]:
        counts: Counter[str] = Counter(records=0, pages=0)
        write_pages(task.output, (page for path in task.inputs for page in extract_file(path, self.config, counts)))
        return counts


def extract_file(path: str | Path, config: ExtractConfig, counts: Counter[str]) -> Iterator[Page]:
    """The pages of a WARC file (responses that are HTML) or a WET file (conversions), plain or compressed.

    Adds to `counts`: records, pages, formulas; what was left out: not_html, status (another than 200), too_large,
    too_deep, broken, empty, no_text, too_short, language; damaged for every place in the file that cannot be read, and
    truncated for a file that ends too early. Raises OSError where the disk fails.
    """
    with open(path, "rb") as file:
        for record, data in _records(file, config.max_html_mb * _MEGABYTE + 1, counts):
            counts["records"] += 1
            try:
                page = _page(record, data, config, counts)
            except NestedTooDeep:
                counts["too_deep"] += 1
            except (ValueError, OSError, EOFError, RuntimeError, zlib.error):
                counts["broken"] += 1
            else:
                if page is not None:
                    counts["pages"] += 1
                    yield page


def _records(file: BinaryIO, limit: int, counts: Counter[str]) -> Iterator[tuple[WarcRecord, bytes]]:
    """Responses and conversions, each with up to `limit` bytes of its content; damaged records are skipped."""
    position: int | None = 0
    damaged = False
    while position is not None:
        file.seek(position)
        try:
            for record in ArchiveIterator(file, record_types=_WANTED, parse_http=True):  # type: ignore[arg-type]
                position = record.stream_pos
                data = record.reader.read(limit)
                if len(data) < min(limit, record.content_length):
                    raise EOFError("the file ends in a record, or one is shorter than it says")
                if damaged:
                    counts["damaged"] += 1
                    damaged = False
                yield record, data
            if not _is_cut(file, position):
                return
        except (OSError, EOFError) as error:
            if getattr(error, "errno", None):  # not the file, but the disk
                raise
        damaged = True
        position = _next_record(file, position + 1)
    counts["truncated"] += 1


def _next_record(file: BinaryIO, position: int) -> int | None:
    """Next position, from `position` on, at which a record may begin; None if there is none."""
    file.seek(position)
    data = b""
    while chunk := file.read(_MEGABYTE):
        data += chunk
        if match := _RECORD.search(data):
            return position + match.start()
        position += len(data) - 8
        data = data[-8:]
    return None


def _is_cut(file: BinaryIO, position: int) -> bool:
    """True if a gzip file breaks off after `position`: fastwarc then ends without an error."""
    file.seek(position)
    try:
        with gzip.GzipFile(fileobj=file) as members:
            while members.read(_MEGABYTE):
                pass
    except EOFError:
        return True
    except (OSError, zlib.error):  # it is not gzip
        return False
    return False


def _page(record: WarcRecord, data: bytes, config: ExtractConfig, counts: Counter[str]) -> Page | None:
    """Page of a record, or None, counted under the reason, if there is none to keep."""
    if record.record_type == WarcRecordType.response and not _is_html(record, counts):
        return None
    limit = config.max_html_mb * _MEGABYTE
    data = _decoded(record, data, limit + 1)
    if len(data) > limit:
        counts["too_large"] += 1
        return None
    if not data.strip():
        counts["empty"] += 1
        return None
    if record.record_type == WarcRecordType.response:
        extracted = html_to_text(data, charset=record.http_charset)
        text, language = extracted.text, extracted.language
        counts["formulas"] += extracted.formulas
    else:
        text = printable(decode(data, "utf-8")[0]).strip()
        language = detect_language(text)
    reason = (
        ("no_text" if not text else "too_short")
        if not text or len(text) < config.min_chars
        else "language"
        if config.languages and language not in config.languages
        else ""
    )
    if reason:
        counts[reason] += 1
        return None
    url, date = record.headers.get("WARC-Target-URI"), record.headers.get("WARC-Date") or ""
    if not url:
        raise ValueError("a record without its address")
    return Page(page_id(url, date), url, text, language, date)


def _decoded(record: WarcRecord, data: bytes, limit: int) -> bytes:
    """The content, decoded where its HTTP headers are true, up to `limit` bytes; Common Crawl's is decoded already."""
    headers = record.http_headers if record.record_type == WarcRecordType.response else None
    if headers is None:
        return data
    if "chunked" in (headers.get("Transfer-Encoding") or "").lower() and _CHUNK.match(data):
        data = b"".join(iterate_http_chunks(io.BytesIO(data)))
    if "gzip" in (headers.get("Content-Encoding") or "").lower() and data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(data, limit)  # what there is, of a body that was cut
    return data


def _is_html(record: WarcRecord, counts: Counter[str]) -> bool:
    headers = record.http_headers
    if headers is None or headers.status_code not in (None, 200):
        counts["status"] += 1
        return False
    kind = (headers.get("Content-Type") or _HTML[0]).partition(";")[0].strip().lower()
    if kind not in _HTML:
        counts["not_html"] += 1
        return False
    return True
