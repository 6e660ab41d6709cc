"""config.json against transformers' own classes: the same meaning, or refused by name."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dsm_train.config import ModelConfig, RopeScaling
from dsm_train.hf.architectures import ARCHITECTURES
from dsm_train.hf.config import fresh_config, read_config
from dsm_train.hf.names import pieces

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    # config.json as it is published, but for keys that say nothing of the model; and the number of parameters
    "Llama 3.2 1B": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
         "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
         "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
         "pretraining_tp": 1, "rms_norm_eps": 1e-05,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"},
         "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
         "vocab_size": 128256},
        1_235_814_400,
    ),
    "DeepSeekMath 7B": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 100000,
         "eos_token_id": 100001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
         "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
         "num_attention_heads": 32, "num_hidden_layers": 30, "num_key_value_heads": 32, "pretraining_tp": 1,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 102400},
        6_910_365_696,
    ),
    "Mistral 7B v0.3": (
        {"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
         "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
         "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
         "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
         "vocab_size": 32768},
        7_248_023_552,
    ),
    "Qwen2.5 0.5B": (
        {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
         "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
         "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
         "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
         "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936},
        494_032_768,
    ),
    "Qwen3 0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
         "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
         "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
         "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
         "use_sliding_window": False, "vocab_size": 151936},
        596_049_920,
    ),
}  # fmt: skip
SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "vocab_size": 77,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ATTRIBUTES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tied_head": "tie_word_embeddings",
}


def theirs(values: dict[str, Any]) -> Any:
    """transformers' reading of a config.json."""
    return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))


def drawn(seed: int) -> dict[str, Any]:
    """A random config.json: any architecture, any form, any rotary scaling, keys that may be left out."""
    rng = random.Random(seed)
    name = rng.choice([architecture.model_type for architecture in ARCHITECTURES])
    values: dict[str, Any] = {"model_type": name, **SMALL}
    optional = {
        "num_key_value_heads": rng.choice([1, 2, 3, 6]),
        "intermediate_size": rng.choice([40, 96]),
        "max_position_embeddings": rng.choice([64, 4096]),
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "initializer_range": rng.choice([0.01, 0.02]),
        "tie_word_embeddings": rng.random() < 0.5,
        "head_dim": rng.choice([8, 16]),
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "attention_dropout": 0.0,
    }
    values |= {key: value for key, value in optional.items() if rng.random() < 0.7}
    if "num_key_value_heads" not in values and name != "llama":
        values["num_key_value_heads"] = 2  # the default is for more heads
    if name == "mistral":
        values["sliding_window"] = None
    if name.startswith("qwen"):
        values |= rng.choice([{}, {"use_sliding_window": True, "max_window_layers": 2}, {"sliding_window": 32}])
    return values | drawn_rope(rng)


def drawn_rope(rng: random.Random) -> dict[str, Any]:
    """Keys of a rotary embedding, in transformers 5's form or in 4's."""
    kind = rng.choice(["default", "linear", "dynamic", "llama3", "yarn"])
    rope: dict[str, Any] = {} if kind == "default" else {"factor": rng.choice([1.5, 4.0, 8])}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice([2.0, 4.0])}
    if kind in ("llama3", "yarn") and rng.random() < 0.7:
        rope["original_max_position_embeddings"] = rng.choice([16, 32])
    if kind == "yarn":
        optional = {"attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2.0, "truncate": False, "mscale": 0.7,
                    "mscale_all_dim": rng.choice([0.3, 1.0, 0])}  # fmt: skip
        rope |= {key: value for key, value in optional.items() if rng.random() < 0.4}
    base = {} if rng.random() < 0.2 else {"rope_theta": rng.choice([1e4, 5e5, 1_000_000])}
    if rng.random() < 0.5:
        return {"rope_parameters": {"rope_type": kind, **rope, **base}}
    scaling = {rng.choice(["type", "rope_type"]): kind, **rope}
    return base | ({"rope_scaling": scaling} if kind != "default" or rng.random() < 0.3 else {})


