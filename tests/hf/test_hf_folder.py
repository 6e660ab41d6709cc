"""A folder beside its weights: model, type, tokenizer; how a run takes it and writes it again."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dsm_train.config import ModelConfig, RopeScaling
from dsm_train.data.tokenizer import FILES
from dsm_train.hf.config import fresh_config
from dsm_train.hf.folder import (
    Pretrained,
    carry_over,
    check_model,
    check_tokenizer,
    with_vocabulary,
    write_config,
    write_tokenizer_note,
)
from dsm_train.hf.names import pieces

SAVED = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, ffn_size=24, vocab_size=30)


def make_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A folder as transformers 4 would have it, weights and all."""
    folder.mkdir(exist_ok=True)
    values = {**fresh_config(SAVED, {"eos_token_id": 1}).values, **changes}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(
        {piece.hf: torch.ones(piece.shape, dtype=dtype) for piece in pieces(SAVED, "language")},
        folder / "model.safetensors",
    )
    return folder


def test_how_to_run_is_not_what_was_saved(tmp_path: Path) -> None:
    """The run's configuration gives all that the weights do not determine."""
    source = Pretrained.of(make_folder(tmp_path))
    asked = ModelConfig(layers="local", recompute=True, vocab_multiple=8, max_length=7, dtype="bf16")
    given = {"model.max_length": "", "model.dtype": ""}
    assert source.model(asked, given) == replace(
        SAVED, layers="local", recompute=True, vocab_multiple=8, max_length=7, dtype="bf16"
    )
    assert source.model(replace(ModelConfig(), max_length=7), {}).max_length == SAVED.max_length


@pytest.mark.parametrize(
    ("named", "stored", "trained", "noted"),
    [
        ("bfloat16", torch.bfloat16, "bf16", False),
        ("float32", torch.bfloat16, "fp32", False),
        ("float16", torch.float16, "fp32", True),
        (None, torch.bfloat16, "bf16", False),  # config.json does not say
        (None, torch.float16, "fp32", True),
    ],
)
def test_the_type_is_that_of_the_weights_unless_it_is_given(
    named: str | None, stored: torch.dtype, trained: str, noted: bool, tmp_path: Path
) -> None:
    source = Pretrained.of(make_folder(tmp_path, stored, torch_dtype=named))
    assert source.model(ModelConfig(), {}).dtype == trained
    note = source.note({})
    assert (note is not None and "float16" in note) == noted
    assert source.model(ModelConfig(dtype="bf16"), {"model.dtype": ""}).dtype == "bf16"
    assert source.note({"model.dtype": ""}) is None


def test_what_the_weights_decide_is_not_asked_for_otherwise(tmp_path: Path) -> None:
    asked = replace(SAVED, num_layers=7, dtype="bf16", max_length=9)
    check_model(tmp_path, SAVED, asked, {})  # the default of a key that nobody set
    check_model(tmp_path, SAVED, asked, {"model.dtype": "", "model.max_length": "", "model.hidden_size": ""})
    with pytest.raises(ValueError, match=r"^x.yaml:3: model.num_layers = 7, and the weights of run.init = .* have 1"):
        check_model(tmp_path, SAVED, asked, {"model.num_layers": "x.yaml:3: "})
    scaled = replace(asked, rope=RopeScaling("linear", 2.0))
    with pytest.raises(ValueError, match="model.rope.kind = linear, and the weights of .* have none"):
        check_model(tmp_path, SAVED, scaled, {"model.rope.kind": "", "model.rope.factor": ""})


