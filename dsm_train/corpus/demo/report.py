"""Scores of the demo against the truth of its synthetic web: numbers, a table, a plot.

P: pages of the web after extraction and deduplication.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from dsm_train.corpus.demo.synthetic_web import PageTruth, Truth
from dsm_train.corpus.engine.page import Page
from dsm_train.corpus.mining.select import Cut, cut, read_scores

_GOAL = 0.95
"""Recall and precision that the demo is tuned for."""


@dataclass(frozen=True)
class RoundScore:
    """Scores of one round's collection against the truth."""

    round: int
    pages: int
    tokens: int
    recall: float
    """Share of the mathematical pages that was collected."""
    precision: float
    """Share of the collected pages that is mathematics."""
    recall_at_last_budget: float
    """Recall of this round's ranking, cut at the last round's budget: isolates the classifier's gain."""
    hidden_recall: float
    """Recall on the hidden sites, which are all mathematics and unknown to the seed."""
    hidden_sites: int
    """Hidden sites of which more than half was collected."""


@dataclass(frozen=True)
class Outcome:
    """Scores of the finished corpus against the truth; `*_left` counts what should be gone."""

    rounds: tuple[RoundScore, ...]
    recall: float
    precision: float
    hidden_sites: int
    hidden_sites_planted: int
    duplicates_left: int
    duplicates_planted: int
    contaminated_left: int
    contaminated_planted: int
    near_misses_lost: int
    """Pages that resemble the benchmark and are not contaminated, that decontamination removed."""
    near_misses_collected: int
    pages: int
    tokens: int
    seconds: dict[str, float]
    """Time of each step on the clock."""


@dataclass(frozen=True)
class Ranking:
    """Ranking of all pages by a round, best first."""

    tokens_P: np.ndarray
    recall_P: np.ndarray
    """Recall and precision if the cut came behind this page."""
    precision_P: np.ndarray


@dataclass(frozen=True)
class Judge:
    """Holds sets of pages, given by their ids, against the truth. Copies of a page count as one."""

    truth: Truth

    @cached_property
    def pages(self) -> dict[str, PageTruth]:
        """Truth of each page, by its id."""
        return {page.id: page for page in self.truth.pages}

    def wanted(self, contaminated: bool) -> set[str]:
        """Mathematical pages that a reader of HTML can read, by the id of the original."""
        return {
            page.original
            for page in self.truth.pages
            if page.mathematics and page.damage != "script" and (contaminated or not page.contaminated)
        }

    def recall(self, ids: Iterable[str], wanted: set[str]) -> float:
        """Share of the wanted pages of which some copy is among `ids`."""
        return len({self.pages[id].original for id in ids} & wanted) / len(wanted)

    def precision(self, ids: Sequence[str]) -> float:
        """Share of `ids` that are mathematics."""
        return sum(self.pages[id].mathematics for id in ids) / max(1, len(ids))

    def hidden_sites(self, ids: Iterable[str]) -> int:
        """Hidden sites of which more than half is among `ids`."""
        whole = Counter(_host(page) for page in self.truth.pages if page.hidden and page.damage != "script")
        found = Counter(_host(self.pages[id]) for id in ids if self.pages[id].hidden)
        return sum(found[site] > whole[site] / 2 for site in self.truth.hidden_sites)

    def score_round(self, number: int, scores: Sequence[Path], where: Cut, last_budget: int) -> RoundScore:
        """Score a round by its shards of scores and its cut."""
        ids, whole = collected(scores, where), self.wanted(contaminated=True)
        hidden = {id for id in whole if self.pages[id].hidden}
        return RoundScore(
            round=number,
            pages=where.pages,
            tokens=where.tokens,
            recall=self.recall(ids, whole),
            precision=self.precision(ids),
            recall_at_last_budget=self.recall(collected(scores, cut(scores, last_budget)), whole),
            hidden_recall=self.recall(ids, hidden),
            hidden_sites=self.hidden_sites(ids),
        )

    def ranking(self, scores: Sequence[Path]) -> Ranking:
        """Recall and precision of a round at every possible budget."""
        batches = [batch for path in scores for batch in read_scores(path)]
        id_P, tokens_P, score_P = (np.concatenate(columns) for columns in zip(*batches, strict=True))
        best_P = np.lexsort((id_P, -score_P))
        found_P = np.cumsum([self.pages[f"{id:016x}"].mathematics for id in id_P[best_P].tolist()])
        whole = len(self.wanted(contaminated=True))
        return Ranking(np.cumsum(tokens_P[best_P]), found_P / whole, found_P / np.arange(1, len(found_P) + 1))

    def duplicates(self, ids: Iterable[str]) -> int:
        """Pages beyond the first of each group of copies."""
        return sum(count - 1 for count in Counter(self.pages[id].original for id in ids).values())


