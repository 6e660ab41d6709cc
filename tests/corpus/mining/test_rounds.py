"""Rounds: the work of their steps, and a run that waits for annotations, resumes, and finds the annotated sites."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsm_train.corpus.config import (
    ClassifierConfig,
    CorpusConfig,
    CorpusRun,
    DomainsConfig,
    EngineConfig,
    RoundsConfig,
    TokenizerConfig,
)
from dsm_train.corpus.engine.engine import StepError, Task
from dsm_train.corpus.engine.page import Page, page_id, read_pages, shards, write_pages
from dsm_train.corpus.mining import classifier, round_steps, rounds
from dsm_train.corpus.mining.annotate import Annotations
from dsm_train.corpus.mining.round_annotation import Shard, find_samples
from dsm_train.corpus.mining.round_steps import (
    Collect,
    Examples,
    FindCut,
    Score,
    Train,
    read_cut,
    read_quality,
    sampled,
)
from dsm_train.corpus.mining.select import Cut, ScoreRow, read_scores, write_scores

WORDS = ClassifierConfig(features="words", dim=16, lr=0.5, epochs=5, bucket=20000)
MATH = "theorem proof lemma integral matrix let denote suppose equation vector group ring".split()
HIDDEN = "olympiad puzzle triangle perimeter digits divisible remainder counting coins probability".split()
OTHER = "football recipe weather holiday price shop music film city garden kitchen travel".split()
COMMON = "the of a is and in we to for with on that".split()


def make_pages(site: str, topic: Sequence[str], count: int, path: str = "") -> list[Page]:
    rng = random.Random(f"{site}/{path}")
    pages = []
    for number in range(count):
        url = f"https://{site}/{path}{number}.html"
        pages.append(Page(page_id(url, "2024"), url, " ".join(rng.choices([*topic, *COMMON], k=80)), "en", "2024"))
    return pages


PAGES = [
    Page("1", "http://a.org/math/1", "one", "", ""),
    Page("2", "http://a.org/math/2", "two", "", ""),
    Page("3", "http://a.org/press/3", "three", "", ""),
    Page("4", "http://b.org/4", "four", "", ""),
]
SCORES = [ScoreRow(1, 10, 5.0), ScoreRow(2, 10, -1.0), ScoreRow(3, 10, 0.0), ScoreRow(4, 10, 0.0)]


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, Path]:
    write_pages(tmp_path / "pages.jsonl", PAGES)
    write_scores(tmp_path / "scores.parquet", SCORES)
    return tmp_path / "pages.jsonl", tmp_path / "scores.parquet"


def test_annotated_pages_that_were_not_collected_become_positives_and_stay(
    shard: tuple[Path, Path], tmp_path: Path
) -> None:
    write_pages(tmp_path / "before.jsonl", [Page("4", "http://b.org/4", "four", "", "", score=1.0)])
    annotations = Annotations(("a.org", "b.org"), ("a.org/press",))
    work = Examples(0, 1.0, annotations, Cut(0.0, 4, 2, 20))
    task = Task(0, (*shard, tmp_path / "before.jsonl"), tmp_path / "out.jsonl")
    assert work(task) == {"positives": 2, "negatives": 1}
    assert [(page.id, page.score) for page in read_pages(task.output)] == [("2", 1.0), ("3", 0.0), ("4", 1.0)]

    work = replace(work, annotations=Annotations(("a.org",), ("a.org/press",)))  # somebody thought again of b.org
    assert work(task) == {"positives": 1, "negatives": 2}


def test_round_one_samples_negatives_alone(shard: tuple[Path, Path], tmp_path: Path) -> None:
    task = Task(0, shard[:1], tmp_path / "out.jsonl")
    assert Examples(0, 1.0, Annotations(), None)(task) == {"positives": 0, "negatives": 4}
    assert Examples(0, 0.0, Annotations(), None)(task) == {"positives": 0, "negatives": 0}


def test_a_sample_has_the_share_asked_for_and_depends_on_the_seed() -> None:
    ids = [f"{number:016x}" for number in range(4000)]
    first, other = ({i for i in ids if sampled(i, seed, 0.25)} for seed in (0, 1))
    assert 900 < len(first) < 1100 and 900 < len(other) < 1100 and 200 < len(first & other) < 300
    assert first < {i for i in ids if sampled(i, 0, 0.5)}
    assert all(sampled(i, 0, 1.0) for i in ids)


def test_what_is_collected_is_above_the_cut_and_counted_against_the_round_before(
    shard: tuple[Path, Path], tmp_path: Path
) -> None:
    write_scores(tmp_path / "before.parquet", [ScoreRow(row.id, row.tokens, -row.score) for row in SCORES])
    task = Task(0, (*shard, tmp_path / "before.parquet"), tmp_path / "out.jsonl")
    counts = Collect(Cut(0.0, 4, 2, 20), Cut(0.0, 4, 2, 20))(task)
    assert counts == {"pages": 2, "tokens": 20, "again": 1, "tokens again": 10}
    assert [(page.id, page.tokens, page.score) for page in read_pages(task.output)] == [("1", 10, 5.0), ("3", 10, 0.0)]
    counts = Collect(Cut(0.0, 4, 2, 20), None)(Task(0, shard, tmp_path / "first.jsonl"))
    assert counts == {"pages": 2, "tokens": 20, "again": 0, "tokens again": 0}


@pytest.mark.parametrize(("budget", "score"), [(20, 0.0), (1000, -math.inf)])
def test_the_cut_survives_its_file(budget: int, score: float, shard: tuple[Path, Path], tmp_path: Path) -> None:
    counts = FindCut(budget)(Task(0, (shard[1],), tmp_path / "cut.json"))
    assert read_cut(tmp_path / "cut.json").score == score
    assert json.loads((tmp_path / "cut.json").read_text())["tokens"] == counts["tokens"] == min(budget, 40)


def test_training_takes_at_most_what_is_asked_for_and_no_page_as_both(tmp_path: Path) -> None:
    seeds, good, bad = make_pages("s.org", MATH, 60), make_pages("g.org", MATH, 60), make_pages("o.org", OTHER, 200)
    write_pages(tmp_path / "seeds.jsonl", seeds)
    again = [
        replace(page, id=page_id(page.url, "2025"), url=page.url.replace("https://", "http://www.")) for page in seeds
    ]
    examples = [(page, 1.0) for page in good] + [(page, 0.0) for page in bad + again]  # the seeds of another crawl
    write_pages(
        tmp_path / "examples.jsonl",
        (Page(page.id, page.url, page.text, "", "", score=score) for page, score in examples),
    )
    task = Task(0, (tmp_path / "seeds.jsonl", tmp_path / "examples.jsonl"), tmp_path / "model.bin")
    counts = Train(WORDS, TokenizerConfig(), 0, 1, 500, 500)(task)
    assert counts == {"positives": 108, "negatives": 180, "held out": 32}  # the seeds are no negatives
    counts = Train(WORDS, TokenizerConfig(), 0, 1, 100, 50)(task)
    assert 60 <= counts["positives"] <= 90 and counts["negatives"] == 45
    assert read_quality(task.output).auc == 1.0


def test_scores_hold_the_tokens_that_a_page_has_or_else_its_words(tmp_path: Path) -> None:
    train = classifier_model(tmp_path)
    texts = [
        Page("a", "u", "theorem proof", "", "", tokens=7),
        Page("b", "u", "the garden", "", ""),
        Page("c", "u", "", "", ""),
    ]
    write_pages(tmp_path / "p.jsonl", texts)
    task = Task(0, (tmp_path / "p.jsonl", train), tmp_path / "s.parquet")
    assert Score(WORDS, TokenizerConfig())(task) == {"pages": 3, "tokens": 9}
    ((id_N, tokens_N, score_N),) = read_scores(task.output)
    assert id_N.tolist() == [10, 11, 12] and tokens_N.tolist() == [7, 2, 0]
    assert score_N[0] > score_N[1] > score_N[2] == -np.inf


def test_a_worker_keeps_the_model_and_takes_the_next_one(tmp_path: Path) -> None:
    """A scorer remembers pieces of text, 10 MB of them: one per shard would pile up."""
    write_pages(tmp_path / "pages.jsonl", make_pages("x.org", MATH, 3))
    model = classifier_model(tmp_path)
    tasks = [Task(i, (tmp_path / "pages.jsonl", model), tmp_path / f"{i}.parquet") for i in range(3)]
    before = round_steps._scorer.cache_info()
    for task in tasks[:2]:
        Score(WORDS, TokenizerConfig())(task)
    os.utime(model, ns=(0, 0))  # another model under the same name
    Score(WORDS, TokenizerConfig())(tasks[2])
    after = round_steps._scorer.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses, after.currsize) == (1, 2, 1)


def classifier_model(folder: Path) -> Path:
    good, bad = ([page.text for page in make_pages(topic[0], topic, 100)] for topic in (MATH, OTHER))
    classifier.train(good, bad, WORDS, folder / "model.bin", 0)
    return folder / "model.bin"


@pytest.fixture
def web(tmp_path: Path) -> CorpusConfig:
    """A corpus before its first round."""
    return make_web(tmp_path / "corpus")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """A corpus after its first round, and a copy of its folder beside it."""
    web = make_web(tmp_path_factory.mktemp("waiting") / "corpus")
    with pytest.raises(rounds.AnnotationNeeded):
        rounds.run(web)
    shutil.copytree(web.run.out, web.run.out.with_name("copy"))
    return web


@pytest.fixture
def waiting(made_once: CorpusConfig) -> CorpusConfig:
    """A corpus whose round 1 is done, and whose round 2 waits for a person; whatever other tests did to its folder."""
    out = made_once.run.out  # a folder of the test's own would be another configuration
    shutil.rmtree(out)
    shutil.copytree(out.with_name("copy"), out)
    return made_once


def make_web(out: Path) -> CorpusConfig:
    """Math sites, hidden ones that share a few pages with them, and others; the seed is half of the math sites."""
    pages = [page for site in range(4) for page in make_pages(f"math{site}.org", MATH, 40, "notes/")]
    seeds = pages[:80]
    for site in range(3):
        pages += make_pages(f"hidden{site}.org", HIDDEN + MATH, 10, "p/x-") + make_pages(
            f"hidden{site}.org", HIDDEN, 30, "p/"
        )
        pages += make_pages(f"hidden{site}.org", OTHER, 20, "shop/")
    pages += [page for site in range(12) for page in make_pages(f"other{site}.com", OTHER, 40)]
    random.Random(0).shuffle(pages)
    for index in range(2):
        write_pages(out / "dedup" / f"{index:05d}.jsonl.gz", pages[index::2])
    write_pages(out / "seeds" / "00000.jsonl.gz", seeds)
    run = CorpusRun(out=out)
    return CorpusConfig(
        run=run,
        engine=EngineConfig(workers=1),
        classifier=WORDS,
        rounds=RoundsConfig(seeds=(str(out / "seeds"),), rounds=3, budget_tokens=(80 * 190, 80 * 280)),
        domains=DomainsConfig(listed=4, samples=3),
    )


def annotate(web: CorpusConfig) -> None:
    """Write the annotations of round 1, as a person would."""
    (web.run.out / "round-1" / "annotations.yaml").write_text(
        "done: true\nmath: [hidden0.org, hidden1.org/p, hidden2.org/p]\nnot_math: [hidden0.org/shop]\n"
    )


def hidden_share(folder: Path) -> float:
    """Share of the hidden mathematical pages that was collected."""
    return sum("hidden" in page.url and "/p/" in page.url for path in shards(folder) for page in read_pages(path)) / 120


def test_a_run_waits_for_a_person_and_goes_on(web: CorpusConfig, capsys: pytest.CaptureFixture[str]) -> None:
    out = web.run.out
    with pytest.raises(rounds.AnnotationNeeded, match="round 2 waits for you.*annotations.yaml.*done: true"):
        rounds.run(web)
    first = json.loads((out / "rounds.json").read_text())
    assert [row["round"] for row in first] == [1] and first[0]["new_domains"] == first[0]["domains"] == 7
    assert first[0]["pages"] == 190 and first[0]["tokens"] == 80 * 190 and first[0]["overlap"] is None
    assert "| 1 |" in capsys.readouterr().out
    assert hidden_share(out / "round-1" / "collected") < 0.5
    text = (out / "round-1" / "annotations.yaml").read_text()
    assert text.index("hidden0.org/p ") < text.index("# - math") and text.count("to gain\n#\n") == 3
    assert "hidden0.org" in (out / "round-1" / "annotate.html").read_text()

    annotate(web)
    model = (out / "round-1" / "train" / "model.bin").stat().st_mtime_ns
    (second,) = rounds.run_rounds(web, shards(out / "dedup"), out)[1:]
    assert (out / "round-1" / "train" / "model.bin").stat().st_mtime_ns == model  # round 1 was not done again
    assert (second.pages, second.new_domains, second.overlap) == (280, 0, 190 / 280)
    waits_for = out / "round-2" / "annotations.yaml"
    assert second.waits_for == waits_for
    assert hidden_share(out / "round-2" / "collected") == 1.0
    assert Annotations.load(waits_for) == Annotations(
        ("hidden0.org", "hidden1.org/p", "hidden2.org/p"), ("hidden0.org/shop",), done=False
    )  # what was said stays

    # Rules do without a person, and two rounds that collect the same pages are the last.
    (out / "rules.yaml").write_text("rules: [{prefix: '*/shop', math: false}]")
    ruled = replace(web, domains=DomainsConfig(rules=out / "rules.yaml"))
    third = rounds.run_rounds(ruled, shards(out / "dedup"), out)[-1]
    assert third.round == 3 and third.waits_for is None and third.overlap is not None and third.overlap > 0.95
    assert rounds.collected_folder(out) == out / "round-3" / "collected"
    rows = (out / "rounds.md").read_text().splitlines()
    assert len(rows) == 5 and rows[-1].startswith("| 3 |")


def test_annotations_that_were_used_cannot_be_changed_behind_a_round(waiting: CorpusConfig) -> None:
    out = waiting.run.out
    annotate(waiting)
    assert rounds.run_rounds(waiting, shards(out / "dedup"), out)[-1].round == 2
    (out / "round-1" / "annotations.yaml").write_text("done: true\nmath: [hidden0.org]\n")
    with pytest.raises(StepError, match="round 2 examples.*another configuration.*annotations.math"):
        rounds.run_rounds(waiting, shards(out / "dedup"), out)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rounds": {"budget_tokens": (80 * 191,)}}, "round 1 cut.*budget_tokens was 15200 and is 15280"),
        ({"domains": {"share": 0.9}}, "round 1 prefixes.*share was 0.1 and is 0.9"),
        ({"domains": {"min_pages": 50}}, "round 1 prefixes.*min_pages was 10 and is 50"),
    ],
)
def test_a_round_belongs_to_its_configuration(waiting: CorpusConfig, other: dict, said: str) -> None:
    out = waiting.run.out
    changed = {section: replace(getattr(waiting, section), **values) for section, values in other.items()}
    cut = (out / "round-1" / "cut" / "cut.json").read_bytes()
    with pytest.raises(StepError, match=said):
        rounds.run_rounds(replace(waiting, **changed), shards(out / "dedup"), out)
    assert (out / "round-1" / "cut" / "cut.json").read_bytes() == cut


def test_a_budget_that_holds_all_pages_chooses_none(web: CorpusConfig) -> None:
    large = replace(web, rounds=replace(web.rounds, budget_tokens=(10**9,)))
    with pytest.raises(ValueError, match=r"rounds.budget_tokens: 1,000,000,000 hold all \d+,\d+ tokens.* lower it"):
        rounds.run_rounds(large, shards(web.run.out / "dedup"), web.run.out)


def test_samples_are_of_the_domain_and_most_were_not_collected(waiting: CorpusConfig) -> None:
    out = waiting.run.out
    files = [f"{index:05d}" for index in range(2)]
    found = [
        Shard(
            out / "dedup" / f"{name}.jsonl.gz",
            out / "index" / f"{name}.parquet",
            out / "round-1/scores" / f"{name}.parquet",
        )
        for name in files
    ]
    cut = read_cut(out / "round-1" / "cut" / "cut.json")
    samples = find_samples(["hidden0.org", "math0.org", "unheard.org"], found, cut, 3)
    assert [sample.collected for sample in samples["hidden0.org"]] == [False, False, True]
    assert [sample.collected for sample in samples["math0.org"]] == [True]
    assert samples["unheard.org"] == []
    assert all("hidden0.org" in sample.url and 0 < len(sample.text) <= 400 for sample in samples["hidden0.org"])


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ((), "rounds.seeds is empty"),
        (("nowhere.jsonl.gz",), "there is no file or folder 'nowhere.jsonl.gz'"),
        ((__file__,), "is no shard of pages"),
    ],
)
def test_seeds_that_are_wrong_are_said(seeds: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rounds.seed_shards(seeds)


def test_nothing_to_decontaminate_before_a_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the step rounds first"):
        rounds.collected_folder(tmp_path)
