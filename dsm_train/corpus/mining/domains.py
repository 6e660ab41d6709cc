"""Counts of pages and collected pages per base URL and per path prefix (DeepSeekMath, section 2.1).

A domain is all pages that share a base URL. It is mathematical when more than a tenth of them was collected; the rest
of its pages may be mathematics that the classifier missed.

Counting is a shuffle (map, partition, reduce). Every shard of pages gives a table of its keys (domains, or prefixes of
URLs), partitioned by a hash of the domain into row groups of one file; then each part is summed over all files. A
worker holds the keys of one part, and the number of parts grows with the pages. A database would mean one writer and
random access to more domains than fit in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from dsm_train.corpus.engine.engine import Task
from dsm_train.corpus.engine.page import id_number, read_pages, replacing
from dsm_train.corpus.mining.select import Cut, batches, read_columns, read_scores

if TYPE_CHECKING:
    import pyarrow as pa

_PAGES_PER_PART = 20_000_000
_MOST_PARTS = 256
_ROWS = 1 << 22
"""Rows summed at once while merging a part."""
_COLUMNS = ("prefix", "pages", "collected")
_DEPTH = 3
"""Depth of path, in folders, down to which prefixes are counted."""
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|//")
_PORT = re.compile(r":\d*$")


def base_url(url: str) -> str:
    """Host of a URL: without scheme, user, port, "www." and final dot, in lower case; "" if there is none.

    >>> base_url("https://www.MathOverflow.net:443/questions/1")
    'mathoverflow.net'
    """
    scheme = _SCHEME.match(url)
    host = re.split(r"[/?#\\]", url[scheme.end() if scheme else 0 :], maxsplit=1)[0]
    host = _PORT.sub("", host.rpartition("@")[2]).strip().rstrip(".").lower()
    return host.removeprefix("www.")


def url_prefixes(url: str) -> Iterator[str]:
    """Prefixes that a URL may be annotated by, shortest first: its base URL, then with each step of its path.

    The query is left out, and a final "/" does not count.

    >>> list(url_prefixes("https://mathoverflow.net/questions/1/?sort=new"))
    ['mathoverflow.net', 'mathoverflow.net/questions', 'mathoverflow.net/questions/1']
    """
    scheme = _SCHEME.match(url)
    address = re.split(r"[?#]", url[scheme.end() if scheme else 0 :], maxsplit=1)[0]
    prefix = base_url(url)
    yield prefix
    for step in address.split("/")[1:]:
        if step:
            prefix = f"{prefix}/{step}"
            yield prefix


def folders(url: str) -> list[str]:
    """The prefixes of a URL that stand for more than the page itself, down to three steps of its path."""
    prefixes = list(url_prefixes(url))
    path = re.split(r"[?#]", url, maxsplit=1)[0]
    return prefixes[: _DEPTH + 1] if path.endswith("/") else prefixes[: max(1, min(len(prefixes) - 1, _DEPTH + 1))]


@dataclass(frozen=True, slots=True)
class Count:
    """Pages under a base URL or a longer prefix."""

    prefix: str
    pages: int
    collected: int

    @property
    def share(self) -> float:
        """Share of the pages that was collected."""
        return self.collected / self.pages

    @property
    def missing(self) -> int:
        """Pages that were not collected: the gain of an annotation."""
        return self.pages - self.collected


@dataclass(frozen=True)
class Index:
    """Step `index`: id, domain and URL of every page of a shard, which later steps read instead of its texts."""

    def __call__(self, task: Task) -> Mapping[str, int]:
        import pyarrow as pa
        from pyarrow import parquet

        schema = pa.schema([("id", pa.uint64()), ("domain", pa.string()), ("url", pa.string())])
        pages = 0
        with replacing(task.output) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
            for rows in batches((id_number(page), base_url(page.url), page.url) for page in read_pages(task.inputs[0])):
                writer.write_table(pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema))
                pages += len(rows)
        return {"pages": pages}


@dataclass(frozen=True)
class CountDomains:
    """Step `domains`: pages and collected pages per domain of a shard; its inputs are its index and its scores."""

    cut: Cut
    parts: int

    def __call__(self, task: Task) -> Mapping[str, int]:
        index, scores = task.inputs
        rows = collected_rows(index, scores, self.cut, ("domain",))
        counts = _group(table.rename_columns(["prefix", "collected"]) for table in rows)
        _write_parts(counts, task.output, self.parts)
        return {"domains": counts.num_rows}


@dataclass(frozen=True)
class CountPrefixes:
    """Step `prefixes`: pages and collected pages per prefix of URLs, in the given domains."""

    cut: Cut
    parts: int
    domains: Path
    """The domains, as `write_counts` wrote them."""
    share: float
    """Threshold that chose the domains, like `min_pages`: part of what identifies this step's output."""
    min_pages: int

    def __call__(self, task: Task) -> Mapping[str, int]:
        from pyarrow import parquet

        wanted = parquet.read_table(self.domains, columns=["prefix"]).column("prefix").combine_chunks()
        index, scores = task.inputs
        rows = collected_rows(index, scores, self.cut, ("domain", "url"))
        counts = _group(_by_folder(table, wanted) for table in rows)
        _write_parts(counts, task.output, self.parts)
        return {"prefixes": counts.num_rows}


