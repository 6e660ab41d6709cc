"""Rounds of mining: train, score, collect up to a budget, find domains, annotate, again (DeepSeekMath, section 2.1).

    results = run_rounds(config, shards(pages), out)

A round is a folder, `out/round-1`, and each of its steps is a folder in it that the engine makes and resumes:

    examples  train  scores  cut  collected  domains-by-shard  domains  prefixes-by-shard  prefixes
    domains.parquet  annotate.html  annotations.yaml (what a person edits)  annotated.yaml (what the next round uses)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsm_train.corpus.config import CorpusConfig
from dsm_train.corpus.engine.engine import (
    StepReport,
    Task,
    Work,
    claim,
    collected_folder,
    finished_shards,
    run_step,
    write_json,
)
from dsm_train.corpus.engine.page import SUFFIXES, replacing, shards
from dsm_train.corpus.mining.annotate import Annotations
from dsm_train.corpus.mining.classifier import Features
from dsm_train.corpus.mining.domains import (
    Count,
    CountDomains,
    CountPrefixes,
    Index,
    Merge,
    mathematical,
    num_parts,
    read_counts,
    write_counts,
)
from dsm_train.corpus.mining.round_annotation import Shard, annotate
from dsm_train.corpus.mining.round_steps import Collect, Examples, FindCut, Score, Train, read_cut, read_quality
from dsm_train.corpus.mining.select import Cut

_FEW_PAGES = 20_000_000
"""Number of pages up to which joining the findings of all shards takes seconds, so that no worker is started."""


class AnnotationNeeded(ValueError):
    """The next round waits for a person."""


@dataclass(frozen=True)
class RoundResult:
    """A row of the table of rounds."""

    round: int
    positives: int
    """Pages trained on as mathematics."""
    negatives: int
    """Pages trained on as others."""
    auc: float
    """AUC of the classifier on held-out pages."""
    pages: int
    """Pages collected."""
    tokens: int
    """Tokens of the collected pages."""
    domains: int
    """Mathematical domains."""
    new_domains: int
    """Domains that no earlier round had."""
    overlap: float | None
    """Share of the collected pages that the round before collected too; none in round 1."""
    waits_for: Path | None = None
    """The annotation file that a person has to edit before the next round."""


def run_rounds(config: CorpusConfig, pages: Sequence[Path], out: Path) -> list[RoundResult]:
    """Run rounds over shards of pages until two collect the same pages, or to the last, or until a person is needed.

    Finished steps are kept. Writes rounds.json and rounds.md to `out`. Raises ValueError for settings that cannot
    work, before anything is read, and whatever the engine raises.
    """
    seeds = seed_shards(config.rounds.seeds)
    Features(config.classifier, config.tokenizer)
    if not pages:
        raise ValueError("no shards of pages to mine: run the step dedup first")
    corpus = _begin(config, pages, seeds, out)
    results: list[RoundResult] = []
    before: _Before | None = None
    known: set[str] = set()
    for number in range(1, config.rounds.rounds + 1):
        result, before, domains = _run_round(corpus, number, before)
        results.append(replace(result, new_domains=len(domains - known)))
        known |= domains
        if before is None:
            results[-1] = replace(results[-1], waits_for=corpus.folder(number) / "annotations.yaml")
        _write_table(out, results)
        if before is None or (result.overlap is not None and result.overlap >= config.rounds.overlap):
            break
    return results


def run(config: CorpusConfig) -> None:
    """Run the step `rounds`: rounds over the pages in OUT/dedup; prints the table.

    Raises AnnotationNeeded, which says what to do, when the next round waits for a person.
    """
    results = run_rounds(config, finished_shards(config.run.out / "dedup"), config.run.out)
    print(table(results), flush=True)
    last = results[-1]
    if last.waits_for is not None:
        raise AnnotationNeeded(
            f"round {last.round} is done, and round {last.round + 1} waits for you: say what is mathematics in "
            f"{str(last.waits_for)!r}, by hand or with annotate.html beside it in a browser, with done: true, and run "
            "the same command again (domains.rules=FILE does without a person)"
        )


def classify(config: CorpusConfig) -> StepReport:
    """Run the step `classify`: round 1 up to its scores."""
    pages, seeds = finished_shards(config.run.out / "dedup"), seed_shards(config.rounds.seeds)
    return _score(_begin(config, pages, seeds, config.run.out), 1, None)


def annotate_step(config: CorpusConfig) -> None:
    """Run the step `annotate`: write the annotation page and file of the last finished round unless they are there."""
    out = config.run.out
    folder = collected_folder(out).parent
    number = int(folder.name.removeprefix("round-"))
    corpus = _begin(config, finished_shards(out / "dedup"), (), out)
    before = corpus.folder(number - 1) / "annotated.yaml"
    base = Annotations.load(before) if before.exists() else Annotations()
    domains = list(read_counts([folder / "domains.parquet"]))
    _annotate(corpus, number, read_cut(folder / "cut" / "cut.json"), domains, base)
    print(f"open {folder / 'annotate.html'} in a browser, or edit {folder / 'annotations.yaml'}", flush=True)


def seed_shards(seeds: Iterable[str]) -> tuple[Path, ...]:
    """Shards that rounds.seeds names: files, or folders of them. Raises ValueError for anything else."""
    found: list[Path] = []
    for path in map(Path, seeds):
        if path.is_file() and not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"rounds.seeds: {str(path)!r} is no shard of pages; its name must end in {', '.join(SUFFIXES)}"
            )
        found += shards(path) if path.is_dir() else [path]
        if not path.exists():
            raise ValueError(f"rounds.seeds: there is no file or folder {str(path)!r}: correct the path")
    if not found:
        raise ValueError("rounds.seeds is empty: name shards of pages that are mathematics, to begin with")
    return tuple(found)


def table(results: Sequence[RoundResult]) -> str:
    """The rounds as a table, in Markdown."""
    rows = [
        "| round | trained on | AUC | pages | tokens | domains | new | overlap |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        overlap = "" if result.overlap is None else f"{result.overlap:.1%}"
        rows.append(
            f"| {result.round} | {result.positives:,} + {result.negatives:,} | {result.auc:.4f} | {result.pages:,} "
            f"| {result.tokens:,} | {result.domains:,} | {result.new_domains:,} | {overlap} |"
        )
    return "\n".join(rows)


@dataclass(frozen=True)
class _Corpus:
    """Pages, seeds, folders and configuration that all rounds share."""

    config: CorpusConfig
    pages: tuple[Path, ...]
    seeds: tuple[Path, ...]
    out: Path
    total: int = 0
    """Pages in all shards."""

    def folder(self, number: int) -> Path:
        return self.out / f"round-{number}"

    def step(
        self, name: str, work: Work, inputs: Sequence[tuple[Path, ...]], out: Path, suffix: str | None = None
    ) -> StepReport:
        """Run a step with a task for each of `inputs`, into files 00000, 00001, ... with this suffix."""
        tasks = [Task(i, paths, self.output(out, i, suffix)) for i, paths in enumerate(inputs)]
        return run_step(name, tasks, work, self.config.engine, out)

    def join(self, name: str, work: Work, tasks: Sequence[Task], out: Path) -> None:
        """Join the findings of all shards: in workers, or here when that takes less time than to start one."""
        if self.total > _FEW_PAGES:
            run_step(name, tasks, work, self.config.engine, out)
        else:
            claim(name, tasks, work, out)
            for task in tasks:
                work(task)

    def output(self, out: Path, index: int, suffix: str | None = None) -> Path:
        return out / f"{index:05d}{suffix or '.' + self.config.engine.format}"

    def outputs(self, out: Path, suffix: str | None = None) -> list[Path]:
        return [self.output(out, index, suffix) for index in range(len(self.pages))]

    def indices(self) -> list[Path]:
        return self.outputs(self.out / "index", ".parquet")

    def scores(self, number: int) -> list[Path]:
        return self.outputs(self.folder(number) / "scores", ".parquet")

    def examples(self, number: int) -> list[Path]:
        return self.outputs(self.folder(number) / "examples")


def _begin(config: CorpusConfig, pages: Sequence[Path], seeds: tuple[Path, ...], out: Path) -> _Corpus:
    """Make the index of all pages, and count them."""
    corpus = _Corpus(config, tuple(pages), seeds, out)
    counts = corpus.step("index", Index(), [(path,) for path in pages], out / "index", ".parquet").counts
    if not counts.get("pages"):
        raise ValueError("the shards hold no page: look at the reports of extract and dedup")
    return replace(corpus, total=counts["pages"])


@dataclass(frozen=True)
class _Before:
    """Results of the previous round that the next one needs."""

    number: int
    cut: Cut
    annotations: Annotations


def _run_round(corpus: _Corpus, number: int, before: _Before | None) -> tuple[RoundResult, _Before | None, set[str]]:
    """Run a round: its row of the table, the state for the next one (None: waits for a person), its domains."""
    config, folder, name = corpus.config, corpus.folder(number), f"round {number}"
    tokens = _score(corpus, number, before).counts["tokens"]
    scores = corpus.scores(number)
    budgets = config.rounds.budget_tokens
    budget = budgets[min(number, len(budgets)) - 1]
    if 0 < tokens <= budget:
        raise ValueError(
            f"rounds.budget_tokens: {budget:,} hold all {tokens:,} tokens, so that round {number} leaves none out: "
            "lower it (the paper kept 0.1 % of its pages)"
        )
    finding = Task(0, tuple(scores), folder / "cut" / "cut.json")
    corpus.join(f"{name} cut", FindCut(budget), [finding], finding.output.parent)
    cut = read_cut(finding.output)
    inputs = [corpus.pages, scores, *([corpus.scores(before.number)] if before else [])]
    collect = Collect(cut, before.cut if before else None)
    counts = corpus.step(f"{name} collect", collect, list(zip(*inputs, strict=True)), folder / "collected").counts
    domains = _find_domains(corpus, number, cut)
    result = _result(corpus, number, counts, domains, before is not None)
    names = {domain.prefix for domain in domains}
    base = before.annotations if before else Annotations()
    if number == config.rounds.rounds or (result.overlap or 0) >= config.rounds.overlap:
        return result, _Before(number, cut, base), names
    annotations = _annotate(corpus, number, cut, domains, base)
    return result, annotations and _Before(number, cut, annotations), names


def _score(corpus: _Corpus, number: int, before: _Before | None) -> StepReport:
    """Run the examples, training and scores of a round."""
    config, folder, name = corpus.config, corpus.folder(number), f"round {number}"
    limits = config.rounds.positives, config.rounds.negatives
    share = min(1.0, config.rounds.negatives / corpus.total)
    annotations, cut = (before.annotations, before.cut) if before else (Annotations(), None)
    inputs = [corpus.pages, *([corpus.scores(before.number), corpus.examples(before.number)] if before else [])]
    examples = Examples(config.run.seed, share, annotations, cut)
    corpus.step(f"{name} examples", examples, list(zip(*inputs, strict=True)), folder / "examples")
    train = Train(config.classifier, config.tokenizer, config.run.seed, len(corpus.seeds), *limits)
    training = Task(0, (*corpus.seeds, *corpus.examples(number)), folder / "train" / "model.bin")
    run_step(f"{name} train", [training], train, config.engine, folder / "train")
    scoring = [(path, training.output) for path in corpus.pages]
    return corpus.step(
        f"{name} score", Score(config.classifier, config.tokenizer), scoring, folder / "scores", ".parquet"
    )


def _find_domains(corpus: _Corpus, number: int, cut: Cut) -> list[Count]:
    """The mathematical domains of a round."""
    config, folder = corpus.config, corpus.folder(number)
    merged = _count(corpus, number, "domains", CountDomains(cut, num_parts(corpus.total)), 1)
    domains = mathematical(read_counts(merged), config.domains.share, config.domains.min_pages)
    write_counts(folder / "domains.parquet", domains)
    return domains


def _annotate(
    corpus: _Corpus, number: int, cut: Cut, domains: Sequence[Count], base: Annotations
) -> Annotations | None:
    """Count the prefixes of the mathematical domains, and annotate them."""
    config, folder = corpus.config, corpus.folder(number)
    settings = config.domains.share, config.domains.min_pages
    work = CountPrefixes(cut, num_parts(corpus.total), folder / "domains.parquet", *settings)
    merged = _count(corpus, number, "prefixes", work, config.domains.min_pages)
    rank = {domain.prefix: place for place, domain in enumerate(domains)}
    counts = sorted(read_counts(merged), key=lambda count: rank[count.prefix.partition("/")[0]])
    found = zip(corpus.pages, corpus.indices(), corpus.scores(number), strict=True)
    shards = [Shard(pages, index, scores) for pages, index, scores in found]
    title = f"Round {number}: domains of which more than {config.domains.share:.0%} was collected"
    return annotate(config.domains, title, folder, counts, shards, cut, base)


def _count(corpus: _Corpus, number: int, name: str, work: Work, min_pages: int) -> list[Path]:
    """Count by shard, then add up by part; the files of the parts."""
    folder, out = corpus.folder(number), corpus.folder(number) / name
    by_shard, inputs = folder / f"{name}-by-shard", list(zip(corpus.indices(), corpus.scores(number), strict=True))
    corpus.step(f"round {number} {name}", work, inputs, by_shard, ".parquet")
    parts = [corpus.output(out, part, ".parquet") for part in range(num_parts(corpus.total))]
    tasks = [Task(part, (by_shard,), path) for part, path in enumerate(parts)]
    corpus.join(f"round {number} {name}, sum", Merge(len(corpus.pages), min_pages), tasks, out)
    return parts


def _result(
    corpus: _Corpus, number: int, counts: Mapping[str, int], domains: Sequence[Count], follows: bool
) -> RoundResult:
    quality = read_quality(corpus.folder(number) / "train" / "model.bin")
    overlap = counts["again"] / counts["pages"] if follows and counts["pages"] else None
    return RoundResult(
        number,
        quality.positives,
        quality.negatives,
        quality.auc,
        counts["pages"],
        counts["tokens"],
        len(domains),
        0,
        overlap,
    )


def _write_table(out: Path, results: Sequence[RoundResult]) -> None:
    write_json(out / "rounds.json", [asdict(result) for result in results])
    with replacing(out / "rounds.md") as temporary:
        temporary.write_text(table(results) + "\n", encoding="utf-8")
