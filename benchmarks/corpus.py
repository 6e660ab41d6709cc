"""Benchmark of the corpus: pages per second and core of each step, and the growth of cost with pages.

Two measurements, on synthetic webs (dsm_train/corpus/demo/synthetic_web.py) or on your own WARC files:

- extraction: `html_to_text`, with mathematics, charset and language, beside resiliparse's plain extraction of the same
  pages, page by page in turns, in one process on one core;
- steps: each step of `dsm-train corpus` over webs of growing size: processor time of the step and all its workers,
  their start included, and the most memory that any worker held.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from fastwarc.warc import ArchiveIterator, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from dsm_train.corpus import tokenise
from dsm_train.corpus.cleaning import decontaminate, dedup
from dsm_train.corpus.config import CorpusConfig
from dsm_train.corpus.demo.synthetic_web import Truth, make
from dsm_train.corpus.engine.engine import collected_folder, finished_shards
from dsm_train.corpus.engine.page import Page, read_pages, write_pages
from dsm_train.corpus.engine.progress import duration
from dsm_train.corpus.mining import rounds
from dsm_train.corpus.text import extract
from dsm_train.corpus.text.html import html_to_text
from dsm_train.data.tokenizer import train_tokenizer

_PACKAGES = ("datatrove", "FastWARC", "Resiliparse", "fasttext-numpy2", "tokenizers", "numpy", "pyarrow")
_TRAINED_ON = 2000
"""Pages of each kind that the classifier is trained on, in every web: their number does not grow with the web."""
_LARGEST = 1 << 24
"""Bytes of the largest page that is compared; the step extract leaves larger ones out by default."""
_PEER = "resiliparse, plain text"


@dataclass(frozen=True)
class ExtractRow:
    """Result of a way to extract text, over the same pages as the others."""

    pages_of: str
    contender: str
    pages: int
    page_bytes: float
    """Bytes of HTML per page, on average."""
    pages_per_second: float
    ratio_to_ours: float
    """Its processor time over ours: above 1 is slower."""
    repetitions: tuple[float, ...]
    """Processor seconds of each."""
    kind: str = "extraction"


@dataclass(frozen=True)
class StepRow:
    """Result of a step over a web."""

    step: str
    web_pages: int
    pages: int
    """Pages given to the step."""
    text_bytes: float
    """Bytes of text per page, on average; of HTML, for extraction."""
    cpu_seconds: float
    seconds: float
    pages_per_core_second: float
    worker_bytes: int
    """Most memory that a worker held."""
    growth: float | None = None
    """Exponent of processor time against pages, from the next smaller web to this one: 1 is linear."""
    kind: str = "step"


def compare_extraction(name: str, pages: Sequence[bytes], repetitions: int) -> list[ExtractRow]:
    """Time both on every page in turns; the ratio is the median over the repetitions."""
    runs: dict[str, Callable[[bytes], object]] = {"ours": html_to_text, _PEER: _plain_text}
    times: dict[str, list[float]] = {contender: [] for contender in runs}
    for repetition in range(repetitions):
        total = dict.fromkeys(runs, 0.0)
        for number, page in enumerate(pages):
            for contender in list(runs)[:: -1 if (repetition + number) % 2 else 1]:
                started = time.process_time()
                runs[contender](page)
                total[contender] += time.process_time() - started
        for contender, seconds in total.items():
            times[contender].append(seconds)
    rows = []
    for contender, seconds in times.items():
        ratio = statistics.median(s / ours for s, ours in zip(seconds, times["ours"], strict=True))
        rate, size = len(pages) / statistics.median(seconds), sum(map(len, pages)) / len(pages)
        rows.append(ExtractRow(name, contender, len(pages), size, rate, ratio, tuple(seconds)))
    return rows


def _plain_text(page: bytes) -> str:
    """resiliparse's extraction of the main content, as its documentation has it for a page of unknown encoding."""
    return extract_plain_text(bytes_to_str(page, detect_encoding(page) or "utf-8"), main_content=True)


