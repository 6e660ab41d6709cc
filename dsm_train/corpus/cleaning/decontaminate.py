"""Step `decontaminate`: no page holds a benchmark's question or answer (DeepSeekMath, section 2.1).

A segment of text that holds 10 words of a benchmark's question or answer in a row is removed; so is one that holds a
benchmark text of 3 to 9 words. A segment is a line of the page, which is a paragraph; with level=page the whole page
goes. The folder `report` says what was removed and why, and what came near: removed.jsonl, near_misses.jsonl and
summary.json. benchmark_sets.py says what counts as a word.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dsm_train.corpus.cleaning.benchmark_sets import Benchmarks, Match, Words
from dsm_train.corpus.config import CorpusConfig, DecontaminateConfig, EngineConfig
from dsm_train.corpus.engine.engine import (
    StepReport,
    Task,
    collected_folder,
    finished_shards,
    run_step,
    shard_tasks,
    write_json,
)
from dsm_train.corpus.engine.page import Page, page_batches, read_pages, replacing, write_pages

_PAGES, _CHARS = 1 << 12, 1 << 18
"""Pages compared at once, at most, and characters of theirs."""
_SHOWN = 1000
"""Characters of a removed segment that the report shows."""
_WORST = 20
"""Benchmark items that the summary names: those with most removals."""


@dataclass(frozen=True)
class Removal:
    """A line of the report."""

    page: str
    url: str
    action: Literal["segment", "page", "near miss"]
    """Removed unit; a near miss removes nothing."""
    kind: str
    """ngram: at least n words in a row; exact: a whole short text; near: fewer words than n."""
    benchmark: str
    line: int
    field: str
    words: str
    """The words that both have."""
    text: str
    """The segments that hold them."""


@dataclass(frozen=True)
class Cleaned:
    """A page after decontamination."""

    page: Page | None
    """The page, perhaps without some segments; None: removed."""
    removals: tuple[Removal, ...]


def clean(pages: Sequence[Page], benchmarks: Benchmarks, config: DecontaminateConfig) -> list[Cleaned]:
    """Compare pages with benchmarks, and remove what matches.

    A page that loses segments has `tokens` 0, not counted; with fewer than `ngram` words left it is removed.
    """
    words = Words.of(*(page.text for page in pages))
    found = benchmarks.check(words)
    return [
        _clean(page, found[p], [" ".join(words.list(p, match.start, match.end)) for match in found[p]], config)
        if found[p]
        else Cleaned(page, ())
        for p, page in enumerate(pages)
    ]


def _clean(page: Page, matches: Sequence[Match], words: Sequence[str], config: DecontaminateConfig) -> Cleaned:
    """`words`: those of each match."""
    lines = page.text.split("\n")
    line_of_word = np.repeat(np.arange(len(lines)), Words.of(*lines).lengths())
    touched = [range(line_of_word[match.start], line_of_word[match.end - 1] + 1) for match in matches]
    removed = {number for match, span in zip(matches, touched, strict=True) if match.kind != "near" for number in span}
    kept = "\n".join(line for number, line in enumerate(lines) if number not in removed)
    goes = bool(removed) and (config.level == "page" or Words.of(kept).lengths()[0] < config.ngram)
    removals = tuple(
        Removal(
            page.id,
            page.url,
            "near miss" if match.kind == "near" else "page" if goes else "segment",
            match.kind,
            match.item.benchmark,
            match.item.line,
            match.item.field,
            shared,
            "\n".join(lines[span.start : span.stop])[:_SHOWN],
        )
        for match, shared, span in zip(matches, words, touched, strict=True)
    )
    if not removed:
        return Cleaned(page, removals)
    return Cleaned(None if goes else replace(page, text=kept, tokens=0), removals)


@dataclass(frozen=True)
class Decontaminate:
    """The step's work on a shard of pages; the report of the shard stands in the folder `report`."""

    config: DecontaminateConfig
    digest: str
    """Hash of the benchmark files: others would give other pages."""
    report: Path

    def __call__(self, task: Task) -> Mapping[str, int]:
        config = self.config
        benchmarks = _load(config.benchmarks, config.ngram, config.min_ngram)
        counts: Counter[str] = Counter(pages=0, pages_removed=0, pages_cut=0, near_misses=0)
        with (
            replacing(_report_path(self.report, task.index)) as path,
            open(path, "w", encoding="utf-8", errors="replace") as report,
        ):

            def kept() -> Iterator[Page]:
                for batch in page_batches(read_pages(task.inputs[0]), _PAGES, _CHARS):
                    for before, cleaned in zip(batch, clean(batch, benchmarks, config), strict=True):
                        counts["pages"] += 1
                        counts["pages_removed"] += cleaned.page is None
                        counts["pages_cut"] += cleaned.page is not None and cleaned.page.text != before.text
                        counts["near_misses"] += any(removal.kind == "near" for removal in cleaned.removals)
                        for removal in cleaned.removals:
                            report.write(json.dumps(asdict(removal), ensure_ascii=False) + "\n")
                        if cleaned.page is not None:
                            yield cleaned.page

            write_pages(task.output, kept())
        return counts


