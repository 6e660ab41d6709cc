"""What is handed out: the source distribution, and a build where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_setup(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`setup.py` in an environment without a compiler."""
    command, environment = [sys.executable, "setup.py", *arguments], os.environ | {"CXX": "no-such-compiler -O2"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)


def test_source_distribution_holds_what_a_build_and_a_first_run_need(tmp_path: Path) -> None:
    run_setup("--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    (archive,) = tmp_path.glob("dsm_train-*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    folders = ["csrc/**/*.cpp", "csrc/**/*.h", "recipes/*.yaml", "launch/*", "dsm_train/**/*.py", "tests/**/*.py"]
    wanted = {str(path.relative_to(ROOT)) for pattern in folders for path in ROOT.glob(pattern)}
    wanted |= {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    wanted |= {"constraints-vllm.txt"}
    wanted |= {"dsm_train/py.typed", "triton_kernels/py.typed", "dsm_train/corpus/demo/demo.yaml"}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_build_without_a_compiler_says_in_one_line_what_is_lost() -> None:
    process = run_setup("--name")
    assert process.stdout == "dsm-train\n"
    assert process.stderr == (
        "dsm-train: without C++ ops (on the CPU PyTorch references serve, slower): "
        "there is no C++ compiler (no-such-compiler); install one (Debian: apt install g++)\n"
    )


@pytest.mark.parametrize("index", ["", "https://mirror.example/cpu"], ids=["usual index", "TORCH_INDEX"])
def test_make_takes_torch_alone_from_torch_index(tmp_path: Path, index: str) -> None:
    command = ["make", "--dry-run", f"VENV={tmp_path}", f"TORCH_INDEX={index}", f"{tmp_path}/.torch"]
    commands = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = [line.partition(" -c constraints.txt ")[2] for line in commands.splitlines() if "pip install" in line]
    from_index = [f"--index-url {index} --no-deps torch"] if index else []
    assert installs == [*from_index, "torch setuptools ninja wheel numpy"]
    assert ("takes the CPU build" in commands) == (not index)
