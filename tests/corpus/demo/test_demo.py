"""`corpus demo`, small: it finds the planted mathematics, and a killed run resumes to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from drawn import drawn_documents

from dsm_train.cli import load_config
from dsm_train.corpus.config import CorpusConfig
from dsm_train.corpus.demo.report import Outcome, table
from dsm_train.corpus.demo.run import run_demo
from dsm_train.corpus.demo.synthetic_web import Truth
from dsm_train.corpus.engine.page import read_pages, shards
from dsm_train.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
SMALL = ["demo.pages=1000", "rounds.budget_tokens=[54000,89000,120000]", "rounds.negatives=350", "rounds.rounds=3"]


def arguments(out: Path) -> list[str]:
    return [f"run.out={out}", *SMALL]


def configuration(arguments: list[str]) -> CorpusConfig:
    recipe = str(ROOT / "dsm_train" / "corpus" / "demo" / "demo.yaml")
    return load_config(CorpusConfig, ["--config", recipe, *arguments], prog="demo", description="")


def run(out: Path) -> Outcome:
    return run_demo(configuration(arguments(out)))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def outcome(out: Path) -> Outcome:
    return run(out)


def test_rounds_find_more_mathematics_and_hidden_sites(outcome: Outcome) -> None:
    first, *_, last = outcome.rounds
    assert [row.recall for row in outcome.rounds] == sorted(row.recall for row in outcome.rounds)
    assert first.recall < 0.5 and last.recall > 0.85 and first.precision > 0.9 and last.precision > 0.85
    assert first.recall_at_last_budget < 0.75 and last.recall_at_last_budget == last.recall
    assert first.hidden_recall < 0.2 and last.hidden_recall > 0.8
    assert first.hidden_sites == 0 and outcome.hidden_sites == outcome.hidden_sites_planted >= 4


def test_nothing_that_was_planted_to_be_removed_is_left(outcome: Outcome) -> None:
    assert outcome.duplicates_planted > 80 and outcome.duplicates_left == 0
    assert outcome.contaminated_planted > 10 and outcome.contaminated_left == 0
    assert outcome.near_misses_collected > 0 and outcome.near_misses_lost == 0


def test_megatron_reads_the_corpus_and_it_is_the_pages_that_were_kept(out: Path, outcome: Outcome) -> None:
    tokenizer = load_tokenizer(out / "tokenizer")
    kept = [page for path in shards(out / "decontaminate") for page in read_pages(path)]
    *read, last = [tokenizer.decode(ids) for ids in drawn_documents(out / "dataset", tokenizer, 256)]
    texts = {page.text for page in kept}
    assert len(kept) == outcome.pages == len(texts) and len(read) == len(set(read)) >= len(texts) - 2
    assert set(read) <= texts and any(text.startswith(last) for text in texts)
    assert sum(len(tokenizer.encode(page.text)) + 1 for page in kept) == outcome.tokens
    known = {page.id: page for page in Truth.load(out / "web" / "truth.json").pages}
    assert not any(known[page.id].contaminated for page in kept)
    assert outcome.precision == sum(known[page.id].mathematics for page in kept) / len(kept)


def test_it_reports_in_a_table_a_plot_and_a_file(out: Path, outcome: Outcome) -> None:
    told = table(outcome)
    assert len(told.splitlines()) == len(outcome.rounds) + 5
    assert f"recall {outcome.recall:.1%}, precision {outcome.precision:.1%}" in told
    assert json.loads((out / "demo.json").read_text(encoding="utf-8"))["recall"] == outcome.recall
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_killed_ends_as_the_same_run_does_elsewhere(out: Path, outcome: Outcome, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsm_train", "corpus", "demo", *arguments(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        give_up = time.monotonic() + 120
        while not (tmp_path / "round-1" / "train" / "model.bin").exists():
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "dataset").exists()
    made = (tmp_path / "dedup" / "report.json").stat().st_mtime_ns
    again = run(tmp_path)
    assert (tmp_path / "dedup" / "report.json").stat().st_mtime_ns == made
    assert replace(again, seconds={}) == replace(outcome, seconds={})
    for name in ("corpus.bin", "corpus.idx"):
        assert (tmp_path / "dataset" / name).read_bytes() == (out / "dataset" / name).read_bytes()


def test_settings_that_cannot_be_meant_are_refused_at_once(out: Path, outcome: Outcome, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"budget_tokens of 120,000,000,000 is most of the web of demo.pages=4000.*480,000"
    ):
        run_demo(CorpusConfig())
    config = configuration([*arguments(out), "run.seed=5"])
    with pytest.raises(ValueError, match="1000 pages made with seed 0, not 1000 with seed 5: choose another run.out"):
        run_demo(config)