def collected(scores: Sequence[Path], where: Cut) -> list[str]:
    """The ids of the pages above a cut."""
    batches = (batch for path in scores for batch in read_scores(path))
    return [f"{id:016x}" for id_N, _, score_N in batches for id in id_N[where.collects(id_N, score_N)].tolist()]


def contaminated(pages: Iterable[Page], benchmark: Path) -> int:
    """Pages that hold a whole question or answer, found by plain search: letters and digits only, in lower case."""
    texts = benchmark_texts(benchmark)
    return sum(any(text in whole for text in texts) for whole in (squashed(page.text) for page in pages))


def benchmark_texts(benchmark: Path) -> list[str]:
    """The questions and answers of a benchmark, squashed; without bare numbers, which are on many pages."""
    records = [json.loads(line) for line in benchmark.read_text(encoding="utf-8").splitlines()]
    texts = [squashed(text) for record in records for text in record.values()]
    return [text for text in texts if len(text) > 12]


def squashed(text: str) -> str:
    """Letters and digits of a text alone, in lower case."""
    return re.sub(r"\W+", "", text.lower())


def _host(page: PageTruth) -> str:
    return urlsplit(page.url).netloc


def table(outcome: Outcome) -> str:
    """Table for the terminal: the rounds, and the planted pages that are left."""
    planted = outcome.hidden_sites_planted
    lines = ["round  pages   tokens  recall  precision  recall at last budget  hidden: recall  sites found"]
    for row in outcome.rounds:
        lines.append(
            f"{row.round:5}  {row.pages:5,}  {row.tokens:7,}  {row.recall:6.1%}  {row.precision:9.1%}  "
            f"{row.recall_at_last_budget:21.1%}  {row.hidden_recall:14.1%}  {row.hidden_sites:5} of {planted}"
        )
    lines += [
        "",
        f"corpus: {outcome.pages:,} pages, {outcome.tokens:,} tokens, recall {outcome.recall:.1%}, precision "
        f"{outcome.precision:.1%}, hidden sites found {outcome.hidden_sites} of {planted}",
        f"left of {outcome.duplicates_planted} planted duplicates: {outcome.duplicates_left}; of "
        f"{outcome.contaminated_planted} contaminated pages: {outcome.contaminated_left}; near misses removed by "
        f"mistake: {outcome.near_misses_lost} of {outcome.near_misses_collected}",
        "seconds: "
        + ", ".join(f"{step} {seconds:.1f}" for step, seconds in outcome.seconds.items())
        + f"; in all {sum(outcome.seconds.values()):.0f}",
    ]
    return "\n".join(lines)


def plot(outcome: Outcome, rankings: Sequence[Ranking], path: Path) -> None:
    """Left: recall and precision by round. Right: both at every budget, by the first and by the last ranking."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rounds = [row.round for row in outcome.rounds]
    series = {
        "recall": ([row.recall for row in outcome.rounds], "tab:blue", "-"),
        "recall of hidden sites": ([row.hidden_recall for row in outcome.rounds], "tab:blue", ":"),
        "recall at the last budget": ([row.recall_at_last_budget for row in outcome.rounds], "tab:cyan", "--"),
        "precision": ([row.precision for row in outcome.rounds], "tab:orange", "-"),
    }
    for name, (values, colour, style) in series.items():
        left.plot(rounds, values, style, marker="o", color=colour, label=name)
    left.set(title="what each round collected", xlabel="round", xticks=rounds, ylim=(0, 1.03))
    for ranking, number, alpha in ((rankings[0], rounds[0], 0.4), (rankings[-1], rounds[-1], 1.0)):
        thousands = ranking.tokens_P / 1e3
        right.plot(thousands, ranking.recall_P, color="tab:blue", alpha=alpha, label=f"recall, round {number}")
        right.plot(thousands, ranking.precision_P, color="tab:orange", alpha=alpha, label=f"precision, round {number}")
    right.axvline(outcome.rounds[-1].tokens / 1e3, color="gray", linewidth=1, label="the budget")
    right.set(title="what other budgets would have collected", xlabel="budget, thousand tokens", ylim=(0, 1.03))
    for axes, x in ((left, 0.01), (right, 0.5)):
        axes.axhline(_GOAL, color="gray", linewidth=0.8, linestyle=":")
        place = {"x": x, "y": _GOAL - 0.01, "transform": axes.get_yaxis_transform(), "ha": "left", "va": "top"}
        axes.text(s=f"goal of the demo: {_GOAL}", fontsize=7, color="gray", **place)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right" if axes is left else "center right")
    figure.suptitle(f"a synthetic web: the truth of its {rankings[-1].tokens_P.size:,} pages is known", fontsize=9)
    figure.savefig(path)
