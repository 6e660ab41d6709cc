"""Deduplication: one page of each URL, of each text, and of each group of near-duplicates; the earliest is kept.

The three differ only in the hashes of a page: one of its URL, one of its text, or 14 of its MinHash signature, which
datatrove computes. Duplicates are the connected components of the graph whose edges are shared hashes. They are found
by label propagation, in steps of the engine whose memory does not grow with the corpus:

  rows    per shard: a row (hash, keep, page) for each hash of each page, sorted by hash. `keep` is the page to keep of
          those that this one is known to be linked with; at first, itself.
  groups  per range of hashes: rows with the same hash get the earliest `keep` among them; rows alone are dropped.
  settle  per shard: the rows of a page get the earliest `keep` among them. A change has to reach its groups: groups
          and settle run again until nothing changes. Then a page goes when its `keep` is another page.

Two pages that have the same 64-bit hash by chance count as duplicates: of 40 billion pages, 43 are expected to.
"""

from __future__ import annotations

import array
import bisect
import heapq
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

import numpy as np

from dsm_train.corpus.cleaning.fingerprints import Near, hash64, normalise_url
from dsm_train.corpus.config import CorpusConfig, DedupConfig, EngineConfig
from dsm_train.corpus.engine.engine import (
    StepReport,
    Task,
    Work,
    claim,
    finished_shards,
    read_report,
    run_step,
    shard_tasks,
)
from dsm_train.corpus.engine.page import Page, id_number, read_pages, replacing, write_pages

