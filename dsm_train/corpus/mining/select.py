"""Selection of the pages that a round collects: the best ones within a budget of tokens (DeepSeekMath, section 2.1).

A shard of scores is a Parquet file with a row for each page of a shard of pages, in its order: id, tokens, score.
Pages are ranked by score, highest first, ties by id. The cut is found by radix selection: each pass over the scores
narrows it by 16 bits with a histogram of tokens, until few enough pages are left to sort. A pass holds a batch of rows
and 65536 counts, whatever the number of pages; four passes are usual.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dsm_train.corpus.engine.page import replacing

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1 << 16
"""Rows read or written at once."""
_BITS = 16
_BINS = 1 << _BITS
_SORTED = 1 << 20
"""Pages that are sorted in memory rather than counted in bins."""

RowT = TypeVar("RowT")
Keys = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Function that yields batches of pages anew: their keys (uint64 [N], the lowest is the best) and their tokens."""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """Row of a shard of scores."""

    id: int
    """The page's id (`page.id_number`)."""
    tokens: int
    """Its tokens."""
    score: float
    """The classifier's score; -inf or NaN: never collected."""


@dataclass(frozen=True)
class Cut:
    """First page of the ranking that is not collected, and the totals of those before it."""

    score: float
    """Pages with a higher score are collected, those with a lower one are not."""
    id: int
    """Pages with this very score are collected when their id is lower."""
    pages: int
    """Pages collected."""
    tokens: int
    """Tokens collected, at most the budget."""

    def collects(self, id_N: np.ndarray, score_N: np.ndarray) -> np.ndarray:
        """Mask of the collected pages among N; bool [N]."""
        return (score_N > self.score) | ((score_N == self.score) & (id_N < self.id))


def write_scores(path: Path, rows: Iterable[ScoreRow]) -> None:
    """Write a shard of scores, whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("id", pa.uint64()), ("tokens", pa.int64()), ("score", pa.float64())])
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for rows_N in batches(rows):
            columns = [[row.id for row in rows_N], [row.tokens for row in rows_N], [row.score for row in rows_N]]
            writer.write_table(pa.table(columns, schema=schema))


def read_scores(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read a shard of scores in batches of N rows: id_N (uint64), tokens_N (int64), score_N (float64)."""
    for batch in read_columns(path, ("id", "tokens", "score")):
        id_N, tokens_N, score_N = (column.to_numpy() for column in batch.columns)
        yield id_N, tokens_N, score_N


def batches(rows: Iterable[RowT]) -> Iterator[list[RowT]]:
    """Rows in lists of 65536: the batches that `read_columns` gives back."""
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, _BATCH)):
        yield batch


def read_columns(path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read columns of a Parquet file in batches; ValueError with the remedy for one that is none, or not there."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(_BATCH, columns=list(names))
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete its folder and run the step again") from error


def cut(scores: Sequence[Path], budget_tokens: int) -> Cut:
    """Cut where the ranking of all pages reaches the budget: the first page that would exceed it ends the collection.

    A budget that holds all pages collects every page with a finite score. Raises ValueError when no page has a score,
    or tokens, and when not even the best page fits.
    """

    def by_score() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in scores:
            for _, tokens_N, score_N in read_scores(path):
                finite_N = np.isfinite(score_N)
                yield _descending(score_N[finite_N]), tokens_N[finite_N]

    def by_id() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in scores:
            for id_N, tokens_N, score_N in read_scores(path):
                tied_N = score_N == score
                yield id_N[tied_N], tokens_N[tied_N]

    edge = _edge(by_score, budget_tokens)
    if edge.tokens == 0 and edge.key is None:
        raise ValueError(
            "no page to collect: the folder of pages is empty, or no text has words"
            if edge.pages == 0
            else f"{edge.pages} pages have no tokens, so that no budget is reached: set tokenizer.path to count them"
        )
    if edge.key is None:
        return Cut(-math.inf, 0, edge.pages, edge.tokens)
    score = float(_ascending(np.array([edge.key], np.uint64))[0])
    tie = _edge(by_id, budget_tokens - edge.tokens)
    assert tie.key is not None
    if edge.pages + tie.pages == 0:
        raise ValueError(f"the best page alone passes the budget of {budget_tokens} tokens: raise rounds.budget_tokens")
    return Cut(score, tie.key, edge.pages + tie.pages, edge.tokens + tie.tokens)


@dataclass(frozen=True)
class _Edge:
    key: int | None
    """The lowest key whose pages do not all fit the budget; None: all pages fit."""
    pages: int
    """Pages with lower keys."""
    tokens: int
    """Their tokens."""


def _edge(keys: Keys, budget: int) -> _Edge:
    """Find the edge; below, `low` bits of it are not known yet, and the others are those of `prefix`."""
    low, prefix, pages, tokens = 64, 0, 0, 0
    while low:
        low -= _BITS
        count_B, sum_B = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        for key_N, tokens_N in keys():
            bin_N = (key_N >> np.uint64(low)) - np.uint64(
                prefix << _BITS
            )  # wraps, to above all bins, before the prefix
            inside_N = bin_N < _BINS
            bin_N = bin_N[inside_N].astype(np.int64)
            count_B += np.bincount(bin_N, minlength=_BINS)
            np.add.at(sum_B, bin_N, tokens_N[inside_N])
        fits = int(np.searchsorted(tokens + np.cumsum(sum_B), budget, "right"))  # bins that fit whole
        pages, tokens = pages + int(count_B[:fits].sum()), tokens + int(sum_B[:fits].sum())
        if fits == _BINS:
            return _Edge(None, pages, tokens)
        prefix = prefix << _BITS | fits
        if count_B[fits] <= _SORTED:
            return _sorted_edge(keys, prefix, low, _Edge(None, pages, tokens), budget)
    return _Edge(prefix, pages, tokens)


def _sorted_edge(keys: Keys, prefix: int, low: int, above: _Edge, budget: int) -> _Edge:
    """Find the edge among the few keys that begin with `prefix`."""
    keys_P, tokens_P = [], []
    for key_N, tokens_N in keys():
        inside_N = key_N >> np.uint64(low) == prefix
        keys_P.append(key_N[inside_N])
        tokens_P.append(tokens_N[inside_N])
    key_K, place_N = np.unique(np.concatenate(keys_P), return_inverse=True)
    tokens_K = np.zeros(len(key_K), np.int64)
    np.add.at(tokens_K, place_N, np.concatenate(tokens_P))
    fits = int(np.searchsorted(above.tokens + np.cumsum(tokens_K), budget, "right"))
    pages = above.pages + int((place_N < fits).sum())
    return _Edge(int(key_K[fits]), pages, above.tokens + int(tokens_K[:fits].sum()))


_SIGN = np.uint64(1 << 63)


def _descending(score_N: np.ndarray) -> np.ndarray:
    """Finite scores as integers whose order is the opposite."""
    bits_N = (score_N + 0.0).view(np.uint64)  # -0 becomes 0
    return np.where(bits_N & _SIGN, bits_N, ~(bits_N | _SIGN))


def _ascending(key_N: np.ndarray) -> np.ndarray:
    """The scores that `_descending` made these keys of."""
    return np.where(key_N & _SIGN, key_N, ~key_N & ~_SIGN).view(np.float64)
