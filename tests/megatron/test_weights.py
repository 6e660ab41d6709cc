"""Initialisation, copies and files of weights, on one rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.data.tokenizer import train_tokenizer
from dsm_train.megatron import weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import HiddenGPTModel, build_model
from dsm_train.megatron.parallel import Parallel


def initialised(layout: Parallel, config: ModelConfig = tiny.MODEL, seed: int = 0) -> dict[str, Tensor]:
    built = build_model(config, HeadSpec(64), layout)
    weights.initialise(built, config, seed, layout)
    return tiny.full_weights(built)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_weights(layout: Parallel) -> None:
    first = initialised(layout)
    assert equal(first, initialised(layout))
    other = initialised(layout, seed=1)
    drawn = [name for name in first if "norm" not in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_no_two_weights_start_alike(layout: Parallel) -> None:
    drawn = [value.flatten()[:100] for name, value in initialised(layout).items() if "norm" not in name]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert float(correlation.abs().max()) < 0.5


def test_weights_have_the_scale_they_should(layout: Parallel) -> None:
    config = replace(tiny.BIASES, num_layers=4, init_std=0.02)
    for name, value in initialised(layout, config).items():
        if "norm" in name or name.endswith(".bias"):
            assert bool((value == ("norm" in name)).all())
        else:
            # projections into the residual stream are divided by sqrt(2 x 4 layers)
            into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            assert float(value.std()) == pytest.approx(0.02 / 8**0.5 if into_residual else 0.02, rel=0.1)


def test_depth_of_layers_does_not_change_the_others(layout: Parallel) -> None:
    """A weight depends on its name: a deeper model has the shallow one's embedding and first layers."""
    shallow, deep = initialised(layout), initialised(layout, replace(tiny.MODEL, num_layers=3))
    same = [name for name in shallow if "linear_proj" not in name and "linear_fc2" not in name]
    assert len(deep) > len(shallow) and all(torch.equal(shallow[name], deep[name]) for name in same)


def test_a_tied_head_is_the_embedding(layout: Parallel) -> None:
    built = tiny.chunks(layout, tiny.tied())
    named = dict(weights.named_weights(built))
    assert "output_layer.weight" not in named
    assert built[0].head_weight() is named["embedding.word_embeddings.weight"]


LAYER = {
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}
CHOICES = {
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.bias",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.bias",
}


def names_of_a_layer(built: list[HiddenGPTModel]) -> set[str]:
    first = "decoder.layers.0."
    return {name.removeprefix(first) for name, _ in weights.named_weights(built) if name.startswith(first)}


def test_every_choice_has_its_weights(layout: Parallel) -> None:
    for chosen, names in (
        ({"qkv_bias": True}, {"self_attention.linear_qkv.bias"}),
        ({"output_bias": True}, {"self_attention.linear_proj.bias"}),
        ({"mlp_bias": True}, {"mlp.linear_fc1.bias", "mlp.linear_fc2.bias"}),
        ({"qk_norm": True}, {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}),
    ):
        assert names_of_a_layer(tiny.chunks(layout, replace(tiny.MODEL, **chosen))) == LAYER | names
    assert names_of_a_layer(tiny.chunks(layout, tiny.BIASES)) == LAYER | CHOICES


def test_names_do_not_depend_on_the_layers_that_serve(layout: Parallel) -> None:
    """Transformer Engine's linear layers hold the norm before them; here the same weights lie where it keeps them."""
    built = tiny.chunks(layout, tiny.BIASES)
    before = tiny.full_weights(built)
    for layer in built[0].decoder.layers:
        for norm, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            linear.layer_norm_weight = getattr(layer, norm).weight
            setattr(layer, norm, torch.nn.Identity())
    assert any(name.endswith("linear_fc1.layer_norm_weight") for name, _ in built[0].named_parameters())
    assert equal(tiny.full_weights(built), before)


@pytest.mark.parametrize("config", [tiny.MODEL, tiny.tied(tiny.BIASES)], ids=["untied", "tied, with all choices"])
def test_saved_weights_come_back(config: ModelConfig, layout: Parallel, tmp_path: Path) -> None:
    written = tiny.chunks(layout, config)
    weights.save_weights(tmp_path / "w", written, config, layout)
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["model.json", "model.safetensors"]
    assert weights.saved_model(tmp_path / "w", ModelConfig()) == replace(config, max_length=ModelConfig().max_length)
    read = tiny.chunks(layout, config, seed=1)
    weights.load_weights(tmp_path / "w", read, layout)
    assert equal(tiny.full_weights(read), tiny.full_weights(written))


def test_how_to_run_is_not_what_was_saved(layout: Parallel, tmp_path: Path) -> None:
    """What the weights do not determine is taken from this run's configuration."""
    weights.save_weights(tmp_path, tiny.chunks(layout), tiny.MODEL, layout)
    asked = ModelConfig(layers="local", dtype="bf16", recompute=True, vocab_multiple=8, max_length=7)
    assert weights.saved_model(tmp_path, asked) == replace(
        tiny.MODEL, layers="local", dtype="bf16", recompute=True, vocab_multiple=8, max_length=7
    )