Kind = Literal["url", "exact", "near"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of duplicates, in the order they are removed: a page gone for its URL cannot take its text along."""
HASH, DATE, ID, KEEP, PAGE = range(5)
"""Columns of a row, all uint64. DATE and ID are of the page KEEP; a page is numbered shard * 2**32 + place in it."""
_SHARDS = 1 << 14
"""Shards at most: for each range of hashes and each block of pages, a file of each is opened."""
_HOPS = 10
"""Rounds of label propagation at most: pages linked over more hops may stay, since long chains are not worth them."""


@dataclass(frozen=True)
class Sizes:
    """Bounds on memory, whatever the size of the corpus. A row takes 40 bytes, and as many to sort."""

    chunk: int
    """Rows sorted at once. A longer file is a sequence of sorted chunks."""
    part: int
    """Rows of a range of hashes, on average; rows of the same hash, however many, take the memory of one."""
    block: int
    """Pages settled at once."""

    @classmethod
    def of(cls, memory_gb: int) -> Sizes:
        """Sizes that take less than half of a worker's memory.

        Every range of hashes reads every chunk: tens of billions of pages want 16 GB or more.
        """
        return cls(memory_gb << 20, memory_gb << 21, memory_gb << 16)


def run(config: CorpusConfig) -> StepReport:
    """Step `dedup`: the pages in OUT/extract, less duplicates, to OUT/dedup."""
    inputs = finished_shards(config.run.out / "extract")
    return deduplicate(inputs, config.run.out / "dedup", config.dedup, config.engine)


def deduplicate(
    inputs: Sequence[Path], out: Path, config: DedupConfig, engine: EngineConfig, sizes: Sizes | None = None
) -> StepReport:
    """Write each input shard to `out` without the pages that are duplicates of an earlier one.

    The earliest page of a group is kept: by date of capture, then by id. More than 16384 shards are joined. The counts
    of the report are the pages read (`pages`), what went for which reason (`url`, `exact`, `near`) and what was written
    (`kept`).
    """
    out.mkdir(parents=True, exist_ok=True)
    tasks, write = _joined(shard_tasks(inputs, out, engine)), _Write(config)
    claim("dedup", tasks, write, out)
    if read_report(out) is None:
        for kind in KINDS:
            if getattr(config, kind):
                _find(kind, tasks, out, config, engine, sizes or Sizes.of(engine.memory_gb))
    shutil.rmtree(out / "parts", ignore_errors=True)
    return run_step("dedup", tasks, write, engine, out)


def _joined(tasks: Sequence[Task]) -> list[Task]:
    """The tasks, joined into _SHARDS that each take the inputs of several when there are more."""
    several = -(-len(tasks) // _SHARDS) or 1
    return [
        Task(index, tuple(path for task in tasks[start : start + several] for path in task.inputs), tasks[index].output)
        for index, start in enumerate(range(0, len(tasks), several))
    ]


def _find(
    kind: Kind, shards: Sequence[Task], out: Path, config: DedupConfig, engine: EngineConfig, sizes: Sizes
) -> None:
    """Write the places of the pages that go for this reason to `out/gone/kind/00042.gone`."""
    gone, parts = out / "gone" / kind, out / "parts" / kind

    def step(name: str, given: Sequence[tuple[Path, ...]], work: Work) -> tuple[Path, StepReport]:
        folder = parts / name
        tasks = [Task(index, inputs, folder / f"{index:05d}.rows") for index, inputs in enumerate(given)]
        return folder, run_step(f"dedup {kind}, {name}", tasks, work, engine, folder)

    if not gone.exists():
        before = tuple(folder for folder in (out / "gone" / earlier for earlier in KINDS) if folder.exists())
        near = Near(config.buckets, config.hashes, config.ngram) if kind == "near" else None
        rows, report = step("rows", [shard.inputs for shard in shards], _Rows(kind, near, before, sizes))
        for hop in range(1, _HOPS + 1):
            count = report.counts["rows"]
            ranges = max(1, -(-count // sizes.part), min(len(shards), count // sizes.chunk))
            groups, _ = step(f"groups-{hop}", [(rows,)] * ranges, _Groups(ranges, sizes))
            rows, report = step(f"settled-{hop}", [(groups,)] * len(shards), _Settle(sizes))
            if not report.counts["changed"]:
                break
        gone.parent.mkdir(exist_ok=True)
        rows.rename(gone)
    shutil.rmtree(parts, ignore_errors=True)
    for path in gone.glob("*.rows"):
        path.unlink()


@dataclass(frozen=True)
class _Rows:
    """Work of the step `rows`."""

    kind: Kind
    near: Near | None
    before: tuple[Path, ...]
    """Folders that list the pages gone for other reasons."""
    sizes: Sizes

    def __call__(self, task: Task) -> Mapping[str, int]:
        with replacing(task.output) as temporary, open(temporary, "wb") as file:
            writer = _RowWriter(file, self.sizes.chunk)
            for place, page in _staying(task, self.before):
                number = task.index << 32 | place
                date, identity = _date(page), id_number(page)
                for value in self._hashes(page):
                    writer.values.extend((value, date, identity, number, number))
                writer.flush()
            writer.flush(last=True)
        return {"rows": writer.written}

    def _hashes(self, page: Page) -> Sequence[int]:
        if self.near is not None:
            return self.near.hashes(page.text)
        text = normalise_url(page.url) if self.kind == "url" else " ".join(page.text.split())
        return (hash64(text),)


@dataclass(frozen=True)
class _Groups:
    """Work of the step `groups`: hashes are shuffled over `ranges` tasks."""

    ranges: int
    sizes: Sizes

    def __call__(self, task: Task) -> Mapping[str, int]:
        low, high = (2**64 * part // self.ranges for part in (task.index, task.index + 1))
        shared = self._shared(task.inputs[0], low, high)
        hashes = np.ascontiguousarray(shared[:, HASH])
        with replacing(task.output) as temporary, open(temporary, "wb") as file:
            for rows in _with_hashes(task.inputs[0], low, high, self.sizes.chunk) if len(shared) else ():
                at = np.searchsorted(hashes, rows[:, HASH]).clip(max=len(hashes) - 1)
                found = hashes[at] == rows[:, HASH]
                rows = rows[found]
                rows[:, DATE:PAGE] = shared[at[found], DATE:PAGE]
                _write(file, rows[np.argsort(rows[:, PAGE], kind="stable")])
        return {"groups": len(shared)}

    def _shared(self, folder: Path, low: int, high: int) -> np.ndarray:
        """One row for each hash that several rows share: KEEP is their earliest, PAGE their number.

        Rows of one hash, however many, take the memory of one.
        """
        waiting, size = [np.empty((0, 5), np.uint64)], 0
        for rows in _with_hashes(folder, low, high, self.sizes.chunk):
            rows[:, PAGE] = 1
            waiting, size = [*waiting, rows], size + len(rows)
            if size >= self.sizes.chunk:
                waiting, size = [self._merge(waiting)], 0
        merged = self._merge(waiting)
        return merged[merged[:, PAGE] > 1]

    def _merge(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        rows, starts = _by(np.concatenate(parts), HASH)
        merged = rows[starts]
        if len(rows):
            merged[:, PAGE] = np.add.reduceat(rows[:, PAGE], np.flatnonzero(starts))
        return merged


@dataclass(frozen=True)
class _Settle:
    """Work of the step `settle`; writes the places of the pages that go beside the rows."""

    sizes: Sizes

    def __call__(self, task: Task) -> Mapping[str, int]:
        folder, first = task.inputs[0], task.index << 32
        ends = [int(rows[-1, PAGE]) + 1 for rows in _of_pages(folder, first, first + 2**32)]
        changed = going = 0
        going_path = task.output.with_suffix(".gone")
        with (
            replacing(task.output) as temporary,
            replacing(going_path) as temporary_going,
            open(temporary, "wb") as file,
            open(temporary_going, "wb") as going_file,
        ):
            writer = _RowWriter(file, self.sizes.chunk)
            for low in range(first, max(ends, default=first), self.sizes.block):
                found = _of_pages(folder, low, low + self.sizes.block)
                rows, starts = _by(np.concatenate([np.empty((0, 5), np.uint64), *found]), PAGE)
                keep = rows[starts]
                settled = keep[np.cumsum(starts) - 1, DATE:PAGE]
                changed += int(np.count_nonzero(settled[:, KEEP - DATE] != rows[:, KEEP]))
                rows[:, DATE:PAGE] = settled
                writer.values.frombytes(rows.tobytes())
                writer.flush()
                goes = keep[keep[:, KEEP] != keep[:, PAGE], PAGE].astype(np.uint32)  # the place, without the shard
                _write(going_file, goes)
                going += len(goes)
            writer.flush(last=True)
        return {"rows": writer.written, "changed": changed, "going": going}


@dataclass(frozen=True)
class _Write:
    """Work of the last step: the pages that stay."""

    config: DedupConfig

    def __call__(self, task: Task) -> Mapping[str, int]:
        gone = [task.output.parent / "gone" / kind for kind in KINDS if getattr(self.config, kind)]
        went = {folder.name: len(_places(folder, task.index)) for folder in gone}
        kept = write_pages(task.output, (page for _, page in _staying(task, gone)))
        return {"pages": kept + sum(went.values()), **went, "kept": kept}


class _RowWriter:
    """Writes rows in chunks that are each sorted by hash."""

    def __init__(self, file: IO[bytes], chunk: int) -> None:
        self.values = array.array("Q")
        self.written = 0
        self._file, self._values_of_chunk = file, 5 * chunk

    def flush(self, last: bool = False) -> None:
        """Write the chunks that are full; at last, all."""
        while len(self.values) >= self._values_of_chunk or (last and self.values):
            rows = np.frombuffer(self.values[: self._values_of_chunk], np.uint64).reshape(-1, 5)
            del self.values[: self._values_of_chunk]
            _write(self._file, rows[np.argsort(rows[:, HASH], kind="stable")])
            self.written += len(rows)


def _write(file: IO[bytes], values: np.ndarray) -> None:
    file.write(values.data)  # numpy's own tofile does not say that it was the disk that is full


def _staying(task: Task, gone: Iterable[Path]) -> Iterator[tuple[int, Page]]:
    """The pages of a shard with their places, less those that went."""
    went = heapq.merge(*(_places(folder, task.index) for folder in gone))
    next_gone = next(went, None)
    for place, page in enumerate(page for path in task.inputs for page in read_pages(path)):
        if place == next_gone:
            next_gone = next(went, None)
        else:
            yield place, page


def _places(folder: Path, shard: int) -> np.ndarray:
    return _map(folder / f"{shard:05d}.gone", np.dtype(np.uint32))


def _with_hashes(folder: Path, low: int, high: int, chunk: int) -> Iterator[np.ndarray]:
    """Copies of the rows with a hash in low..high - 1, chunk by chunk, in the order of their pages."""
    for rows in _files(folder):
        for start in range(0, len(rows), chunk):
            yield from _slice(rows[start : start + chunk], HASH, low, high)


def _of_pages(folder: Path, low: int, high: int) -> Iterator[np.ndarray]:
    """Copies of the rows of pages low..high - 1, from each file of rows that are sorted by page."""
    for rows in _files(folder):
        yield from _slice(rows, PAGE, low, high)


def _files(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob("*.rows"), key=lambda path: int(path.stem)):
        yield _map(path, np.dtype(np.uint64)).reshape(-1, 5)


def _slice(rows: np.ndarray, column: int, low: int, high: int) -> Iterator[np.ndarray]:
    """The rows of low..high - 1 in the column that they are sorted by, read from the disk alone; none gives nothing."""
    first, end = (bisect.bisect_left(rows[:, column], value) for value in (low, high))
    if first < end:
        yield np.array(rows[first:end])


def _by(rows: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by a column and then the earliest KEEP; and, for each, whether it is the first with its value."""
    rows = rows[np.lexsort((rows[:, KEEP], rows[:, ID], rows[:, DATE], rows[:, column]))]
    starts = np.ones(len(rows), bool)
    starts[1:] = rows[1:, column] != rows[:-1, column]
    return rows, starts


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _date(page: Page) -> int:
    """The date as a number in order of time; a page without one counts as the latest."""
    digits = "".join(filter(str.isdecimal, page.date))[:14]
    return int(digits.ljust(14, "0")) if digits else 2**64 - 1