def decontaminate(config: DecontaminateConfig, engine: EngineConfig, inputs: Sequence[Path], out: Path) -> StepReport:
    """Run the step over shards of pages into the folder `out`, and write its report.

    Raises ValueError for benchmarks that cannot be read, before any page is.
    """
    files = tuple(map(Path, config.benchmarks))
    benchmarks = Benchmarks.from_files(files, config.ngram, config.min_ngram)
    digest = hashlib.blake2b(b"".join(hashlib.blake2b(path.read_bytes()).digest() for path in files), digest_size=8)
    work = Decontaminate(config, digest.hexdigest(), out / "report")
    report = run_step("decontaminate", shard_tasks(inputs, out, engine), work, engine, out)
    if not (work.report / "summary.json").exists():
        summary = _collect(work.report, len(inputs))
        write_json(
            work.report / "summary.json", {"benchmarks": asdict(benchmarks.counts), **report.counts, **asdict(summary)}
        )
        for index in range(len(inputs)):
            _report_path(work.report, index).unlink()
    return report


def run(config: CorpusConfig) -> StepReport:
    """Run the step `decontaminate`: decontaminate.inputs, or the last round's collection, to OUT/decontaminate."""
    out = config.run.out
    inputs = finished_shards(config.decontaminate.inputs or collected_folder(out))
    return decontaminate(config.decontaminate, config.engine, inputs, out / "decontaminate")


@functools.lru_cache(1)
def _load(files: tuple[str, ...], ngram: int, min_ngram: int) -> Benchmarks:
    """Index of the benchmarks, kept by a worker from one shard to the next."""
    return Benchmarks.from_files([Path(file) for file in files], ngram, min_ngram)


def _report_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.jsonl"


@dataclass(frozen=True)
class Summary:
    """Findings in all shards."""

    ngram: int
    """Matches of n words or more in a row."""
    exact: int
    """Matches of short texts as a whole."""
    items: int
    """Benchmark texts that were found."""
    found_most: tuple[tuple[str, int], ...]
    """Texts that caused most removals ("file:line field"), and how many: they may be too short to match by."""


def _collect(report: Path, count: int) -> Summary:
    """Join the reports of all shards."""
    kinds: Counter[str] = Counter()
    items: Counter[str] = Counter()
    with replacing(report / "removed.jsonl") as removed, replacing(report / "near_misses.jsonl") as near:
        with open(removed, "wb") as removals, open(near, "wb") as misses:
            for index in range(count):
                for line in _report_path(report, index).read_bytes().splitlines(keepends=True):
                    row = Removal(**json.loads(line))
                    kinds[row.kind] += 1
                    (misses if row.kind == "near" else removals).write(line)
                    if row.kind != "near":
                        items[f"{row.benchmark}:{row.line} {row.field}"] += 1
    return Summary(kinds["ngram"], kinds["exact"], len(items), tuple(items.most_common(_WORST)))
