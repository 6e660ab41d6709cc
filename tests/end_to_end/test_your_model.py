"""The page about your own model, typed in on a CPU: a folder that transformers saved, questions, a reward, and back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from commands import metrics, write_gsm8k

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
ON_A_CPU = PAGE.split("## All of it on a CPU", 1)[1].split("\n## ", 1)[0]


def test_the_commands_of_the_page_train_a_folder_and_transformers_loads_the_result(tmp_path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", ON_A_CPU, re.DOTALL):
        (tmp_path / block.split()[1]).write_text(block)  # the first line names the file
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    write_gsm8k(tmp_path / "train.jsonl", 50)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "LICENSE").write_text("free")
    (script,) = re.findall(r"```sh\n(.*?)```", ON_A_CPU, re.DOTALL)
    # As in an activated environment: the names `python` and `dsm-train` are this checkout's.
    names = f'set -e\npython() {{ {sys.executable} "$@"; }}\ndsm-train() {{ {sys.executable} -m dsm_train "$@"; }}\n'
    env = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", names + script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "weights" / "LICENSE").read_text() == "free"
    rows = [row for row in metrics(tmp_path / "runs" / "tiny") if "reward" in row]
    assert len(rows) == 20
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.2
    ours, theirs = (text.split("<|im_start|>assistant\n")[1].strip() for text in _answers(done.stdout))
    assert ours and theirs.removesuffix("<|im_end|>").strip() == ours  # theirs shows the end token, if there is one


def test_the_lines_that_the_page_quotes_are_those_that_are_said() -> None:
    files = [*(ROOT / "dsm_train").rglob("*.py")]
    said = "\n".join(re.sub(r'"\s+f?"', "", file.read_text(encoding="utf-8")) for file in files)
    quoted = re.findall(r"^\| `(.*?)`", PAGE.split("## If it is refused", 1)[1], re.MULTILINE)
    assert len(quoted) > 5 and [phrase for phrase in quoted if phrase.removesuffix("...") not in said] == []


def _answers(printed: str) -> list[str]:
    """Answers that `generate` and `use_it.py` printed, each from the first turn on; training shows a prompt before."""
    return printed.split("<|im_start|>user")[-2:]
