"""The start-up check that `triton_kernels` is this project's, beside packages of the same name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dsm_train

ROOT = Path(dsm_train.__file__).parents[1]
CHECK = """
import sys
from dsm_train.installed import require_own_kernels
try:
    require_own_kernels()
finally:
    assert "torch" not in sys.modules and "triton_kernels" not in sys.modules
"""


def checked(path: list[Path]) -> str:
    """The last line on stderr of the check in a process with this search path; empty when it passed."""
    environment = {"PYTHONPATH": ":".join(map(str, path)), "PYTHONSAFEPATH": "1"}
    process = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    return process.stderr.strip().rpartition("\n")[2]


def other_package(folder: Path) -> Path:
    """A package of the same name in `folder`, as PyPI's and OpenAI's have it: another `__init__.py`."""
    package = folder / "triton_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('from . import matmul_ogs\n__version__ = "1.0.0"\n')
    return package


def distribution(folder: Path, name: str, *files: str) -> None:
    """The record that pip leaves of `name`, which says that it installed these files."""
    record = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (record / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_our_own_kernels_pass_without_an_import_of_torch() -> None:
    assert checked([ROOT]) == ""


def test_another_package_first_on_the_path_is_named_with_its_folder(tmp_path: Path) -> None:
    package = other_package(tmp_path)
    line = checked([tmp_path, ROOT])
    assert line.startswith(f"ValueError: triton_kernels is another project's package, found at {package}: ")
    assert line.endswith("take its folder off PYTHONPATH, or start from another folder")


@pytest.mark.parametrize("also_ours", [False, True], ids=["before ours", "over the files of ours"])
def test_another_package_that_pip_installed_is_named_for_pip_uninstall(tmp_path: Path, also_ours: bool) -> None:
    other_package(tmp_path)
    distribution(tmp_path, "triton-kernels", "triton_kernels/__init__.py")
    if also_ours:
        (tmp_path / "triton_kernels" / "_register.py").touch()
        (tmp_path / "dsm_train").symlink_to(ROOT / "dsm_train")
        distribution(tmp_path, "dsm-train", "triton_kernels/__init__.py", "dsm_train/__init__.py")
    assert ": pip uninstall triton-kernels; then, in this project's checkout, pip install " in checked([tmp_path, ROOT])


def test_a_folder_of_that_name_without_a_package_is_no_installation(tmp_path: Path) -> None:
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "dsm_train").symlink_to(ROOT / "dsm_train")
    assert "triton_kernels is not installed beside dsm_train: " in checked([tmp_path])