@pytest.mark.parametrize("seed", range(60))
def test_a_random_config_means_what_it_means_to_transformers(seed: int) -> None:
    values = drawn(seed)
    ours, config = read_config(values).model, theirs(values)
    for name, attribute in ATTRIBUTES.items():
        assert getattr(ours, name) == getattr(config, attribute), (name, values)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (ours.kv_channels, ours.rope_base) == (head, config.rope_parameters["rope_theta"])
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    assert {piece.hf: piece.shape for piece in pieces(ours, "language")} == {
        name: tuple(tensor.shape) for name, tensor in state.items() if name != "lm_head.weight" or not ours.tied_head
    }


@pytest.mark.parametrize("seed", range(60))
def test_what_was_read_is_written_with_the_same_meaning(seed: int) -> None:
    """Biases, norms and rotary embedding: the frequencies that transformers computes from what we write."""
    values = drawn(seed)
    ours = read_config(values).model
    written = dict(fresh_config(ours, {"eos_token_id": 1}).values)
    assert read_config(written).model == ours
    rotary, again = (LlamaRotaryEmbedding(theirs(config)) for config in (values, written))
    torch.testing.assert_close(again.inv_freq, rotary.inv_freq, rtol=1e-7, atol=0)
    assert again.attention_scaling == pytest.approx(rotary.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_passes_every_shape_rule(name: str) -> None:
    values, parameters = PUBLISHED[name]
    description = read_config(values)
    assert (description.dtype, description.kind) == ("bf16", "language")
    ours = {piece.hf: piece.shape for piece in pieces(description.model, "language")}
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == parameters
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs(values))
    expected = {parameter: tuple(value.shape) for parameter, value in model.named_parameters()}
    assert ours == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_keys_that_are_left_out_have_transformers_defaults(architecture: Any) -> None:
    config = CONFIG_MAPPING[architecture.model_type]()
    for key, value in architecture.defaults.items():
        if key in ("num_key_value_heads", "head_dim") and value is None:
            continue  # they follow from others
        if key == "layer_types" or (key == "sliding_window" and architecture.window == "some layers"):
            continue  # transformers has put in what they come to
        assert getattr(config, key) == value, key


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', and the activation here is 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"model_type": "mistral"}, "sliding_window = 4096 .the default where the key is left out."),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window = 32, .* set it to null"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window = true"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types with sliding_"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type = 'longrope', .* linear, dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks the factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"model_type": "gemma2"}, "model_type = 'gemma2', .* llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe', a mixture of experts"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral', a mixture of experts"),
        ({"model_type": None}, "model_type = None"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel, and the heads .* LlamaForCausalLM"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "2 labels"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn, .* float32, bfloat16, float16"),
        ({"hidden_size": "48"}, "hidden_size = '48', which is no whole number"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None, which is no number"),
        (
            {"num_key_value_heads": 4},
            "no model: num_attention_heads must be a multiple of num_key_value_heads = 4; .*: ",
        ),
        ({"initializer_range": -1}, "no model: initializer_range must be .*; got -1.*: correct it"),
        ({"rope_scaling": [1]}, r"a rotary embedding of \[1\], which is no JSON object: correct it"),
        ({"rope_scaling": {"type": ["x"]}}, r"rope_type = \['x'\], and those"),
        ({"rope_scaling": {"type": "linear", "factor": [2]}}, r"has factor = \[2\], which is no number: correct it"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "no model: factor must be at least 1; got 0.5: correct it",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
            "no model: original_max_position_embeddings must be at least 1; got 0: correct it",
        ),
        ({"torch_dtype": ["x"]}, r"asks for dtype = \['x'\], and"),
        ({"architectures": "LlamaModel"}, "asks for LlamaModel, and the heads"),
        ({"model_type": "qwen2", "layer_types": 1}, "layer_types with 1, and attention here"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_we_lack_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config({"model_type": "llama", **SMALL, **values})


ROPE = {
    "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.4,
    "beta_fast": 16, "beta_slow": 2, "truncate": False, "rope_theta": 1e4, "partial_rotary_factor": 1.0,
}  # fmt: skip
JUNK = ([1], ["x"], [[]], {"x": 1}, "x", "", 0, -1, 1.5, True, float("nan"), float("inf"))


@pytest.mark.parametrize("junk", JUNK, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_whatever_stands_behind_a_key_is_understood_or_refused_by_a_line(architecture: Any, junk: Any) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    whole = {"id2label": {"0": "x"}, "num_labels": 1, "dtype": "float32", "attention_bias": False, **SMALL}
    whole |= {"model_type": architecture.model_type, "num_key_value_heads": 2, "rope_parameters": ROPE}
    whole |= {"architectures": [architecture.class_name("value")]}
    whole |= window if architecture.window == "some layers" else {"sliding_window": None}
    assert read_config(whole).kind == "value"
    damaged = [whole | {key: junk} for key in {**whole, **architecture.defaults, "torch_dtype": None}]
    damaged += [whole | {"rope_parameters": ROPE | {key: junk}} for key in ROPE]
    damaged += [whole | {"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, key: junk}}
                for key in ("low_freq_factor", "high_freq_factor")]  # fmt: skip
    for values in damaged:
        try:
            read_config(values)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "values",
    [
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True},  # Llama's class reads neither
        {"sliding_window": 8, "num_experts": None, "use_cache": False, "pretraining_tp": 2},
        {"hidden_act": "swish", "rope_scaling": None, "architectures": None},
        {"model_type": "qwen2", "attention_bias": False, "mlp_bias": True},  # biases are as its class has them
    ],
    ids=["windows of others", "unread keys", "other words", "biases of others"],
)
def test_keys_that_the_architecture_does_not_read_are_no_demand(values: dict[str, Any]) -> None:
    model = read_config({"model_type": "llama", **SMALL, "num_key_value_heads": 2, **values}).model
    assert model.qkv_bias == (values.get("model_type") == "qwen2") and not model.mlp_bias


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ModelConfig(), "llama"),
        (ModelConfig(qkv_bias=True, output_bias=True, mlp_bias=True), "llama"),
        (ModelConfig(hidden_size=100, num_heads=8, num_kv_heads=4, head_size=16), "mistral"),
        (ModelConfig(qkv_bias=True), "qwen2"),
        (ModelConfig(qk_norm=True), "qwen3"),
        (ModelConfig(qk_norm=True, qkv_bias=True, output_bias=True), "qwen3"),
    ],
)
def test_a_model_that_starts_from_nothing_is_the_first_row_that_can_express_it(model: ModelConfig, name: str) -> None:
    model = replace(model, vocab_size=300, rope=RopeScaling("dynamic", 2.0, 2048))
    description = fresh_config(model, {"eos_token_id": 1, "pad_token_id": 0})
    assert description.values["model_type"] == name
    assert read_config(description.values).model == replace(model, max_length=2048)


