"""Folders of weights that are not as they should be: one line each, from the headers alone; and writing of files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dsm_train.data.tokenizer import train_tokenizer
from dsm_train.hf.files import INDEX, Reader, check_tensors, stored_tensors
from dsm_train.hf.writer import Entry, appearing, split_files, write_index, write_shard

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.arange(5).bfloat16(),  # 10 bytes: an fp32 tensor behind it would not be aligned
    "c": torch.arange(8.0).half().view(2, 4),
    "d": torch.arange(6.0),
}
SHAPES = {name: tuple(value.shape) for name, value in TENSORS.items()}


def write(folder: Path, tensors: dict[str, Tensor], most_bytes: int) -> None:
    """Write as a run does."""
    written = split_files([Entry(name, tuple(value.shape), value.dtype) for name, value in tensors.items()], most_bytes)
    for shard in written:
        write_shard(folder, shard, lambda entry: tensors[entry.name])
    write_index(folder, written)


@pytest.mark.parametrize("most_bytes", [10**9, 60, 1])
def test_what_is_written_is_read_by_slices(most_bytes: int, tmp_path: Path) -> None:
    write(tmp_path, TENSORS, most_bytes)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert (
        files
        == {
            10**9: ["model.safetensors"],
            60: ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX],
            1: [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)] + [INDEX],
        }[most_bytes]
    )
    check_tensors(tmp_path, stored_tensors(tmp_path), SHAPES)
    with Reader(tmp_path) as reader:
        for name, value in TENSORS.items():
            assert torch.equal(reader.read(name, SHAPES[name], None, 0, 0), value)
            assert torch.equal(reader.read(name, SHAPES[name], 0, 1, 2), value[1:2])
        assert torch.equal(reader.read("a", (3, 4), 1, 1, 3), TENSORS["a"][:, 1:3])


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, 10**9)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == TENSORS.keys() and all(torch.equal(again[name], TENSORS[name]) for name in again)


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    path = folder / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def empty_file(folder: Path) -> None:
    (folder / "model-00001-of-00004.safetensors").write_bytes(b"")


def lengthen(folder: Path) -> None:
    path = folder / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")


def damage_header(folder: Path) -> None:
    path = folder / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape"', b'"shave"'))


def rewrite_header(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "model-00001-of-00004.safetensors"
    assert old in path.read_bytes() and len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old, new))


def lie_about_the_shape(folder: Path) -> None:
    rewrite_header(folder, b'"shape":[3,4]', b'"shape":[4,4]')


def leave_a_gap(folder: Path) -> None:
    rewrite_header(folder, b'"data_offsets":[0,48]', b'"data_offsets":[4,48]')


def damage_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def misplace(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["e"] = "model-00001-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def remove_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def replace_by(*names: str) -> Callable[[Path], None]:
    """Other files in the place of the weights."""

    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).touch()

    damage.__name__ = names[0]
    return damage


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_shard, "has no file model-00002-of-00004.safetensors, which model.safetensors.index.json names"),
        (cut_off, "model-00001-of-00004.safetensors is cut off .* its header says"),
        (cut_header, "model-00001-of-00004.safetensors is cut off"),
        (empty_file, "is no safetensors file"),
        (lengthen, "is longer than its header says"),
        (damage_header, "damaged header"),
        (lie_about_the_shape, "damaged header"),
        (leave_a_gap, "damaged header"),
        (damage_index, "index.json does not say which file holds which weight"),
        (misplace, "has no weight e, which model.safetensors.index.json places there"),
        (remove_index, "and no model.safetensors.index.json"),
        (replace_by("pytorch_model.bin"), "weights as pytorch_model.bin, .* convert it: python -c"),
        (replace_by("consolidated.00.pth"), "consolidated.00.pth"),
        (replace_by("m.gguf"), r"m.gguf, .* gguf_file='m.gguf'"),
        (replace_by("adapter_config.json", "adapter_model.safetensors"), "an adapter, not a model"),
        (replace_by("README.md"), "holds no model.safetensors"),
        (remove_folder, "is no folder"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_is_named(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    write(folder, TENSORS, 1)
    damage(folder)
    with pytest.raises(ValueError, match=words) as error:
        stored_tensors(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (SHAPES | {"e": (1,)}, "has no weight e"),
        (SHAPES | {"a": (4, 3)}, r"weight a in .* has shape \[3, 4\], the model \[4, 3\]"),
        ({name: shape for name, shape in SHAPES.items() if name != "d"}, "has the weight d, which the model"),
    ],
    ids=["missing", "shape", "one too many"],
)
def test_tensors_that_are_not_the_models_are_named(
    shapes: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    write(tmp_path, TENSORS, 10**9)
    with pytest.raises(ValueError, match=words):
        check_tensors(tmp_path, stored_tensors(tmp_path), shapes)


def test_what_old_and_tied_files_hold_besides_is_no_error(tmp_path: Path) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "lm_head.weight": torch.ones(2)}
    save_file(TENSORS | more, tmp_path / "model.safetensors")
    check_tensors(tmp_path, stored_tensors(tmp_path), SHAPES, ["lm_head.weight"])


def test_other_types_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weight a in .* is F8_E4M3, and F32, BF16, F16 are read here"):
        check_tensors(tmp_path, stored_tensors(tmp_path), {"a": (2,)})


@pytest.mark.slow  # a process that imports transformers, and loads pickles with it
def test_the_command_that_converts_is_one_that_runs(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    config = LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    train_tokenizer(["1 + 1"], 258).save(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        stored_tensors(folder)
    command = str(error.value).split("convert it: python")[1]
    done = subprocess.run(f"{sys.executable}{command}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "NEW" / "model.safetensors")
    assert weights.keys() == model.state_dict().keys() and len(weights) > 10
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "NEW" / "tokenizer.json").is_file()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "weights"

    def fill(text: str, *, fails: bool = False) -> None:
        with appearing(folder) as temporary:
            assert temporary.parent == tmp_path and not any(temporary.iterdir())
            (temporary / "file").write_text(text)
            if fails:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        fill("first", fails=True)
    assert not any(tmp_path.iterdir())
    fill("second")
    with pytest.raises(RuntimeError):
        fill("third", fails=True)
    assert (folder / "file").read_text() == "second"
    (tmp_path / ".weights.new").mkdir()
    (tmp_path / ".weights.new" / "rest").touch()  # of a process that was killed
    fill("fourth")
    assert (folder / "file").read_text() == "fourth" and [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_folder_is_not_lost_where_the_process_was_killed_as_it_appeared(renames: int, tmp_path: Path) -> None:
    folder, old = tmp_path / "weights", tmp_path / ".weights.old"
    old.mkdir()
    (old / "file").write_text("whole")
    for place in (folder, tmp_path / ".weights.new")[2 - renames :][:1]:
        place.mkdir()
        (place / "file").write_text("whole")
    with pytest.raises(RuntimeError), appearing(folder):
        raise RuntimeError
    assert (folder / "file").read_text() == "whole" and [path.name for path in tmp_path.iterdir()] == ["weights"]