@dataclass(frozen=True)
class Merge:
    """Sum part `task.index` of the tables in the folder that is the task's input; drop keys of too few pages."""

    files: int
    min_pages: int = 1

    def __call__(self, task: Task) -> Mapping[str, int]:
        from pyarrow import compute, parquet

        pending: list[pa.Table] = []
        for index in range(self.files):
            with parquet.ParquetFile(task.inputs[0] / f"{index:05d}.parquet") as file:
                pending.append(file.read_row_group(task.index))
            if sum(table.num_rows for table in pending[1:]) > max(_ROWS, pending[0].num_rows):
                pending = [_add_up(pending)]
        total = _add_up(pending)
        total = total.filter(compute.field("pages") >= self.min_pages).sort_by("prefix")
        with replacing(task.output) as temporary:
            parquet.write_table(total, temporary)
        pages, collected = (int(total.column(name).to_numpy().sum()) for name in ("pages", "collected"))
        return {"prefixes": total.num_rows, "pages": pages, "collected": collected}


def num_parts(pages: int) -> int:
    """Number of parts for counts over this many pages."""
    return min(_MOST_PARTS, 1 + pages // _PAGES_PER_PART)


def read_counts(paths: Iterable[Path]) -> Iterator[Count]:
    """Read tables that `Merge` or `write_counts` wrote."""
    for path in paths:
        for batch in read_columns(path, _COLUMNS):
            for prefix, pages, collected in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield Count(prefix, pages, collected)


def write_counts(path: Path, counts: Sequence[Count]) -> None:
    """Write a table of counts, with the share of each."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(
        {
            "prefix": pa.array([count.prefix for count in counts], pa.string()),
            "pages": pa.array([count.pages for count in counts], pa.int64()),
            "collected": pa.array([count.collected for count in counts], pa.int64()),
            "share": pa.array([count.share for count in counts], pa.float64()),
        }
    )
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)


def mathematical(domains: Iterable[Count], share: float, min_pages: int) -> list[Count]:
    """The domains of which more than `share` was collected, of at least `min_pages`; most pages to gain first."""
    found = [domain for domain in domains if domain.pages >= min_pages and domain.share > share and domain.prefix]
    return sorted(found, key=lambda domain: (-domain.missing, domain.prefix))


def collected_rows(index: Path, scores: Path, cut: Cut, names: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of an index beside whether each page was collected (`collected`, 0 or 1), in batches."""
    import pyarrow as pa

    for batch, (id_N, _, score_N) in zip(read_columns(index, names), read_scores(scores), strict=True):
        collected_N = cut.collects(id_N, score_N).astype(np.int64)
        yield pa.Table.from_batches([batch]).append_column("collected", pa.array(collected_N))


def _by_folder(pages: pa.Table, wanted: pa.Array) -> pa.Table:
    """A row for each folder of each page of the wanted domains."""
    import pyarrow as pa
    from pyarrow import compute

    pages = pages.filter(compute.field("domain").isin(wanted))
    found = [folders(url) for url in pages.column("url").to_pylist()]
    collected_M = np.repeat(pages.column("collected").to_numpy(), [len(prefixes) for prefixes in found])
    prefix_M = pa.array([prefix for prefixes in found for prefix in prefixes], pa.string())
    return pa.table({"prefix": prefix_M, "collected": collected_M})


def _group(tables: Iterable[pa.Table]) -> pa.Table:
    """Pages and collected pages per prefix, of tables with a row per page (prefix, collected)."""
    counts: list[pa.Table] = []
    for table in tables:
        grouped = table.group_by("prefix", use_threads=False).aggregate([("collected", "count"), ("collected", "sum")])
        counts.append(grouped.select(["prefix", "collected_count", "collected_sum"]).rename_columns(list(_COLUMNS)))
    return _add_up(counts)


def _add_up(counts: Sequence[pa.Table]) -> pa.Table:
    """Sum tables of counts."""
    import pyarrow as pa

    schema = pa.schema([("prefix", pa.string()), ("pages", pa.int64()), ("collected", pa.int64())])
    table = pa.concat_tables([schema.empty_table(), *counts])
    summed = table.group_by("prefix", use_threads=False).aggregate([("pages", "sum"), ("collected", "sum")])
    return summed.select(["prefix", "pages_sum", "collected_sum"]).rename_columns(list(_COLUMNS))


def _write_parts(counts: pa.Table, path: Path, parts: int) -> None:
    """Write counts with a row group per part; a domain and all its prefixes are in the same one."""
    import pyarrow as pa
    from pyarrow import parquet

    domains = (prefix.partition("/")[0].encode("utf-8", "replace") for prefix in counts.column("prefix").to_pylist())
    part_N = np.array([xxhash.xxh3_64_intdigest(domain) % parts for domain in domains], np.int64)
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, counts.schema) as writer:
        for part in range(parts):
            writer.write_table(counts.filter(pa.array(part_N == part)))