@pytest.mark.parametrize("model", [ModelConfig(output_bias=True), ModelConfig(qk_norm=True, mlp_bias=True)])
def test_a_model_that_no_architecture_has_is_refused(model: ModelConfig) -> None:
    with pytest.raises(ValueError, match="no architecture of Hugging Face's has these together"):
        fresh_config(replace(model, vocab_size=300), {})


def test_config_json_is_carried_over_but_for_what_changed() -> None:
    values = {**PUBLISHED["Qwen2.5 0.5B"][0], "transformers_version": "4.40.1"}
    description = read_config(values)
    assert description.written(description.model, "language", "bf16") == values
    assert description.written(description.model, "language", None) == values
    assert description.written(description.model, "language", "fp32") == {**values, "torch_dtype": "float32"}
    value = description.written(description.model, "value", "bf16")
    assert value == {**values, "architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}
    assert read_config(value).kind == "value"


def test_a_longer_sequence_is_written_where_no_frequency_depends_on_it() -> None:
    plain, scaled = (read_config({"model_type": "llama", **SMALL, "max_position_embeddings": 64, **rope})
                     for rope in ({}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}))  # fmt: skip
    for description, longest in ((plain, 128), (scaled, 64)):
        model = replace(description.model, max_length=128)
        assert description.written(model, "language", None)["max_position_embeddings"] == longest
    shorter = replace(plain.model, max_length=32)
    assert plain.written(shorter, "language", None)["max_position_embeddings"] == 64


def test_both_forms_are_read_alike(tmp_path: Any) -> None:
    """transformers writes its own form of what it read in the former one."""
    for values, _ in PUBLISHED.values():
        theirs(values).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert read_config(config.to_dict() | {"dtype": "bfloat16"}).model == read_config(values).model
