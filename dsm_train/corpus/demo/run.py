"""Step `demo`: run all steps on a synthetic web and score them against its truth.

The steps are those of every corpus; they see WARC files, seed pages, a benchmark and rules, never the truth. The seed
is drawn from the truth: it stands for the corpus that mining begins with (the paper's OpenWebMath). Domains are
annotated by `RULES`, which use the share of a prefix that was collected. Budgets are the recipe's, as the paper's come
from training on corpora of several sizes; the plot shows all other budgets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from dsm_train.corpus.config import CorpusConfig
from dsm_train.corpus.demo.report import Judge, Outcome, contaminated, plot, table
from dsm_train.corpus.demo.synthetic_web import Truth, make
from dsm_train.corpus.engine.engine import finished_shards, write_json
from dsm_train.corpus.engine.page import Page, read_pages, write_pages

RULES = """\
# Annotation without a person: a prefix of a mathematical domain is mathematics where at least a fifth of its pages was
# collected, and is not where next to nothing was.
rules:
- {prefix: "*", min_share: 0.2}
- {prefix: "*", max_share: 0.05, math: false}
"""
_VOCABULARY = 2048
"""Tokens of the tokenizer that is trained on every fourth page: a small web has few words."""

_MOST_TOKENS_PER_PAGE = 200
"""Largest budget per page, half of the tokens that a page holds."""

ResultT = TypeVar("ResultT")


@dataclass
class _Clock:
    """Times the steps."""

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, step: str, work: Callable[[], ResultT]) -> ResultT:
        print(f"demo: {step}", flush=True)
        started = time.monotonic()
        result = work()
        self.seconds[step] = round(time.monotonic() - started, 2)
        return result


def run(config: CorpusConfig) -> None:
    """Run the step `demo`: everything, a table on the terminal, demo.json and demo.png in run.out."""
    outcome = run_demo(config)
    print(f"\n{table(outcome)}\nplot: {config.run.out / 'demo.png'}", flush=True)


def run_demo(config: CorpusConfig) -> Outcome:
    """Run all steps, then score them against the truth. Finished steps of an earlier run are kept.

    Raises ValueError for a budget that would hold most of the web, for a run.out with the web of another seed or size,
    and whatever the steps raise.
    """
    from dsm_train.corpus import tokenise
    from dsm_train.corpus.cleaning import decontaminate, dedup
    from dsm_train.corpus.mining import rounds
    from dsm_train.corpus.text import extract

    out, clock = config.run.out, _Clock()
    _check_budget(config.rounds.budget_tokens[-1], config.demo.pages)
    truth = clock("make the web", lambda: _web(out / "web", config.run.seed, config.demo.pages))
    config = _complete(config)
    clock("extract", lambda: extract.run(config))
    clock("dedup", lambda: dedup.run(config))
    clock("tokenizer and seed", lambda: _prepare(out, truth))
    results = clock("rounds", lambda: rounds.run_rounds(config, finished_shards(out / "dedup"), out))
    clock("decontaminate", lambda: decontaminate.run(config))
    clock("tokenise", lambda: tokenise.run(config))
    outcome = judge(out, truth, [result.tokens for result in results], clock.seconds)
    write_json(out / "demo.json", asdict(outcome))
    return outcome


def judge(out: Path, truth: Truth, tokens: list[int], seconds: dict[str, float]) -> Outcome:
    """Score the output of the steps in `out` against the truth; draw demo.png. `tokens`: collected by each round."""
    from dsm_train.corpus.mining.round_steps import read_cut

    judge, rows, rankings = Judge(truth), [], []
    for number, _ in enumerate(tokens, start=1):
        folder = out / f"round-{number}"
        scores = sorted((folder / "scores").glob("*.parquet"))
        rows.append(judge.score_round(number, scores, read_cut(folder / "cut" / "cut.json"), tokens[-1]))
        rankings.append(judge.ranking(scores))
    final = list(_pages(out / "decontaminate"))
    ids = [page.id for page in final]
    misses = {page.id for page in _pages(out / f"round-{len(tokens)}" / "collected") if judge.pages[page.id].near_miss}
    manifest = json.loads((out / "dataset" / "manifest.json").read_text(encoding="utf-8"))
    outcome = Outcome(
        rounds=tuple(rows),
        recall=judge.recall(ids, judge.wanted(contaminated=False)),
        precision=judge.precision(ids),
        hidden_sites=judge.hidden_sites(ids),
        hidden_sites_planted=len(truth.hidden_sites),
        duplicates_left=judge.duplicates(page.id for page in _pages(out / "dedup")),
        duplicates_planted=sum(page.copy != "" for page in truth.pages),
        contaminated_left=contaminated(final, out / "web" / "benchmark.jsonl"),
        contaminated_planted=sum(page.contaminated for page in truth.pages),
        near_misses_lost=len(misses - set(ids)),
        near_misses_collected=len(misses),
        pages=manifest["pages"],
        tokens=manifest["tokens"],
        seconds=seconds,
    )
    plot(outcome, rankings, out / "demo.png")
    return outcome


def _check_budget(budget: int, pages: int) -> None:
    if budget > _MOST_TOKENS_PER_PAGE * pages:
        raise ValueError(
            f"rounds.budget_tokens of {budget:,} is most of the web of demo.pages={pages}, of which a quarter is "
            f"mathematics: about {120 * pages:,} is right (demo.yaml beside this program suits 4000 pages)"
        )


def _web(folder: Path, seed: int, pages: int) -> Truth:
    """Make the web, unless it is there."""
    path = folder / "truth.json"
    if not path.exists():
        return make(folder, seed, pages)
    truth = Truth.load(path)
    if (truth.seed, len(truth.pages)) != (seed, pages):
        raise ValueError(
            f"{str(folder)!r} holds a web of {len(truth.pages)} pages made with seed {truth.seed}, not {pages} with "
            f"seed {seed}: choose another run.out, or delete {str(folder.parent)!r}"
        )
    return truth


def _complete(config: CorpusConfig) -> CorpusConfig:
    """Point the configuration of every step to the files that the demo makes in run.out."""
    out, domains = config.run.out, config.domains
    if domains.rules is None:
        (out / "rules.yaml").write_text(RULES, encoding="utf-8")
        domains = replace(domains, rules=out / "rules.yaml")
    return replace(
        config,
        extract=replace(config.extract, inputs=(str(out / "web" / "warc"),)),
        tokenizer=replace(config.tokenizer, path=out / "tokenizer"),
        rounds=replace(config.rounds, seeds=(str(out / "seed"),)),
        domains=domains,
        decontaminate=replace(config.decontaminate, benchmarks=(str(out / "web" / "benchmark.jsonl"),)),
    )


def _prepare(out: Path, truth: Truth) -> None:
    """Train the tokenizer, and pick the seed of round 1 from the pages."""
    from dsm_train.data.tokenizer import train_tokenizer

    if (out / "seed" / "00000.jsonl.gz").exists():
        return
    seed = {page.id for page in truth.pages if page.seed}
    pages = list(_pages(out / "dedup"))
    train_tokenizer((page.text for page in pages[::4]), _VOCABULARY).save(out / "tokenizer")
    write_pages(out / "seed" / "00000.jsonl.gz", (page for page in pages if page.id in seed))


def _pages(folder: Path) -> Iterator[Page]:
    return (page for path in finished_shards(folder) for page in read_pages(path))