def html_pages(files: Sequence[Path], most: int) -> list[bytes]:
    """The first HTML pages of WARC files that extraction takes."""

    def found() -> Iterator[bytes]:
        for path in files:
            with open(path, "rb") as file:
                for record in ArchiveIterator(file, record_types=WarcRecordType.response, parse_http=True):
                    if record.http_headers.status_code == 200 and "html" in (record.http_content_type or ""):
                        yield record.reader.read()

    def extractable(page: bytes) -> bool:
        try:
            return len(page) <= _LARGEST and bool(html_to_text(page).text)
        except ValueError:
            return False

    pages = (page for page in found() if extractable(page))
    return [page for page, _ in zip(pages, range(most), strict=False)]


class Meter:
    """Processor time of this process and of all its descendants, and the most memory that one of those held.

    The workers' parent, a fork server, lives on and has reaped them when a step ends. Memory is looked at every 50 ms.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()

    def __call__(self, work: Callable[[], object]) -> tuple[float, float, int]:
        """Run `work`; processor seconds, seconds on the clock, bytes."""
        peak, over = [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                for child in self._process.children(recursive=True):
                    try:
                        peak[0] = max(peak[0], child.memory_info().rss)
                    except psutil.Error:  # it has just ended
                        continue

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        before, started = self._cpu(), time.monotonic()
        try:
            work()
        finally:
            over.set()
            watcher.join()
        return self._cpu() - before, time.monotonic() - started, peak[0]

    def _cpu(self) -> float:
        total = 0.0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total


def measure_steps(folder: Path, pages: int, config: CorpusConfig, padding: int, seed: int) -> list[StepRow]:
    """Measure every step over a new web of so many pages."""
    truth, meter, rows = make(folder / "web", seed, pages, padding), Meter(), []
    config = replace(
        config,
        run=replace(config.run, out=folder, seed=seed),
        extract=replace(config.extract, inputs=(str(folder / "web" / "warc"),)),
        tokenizer=replace(config.tokenizer, path=folder / "tokenizer"),
        rounds=replace(
            config.rounds,
            seeds=(str(folder / "seed"),),
            rounds=1,
            positives=_TRAINED_ON,
            negatives=min(_TRAINED_ON, pages // 2),
            budget_tokens=(100 * pages,),  # about a quarter
        ),
        decontaminate=replace(config.decontaminate, benchmarks=(str(folder / "web" / "benchmark.jsonl"),)),
    )

    def step(name: str, given: int, size: float, work: Callable[[], object]) -> None:
        cpu, seconds, memory = meter(work)
        rows.append(StepRow(name, pages, given, size, cpu, seconds, given / cpu, memory))

    html = sum(path.stat().st_size for path in (folder / "web" / "warc").glob("*"))
    step("extract", pages, html / pages, lambda: extract.run(config))
    texts = list(_lengths(folder / "extract"))
    given, size = len(texts), sum(texts) / len(texts)
    exact, near = replace(config.dedup, near=False), replace(config.dedup, url=False, exact=False)
    inputs = finished_shards(folder / "extract")
    step("dedup url, exact", given, size, lambda: dedup.deduplicate(inputs, folder / "exact", exact, config.engine))
    step("dedup near", given, size, lambda: dedup.deduplicate(inputs, folder / "near", near, config.engine))
    (folder / "near").rename(folder / "dedup")
    texts = list(_lengths(folder / "dedup"))
    given, size = len(texts), sum(texts) / len(texts)
    _prepare(folder, truth)
    step("round", given, size, lambda: rounds.run_rounds(config, finished_shards(folder / "dedup"), folder))
    texts = list(_lengths(collected_folder(folder)))
    given, size = len(texts), sum(texts) / len(texts)
    step("decontaminate", given, size, lambda: decontaminate.run(config))
    step("tokenise", given, size, lambda: tokenise.run(config))
    return rows


def _lengths(folder: Path) -> Iterator[int]:
    return (len(page.text.encode()) for path in finished_shards(folder) for page in read_pages(path))


def _prepare(folder: Path, truth: Truth) -> None:
    """A tokenizer, and a seed of as many pages in every web."""
    wanted = {page.id for page in truth.pages if page.seed}
    seed: list[Page] = []
    sample: list[str] = []
    for path in finished_shards(folder / "dedup"):
        for page in read_pages(path):
            if len(sample) < _TRAINED_ON:
                sample.append(page.text)
            if page.id in wanted and len(seed) < _TRAINED_ON:
                seed.append(page)
    train_tokenizer(sample, 4096).save(folder / "tokenizer")
    write_pages(folder / "seed" / "00000.jsonl.gz", seed)


def with_growth(rows: Sequence[StepRow]) -> list[StepRow]:
    """The rows with the exponent between each web and the next smaller one."""
    by = {(row.step, row.web_pages): row for row in rows}
    sizes = sorted({row.web_pages for row in rows})
    below = dict(zip(sizes[1:], sizes, strict=False))
    grown = []
    for row in rows:
        smaller = by.get((row.step, below.get(row.web_pages, 0)))
        growth = smaller and math.log(row.cpu_seconds / smaller.cpu_seconds) / math.log(row.pages / smaller.pages)
        grown.append(replace(row, growth=growth))
    return grown


def tables(extraction: Sequence[ExtractRow], steps: Sequence[StepRow]) -> str:
    """Tables for the terminal."""
    lines = []
    if extraction:
        width = max(len(row.pages_of) for row in extraction)
        lines += [f"{'extraction, pages of':<{width}}  contender                   kB  pages/s  x ours"]
        for row in extraction:
            lines.append(
                f"{row.pages_of:<{width}}  {row.contender:<24} {row.page_bytes / 1e3:5.1f}  "
                f"{row.pages_per_second:7.0f}  {row.ratio_to_ours:6.2f}"
            )
    if steps:
        lines += ["", "steps                 pages   kB each  core seconds  pages/s per core  growth  MiB per worker"]
        order = list(dict.fromkeys(row.step for row in steps))
        for row in sorted(steps, key=lambda row: (order.index(row.step), row.pages)):
            growth = "     -" if row.growth is None else f"{row.growth:6.2f}"
            lines.append(
                f"{row.step:<18} {row.pages:8,}  {row.text_bytes / 1e3:8.1f}  {row.cpu_seconds:12.1f}  "
                f"{row.pages_per_core_second:16.0f}  {growth}  {row.worker_bytes / 2**20:14.0f}"
            )
    return "\n".join(lines)


def plot(steps: Sequence[StepRow], path: Path, title: str) -> None:
    """Processor time of each step against pages, and the memory of a worker."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row.step for row in steps):
        rows = sorted((row for row in steps if row.step == name), key=lambda row: row.pages)
        pages = [row.pages for row in rows]
        left.plot(pages, [row.cpu_seconds for row in rows], "o-", label=name)
        right.plot([row.web_pages for row in rows], [row.worker_bytes / 2**20 for row in rows], "o-", label=name)
    longest = max(steps, key=lambda row: row.cpu_seconds)
    ends = [min(row.pages for row in steps), max(row.pages for row in steps)]
    line = [longest.cpu_seconds * end / longest.pages for end in ends]
    left.plot(ends, line, color="gray", linestyle=":", label="linear")
    left.set(title="core seconds", xlabel="pages that the step was given", xscale="log", yscale="log")
    right.set(title="most memory of a worker, MiB", xlabel="pages of the web", xscale="log", ylim=(0, None))
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path)


