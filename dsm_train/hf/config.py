"""config.json and ModelConfig: what the one says of the other, and what it asks for that we lack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsm_train.config import ModelConfig, RopeScaling
from dsm_train.hf.architectures import (
    SUFFIXES,
    Architecture,
    HeadKind,
    architecture_of,
    check_window,
    find_architecture,
)
from dsm_train.hf.dtypes import BY_CONFIG, BY_NAME, WeightsType
from dsm_train.hf.rope import number, read_rope, write_rope

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
}
_NUMBERS = {"norm_eps": "rms_norm_eps", "init_std": "initializer_range"}
_KEYS = {**_SIZES, **_NUMBERS, "rope_base": "rope_theta", "original_length": "original_max_position_embeddings"}
"""Keys of config.json by our names."""
_LACKED = {
    "quantization_config": "weights here are fp32, bf16 or fp16",
    "auto_map": "code that comes with a model is not run here",
    "per_layer_config": "all layers are alike here",
}
_LABELS = ("num_labels", "id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Description:
    """A config.json, understood."""

    values: Mapping[str, Any]
    """Its keys and values, as they stand."""
    architecture: Architecture
    model: ModelConfig
    """The model, with max_position_embeddings as its longest sequence."""
    kind: HeadKind
    """Head that the weights have."""
    dtype: WeightsType | None
    """Type that it gives the weights."""

    def written(self, model: ModelConfig, kind: HeadKind, dtype: WeightsType | None) -> dict[str, Any]:
        """Update config.json for the new weights; other keys are kept.

        A longer model.max_length than max_position_embeddings is written where nothing else depends on that.

        dtype: type of the weights; None: as before.
        """
        values = dict(self.values)
        if dtype is not None:
            key = next((key for key in ("dtype", "torch_dtype") if values.get(key)), "torch_dtype")
            values |= {key: BY_NAME[dtype].config}
        if kind != self.kind:
            values = {key: value for key, value in values.items() if key not in _LABELS}
            values |= {"num_labels": 1} if kind == "value" else {}
        longer = values | {"max_position_embeddings": model.max_length}
        if model.max_length > self.model.max_length and read_config(longer).model.rope == self.model.rope:
            values = longer
        return values | {"architectures": [self.architecture.class_name(kind)]}


def read_config(values: Mapping[str, Any]) -> Description:
    """Understand a config.json; raises `ValueError` that names what it asks for and we lack."""
    architecture = find_architecture(values)
    for key, has in _LACKED.items():
        if values.get(key):
            raise ValueError(f"asks for {key}, and {has}")
    get = {**architecture.defaults, **values}.get
    if get("hidden_act") not in ("silu", "swish"):
        raise ValueError(f"asks for hidden_act = {get('hidden_act')!r}, and the activation here is 'silu'")
    if get("attention_dropout"):
        raise ValueError(f"asks for attention_dropout = {get('attention_dropout')}, and there is no dropout here")
    check_window(architecture, values)
    return Description(values, architecture, _model(architecture, values), _kind(architecture, values), _dtype(values))


def _model(architecture: Architecture, values: Mapping[str, Any]) -> ModelConfig:
    get = {**architecture.defaults, **values}.get
    fields: dict[str, Any] = {name: get(key) for name, key in _SIZES.items()}
    fields["num_kv_heads"] = fields["num_heads"] if fields["num_kv_heads"] is None else fields["num_kv_heads"]
    head = get("head_dim")
    for key, value in {**{key: fields[name] for name, key in _SIZES.items()}, "head_dim": head}.items():
        if not (type(value) is int or (key == "head_dim" and value is None)):
            raise ValueError(f"has {key} = {value!r}, which is no whole number: correct it")
    fields |= {name: number(key, get(key)) for name, key in _NUMBERS.items()}
    if head is not None and head * fields["num_heads"] == fields["hidden_size"]:
        head = None  # said twice
    fields |= architecture.flags_of(values) | {"head_size": head, "tied_head": bool(get("tie_word_embeddings"))}
    fields["rope_base"], scaling = read_rope(values, fields["max_length"])
    try:
        return ModelConfig(**fields, rope=RopeScaling(**scaling))
    except ValueError as error:
        said = re.sub(r"\w+", lambda word: _KEYS.get(word[0], word[0]), str(error))
        raise ValueError(f"describes no model: {said}: correct it") from error


def _kind(architecture: Architecture, values: Mapping[str, Any]) -> HeadKind:
    """Read the head from the name of the class; a config.json without one means a language model."""
    names = values.get("architectures") or [architecture.class_name("language")]
    names = names if isinstance(names, list) else [names]
    for kind in SUFFIXES:
        if names == [architecture.class_name(kind)]:
            labels = values.get("id2label")
            count = len(labels) if isinstance(labels, Mapping) else values.get("num_labels", 2)
            if kind == "value" and count != 1:
                raise ValueError(f"asks for a classifier with {count} labels, and a value head has one")
            return kind
    known = " and ".join(architecture.class_name(kind) for kind in SUFFIXES)
    raise ValueError(f"asks for {', '.join(map(str, names))}, and the heads that train here are those of {known}")


def _dtype(values: Mapping[str, Any]) -> WeightsType | None:
    name = values.get("dtype") or values.get("torch_dtype")
    if name is not None and str(name) not in BY_CONFIG:
        raise ValueError(f"asks for dtype = {name}, and weights here are {', '.join(BY_CONFIG)}")
    return None if name is None else BY_CONFIG[name].name


def fresh_config(model: ModelConfig, ids: Mapping[str, int | list[int] | None]) -> Description:
    """Describe a model that started from nothing, with the ids of its special tokens (eos_token_id, ...).

    Raises `ValueError` where no architecture has its biases and norms.
    """
    architecture = architecture_of(model)
    flags = architecture.keys_of(model)
    assert flags is not None, "architecture_of found it"
    # A dynamic scaling is off up to max_position_embeddings.
    longest = model.rope.original_length if model.rope.kind == "dynamic" else model.max_length
    values: dict[str, Any] = {
        "architectures": [architecture.class_name("language")],
        "model_type": architecture.model_type,
        **{key: getattr(model, name) for name, key in _SIZES.items() if name != "max_length"},
        "head_dim": model.kv_channels,
        "max_position_embeddings": longest,
        "hidden_act": "silu",
        **{key: getattr(model, name) for name, key in _NUMBERS.items()},
        "tie_word_embeddings": model.tied_head,
        **flags,
        **write_rope(model),
        **({"sliding_window": None} if architecture.window == "every layer" else {}),
        **{"bos_token_id": None, **ids},
    }
    return replace(read_config(values), dtype=None)


def check_expressible(model: ModelConfig) -> None:
    """Raise `ValueError` unless config.json can express a model that starts from nothing."""
    fresh_config(model, {})
