"""Initialisation, copies and files of weights, on one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.megatron import weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import HiddenGPTModel, build_model
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.weights import ModelSpec


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
    weights.save_weights(tmp_path, written, config, layout, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = tiny.chunks(layout, config, seed=1)
    weights.load_weights(tmp_path, read, config, layout)
    for name, value in tiny.full_weights(written).items():
        rows = tiny.VOCAB if name in weights.VOCABULARY_WEIGHTS else len(value)  # padding is not written
        assert torch.equal(tiny.full_weights(read)[name][:rows], value[:rows])


def test_padding_of_the_vocabulary_is_not_written_and_read_as_zeros(layout: Parallel, tmp_path: Path) -> None:
    weights.save_weights(tmp_path, tiny.chunks(layout), tiny.MODEL, layout, torch.float32)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [tiny.VOCAB, 32]
    for multiple in (1, 40):  # no padding, and 30 rows of it
        config = replace(tiny.MODEL, vocab_multiple=multiple)
        read = build_model(config, tiny.HEAD, layout)
        weights.load_weights(tmp_path, read, config, layout)
        for name in weights.VOCABULARY_WEIGHTS:
            value = tiny.full_weights(read)[name]
            assert len(value) == {1: 50, 40: 80}[multiple] and not value[50:].any() and value[:50].any(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_written_in_the_type_asked_for(dtype: torch.dtype, layout: Parallel, tmp_path: Path) -> None:
    written = tiny.chunks(layout)
    weights.save_weights(tmp_path, written, tiny.MODEL, layout, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    expected = tiny.full_weights(written)["decoder.layers.1.mlp.linear_fc2.weight"]
    assert torch.equal(stored["model.layers.1.mlp.down_proj.weight"], expected.to(dtype))
    read = tiny.chunks(layout, seed=1)
    weights.load_weights(tmp_path, read, tiny.MODEL, layout)
    assert torch.equal(tiny.full_weights(read)["decoder.layers.1.mlp.linear_fc2.weight"], expected.to(dtype).float())


def test_a_value_head_starts_at_0_on_weights_without_one_and_comes_back(layout: Parallel, tmp_path: Path) -> None:
    language = tiny.chunks(layout)
    weights.save_weights(tmp_path, language, tiny.MODEL, layout, torch.float32)
    spec = ModelSpec(tiny.MODEL, HeadSpec(tiny.VOCAB, "value"), tmp_path)
    critic = spec.chunks(layout)
    head = tiny.full_weights(critic)["value_head.weight"]
    assert head.shape == (1, 32) and not head.any()
    with torch.no_grad():
        critic[0].output_layer.weight.copy_(torch.arange(32.0))
    (tmp_path / "critic").mkdir()
    weights.save_weights(tmp_path / "critic", critic, tiny.MODEL, layout, torch.float32, "value")
    again = replace(spec, init=tmp_path / "critic").chunks(layout)
    assert torch.equal(tiny.full_weights(again)["value_head.weight"], torch.arange(32.0)[None])
    assert "lm_head.weight" not in load_file(tmp_path / "critic" / "model.safetensors")


def test_weights_of_another_model_raise(layout: Parallel, tmp_path: Path) -> None:
    weights.save_weights(tmp_path, tiny.chunks(layout), tiny.MODEL, layout, torch.float32)
    for config, words in (
        (replace(tiny.MODEL, ffn_size=64), r"gate_proj.weight in .* has shape \[48, 32\], the model \[64, 32\]"),
        (replace(tiny.MODEL, num_layers=3), "has no weight model.layers.2.input_layernorm.weight"),
    ):
        with pytest.raises(ValueError, match=words):
            weights.load_weights(tmp_path, build_model(config, tiny.HEAD, layout), config, layout)


def test_a_model_of_the_first_layers_reads_those_alone(layout: Parallel, tmp_path: Path) -> None:
    written, config = tiny.chunks(layout), replace(tiny.MODEL, num_layers=1)
    weights.save_weights(tmp_path, written, tiny.MODEL, layout, torch.float32)
    read = build_model(config, tiny.HEAD, layout)
    weights.load_weights(tmp_path, read, config, layout)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(tiny.full_weights(read)[name], tiny.full_weights(written)[name])


def test_copies_are_independent(layout: Parallel) -> None:
    source, target = tiny.chunks(layout), tiny.chunks(layout, seed=1)
    weights.copy_weights(source, target)
    before = tiny.full_weights(target)
    assert equal(before, tiny.full_weights(source))
    with torch.no_grad():
        for parameter in source[0].parameters():
            parameter.add_(1)
    assert equal(before, tiny.full_weights(target))


def test_what_is_gathered_does_not_change_with_the_weights(layout: Parallel) -> None:
    built = tiny.chunks(layout)
    gathered = weights.gather_full(built, layout)
    expected = tiny.full_weights(built)
    with torch.no_grad():
        for parameter in built[0].parameters():
            parameter.add_(1)
    assert gathered.keys() == expected.keys()
    assert all(torch.equal(gathered[name], value) for name, value in expected.items())
