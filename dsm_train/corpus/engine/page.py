"""Web page with its text, and shards of pages on disk.

A shard is JSON Lines (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`) or Parquet (`.parquet`), by its suffix. It is written under
another name and renamed when complete, so a shard that exists is whole.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".jsonl.gz", ".jsonl.zst", ".jsonl", ".parquet")
_ROWS, _CHARS = 512, 1 << 24
"""Pages in memory at once in a Parquet shard (a row group), and characters of theirs."""


@dataclass(frozen=True, slots=True)
class Page:
    """Page of the web: address, time of capture, and text with mathematics as LaTeX in `$..$`."""

    id: str
    """`page_id(url, date)`: the same page of the same crawl has the same id in every run."""
    url: str
    """Address as crawled."""
    text: str
    """Main text."""
    language: str
    """ISO 639-1 code ("en", "zh"), or "" if it is not known."""
    date: str
    """Time of capture, ISO 8601 in UTC."""
    tokens: int = 0
    """Tokens of the text; 0: not counted yet."""
    score: float = math.nan
    """The classifier's score; NaN: not scored yet."""


def page_id(url: str, date: str) -> str:
    """16 hexadecimal digits that name the capture of `url` at `date`."""
    return hashlib.blake2b(f"{url}\n{date}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def id_number(page: Page) -> int:
    """Id of a page as a 64-bit number: its hexadecimal digits, or a hash of a name that is not hexadecimal."""
    try:
        return int(page.id, 16) % 2**64
    except ValueError:
        return int(page_id(page.id, ""), 16)


def shards(folder: str | Path) -> list[Path]:
    """Shards in a folder, in the order of their numbers. Raises ValueError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of pages at {str(folder)!r}: run the step that writes it, or correct the path")
    found = (path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    return sorted(found, key=lambda path: (len(path.name), path.name))  # 99999 before 100000


def write_pages(path: str | Path, pages: Iterable[Page]) -> int:
    """Write a shard, whole or not at all, and return how many pages it holds.

    The same pages give the same bytes. Half a surrogate pair, which is no UTF-8, becomes "?". Raises ValueError for
    another suffix than those of `SUFFIXES`, and what the file system raises.
    """
    path = Path(path)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if path.name.endswith(".parquet"):
            return _write_parquet(file, pages)
        with _compressed(path, file) as lines:
            count = 0
            for page in pages:
                lines.write(_to_json(page))
                count += 1
        return count


def read_pages(path: str | Path) -> Iterator[Page]:
    """Read a shard page by page.

    Shards from elsewhere need only `text`: missing fields are "", and the id is that of URL and date. Raises ValueError
    with the place and the remedy for a shard that is truncated, or holds something else.
    """
    path = Path(path)
    number = 0
    try:
        with open(path, "rb") as file:
            if path.name.endswith(".parquet"):
                yield from _read_parquet(file)
                return
            for line in _decompressed(path, file):
                number += 1
                if line.strip():
                    yield _from_json(json.loads(line))
    except (EOFError, zlib.error, OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        raise ValueError(
            f"{path}:{number}: not a shard of pages, or cut short ({type(error).__name__}: {error}): "
            "correct it; if a step wrote it, delete it with its .counts.json and run that step again"
        ) from error


def page_batches(pages: Iterable[Page], most: int, chars: int) -> Iterator[list[Page]]:
    """Batches of at most `most` pages; a batch ends once its texts reach `chars` characters."""
    batch: list[Page] = []
    size = 0
    for page in pages:
        batch.append(page)
        size += len(page.text)
        if len(batch) == most or size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed to it when the block ends, and deleted when it fails.

    A file that a killed process left there is overwritten by the next attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_json(page: Page) -> bytes:
    record = {name: getattr(page, name) for name in _NAMES}
    if math.isnan(page.score):
        del record["score"]  # NaN is no JSON
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _from_json(record: dict[str, Any]) -> Page:
    known = {name: record[name] for name in _NAMES if record.get(name) is not None}
    text, url, date = known.get("text"), known.setdefault("url", ""), str(known.get("date", ""))
    if not isinstance(text, str) or not isinstance(url, str):
        raise TypeError("a page has a text, which is a string")
    if not text.isascii():
        known["text"] = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no UTF-8
    known["date"], known["id"] = date, str(known["id"] if "id" in known else page_id(url or text, date))
    known.setdefault("language", "")
    return Page(**known)


_NAMES = tuple(field.name for field in fields(Page))


def _compressed(path: Path, file: IO[bytes]) -> contextlib.AbstractContextManager[IO[bytes]]:
    if path.name.endswith(".jsonl.gz"):
        # Neither name nor time in the header: the same pages give the same bytes. Level 4: half the time of 6.
        return gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0)  # type: ignore[return-value]
    if path.name.endswith(".jsonl.zst"):
        import zstandard

        return zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(file, closefd=False)  # type: ignore[return-value]
    if path.name.endswith(".jsonl"):
        return contextlib.nullcontext(file)
    raise ValueError(f"a shard of pages ends in {', '.join(SUFFIXES)}; got {path.name!r}")


def _decompressed(path: Path, file: IO[bytes]) -> Iterable[bytes]:
    """Lines of a shard. Raises EOFError if it was cut short."""
    if path.name.endswith(".jsonl"):
        return file
    if path.stat().st_size == 0:  # a shard of no pages has a header
        raise EOFError("the file is empty")
    return gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else _lines(_zst_blocks(file))


def _zst_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Decompressed blocks. zstandard's own reader takes a truncated file for a whole one; this raises EOFError."""
    import zstandard

    frame = None
    while data := file.read(1 << 10):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("compressed data ends early")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        waiting.append(first)
        for other in others:
            yield b"".join(waiting)
            waiting = [other]
    yield b"".join(waiting)


def _write_parquet(file: IO[bytes], pages: Iterable[Page]) -> int:
    import pyarrow
    from pyarrow import parquet

    names = {"tokens": pyarrow.int64(), "score": pyarrow.float64()}
    schema = pyarrow.schema([(name, names.get(name, pyarrow.string())) for name in _NAMES])
    count = 0
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in page_batches(pages, _ROWS, _CHARS):
            rows = [json.loads(_to_json(page)) for page in batch]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            count += len(rows)
    return count


def _read_parquet(file: IO[bytes]) -> Iterator[Page]:
    from pyarrow import parquet

    whole = parquet.ParquetFile(file)
    for group in range(whole.num_row_groups):
        for batch in whole.iter_batches(_ROWS, [group], use_threads=False):  # workers are one per core
            yield from map(_from_json, batch.to_pylist())