# Workers import this module again: torch, which `report` brings, would take each of them seconds.


def environment() -> dict[str, Any]:
    """Device, date, commit and versions."""
    from benchmarks import report

    versions = {"python": platform.python_version()} | {name: report.version(name) for name in _PACKAGES}
    return {
        "device": report.cpu_name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": report.commit(),
        "versions": versions,
        "load_average": psutil.getloadavg()[0],
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", nargs="+", type=int, default=[1000, 10_000, 100_000], help="sizes of the webs")
    parser.add_argument("--padding", type=int, default=0, help="bytes of script and menus around each page; 0")
    parser.add_argument("--warc", nargs="+", type=Path, default=[], help="WARC files to compare extraction on as well")
    parser.add_argument("--workers", type=int, default=0, help="shards worked on at once; one per core")
    parser.add_argument("--repetitions", type=int, default=7, help="of the comparison of extraction; 7")
    parser.add_argument("--seed", type=int, default=0, help="of the webs; 0")
    parser.add_argument("--out", type=Path, help="folder or .jsonl; benchmarks/results. A .png goes beside it")
    parser.add_argument("--only", choices=["extraction", "steps"], help="one of the two measurements")
    options = parser.parse_args(arguments)
    if min(options.pages) < 500:
        parser.error(f"--pages: at least 500, got {min(options.pages)}")
    if missing := [path for path in options.warc if not path.is_file()]:
        parser.error(f"--warc: no file {str(missing[0])!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, print the tables, write the rows and the plot; returns the path of the rows."""
    from benchmarks import report

    options = parse_arguments(arguments)
    common = environment()
    config = CorpusConfig()
    config = replace(
        config,
        engine=replace(config.engine, workers=options.workers),
        # So that a few thousand pages train a classifier; folded, it scores as fast as one of the paper's size.
        classifier=replace(config.classifier, lr=2.0, dim=32),
    )
    path = report.path(options.out, common, "corpus")
    extraction: list[ExtractRow] = []
    steps: list[StepRow] = []

    def save() -> None:
        report.write([common | asdict(row) for row in [*extraction, *with_growth(steps)]], path)

    with tempfile.TemporaryDirectory(prefix="corpus-") as scratch:
        if options.only != "steps":
            for name, pages in _compared(options, Path(scratch)):
                _say(f"extraction of {len(pages)} pages: {name}")
                extraction += compare_extraction(name, pages, options.repetitions)
                save()
        for pages in sorted(options.pages) if options.only != "extraction" else ():
            folder = Path(scratch) / str(pages)
            started = time.monotonic()
            _say(f"all steps over {pages:,} pages" + _expected(steps, pages))
            steps += measure_steps(folder, pages, config, options.padding, options.seed)
            save()
            _say(f"{pages:,} pages took {duration(time.monotonic() - started)}")
            shutil.rmtree(folder)
    print(tables(extraction, with_growth(steps)), flush=True)
    if steps:
        plot(steps, path.with_suffix(".png"), f"{common['device']}, {common['date'][:10]}, commit {common['commit']}")
    print(f"\nrows: {path}")
    return path


def _compared(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, list[bytes]]]:
    """Pages of synthetic webs, bare and as large as real ones, and those of the files that were given."""
    for padding in (0, 30_000, 120_000):
        make(scratch / f"padded-{padding}", options.seed, 500, padding)
        files = sorted((scratch / f"padded-{padding}" / "warc").glob("*"))
        yield f"synthetic, +{padding // 1000} kB", html_pages(files, 200)
    if options.warc:
        yield ", ".join(path.name for path in options.warc), html_pages(options.warc, 1000)


def _expected(steps: Sequence[StepRow], pages: int) -> str:
    """Time that the next size will take, extrapolated from the last one."""
    if not steps:
        return ""
    last = steps[-1].web_pages
    seconds = sum(row.seconds for row in steps if row.web_pages == last)
    return f", at most about {duration(1.5 * seconds * pages / last)}"


def _say(text: str) -> None:
    print(f"corpus: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
