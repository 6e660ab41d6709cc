"""A folder of weights: what it says of its model, and what is written beside the weights."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsm_train.config import ModelConfig, require
from dsm_train.hf.architectures import SUFFIXES, HeadKind
from dsm_train.hf.config import Description, check_expressible, read_config
from dsm_train.hf.dtypes import BY_FILE, WeightsType
from dsm_train.hf.files import Reader, check_tensors, stored_tensors
from dsm_train.hf.names import pieces

CONFIG, GENERATION, TOKENIZER_NOTE = "config.json", "generation_config.json", "dsm.json"
_FORMER = "model.json"
_OF_CHECKPOINT = ("state.json", ".metadata")
"""Files of a run's checkpoint: the run's place, and Megatron's index."""
_AS_GIVEN = ("layers", "attention", "dtype", "recompute", "logits_mib", "vocab_multiple", "max_length")
_OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROWS = 4096
"""Rows of a vocabulary's weights that are compared at once."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Pretrained:
    """Folder of a pretrained model without weights and tokenizer: its description, carried on to what is trained."""

    folder: Path
    description: Description
    generation: bytes | None
    """generation_config.json, if there is one."""

    @classmethod
    def of(cls, folder: Path) -> Pretrained:
        """Read a folder; raises `ValueError` with the key in front for one that holds no model that trains here."""
        path, generation = folder / CONFIG, folder / GENERATION
        try:
            if not path.is_file():
                raise ValueError(_no_config(folder))
            values = _read_json(path)
            try:
                description = read_config(values)
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
            if not generation.is_file():
                return cls(folder, description, None)
            _read_json(generation)
            return cls(folder, description, generation.read_bytes())
        except ValueError as error:
            raise ValueError(f"run.init: {error}") from error

    def model(self, asked: ModelConfig, given: Mapping[str, str]) -> ModelConfig:
        """Return the model of the weights, to be run as `asked`; raises `ValueError` for what the user set otherwise.

        given: keys that the user set, each with its place. Without model.max_length and model.dtype among them, these
        are those of the weights too.
        """
        saved = self.description.model
        check_model(self.folder, saved, asked, given)
        kept = {name: getattr(asked, name) for name in _AS_GIVEN}
        if "model.max_length" not in given:
            kept["max_length"] = saved.max_length
        if "model.dtype" not in given:
            kept["dtype"] = "bf16" if self.dtype() == "bf16" else "fp32"
        return replace(saved, **kept)

    def dtype(self) -> WeightsType:
        """Type of the weights: what config.json says, else that of the first one."""
        if self.description.dtype is not None:
            return self.description.dtype
        first = next(iter(stored_tensors(self.folder).values()))
        return BY_FILE[first.dtype].name if first.dtype in BY_FILE else "fp32"

    def note(self, given: Collection[str]) -> str | None:
        """Say that weights are not trained in the type that they have."""
        if "model.dtype" in given or self.dtype() != "fp16":
            return None
        return (
            f"the weights of {self.folder} are float16, which is not trained in: fp32 serves (model.dtype=bf16 takes "
            "half the memory)"
        )

    def stops_note(self, stops: Collection[int]) -> str | None:
        """Say that responses end elsewhere in training than the files that are written beside the weights say.

        stops: tokens that end a response in training.
        """
        generation = {} if self.generation is None else json.loads(self.generation)
        written = generation.get("eos_token_id", self.description.values.get("eos_token_id"))
        written = written if isinstance(written, list) else [] if written is None else [written]
        if sorted(map(str, written)) == sorted(map(str, set(stops))):
            return None
        return (
            f"responses end at the tokens {sorted(stops)} here, and eos_token_id of {self.folder} is {written}, which "
            "is written beside the weights: transformers and vLLM will stop there"
        )

    def check_weights(self, kind: HeadKind) -> None:
        """Raise `ValueError` unless the files hold the model's weights, told from their headers.

        A tied head's own tensor, if there is one, is compared with the embedding. A value head starts anew on weights
        with a language head; a language head does not.
        """
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

    def write(
        self, folder: Path, model: ModelConfig, kind: HeadKind, dtype: WeightsType | None, without: Collection[str] = ()
    ) -> None:
        """Write what lies beside weights that were trained from these.

        without: patterns of files that are not carried over, since they are written from elsewhere.
        """
        carry_over(self.folder, folder, without)
        write_config(folder, self.description.written(model, kind, dtype), self.generation)


def write_config(folder: Path, values: Mapping[str, Any], generation: bytes | None = None) -> None:
    """Write config.json and generation_config.json; without the latter, the ids of the former for a language model."""
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    language = any(name.endswith(SUFFIXES["language"]) for name in values["architectures"])
    if generation is not None:
        (folder / GENERATION).write_bytes(generation)
    elif language and values.get("eos_token_id") is not None:
        ids = {name: values[name] for name in _IDS if values.get(name) is not None}
        (folder / GENERATION).write_text(json.dumps(ids, indent=2) + "\n")


def _check_tied(folder: Path) -> None:
    """Raise `ValueError` where a tied head has weights of its own: transformers would then not tie it.

    Reads both, some rows at a time.
    """
    with Reader(folder) as reader:
        embedding, head = reader.tensors[_EMBEDDING], reader.tensors[_HEAD]
        same = embedding.dtype == head.dtype and embedding.shape == head.shape
        for start in range(0, embedding.shape[0] if same else 0, _ROWS):
            stop = min(start + _ROWS, embedding.shape[0])
            rows, others = (reader.read(name, head.shape, 0, start, stop) for name in (_EMBEDDING, _HEAD))
            same = same and torch.equal(rows, others)
    if not same:
        raise ValueError(
            f"{folder / CONFIG} has tie_word_embeddings = true, and {_HEAD} is not the embedding: set it to false"
        )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} is no JSON object: copy it again")
    return values


def is_checkpoint(folder: Path) -> bool:
    """True for the checkpoint of a run, damaged or not, whose weights are in Megatron's files."""
    return not (folder / CONFIG).exists() and any((folder / name).is_file() for name in _OF_CHECKPOINT)