@pytest.mark.parametrize("padded", [56, 128])  # fewer and more rows than the 64 that were saved
def test_the_vocabulary_may_be_padded_differently(padded: int, layout: Parallel, tmp_path: Path) -> None:
    written = tiny.chunks(layout)
    weights.save_weights(tmp_path, written, tiny.MODEL, layout)
    read = build_model(replace(tiny.MODEL, vocab_multiple=8), HeadSpec(padded), layout)
    weights.load_weights(tmp_path, read, layout)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        old, new = tiny.full_weights(written)[name], tiny.full_weights(read)[name]
        assert torch.equal(new[:56], old[:56]) and new.shape[0] == padded
        assert not new[64:].any()


def test_copies_are_independent(layout: Parallel) -> None:
    source, target = tiny.chunks(layout), tiny.chunks(layout, seed=1)
    weights.copy_weights(source, target)
    before = tiny.full_weights(target)
    assert equal(before, tiny.full_weights(source))
    with torch.no_grad():
        for parameter in source[0].parameters():
            parameter.add_(1)
    assert equal(before, tiny.full_weights(target))


def test_a_folder_without_weights_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.init: .*nowhere holds no model.safetensors"):
        weights.saved_model(tmp_path / "nowhere", ModelConfig())


@pytest.mark.parametrize("text", ["{", "[]", '{"num_layer": 2}'], ids=["not JSON", "no object", "unknown field"])
def test_a_damaged_description_raises(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match=r"run.init: .*model.json"):
        weights.saved_model(tmp_path, ModelConfig())


def test_weights_of_another_model_raise(layout: Parallel, tmp_path: Path) -> None:
    weights.save_weights(tmp_path, tiny.chunks(layout), tiny.MODEL, layout)
    wider = replace(tiny.MODEL, ffn_size=64)
    with pytest.raises(ValueError, match=r"shape \[96, 32\], the model \[128, 32\]"):
        weights.load_weights(tmp_path, build_model(wider, HeadSpec(64), layout), layout)
    with pytest.raises(ValueError, match="has no weight decoder.layers.2"):
        weights.load_weights(tmp_path, build_model(replace(tiny.MODEL, num_layers=3), HeadSpec(64), layout), layout)


def test_what_is_gathered_does_not_change_with_the_weights(layout: Parallel) -> None:
    built = tiny.chunks(layout)
    gathered = weights.gather_full(built, layout)
    expected = tiny.full_weights(built)
    with torch.no_grad():
        for parameter in built[0].parameters():
            parameter.add_(1)
    assert gathered.keys() == expected.keys()
    assert all(torch.equal(gathered[name], value) for name, value in expected.items())


def test_the_description_is_plain_json(layout: Parallel, tmp_path: Path) -> None:
    weights.save_weights(tmp_path, tiny.chunks(layout), tiny.MODEL, layout)
    assert json.loads((tmp_path / "model.json").read_text())["num_kv_heads"] == 2


def test_what_the_weights_decide_is_not_asked_for_otherwise(tmp_path: Path) -> None:
    saved, asked = tiny.MODEL, replace(tiny.MODEL, num_layers=7, dtype="bf16", max_length=9)
    weights.check_model(tmp_path, saved, asked, {})  # the default of a key that nobody set
    weights.check_model(tmp_path, saved, asked, {"model.dtype": "", "model.max_length": "", "model.hidden_size": ""})
    with pytest.raises(ValueError, match=r"^x.yaml:3: model.num_layers = 7, and the weights of run.init = .* have 2"):
        weights.check_model(tmp_path, saved, asked, {"model.num_layers": "x.yaml:3: "})


def test_weights_know_the_tokenizer_that_they_were_trained_with(layout: Parallel, tmp_path: Path) -> None:
    """Another tokenizer of the same size would score garbage without a word."""
    tokenizer, other = (train_tokenizer([text], 262) for text in ("ab ab ab ab", "xy xy xy xy"))
    assert tokenizer.vocab_size == other.vocab_size
    built = build_model(tiny.MODEL, HeadSpec(tokenizer.vocab_size), layout)
    weights.save_weights(tmp_path, built, tiny.MODEL, layout, tokenizer)
    weights.check_tokenizer(tmp_path, tokenizer)
    assert weights.saved_model(tmp_path, tiny.MODEL) == tiny.MODEL
    with pytest.raises(ValueError, match="was trained with another tokenizer .* use the tokenizer that lies beside"):
        weights.check_tokenizer(tmp_path, other)


def test_the_longest_sequence_is_that_of_the_weights_unless_it_is_given(layout: Parallel, tmp_path: Path) -> None:
    weights.save_weights(tmp_path, tiny.chunks(layout), tiny.MODEL, layout)
    asked = replace(tiny.MODEL, max_length=1000)
    assert weights.saved_model(tmp_path, asked, given=()).max_length == tiny.MODEL.max_length
    assert weights.saved_model(tmp_path, asked, given=("model.max_length",)).max_length == 1000
