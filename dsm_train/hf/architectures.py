"""Architectures that can be read and written, one row each: a new one is a row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsm_train.config import ModelConfig

HeadKind = Literal["language", "value"]
SUFFIXES: Mapping[HeadKind, str] = {"language": "ForCausalLM", "value": "ForSequenceClassification"}
"""Suffixes of the class names: a value head is a classifier with one label."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # those of the queries
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_QWEN = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


@dataclass(frozen=True)
class Architecture:
    """Row of the table."""

    model_type: str
    """Its name in config.json."""
    classes: str
    """Prefix of its class names."""
    flags: Mapping[str, bool | str]
    """Biases and norms by their fields of ModelConfig: there, not there, or as this key of config.json says."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: _LLAMA)
    """Values of the keys that config.json leaves out."""
    window: Literal["none", "every layer", "some layers"] = "none"
    """Layers that config.json may give a sliding window."""
    whole_heads: bool = False
    """Insist that hidden_size is a multiple of the heads, even where head_dim is given."""

    def class_name(self, kind: HeadKind) -> str:
        """Name the class of the model with this head."""
        return self.classes + SUFFIXES[kind]

    def flags_of(self, values: Mapping[str, Any]) -> dict[str, bool]:
        """Read biases and norms from config.json."""
        return {
            name: rule if isinstance(rule, bool) else bool(values.get(rule, False)) for name, rule in self.flags.items()
        }

    def keys_of(self, model: ModelConfig) -> dict[str, bool] | None:
        """Say biases and norms of a model with the keys of config.json; None if its config.json cannot express them."""
        keys: dict[str, bool] = {}
        for name, rule in self.flags.items():
            value = getattr(model, name)
            said = rule if isinstance(rule, bool) else keys.setdefault(rule, value)
            if said != value:
                return None
        return None if self.whole_heads and model.hidden_size % model.num_heads else keys


_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_NO_BIAS = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
ARCHITECTURES = (
    Architecture(
        "llama", "Llama", {**_ATTENTION_BIAS, "mlp_bias": "mlp_bias", "qk_norm": False}, whole_heads=True
    ),  # DeepSeek LLM, Coder and Math as well
    Architecture(
        "mistral",
        "Mistral",
        {**_NO_BIAS, "qk_norm": False},
        _LLAMA
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        window="every layer",
    ),
    Architecture("qwen2", "Qwen2", {**_NO_BIAS, "qkv_bias": True, "qk_norm": False}, _QWEN, window="some layers"),
    Architecture(
        "qwen3",
        "Qwen3",
        {**_ATTENTION_BIAS, "mlp_bias": False, "qk_norm": True},
        _QWEN | {"head_dim": 128},
        window="some layers",
    ),
)


def find_architecture(values: Mapping[str, Any]) -> Architecture:
    """Find the row of a config.json; raises `ValueError` that names what it is otherwise."""
    name = values.get("model_type")
    for architecture in ARCHITECTURES:
        if architecture.model_type == name:
            return architecture
    experts = any(values.get(key) for key in _EXPERTS) or "moe" in str(name)
    what = f"model_type = {name!r}" + (", a mixture of experts" if experts else "")
    known = ", ".join(architecture.model_type for architecture in ARCHITECTURES)
    raise ValueError(f"asks for {what}, and the architectures that train here are {known} (dense models)")


def architecture_of(model: ModelConfig) -> Architecture:
    """Choose the first row that can express a model that starts from nothing; `ValueError` where none can."""
    for architecture in ARCHITECTURES:
        if architecture.keys_of(model) is not None:
            return architecture
    flags = ", ".join(f"model.{name} = {str(getattr(model, name)).lower()}" for name in ARCHITECTURES[0].flags)
    raise ValueError(
        f"{flags}: no architecture of Hugging Face's has these together, so that the weights could not be written; "
        "Llama has biases (qkv_bias and output_bias alike), Qwen2 qkv_bias alone, Qwen3 qk_norm"
    )


def check_window(architecture: Architecture, values: Mapping[str, Any]) -> None:
    """Raise `ValueError` where config.json gives a layer a sliding window."""
    get = {**architecture.defaults, **values}.get
    window, types = get("sliding_window"), get("layer_types")
    if architecture.window == "every layer" and window is not None:
        default = "" if "sliding_window" in values else " (the default where the key is left out)"
        raise ValueError(
            f"asks for sliding_window = {window}{default}, and attention here sees all tokens before: set it to null "
            "if no sequence is longer"
        )
    if architecture.window != "some layers":
        return
    if types is not None:
        kinds = types if isinstance(types, list) else [types]
        others = sorted({str(kind) for kind in kinds if kind != "full_attention"})
        if others:
            raise ValueError(f"asks for layer_types with {', '.join(others)}, and attention here is full_attention")
        return
    first = get("max_window_layers")
    layers = get("num_hidden_layers")
    full = type(first) is int and type(layers) is int and first >= layers  # the first so many layers see all
    if get("use_sliding_window") and window is not None and not full:
        raise ValueError(
            f"asks for use_sliding_window = true (sliding_window = {window}), and attention here sees all tokens "
            "before: set it to false if no sequence is longer"
        )