def _no_config(folder: Path) -> str:
    if is_checkpoint(folder):
        return (
            f"{folder} is a checkpoint, whose weights are in Megatron's files: have them written as a folder, and give "
            f"that: dsm-train convert {shlex.quote(f'run.init={folder}')} run.out=NEW"
        )
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
    path = folder / TOKENIZER_NOTE
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


def with_vocabulary(model: ModelConfig, pretrained: Pretrained | None, size: int, fingerprint: str) -> ModelConfig:
    """Fill model.vocab_size from the tokenizer, where the weights have not.

    size, fingerprint: those of the tokenizer.
    Raises `ValueError` for a tokenizer that is not the weights', and for a model that could not be written.
    """
    if pretrained is not None and model.vocab_size is not None:
        check_tokenizer(pretrained.folder, model.vocab_size, size, fingerprint)
        return model
    rule = f"at least the tokenizer's {size} tokens, or left out"
    require(model.vocab_size is None or model.vocab_size >= size, "model.vocab_size", rule, model.vocab_size)
    model = replace(model, vocab_size=model.vocab_size or size)
    check_expressible(model)
    return model


def carry_over(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy what lies beside the weights: tokenizer, chat templates, licence, ...; nothing where `source` is gone.

    without: patterns of files that are not copied.
    """
    for path in sorted([*source.glob("*"), *source.glob("additional_chat_templates/*.jinja")]):
        name = path.relative_to(source)
        weights = path.name.endswith((*_OF_WEIGHTS, ".index.json"))
        if not path.is_file() or path.name.startswith(".") or weights or path.name == CONFIG:
            continue
        if not any(name.match(pattern) for pattern in without):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)


def write_tokenizer_note(folder: Path, size: int, fingerprint: str) -> None:
    """Write down which tokenizer the weights were trained with."""
    note = {"tokenizer": {"vocab_size": size, "fingerprint": fingerprint}}
    (folder / TOKENIZER_NOTE).write_text(json.dumps(note, indent=2) + "\n")
