"""Stage `convert`: a Hugging Face folder or a checkpoint in and one out, in other files, another type, any layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import TINY, refused, run, run_apart, run_on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.hf.config import fresh_config
from dsm_train.hf.names import pieces

MODEL = ModelConfig(
    num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=53, qkv_bias=True
)
BESIDE = {"tokenizer.json": "{ }", "generation_config.json": '{"eos_token_id": [1, 7]}', "dsm.json": "{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose norms are fp32 and whose other weights are bf16, and a file of another kind."""
    made = tmp_path / "in"
    made.mkdir()
    values = {**fresh_config(MODEL, {"eos_token_id": 1}).values, "torch_dtype": "bfloat16", "of_its_maker": 7}
    (made / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(0)
    weights = {piece.hf: torch.randn(piece.shape, generator=generator) for piece in pieces(MODEL, "language")}
    weights = {name: value if "norm" in name else value.bfloat16() for name, value in weights.items()}
    save_file(weights, made / "model.safetensors")
    for name, text in BESIDE.items():
        (made / name).write_text(text)
    return made


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_tensor_and_what_lies_beside_them_stays(ranks: int, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("convert", f"run.init={folder}", f"run.out={out}", "shard_gb=2e-5", "run.threads=1")
    if ranks == 1:
        run(*arguments)
    else:
        printed = run_on_ranks(ranks, tmp_path, *arguments, "parallel.tp=2", "parallel.pp=2")
        assert printed.startswith("Qwen2ForCausalLM: ") and str(out) in printed
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert all((out / name).read_text() == text for name, text in BESIDE.items())
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    files = list(out.glob("*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 25_000


@pytest.mark.gpu
def test_gpus_read_and_write_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    """Over NCCL, with device tensors; one GPU has nobody to talk to, and still copies from and to its memory."""
    ranks = next(number for number in (4, 2, 1) if number <= torch.cuda.device_count())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    stage = ["-m", "dsm_train", "convert", f"run.init={folder}", f"run.out={tmp_path / 'out'}", "shard_gb=2e-5"]
    layout = [f"parallel.tp={min(ranks, 2)}", f"parallel.pp={max(1, ranks // 2)}"]
    done = subprocess.run([*launcher, *stage, *layout], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_another_type_is_written_and_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("convert", f"run.init={folder}", f"run.out={out}", "run.weights_dtype=fp16", "run.threads=1")
    assert all(torch.equal(tensors(out)[name], value.half()) for name, value in tensors(folder).items())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_value_head_is_converted_as_one(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values |= {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(values))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    weights["score.weight"] = torch.arange(32.0)[None]
    save_file(weights, folder / "model.safetensors")
    run("convert", f"run.init={folder}", f"run.out={tmp_path / 'out'}", "run.threads=1")
    after = tensors(tmp_path / "out")
    assert after.keys() == weights.keys() and torch.equal(after["score.weight"], torch.arange(32.0)[None])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.out={out}"], ["run.init must be given"]),
        (["run.init={folder}"], ["run.out must be given"]),
        (["run.init={folder}", "run.out={folder}"], ["is not empty", "choose a folder"]),
        (["run.init={folder}", "run.out={folder}/config.json"], ["config.json is a file", "choose a folder"]),
        (["run.init={folder}/nowhere", "run.out={out}"], ["run.init", "nowhere is no folder"]),
        (["run.init={folder}", "run.out={out}", "shard_gb=0"], ["shard_gb must be above 0"]),
        (["run.init={folder}", "run.out={out}", "run.seed=1"], ["run.seed is not used by convert"]),
        (["run.init={folder}", "run.out={out}", "parallel.tp=2"], ["2 x 1 = 2", "1 rank"]),
    ],
    ids=lambda value: " ".join(value[-1:]),
)
def test_mistakes_are_named(
    arguments: list[str], words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(folder=folder, out=tmp_path / "out") for argument in arguments]
    line = refused(capsys, "convert", *given)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


RUN = (*TINY, "model.num_layers=3", "model.num_kv_heads=2", "sampling.max_new_tokens=5", "sft.batch=8",
       "sft.optim.lr=1e-2", "checkpoint.every=1", "checkpoint.keep=9")  # fmt: skip
LAST = "00000002-sft-2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run("sft", *RUN, "sft.steps=2", f"run.out={out}")
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", [[], ["parallel.tp=2"], ["parallel.pp=2"]], ids=lambda words: " ".join(words))
def test_the_last_checkpoint_becomes_the_files_that_the_run_wrote(
    layout: list[str], trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("convert", f"run.init={trained / 'checkpoints' / LAST}", f"run.out={tmp_path / 'out'}", *layout)
    if layout:
        printed = run_on_ranks(2, tmp_path, *arguments, "run.threads=1")
    else:
        run(*arguments, "run.threads=1")
        printed = capfd.readouterr().out
    assert "at step 2 of 2 of sft" in printed
    assert files(tmp_path / "out") == files(trained / "weights")


def test_an_earlier_checkpoint_becomes_what_a_shorter_run_writes_and_transformers_loads(
    trained: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    run("convert", f"run.init={trained}/checkpoints/00000001-sft-1", f"run.out={out}", "run.threads=1")
    run("sft", *RUN, "sft.steps=1", "checkpoint.every=null", f"run.out={tmp_path / 'shorter'}")
    assert files(out) == files(tmp_path / "shorter" / "weights")
    assert tensors(out).keys() == tensors(trained / "weights").keys()
    assert not torch.equal(tensors(out)["lm_head.weight"], tensors(trained / "weights")["lm_head.weight"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert torch.isfinite(model(tokenizer("1+1=", return_tensors="pt").input_ids).logits).all()


def test_what_lies_beside_the_initial_weights_and_the_written_type_are_the_runs(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "weights", tmp_path / "in")
    (tmp_path / "in" / "LICENSE").write_text("free")
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": 1, "of_its_maker": 7}')
    start = (f"run.init={tmp_path / 'in'}", "run.weights_dtype=bf16", f"run.out={tmp_path / 'run'}")
    run("sft", *RUN, "sft.steps=1", *start)
    out = tmp_path / "out"
    run("convert", f"run.init={tmp_path}/run/checkpoints/00000001-sft-1", f"run.out={out}", "run.threads=1")
    written = files(out)
    assert written == files(tmp_path / "run" / "weights") and written["LICENSE"] == b"free"
    assert {value.dtype for value in tensors(out).values()} == {torch.bfloat16}


def test_a_bf16_model_with_a_tied_head_that_two_ranks_wrote_is_converted_on_one(tmp_path: Path) -> None:
    given = ("model.dtype=bf16", "model.tied_head=true", "parallel.tp=2", "checkpoint.keep=1")
    run_on_ranks(2, tmp_path, "sft", *RUN, "sft.steps=2", *given, f"run.out={tmp_path / 'run'}")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {LAST, "model"}
    run("convert", f"run.init={tmp_path}/run/checkpoints/{LAST}", f"run.out={tmp_path / 'out'}", "run.threads=1")
    assert files(tmp_path / "out") == files(tmp_path / "run" / "weights")


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [("eval", []), ("generate", ["prompts=[1+1=]"]), ("sft", []), ("grpo", []), ("verify-step", ["synthetic=true"])],
)
def test_other_stages_send_a_checkpoint_to_this_one(
    stage: str, arguments: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained / "checkpoints" / LAST
    out = [] if stage == "verify-step" else [f"run.out={tmp_path / 'out'}"]
    line = refused(capsys, stage, f"run.init={checkpoint}", *out, *arguments)
    assert f"run.init: {checkpoint} is a checkpoint" in line
    assert f"dsm-train convert run.init={checkpoint} run.out=NEW" in line and not (tmp_path / "out").exists()


def test_a_checkpoint_whose_model_is_not_described_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, model = tmp_path / LAST, tmp_path / "model"
    shutil.copytree(trained / "checkpoints" / LAST, checkpoint)
    arguments = ("convert", f"run.init={checkpoint}", f"run.out={tmp_path / 'out'}")
    assert f"the folder {model} is missing" in refused(capsys, *arguments)
    shutil.copytree(trained / "checkpoints" / "model", model)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 2}))
    line = refused(capsys, *arguments)
    assert f"{checkpoint} has model.num_layers = 3, and {model} 2" in line
    (checkpoint / "state.json").unlink()
    (model / "config.json").write_text(json.dumps(values))
    assert f"{checkpoint} is a damaged checkpoint (state.json is missing)" in refused(capsys, *arguments)


def test_a_flipped_bit_of_a_checkpoint_is_found_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    checkpoint = tmp_path / "checkpoints" / LAST
    content = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(content)
    done = run_apart("convert", f"run.init={checkpoint}", f"run.out={tmp_path / 'out'}")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert f"{checkpoint} is a damaged checkpoint (__0_0.distcp is damaged" in line
