"""Models, templates, rewards and answers that cannot work: one line before training, and no folder of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import GRPO, TINY, refused, run, write_gsm8k
from safetensors.torch import load_file, save_file

from dsm_train.data.tokenizer import train_tokenizer

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, with a tokenizer that chats."""
    folder = tmp_path_factory.mktemp("model")
    run("sft", *TINY, "sft.steps=1", "sft.batch=4", "sampling.max_new_tokens=5", f"run.out={folder / 'run'}")
    run("convert", f"run.init={folder / 'run' / 'weights'}", f"run.out={folder / 'weights'}", "shard_gb=3e-5")
    assert len(list((folder / "weights").glob("*.safetensors"))) > 1
    (folder / "weights" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    return folder / "weights"


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def missing_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def truncated(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-8])


def wrong_shape(folder: Path) -> None:
    tensors = load_file(first_shard(folder))
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, first_shard(folder))


def larger_tokenizer(folder: Path) -> None:
    (folder / "dsm.json").unlink()
    texts = [f"{word}{number}" for word in ("apples", "pears", "plums") for number in range(200)]
    train_tokenizer(texts, 400).save(folder)


def without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing_shard, "has no file model-00001-of-"),
        (truncated, "is cut off"),
        (wrong_shape, "the model ["),
        (larger_tokenizer, "use the tokenizer that lies beside the weights"),
        (without_weights, "pytorch_model.bin, and safetensors are read here; convert it: python -c"),
        (lambda folder: configure(folder, model_type="gpt2"), "model_type = 'gpt2'"),
        (lambda folder: configure(folder, model_type="mixtral", num_local_experts=8), "a mixture of experts"),
        (lambda folder: configure(folder, model_type="mistral", sliding_window=4096), "sliding_window = 4096"),
        (lambda folder: configure(folder, quantization_config={"bits": 4}), "quantization_config"),
        (lambda folder: configure(folder, rope_scaling={"rope_type": "longrope", "factor": 2.0}), "longrope"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_cannot_train(
    damage: Callable[[Path], None], words: str, weights: Path, tmp_path: Path, capsys: Capsys
) -> None:
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(weights, folder)
    damage(folder)
    line = refused(capsys, "grpo", f"run.init={folder}", f"run.out={out}", "sampling.max_new_tokens=5")
    assert line.startswith("dsm-train grpo: run.init: ") and words in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "the tokenizer has none"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves the assistant's turns out"),
        ("{% for m in messages %}{{ m.content }}", "endfor"),
    ],
    ids=["none", "without an assistant", "broken"],
)
def test_a_chat_template_that_cannot_serve(
    template: str | None, words: str, weights: Path, tmp_path: Path, capsys: Capsys
) -> None:
    shutil.copytree(weights, tmp_path / "model")
    path = tmp_path / "model" / "chat_template.jinja"
    path.unlink() if template is None else path.write_text(template)
    line = refused(capsys, "grpo", f"run.init={tmp_path / 'model'}", f"run.out={tmp_path / 'run'}", "data.chat=true",
                   "sampling.max_new_tokens=5")  # fmt: skip
    assert words in line and not (tmp_path / "run").exists()


REWARDS = """
def good(completions, tasks): return [0.5 for _ in completions]
def one_short(completions, tasks): return [0.5 for _ in completions][1:]
def words(completions, tasks): return ["good" for _ in completions]
def fails(completions, tasks): return [task.fields["tests"] for task in tasks]
"""


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("no_such_module:good", "no_such_module"),
        ("their_rewards:great", "great"),
        ("their_rewards:one_short", "1 value"),
        ("their_rewards:words", "'good'"),
        ("their_rewards:fails", "their_rewards.py:5"),
    ],
)
def test_a_reward_function_that_cannot_serve(
    call: str, words: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    (tmp_path / "their_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "grpo", *GRPO, f"run.out={tmp_path / 'run'}",
                   f"rewards.functions=[{{call: '{call}'}}]")  # fmt: skip
    assert "item 1 of rewards.functions" in line and words in line and not (tmp_path / "run").exists()


def test_a_gold_answer_that_no_reward_can_read(tmp_path: Path, capsys: Capsys) -> None:
    path = write_gsm8k(tmp_path / "a.jsonl", 20)
    path.write_text(path.read_text() + json.dumps({"question": "Which?", "answer": r"$x \in [0, 1]$"}) + "\n")
    line = refused(capsys, "grpo", *GRPO, f"data.path={path}", f"run.out={tmp_path / 'run'}", "model.max_length=200")
    assert f"{path}:21" in line and "data.unreadable=skip" in line and not (tmp_path / "run").exists()
