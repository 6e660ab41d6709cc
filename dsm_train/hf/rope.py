"""Rotary embeddings as config.json says them, in transformers 5's form (rope_parameters) and in 4's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsm_train.config import ModelConfig

_BASE = 10000.0
_KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3", "yarn": "yarn"}
_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "truncate", "attention_factor")


def number(key: str, value: Any) -> float:
    """Return a value of config.json as a number; raises `ValueError` where it is none."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"has {key} = {value!r}, which is no number: correct it")
    return float(value)


def read_rope(values: Mapping[str, Any], max_positions: int) -> tuple[float, dict[str, Any]]:
    """Read the base, and the scaling as fields of `RopeScaling`; raises `ValueError` for what we lack.

    max_positions: max_position_embeddings, the original length where none is given.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"has a rotary embedding of {rope!r}, which is no JSON object: correct it")
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(f"asks for rope_parameters of their own for {', '.join(nested)}, and layers share theirs here")
    base = number("rope_theta", rope.get("rope_theta", values.get("rope_theta", _BASE)))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"asks for partial_rotary_factor = {partial}, and whole heads are rotated here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"asks for rope_type = {kind!r}, and those that train here are {', '.join(_KINDS)}")
    if kind == "default":
        return base, {}
    # A key beside the others counts before theirs, as in transformers.
    given = values.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    original = max_positions
    if given is not None and kind != "dynamic":
        original = int(number("original_max_position_embeddings", given))
    factor = _factor(rope, kind, max_positions / max(original, 1))
    return base, {
        "kind": _KINDS[kind],
        "factor": factor,
        "original_length": None if kind == "linear" else original,
        **(_llama3(rope) if kind == "llama3" else _yarn(rope, factor) if kind == "yarn" else {}),
    }


def _factor(rope: Mapping[str, Any], kind: str, ratio: float) -> float:
    """Read the factor, which YaRN may leave open (null): the ratio of the lengths."""
    factor = rope.get("factor")
    if factor is None and not (kind == "yarn" and "factor" in rope):
        raise ValueError(f"lacks the factor of rope_type = {kind!r}: add it")
    return ratio if factor is None else number("factor", factor)


def _llama3(rope: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in _LLAMA3 if rope.get(name) is None]
    if missing:
        raise ValueError(f"lacks {missing[0]} of rope_type = 'llama3': add it")
    return {name: number(name, rope[name]) for name in _LLAMA3}


def _yarn(rope: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Read the keys of YaRN; `mscale` and `mscale_all_dim` together set the attention factor, unless it is given."""
    mscale, of_all, attention = (
        None if rope.get(name) is None else number(name, rope[name])
        for name in ("mscale", "mscale_all_dim", "attention_factor")
    )
    if attention is None and mscale and of_all and factor > 1:
        attention = (0.1 * mscale * math.log(factor) + 1) / (0.1 * of_all * math.log(factor) + 1)
    return {
        "beta_fast": number("beta_fast", rope.get("beta_fast") or 32),
        "beta_slow": number("beta_slow", rope.get("beta_slow") or 1),
        "truncate": bool(rope.get("truncate", True)),
        "attention_factor": attention,
    }


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Say base and scaling in transformers 4's form, which 5 reads as well."""
    rope = model.rope
    if rope.kind == "none":
        return {"rope_theta": model.rope_base}
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        names = _LLAMA3 if rope.kind == "llama3" else _YARN
        scaling |= {name: value for name in names if (value := getattr(rope, name)) is not None}
        scaling["original_max_position_embeddings"] = rope.original_length
    return {"rope_theta": model.rope_base, "rope_scaling": scaling}
