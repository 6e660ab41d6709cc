"""Work of a round's steps, on one shard or on all: examples, training, scores, cut, collection."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

from dsm_train.corpus.cleaning.fingerprints import normalise_url
from dsm_train.corpus.config import ClassifierConfig, TokenizerConfig
from dsm_train.corpus.engine.engine import Task, write_json
from dsm_train.corpus.engine.page import Page, id_number, read_pages, write_pages
from dsm_train.corpus.mining import classifier
from dsm_train.corpus.mining.annotate import Annotations
from dsm_train.corpus.mining.classifier import Quality, Scorer
from dsm_train.corpus.mining.select import Cut, ScoreRow, cut, read_scores, write_scores


@dataclass(frozen=True)
class Examples:
    """Pages of a shard to train on: those under annotated URLs that were not collected, and a random sample.

    Inputs: the pages; from round 2 their scores and their examples in the round before, whose positives stay as long as
    their annotation does. In the output `score` is 1 for a positive and 0 for a negative.
    """

    seed: int
    share: float
    """Share of the pages that is sampled; the same pages in every round."""
    annotations: Annotations
    """Nothing under them is sampled as a negative."""
    previous: Cut | None
    """The cut of the round before; none in round 1."""

    def __call__(self, task: Task) -> Mapping[str, int]:
        counts: Counter[str] = Counter(positives=0, negatives=0)

        def examples() -> Iterator[Page]:
            pages, *before = task.inputs
            stay = {page.id for page in read_pages(before[1]) if page.score == 1} if before else set()
            collected_before = _collected(before[0] if before else None, self.previous)
            for page, collected in zip(read_pages(pages), collected_before, strict=False):
                in_math = self.annotations.is_math(page.url)
                if in_math and (page.id in stay or not collected):
                    counts["positives"] += 1
                    yield replace(page, score=1.0)
                elif not in_math and sampled(page.id, self.seed, self.share):
                    counts["negatives"] += 1
                    yield replace(page, score=0.0)

        write_pages(task.output, examples())
        return counts


@dataclass(frozen=True)
class Train:
    """Train the classifier of a round. Inputs: shards of seeds, then shards of examples. Output: the model."""

    classifier: ClassifierConfig
    tokenizer: TokenizerConfig
    seed: int
    seeds: int
    """Number of the inputs that are seeds; they come first."""
    most_positives: int
    most_negatives: int

    def __call__(self, task: Task) -> Mapping[str, int]:
        known: set[str] = set()
        quality = classifier.train(
            self._positives(task.inputs, known),
            self._negatives(task.inputs[self.seeds :], known),
            self.classifier,
            task.output,
            self.seed,
            self.tokenizer,
        )
        write_json(quality_path(task.output), asdict(quality))
        return {"positives": quality.positives, "negatives": quality.negatives, "held out": quality.held_out}

    def _positives(self, inputs: Sequence[Path], known: set[str]) -> Iterator[str]:
        """Texts of the positives, a sample when there are more than asked for; their addresses go to `known`."""

        def pages() -> Iterator[Page]:
            for number, path in enumerate(inputs):
                yield from (page for page in read_pages(path) if number < self.seeds or page.score == 1)

        share = self.most_positives / max(1, sum(1 for _ in pages()))
        chosen = (page for page in pages() if sampled(page.id, self.seed, share) and _address(page) not in known)
        for page in itertools.islice(chosen, self.most_positives):
            known.add(_address(page))
            yield page.text

    def _negatives(self, inputs: Sequence[Path], known: set[str]) -> Iterator[str]:
        pages = (page for path in inputs for page in read_pages(path) if page.score == 0)
        others = (page for page in pages if _address(page) not in known)
        return (page.text for page in itertools.islice(others, self.most_negatives))


@dataclass(frozen=True)
class Score:
    """Score a shard. Inputs: the pages and the model. Output: their scores, with the tokens of each page."""

    classifier: ClassifierConfig
    tokenizer: TokenizerConfig

    def __call__(self, task: Task) -> Mapping[str, int]:
        pages, model = task.inputs
        scorer = _scorer(model, model.stat().st_mtime_ns, self.classifier, self.tokenizer)
        counts: Counter[str] = Counter(pages=0, tokens=0)

        def rows() -> Iterator[ScoreRow]:
            for page in read_pages(pages):
                line = scorer.features.line(page.text)
                tokens = page.tokens or scorer.features.tokens(page.text, line)
                counts.update(pages=1, tokens=tokens)
                yield ScoreRow(id_number(page), tokens, scorer.score_line(line))

        write_scores(task.output, rows())
        return counts


@functools.lru_cache(1)
def _scorer(model: Path, changed: int, config: ClassifierConfig, tokenizer: TokenizerConfig) -> Scorer:
    """Scorer, kept by a worker from shard to shard: its cache of cut texts saves most of the work."""
    return Scorer.load(model, config, tokenizer)


@dataclass(frozen=True)
class FindCut:
    """Find where the ranking reaches the budget. Inputs: the scores of all shards. Output: the cut, as JSON."""

    budget_tokens: int

    def __call__(self, task: Task) -> Mapping[str, int]:
        found = cut(task.inputs, self.budget_tokens)
        # JSON has no -inf: a budget that nothing exceeds.
        write_json(task.output, {**asdict(found), "score": None if math.isinf(found.score) else found.score})
        return {"pages": found.pages, "tokens": found.tokens}


def read_cut(path: Path) -> Cut:
    """The cut that `FindCut` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return Cut(**{**record, "score": -math.inf if record["score"] is None else record["score"]})


@dataclass(frozen=True)
class Collect:
    """The pages of a shard above the cut. Inputs: the pages, their scores, and those of the round before.

    The counts `again` and `tokens again` are of pages that the round before collected too.
    """

    cut: Cut
    previous: Cut | None

    def __call__(self, task: Task) -> Mapping[str, int]:
        counts: Counter[str] = Counter({"pages": 0, "tokens": 0, "again": 0, "tokens again": 0})
        pages, scores, *before = task.inputs

        def collected() -> Iterator[Page]:
            rows = (row for batch in read_scores(scores) for row in zip(*batch, strict=True))
            now, then = _collected(scores, self.cut), _collected(before[0] if before else None, self.previous)
            for page, (_, tokens, score), is_in, was_in in zip(read_pages(pages), rows, now, then, strict=False):
                if is_in:
                    counts.update({"pages": 1, "tokens": int(tokens)})
                    counts.update({"again": int(was_in), "tokens again": int(tokens) * was_in})
                    yield replace(page, tokens=int(tokens), score=float(score))

        write_pages(task.output, collected())
        return counts


def sampled(page_id: str, seed: int, share: float) -> bool:
    """True if a page is in the random sample of this share of all pages: decided by its id, hence in any order."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{page_id}".encode()) < share * 2.0**64


def _address(page: Page) -> str:
    """Key of a page that was captured twice, since seeds come from other crawls."""
    return normalise_url(page.url) or page.id


def quality_path(model: Path) -> Path:
    """Path of the file with a model's quality."""
    return model.with_name("quality.json")


def read_quality(model: Path) -> Quality:
    """The quality of a model that `Train` wrote."""
    return Quality(**json.loads(quality_path(model).read_text(encoding="utf-8")))


def _collected(scores: Path | None, where: Cut | None) -> Iterator[bool]:
    """True for each page of a shard that was collected; without scores, none was."""
    if scores is None or where is None:
        return itertools.repeat(False)
    return (bool(flag) for id_N, _, score_N in read_scores(scores) for flag in where.collects(id_N, score_N))