def test_saying_the_same_in_other_words_is_no_contradiction(tmp_path: Path) -> None:
    """A configuration that a run wrote names every value, those that were left open as null."""
    given = {"model.head_size": "", "model.vocab_size": ""}
    check_model(tmp_path, SAVED, replace(SAVED, head_size=8, vocab_size=None), given)
    check_model(tmp_path, replace(SAVED, head_size=16), replace(SAVED, head_size=None), given)
    with pytest.raises(ValueError, match="model.head_size = 4, .* have 8"):
        check_model(tmp_path, SAVED, replace(SAVED, head_size=4), given)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.json": "{}"}, "written by an earlier version .* train again"),
        ({}, "holds no config.json: give"),
        ({"config.json": "{"}, "config.json is not JSON"),
        ({"config.json": "[]"}, "config.json is no JSON object"),
        (
            {"config.json": json.dumps(fresh_config(SAVED, {}).values), "generation_config.json": "["},
            "n_config.json is not",
        ),
        ({"config.json": '{"model_type": "bert"}'}, "config.json asks for model_type = 'bert'"),
    ],
    ids=["earlier version", "nothing", "not JSON", "no object", "generation", "another model"],
)
def test_a_folder_that_describes_no_model_is_named(files: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"^run.init: .*{words}"):
        Pretrained.of(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run.init: .*nowhere is no folder"):
        Pretrained.of(tmp_path / "nowhere")


def test_weights_are_checked_against_their_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsm_train.hf.folder._ROWS", 2)
    Pretrained.of(make_folder(tmp_path)).check_weights("language")
    with pytest.raises(ValueError, match=r"run.init: weight .*gate_proj.weight in .* \[24, 16\], the model \[32, 16\]"):
        Pretrained.of(make_folder(tmp_path, intermediate_size=32)).check_weights("language")
    with pytest.raises(ValueError, match="run.init: .* has no weight model.layers.0.self_attn.q_proj.bias"):
        Pretrained.of(make_folder(tmp_path, attention_bias=True)).check_weights("language")
    value = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    with pytest.raises(ValueError, match="has a value head, and a language model is trained here"):
        Pretrained.of(make_folder(tmp_path, **value)).check_weights("language")
    tied = Pretrained.of(make_folder(tmp_path, tie_word_embeddings=True))
    tied.check_weights("language")  # its lm_head.weight is the embedding
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][3] = 0
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings = true, and lm_head.weight is not the embedding"):
        tied.check_weights("language")


def test_the_vocabulary_is_the_tokenizers_where_there_are_no_weights(tmp_path: Path) -> None:
    assert with_vocabulary(ModelConfig(), None, 300, "x").vocab_size == 300
    assert with_vocabulary(ModelConfig(vocab_size=320), None, 300, "x").vocab_size == 320
    with pytest.raises(ValueError, match="model.vocab_size must be at least the tokenizer's 300 tokens.*; got 299"):
        with_vocabulary(ModelConfig(vocab_size=299), None, 300, "x")
    with pytest.raises(ValueError, match="no architecture of Hugging Face's"):
        with_vocabulary(ModelConfig(output_bias=True), None, 300, "x")
    source = Pretrained.of(make_folder(tmp_path))
    assert with_vocabulary(SAVED, source, 20, "x") == SAVED  # more rows than the tokenizer has tokens
    with pytest.raises(ValueError, match="has weights for 30 tokens, and the tokenizer 31: use the tokenizer that"):
        with_vocabulary(SAVED, source, 31, "x")


def test_weights_know_the_tokenizer_that_they_were_trained_with(tmp_path: Path) -> None:
    """Another tokenizer of the same size would score garbage without a word."""
    check_tokenizer(tmp_path, 30, 30, "here")  # a folder from outside does not say
    write_tokenizer_note(tmp_path, 30, "here")
    check_tokenizer(tmp_path, 30, 30, "here")
    with pytest.raises(ValueError, match="was trained with another tokenizer .* use the tokenizer that lies beside"):
        check_tokenizer(tmp_path, 30, 30, "there")
    (tmp_path / "dsm.json").write_text("{}")
    with pytest.raises(ValueError, match="dsm.json does not name the weights' tokenizer"):
        check_tokenizer(tmp_path, 30, 30, "here")


