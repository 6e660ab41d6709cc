"""A folder of weights: what it says of its model, and what is written beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsm_train.config import ModelConfig, require
from dsm_train.hf.architectures import HeadKind
from dsm_train.hf.config import Description, WeightsType, fresh_config, read_config
from dsm_train.hf.files import Reader, check_tensors, stored_tensors
from dsm_train.hf.names import pieces

CONFIG, GENERATION, OURS = "config.json", "generation_config.json", "dsm.json"
_FORMER = "model.json"
_AS_GIVEN = ("layers", "attention", "dtype", "recompute", "logits_mib", "vocab_multiple", "max_length")
_OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MODEL_TYPES: Mapping[WeightsType, str] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp32"}
"""Type that weights of each type are trained in."""


@dataclass(frozen=True)
class Source:
    """All that a folder says beside its weights and its tokenizer, for those who train them and write them again."""

    folder: Path | None
    """None: the model starts from nothing."""
    description: Description
    generation: bytes | None
    """generation_config.json, if there is one."""

    @classmethod
    def of(cls, folder: Path) -> Source:
        """Read a folder; raises `ValueError` with the key in front for one that holds no model that trains here."""
        path = folder / CONFIG
        try:
            if not path.is_file():
                raise ValueError(_no_config(folder))
            try:
                description = read_config(json.loads(path.read_bytes()))
            except ValueError as error:
                raise ValueError(f"{path} {_what(error)}") from error
            generation = folder / GENERATION
            return cls(folder, description, generation.read_bytes() if generation.is_file() else None)
        except ValueError as error:
            raise ValueError(f"run.init: {error}") from error

    @classmethod
    def fresh(cls, model: ModelConfig, ids: Mapping[str, int | list[int] | None]) -> Source:
        """Describe a model that starts from nothing; raises `ValueError` where no architecture can express it."""
        return cls(None, fresh_config(model, ids), None)

    def model(self, asked: ModelConfig, given: Mapping[str, str]) -> ModelConfig:
        """Return the model of the weights, to be run as `asked`; raises `ValueError` for what the user set otherwise.

        given: keys that the user set, each with its place. Without model.max_length and model.dtype among them, these
        are those of the weights too.
        """
        assert self.folder is not None, "a model that starts from nothing is as asked"
        saved = self.description.model
        check_model(self.folder, saved, asked, given)
        kept = {name: getattr(asked, name) for name in _AS_GIVEN}
        if "model.max_length" not in given:
            kept["max_length"] = saved.max_length
        if "model.dtype" not in given:
            kept["dtype"] = _MODEL_TYPES[self.dtype()]
        return replace(saved, **kept)

    def dtype(self) -> WeightsType:
        """Type of the weights: what config.json says, else that of the first one."""
        if self.description.dtype is not None:
            return self.description.dtype
        assert self.folder is not None
        first = next(iter(stored_tensors(self.folder).values()))
        return {"BF16": "bf16", "F16": "fp16"}.get(first.dtype, "fp32")  # type: ignore[return-value]

    def note(self, given: Collection[str]) -> str | None:
        """Say that weights are not trained in the type that they have."""
        if "model.dtype" in given or self.folder is None or self.dtype() != "fp16":
            return None
        return (
            f"the weights of {self.folder} are float16, which is not trained in: fp32 serves (model.dtype=bf16 takes "
            "half the memory)"
        )

    def check_weights(self, kind: HeadKind) -> None:
        """Raise `ValueError` unless the files hold the model's weights, told from their headers.

        A value head starts anew on weights with a language head; a language head does not.
        """
        assert self.folder is not None
        description = self.description
        if kind == "language" and description.kind == "value":
            raise ValueError(f"run.init: {self.folder} has a value head, and a language model is trained here")
        try:
            stored = stored_tensors(self.folder)
            expected = {piece.hf: piece.shape for piece in pieces(description.model, description.kind)}
            tied = description.model.tied_head
            check_tensors(self.folder, stored, expected, [_HEAD] if tied else [])
            if tied and _HEAD in stored:
                _check_tied(self.folder)
        except ValueError as error:
            raise ValueError(f"run.init: {error}") from error

    def write(self, folder: Path, model: ModelConfig, kind: HeadKind, dtype: WeightsType | None) -> None:
        """Write config.json and generation_config.json beside weights that were trained from these."""
        values = self.description.written(model, kind, dtype)
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        if self.generation is not None:
            (folder / GENERATION).write_bytes(self.generation)
        elif kind == "language" and values.get("eos_token_id") is not None:
            ids = {name: values[name] for name in _IDS if values.get(name) is not None}
            (folder / GENERATION).write_text(json.dumps(ids, indent=2) + "\n")


def _check_tied(folder: Path) -> None:
    """Raise `ValueError` where a tied head has weights of its own: transformers would then not tie it."""
    with Reader(folder) as reader:
        embedding, head = (reader.read(name, reader.tensors[name].shape, None, 0, 0) for name in (_EMBEDDING, _HEAD))
        if embedding.dtype != head.dtype or not torch.equal(embedding, head):
            raise ValueError(
                f"{folder / CONFIG} has tie_word_embeddings = true, and {_HEAD} is not the embedding: set it to false"
            )


def _what(error: ValueError) -> str:
    """Say what is wrong with config.json: damaged text, a value that no model has, or what we lack."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"is not JSON ({error}): copy it again"
    return str(error)


