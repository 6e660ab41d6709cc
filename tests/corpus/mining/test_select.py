"""The cut at a token budget, against sorting all pages."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dsm_train.corpus.mining import select
from dsm_train.corpus.mining.select import Cut, ScoreRow, cut, read_scores, write_scores


def write(folder: Path, rows: list[ScoreRow], shards: int = 3) -> list[Path]:
    paths = [folder / f"{index:05d}.parquet" for index in range(shards)]
    for index, path in enumerate(paths):
        write_scores(path, rows[index::shards])
    return paths


def by_sorting(rows: list[ScoreRow], budget: int) -> set[int]:
    """The collected ids, the plain way."""
    collected: set[int] = set()
    total = 0
    for row in sorted(rows, key=lambda row: (-row.score, row.id)):
        total += row.tokens
        if total > budget or not math.isfinite(row.score):
            break
        collected.add(row.id)
    return collected


def collected(paths: list[Path], where: Cut) -> set[int]:
    ids: set[int] = set()
    for path in paths:
        for id_N, _, score_N in read_scores(path):
            ids |= set(id_N[where.collects(id_N, score_N)].tolist())
    return ids


def random_rows(count: int, seed: int, scores: np.ndarray) -> list[ScoreRow]:
    rng = np.random.default_rng(seed)
    ids = rng.choice(1 << 62, count, replace=False).astype(np.uint64) * np.uint64(4) + np.uint64(seed)
    return [
        ScoreRow(int(i), int(t), float(s))
        for i, t, s in zip(ids, rng.integers(1, 5000, count), rng.choice(scores, count), strict=True)
    ]


TIED = np.array([-3.0, -1.0, -0.0, 0.0, 1e-300, 0.1, 7.0])
SPREAD = np.random.default_rng(9).normal(size=500) * np.array([1e-6, 1.0, 30.0, 1.0, 1.0])[np.arange(500) % 5]


@pytest.mark.parametrize("scores", [TIED, SPREAD], ids=["tied", "spread"])
@pytest.mark.parametrize("most_sorted", [0, 10, 1 << 20])  # 0: down to the last bit by counting alone
def test_it_is_what_sorting_gives(
    scores: np.ndarray, most_sorted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_SORTED", most_sorted)
    rows = random_rows(400, 1, scores)
    paths = write(tmp_path, rows)
    whole = sum(row.tokens for row in rows)
    best = max(rows, key=lambda row: (row.score, -row.id))
    for budget in (best.tokens, 10_000, whole // 2, whole - 1, whole, 10 * whole):
        where = cut(paths, budget)
        expected = by_sorting(rows, budget)
        assert collected(paths, where) == expected
        assert (where.pages, where.tokens) == (len(expected), sum(r.tokens for r in rows if r.id in expected))


def test_shards_in_another_order_cut_at_the_same_page(tmp_path: Path) -> None:
    rows = random_rows(300, 2, TIED)
    first = cut(write(tmp_path / "a", rows), 200_000)
    assert cut(write(tmp_path / "b", rows[::-1], shards=7), 200_000) == first


def test_pages_without_a_score_are_never_collected(tmp_path: Path) -> None:
    rows = [ScoreRow(1, 10, -math.inf), ScoreRow(2, 10, math.nan), ScoreRow(3, 10, -5.0)]
    paths = write(tmp_path, rows)
    where = cut(paths, 1000)
    assert collected(paths, where) == {3} and (where.pages, where.tokens) == (1, 10)


def test_an_empty_shard_is_no_error(tmp_path: Path) -> None:
    paths = write(tmp_path, [ScoreRow(3, 10, 1.0)], shards=2)
    assert cut(paths, 10).pages == 1


def test_budgets_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raise rounds.budget_tokens"):
        cut(write(tmp_path / "a", [ScoreRow(1, 10, 1.0), ScoreRow(2, 1, 0.5)]), 9)
    with pytest.raises(ValueError, match="2 pages have no tokens.*tokenizer.path"):
        cut(write(tmp_path / "b", [ScoreRow(1, 0, 1.0), ScoreRow(2, 0, 0.5)]), 9)
    with pytest.raises(ValueError, match="no page to collect"):
        cut(write(tmp_path / "c", [ScoreRow(1, 4, -math.inf)]), 9)


def test_a_shard_that_is_broken_or_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match="00000.parquet cannot be read"):
        cut([tmp_path / "00000.parquet"], 9)
    with pytest.raises(ValueError, match="00001.parquet cannot be read .*run the step again"):
        cut([tmp_path / "00001.parquet"], 9)