def test_what_lies_beside_the_weights_is_written_again(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "in", torch_dtype="bfloat16"), tmp_path / "out"
    out.mkdir()
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7],   "temperature": 0.6}')
    source = Pretrained.of(folder)
    source.write(out, SAVED, "language", "fp16")
    name = "generation_config.json"
    assert (out / name).read_bytes() == (folder / name).read_bytes()
    read = [json.loads((place / "config.json").read_text()) for place in (folder, out)]
    assert read[1] == read[0] | {"torch_dtype": "float16"}


def test_the_ids_of_special_tokens_are_written_where_nothing_says_how_to_generate(tmp_path: Path) -> None:
    write_config(tmp_path, fresh_config(SAVED, {"eos_token_id": 1, "pad_token_id": 0}).values)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 1, "pad_token_id": 0}


def test_all_but_weights_is_carried_over(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for folder in (source, target, source / "onnx"):
        folder.mkdir()
    kept = ("tokenizer.json", "chat_template.jinja", "LICENSE", "dsm.json", "tokenizer.model")
    for name in (*kept, "config.json", "model.safetensors", "model.safetensors.index.json", "x.bin", ".hidden"):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag")
    carry_over(source, target)
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "rag"
    shutil.rmtree(target / "additional_chat_templates")
    assert {path.name: path.read_text() for path in target.iterdir()} == {name: name for name in kept}

    shutil.rmtree(target)
    target.mkdir()
    carry_over(source, target, FILES)  # another tokenizer will be written there
    assert sorted(path.name for path in target.iterdir()) == ["LICENSE", "dsm.json"]
    shutil.rmtree(source)
    carry_over(source, target)  # after weeks of training the folder may be gone


@pytest.mark.parametrize(
    ("generation", "config", "same"),
    [
        ({"eos_token_id": [7, 1]}, None, True),
        ({"eos_token_id": 1}, [1, 7], False),
        (None, [1, 7], True),
        ({"temperature": 1}, [1, 7], True),
        (None, None, False),
    ],
)
def test_a_line_says_where_responses_end_elsewhere_than_the_written_files_say(
    generation: dict[str, Any] | None, config: list[int] | None, same: bool, tmp_path: Path
) -> None:
    """data.tokenizer brings stop tokens of its own, and the weights go out with the files that they came with."""
    folder = make_folder(tmp_path, eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    note = Pretrained.of(folder).stops_note((1, 7))
    assert (note is None) == same
    assert same or ("at the tokens [1, 7] here" in str(note) and "transformers and vLLM will stop there" in str(note))


FRESH = {
    "llama": SAVED,
    "llama, biases, llama3": replace(
        SAVED, qkv_bias=True, output_bias=True, mlp_bias=True, rope=RopeScaling("llama3", 8.0, 128), tied_head=True
    ),
    "mistral, yarn": replace(SAVED, hidden_size=18, num_heads=4, head_size=4, rope=RopeScaling("yarn", 4.0, 256)),
    "qwen2, dynamic": replace(SAVED, qkv_bias=True, rope=RopeScaling("dynamic", 2.0, 2048)),
    "qwen3, linear": replace(SAVED, qk_norm=True, rope=RopeScaling("linear", 4.0), rope_base=5e5),
}


@pytest.mark.parametrize("model", FRESH.values(), ids=FRESH)
def test_transformers_loads_a_model_that_started_here_without_a_warning(
    model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ids: dict[str, int | list[int] | None] = {"bos_token_id": None, "eos_token_id": [1, 2], "pad_token_id": 0}
    write_config(tmp_path, fresh_config(model, ids).written(model, "language", "bf16"))
    weights = {piece.hf: torch.ones(piece.shape, dtype=torch.bfloat16) for piece in pieces(model, "language")}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values()) and not caplog.records, (info, caplog.text)
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.eos_token_id == [1, 2]
    rope = loaded.config.rope_parameters
    kind = "default" if model.rope.kind == "none" else model.rope.kind
    assert (rope["rope_type"], rope["rope_theta"]) == (kind, model.rope_base)
