"""A run's folder tells later what ran in it."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dsm_train.config import ParallelConfig
from dsm_train.reporting.record import Code, Layout, Record, command


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the package in it, all of it committed."""
    root = tmp_path / "a checkout"
    (root / "dsm_train").mkdir(parents=True)
    (root / "dsm_train" / "__init__.py").write_text("first\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


def test_a_record_reads_back_as_it_was_written():
    record = Record.now(ParallelConfig(tp=2, sp=True), 7, ranks=8, gpus=["A"] * 6 + ["B"] * 2)
    assert Record.of(json.loads(json.dumps(asdict(record)))) == record
    assert record.layout == Layout(8, record.layout.nodes, 2, 1, 1, 4, True, False) and record.seed == 7
    assert record.devices == ("6 x A", "2 x B") and record.versions["torch"] and record.host and record.time
    (cpu,) = Record.now(ParallelConfig(), 0).devices
    assert cpu.endswith("core(s)")


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"seed": 3, "colour": "blue", "layout": {"tp": 2, "cp": 4}},
        {"layout": "wide", "versions": 5, "devices": 3, "seed": 3},
    ],
)
def test_records_of_other_versions_are_read_as_far_as_they_are_known(values: object):
    record = Record.of(values)
    assert record.seed == (3 if isinstance(values, dict) and values else None)
    assert str(record.layout) and dict(record.versions) == {} and record.devices == ()


def test_a_clean_checkout_is_its_commit(checkout: Path, tmp_path: Path):
    code = Code.at(checkout)
    assert code == Code(git(checkout, "rev-parse", "HEAD"), ())
    code.save(tmp_path)
    assert not (tmp_path / "changes").exists()


def test_changes_come_back_from_the_commit_and_the_patch(checkout: Path, tmp_path: Path):
    (checkout / "dsm_train" / "__init__.py").write_text("second\n")
    (checkout / "dsm_train" / "mine.py").write_text("mine\n")
    (checkout / "notes.txt").write_text("runs nowhere")
    code = Code.at(checkout)
    assert code.changed == ("dsm_train/__init__.py", "dsm_train/mine.py")
    (tmp_path / "run").mkdir()
    code.save(tmp_path / "run")
    assert code.patch_name is not None
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(checkout), str(again))
    git(again, "apply", str(tmp_path / "run" / code.patch_name))
    assert (again / "dsm_train" / "__init__.py").read_text() == "second\n"
    assert (again / "dsm_train" / "mine.py").read_text() == "mine\n"
    assert not (again / "notes.txt").exists()


def test_a_patch_too_large_is_not_kept_and_counts(checkout: Path):
    (checkout / "dsm_train" / "mine.py").write_text("x = 1\n" * 2**18)
    code = Code.at(checkout)
    assert code.changed == ("dsm_train/mine.py",) and code.patch is None and code.patch_name is None


def test_the_current_folder_and_the_environment_name_no_commit(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "other"
    (other / "dsm_train").mkdir(parents=True)
    (other / "dsm_train" / "__init__.py").write_text("installed")
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))
    assert Code.at(other) == Code()  # no checkout
    installed = checkout / ".venv"
    (installed / "dsm_train").mkdir(parents=True)
    (installed / "dsm_train" / "__init__.py").write_text("installed")
    assert Code.at(installed) == Code()  # in a checkout, and none of its files


def test_what_git_does_not_tell_is_not_known(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (checkout / ".git" / "HEAD").write_text("ref: refs/heads/unborn\n")
    assert Code.at(checkout) == Code()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Code.at(checkout) == Code()
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("dsm_train.reporting.record._SECONDS", 0.2)
    assert Code.at(checkout) == Code()


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_MAX_RESTARTS": "0"}


@pytest.mark.parametrize(
    ("argv", "environment", "expected"),
    [
        (["/bin/dsm-train", "sft", "a=b c"], {}, "dsm-train sft 'a=b c'"),
        (["/x/dsm_train/__main__.py", "sft"], {}, "python -m dsm_train sft"),
        (["/x/__main__.py", "sft"], TORCHRUN, "torchrun --standalone --nproc-per-node 4 -m dsm_train sft"),
        (
            ["/x/__main__.py", "sft"],
            TORCHRUN | {"WORLD_SIZE": "8", "TORCHELASTIC_MAX_RESTARTS": "3"},
            "torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 -m dsm_train sft",
        ),
    ],
)
def test_the_command_starts_as_many_ranks(argv: list[str], environment: dict[str, str], expected: str):
    assert command(argv, environment) == expected and shlex.split(expected)[-len(argv) + 1 :] == argv[1:]


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(1, 1, 1, 1, 1, 1, False, False), "1 rank(s)"),
        (Layout(16, 2, 2, 1, 1, 8, True, True), "16 rank(s) on 2 nodes: tp 2, dp 8, sp, distributed optimizer"),
    ],
)
def test_a_layout_names_what_is_split(layout: Layout, words: str):
    assert str(layout) == words and str(replace(layout, nodes=None)) == words.replace(" on 2 nodes", "")
