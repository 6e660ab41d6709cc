"""`dsm-train corpus`: what a user types, and what a user reads when it is wrong."""

from __future__ import annotations

import functools
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsm_train.__main__ import main
from dsm_train.cli import load_config
from dsm_train.corpus.config import CorpusConfig
from dsm_train.corpus.engine.page import Page, read_pages, shards, write_pages
from dsm_train.corpus.stage import RUN, STEPS

RECIPE = """
run: {out: OUT}
engine: {workers: 1}
dedup: {near: false}
"""


def corpus(command: str) -> int:
    """The exit status of `dsm-train corpus COMMAND`."""
    try:
        main(["corpus", *shlex.split(command)])
    except SystemExit as status:
        return int(status.code or 0)
    return 0


def write_extracted(out: Path) -> None:
    for i in range(2):
        pages = [Page(f"{i}{j}", f"http://a.org/{j}", f"text {j}", "en", f"202{i}") for j in range(3 + i)]
        write_pages(out / "extract" / f"{i:05d}.jsonl.gz", pages)


def test_without_a_step_it_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus("--help") == 0 and corpus("") == 2
    told = capsys.readouterr().out
    assert all(f"  {step.name} " in told for step in STEPS) and "dsm-train corpus demo" in told
    assert ", ".join(RUN) in told


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_explains_every_key_and_leads_somewhere(step, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ANN001
    assert corpus(f"{step.name} --help") == 0
    told = capsys.readouterr().out
    for key in ("classifier.word_ngrams", "engine.slurm.partition", *step.needs):
        assert f"--{key}" in told
    assert callable(getattr(importlib.import_module(f"dsm_train.corpus.{step.module}"), step.function))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("extrct", "dsm-train corpus: extrct is no step; did you mean extract?"),
        ("x", "dsm-train corpus: x is no step: demo extract dedup"),
        (
            "extract run.out=OUT",
            "dsm-train corpus extract: extract.inputs is needed by the step extract: add extract.inp",
        ),
        ("tokenise run.out=OUT", "dsm-train corpus tokenise: tokenizer.path is needed by the step tokenise: add"),
        (
            "run extract.inputs=a.warc",
            "dsm-train corpus run: rounds.seeds is needed by the step rounds: add rounds.seeds=",
        ),
        (
            "run extract.inputs=a.warc rounds.seeds=nowhere tokenizer.path=x decontaminate.benchmarks=b.jsonl",
            "dsm-train corpus run: rounds.seeds: there is no file or folder 'nowhere': correct the path",
        ),
        (
            "rounds rounds.seeds=. domains.rules=rules.yml",
            "dsm-train corpus rounds: domains.rules: there is no file or folder 'rules.yml': correct the path",
        ),
        (
            "dedup run.out=OUT",
            "dsm-train corpus dedup: no folder of pages at 'OUT/extract': run the step that writes it",
        ),
        ("dedup dedup.hashs=3", "dsm-train corpus dedup: unknown key 'dedup.hashs'; did you mean 'dedup.hashes'?"),
        ("dedup dedup.buckets=0", "dsm-train corpus dedup: dedup.buckets must be at least 1; got 0"),
        (
            "rounds rounds.seeds=x rounds.budget_tokens=[]",
            "dsm-train corpus rounds: rounds.budget_tokens must be a list of",
        ),
        ("dedup engine.executor=slurm", "dsm-train corpus dedup: engine.slurm.partition must be given with"),
    ],
)
def test_errors_are_one_line(command: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert corpus(command.replace("OUT", out)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said.replace("OUT", out))


def test_a_step_runs_from_a_recipe_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_extracted(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("OUT", str(tmp_path)))
    assert corpus(f"dedup --config {recipe}") == 0
    assert capsys.readouterr().out.startswith("dedup: pages 7, url 3, exact 0, kept 4 (2 shards, ")
    assert [len(list(read_pages(path))) for path in shards(tmp_path / "dedup")] == [3, 1]
    assert corpus(f"dedup --config {recipe} dedup.exact=false") == 2
    assert "was made with another configuration (config.exact was True and is False)" in capsys.readouterr().err


def test_what_the_file_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_extracted(tmp_path)
    (tmp_path / "dedup").write_text("a file where a folder belongs")
    assert corpus(f"dedup run.out={tmp_path} engine.workers=1") == 2
    assert (
        capsys.readouterr().err
        == f"dsm-train corpus dedup: {tmp_path}/dedup: File exists: give a path that can be used\n"
    )


def test_a_shard_cut_short_is_named_and_the_others_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_extracted(tmp_path)
    cut = tmp_path / "extract" / "00001.jsonl.gz"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-20])
    assert corpus(f"dedup run.out={tmp_path} engine.workers=1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 2 shards did not finish, such as 00001.rows" in line and f"{cut}:" in line and "cut short" in line
    cut.write_bytes(whole)
    assert corpus(f"dedup run.out={tmp_path} engine.workers=1") == 0


def test_ctrl_c_stops_at_once_and_says_that_nothing_is_lost(tmp_path: Path) -> None:
    pages = (Page(f"{i:x}", f"http://a.org/{i}", f"word{i} " * 2000, "en", "") for i in range(20_000))
    write_pages(tmp_path / "extract" / "00000.jsonl.gz", pages)
    command = [
        sys.executable,
        "-m",
        "dsm_train",
        "corpus",
        "dedup",
        f"run.out={tmp_path}",
        "dedup.url=false",
        "dedup.exact=false",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeding
    )
    temporary, end = tmp_path / "dedup" / "parts" / "near" / "rows" / "00000.rows.tmp", time.monotonic() + 60
    while not temporary.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and not list(temporary.parent.glob("*.rows"))  # not after the shard, which is long
    assert errors.splitlines()[-1] == (
        "dsm-train corpus dedup: stopped; finished shards are kept, and the same command goes on from there"
    )
    assert "Traceback" not in errors


def test_the_papers_constants_are_the_defaults() -> None:
    config = load_config(CorpusConfig, [], prog="", description="")
    classifier = config.classifier
    assert (classifier.dim, classifier.lr, classifier.word_ngrams, classifier.min_count) == (256, 0.1, 3, 3)
    assert classifier.epochs == 3
    rounds = config.rounds
    assert (rounds.positives, rounds.negatives, rounds.rounds, rounds.overlap) == (500_000, 500_000, 4, 0.98)
    assert rounds.budget_tokens == (40_000_000_000, 89_000_000_000, 120_000_000_000)
    assert config.domains.share == 0.10
    assert (config.decontaminate.ngram, config.decontaminate.min_ngram) == (10, 3)
    assert (config.dedup.buckets, config.dedup.hashes) == (14, 8)