def _no_config(folder: Path) -> str:
    if (folder / _FORMER).is_file():
        return (
            f"{folder} was written by an earlier version of this trainer ({_FORMER} and no {CONFIG}), whose format is "
            "no longer read: train again"
        )
    if not folder.is_dir():
        return f"{folder} is no folder (nothing is downloaded): give a run's weights/ or a Hugging Face model"
    return f"{folder} holds no {CONFIG}: give a run's weights/ or a Hugging Face model"


def check_model(folder: Path, saved: ModelConfig, asked: ModelConfig, given: Mapping[str, str]) -> None:
    """Raise `ValueError` for a value of `model` that the user set and the weights have otherwise.

    given: the keys that the user set, each with its place.
    """
    has, wants = (_flat(asdict(model) | {"head_size": model.kv_channels}) for model in (saved, asked))
    for name, value in wants.items():
        key = f"model.{name}"
        if key not in given or name in _AS_GIVEN or getattr(asked, name, value) is None or value == has[name]:
            continue
        raise ValueError(
            f"{given[key]}{key} = {value}, and the weights of run.init = {folder} have {has[name]}: leave {key} out, "
            "or start without run.init"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def check_tokenizer(folder: Path, rows: int, size: int, fingerprint: str) -> None:
    """Raise `ValueError` for a tokenizer that has more tokens than the weights rows, or is not the one they know.

    size: tokens of the tokenizer.
    """
    if rows < size:
        raise ValueError(
            f"run.init: {folder} has weights for {rows} tokens, and the tokenizer {size}: use the tokenizer that lies "
            "beside the weights"
        )
    path = folder / OURS
    if not path.is_file():
        return
    try:
        known = json.loads(path.read_bytes())["tokenizer"]
        size_of_known, fingerprint_of_known = known["vocab_size"], known["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"run.init: {path} does not name the weights' tokenizer: remove it") from error
    if fingerprint_of_known != fingerprint:
        raise ValueError(
            f"run.init: {folder} was trained with another tokenizer ({size_of_known} tokens, {fingerprint_of_known}) "
            f"than the one given ({size} tokens, {fingerprint}): use the tokenizer that lies beside the weights"
        )


def with_vocabulary(model: ModelConfig, source: Source | None, size: int, fingerprint: str) -> ModelConfig:
    """Fill model.vocab_size from the tokenizer, where the weights have not.

    size, fingerprint: those of the tokenizer.
    Raises `ValueError` for a tokenizer that is not the weights', and for a model that could not be written.
    """
    if source is not None and source.folder is not None and model.vocab_size is not None:
        check_tokenizer(source.folder, model.vocab_size, size, fingerprint)
        return model
    rule = f"at least the tokenizer's {size} tokens, or left out"
    require(model.vocab_size is None or model.vocab_size >= size, "model.vocab_size", rule, model.vocab_size)
    model = replace(model, vocab_size=model.vocab_size or size)
    fresh_config(model, {})
    return model


def carry_over(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, chat template, licence, ..."""
    for path in sorted(source.iterdir()):
        weights = path.name.endswith((*_OF_WEIGHTS, ".index.json"))
        if path.is_file() and not path.name.startswith(".") and not weights and path.name != CONFIG:
            shutil.copyfile(path, target / path.name)


def write_tokenizer_note(folder: Path, size: int, fingerprint: str) -> None:
    """Write down which tokenizer the weights were trained with."""
    note = {"tokenizer": {"vocab_size": size, "fingerprint": fingerprint}}
    (folder / OURS).write_text(json.dumps(note, indent=2) + "\n")
