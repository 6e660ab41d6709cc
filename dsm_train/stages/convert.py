"""Stage `convert`: weights are read in this layout and written again, in other files or another type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from dsm_train.checkpoint import find
from dsm_train.checkpoint.place import FOLDER, NewerFormat, Place
from dsm_train.cli import user_errors
from dsm_train.config import ModelConfig
from dsm_train.configs import ConvertConfig
from dsm_train.hf.dtypes import BY_NAME
from dsm_train.hf.files import stored_dtypes
from dsm_train.hf.folder import Pretrained, is_checkpoint
from dsm_train.hf.writer import appearing
from dsm_train.megatron import checkpoint, parallel, weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import build_model, padded_vocab
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model
from dsm_train.megatron.weights import ModelSpec
from dsm_train.reporting.metrics import prepare_output

_TRAINED = "policy"
"""Name of the model in a checkpoint whose weights the run writes at its end."""
_SHAPE = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size")


@dataclass(frozen=True)
class Source:
    """Weights to convert."""

    folder: Path
    beside: Pretrained
    """Description of the model, and all that is written beside the weights."""
    held: Literal["fp32", "bf16"]
    """Type in which a model holds the weights exactly."""
    stored: torch.dtype | Mapping[str, torch.dtype]
    """Type that they are written in unless another is asked for."""
    place: Place | None = None
    """Place of the run that the weights are a checkpoint of."""

    @classmethod
    def of(cls, folder: Path) -> Source:
        """Read what a folder of weights or a checkpoint holds; raises `ValueError` for what cannot be read."""
        if is_checkpoint(folder):
            return cls.of_checkpoint(folder)
        beside = Pretrained.of(folder)
        beside.check_weights(beside.description.kind)
        stored = stored_dtypes(folder)
        return cls(folder, beside, "bf16" if set(stored.values()) == {torch.bfloat16} else "fp32", stored)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Source:
        """Read where the run stood, and the description of its model, which the run wrote beside its checkpoints."""
        description = folder.resolve().parent / find.MODEL
        if not description.is_dir():
            raise ValueError(
                f"run.init: {folder} is a checkpoint, and the folder {description} is missing, which describes its "
                f"model and tokenizer: copy {find.MODEL}/ from the run's {FOLDER}/ as well"
            )
        beside = Pretrained.of(description)
        with whole(folder):
            place = Place.read(folder)
        for name in _SHAPE:
            here, there = str(getattr(beside.description.model, name)), place.identity.get(f"model.{name}")
            if here != there:
                raise ValueError(
                    f"run.init: {folder} has model.{name} = {there}, and {description} {here}: it describes the model "
                    "of another run; put that of this run there"
                )
        held = "bf16" if place.identity.get("model.dtype") == "bf16" else "fp32"
        return cls(folder, beside, held, BY_NAME[beside.dtype()].torch, place)

    def check(self, ranks: Parallel) -> None:
        """Compare a checkpoint's files with their checksums; raises `ValueError` for a damaged one. Collective."""
        if self.place is not None:
            with whole(self.folder):
                find.check(self.folder, ranks)

    def model(self, model: ModelConfig, ranks: Parallel) -> Model:
        """Build the model with its weights. Collective."""
        head = HeadSpec.of(model, self.beside.description.kind)
        if self.place is None:
            return Model.build(ModelSpec(model, head, self.folder), ranks)
        built = Model(model, head, build_model(model, head, ranks), ranks)
        checkpoint.load_weights(self.folder, _TRAINED, built, ranks)
        return built


def convert(config: ConvertConfig) -> None:
    """Read a folder of weights, with either head, or a checkpoint, and write it anew with all that lies beside it."""
    init, out = config.run.init, config.run.out
    assert init is not None and out is not None, "the configuration insists on both"
    with user_errors("dsm-train convert"):
        source, model = check(config, init, out)
        parallel.set_threads(config.run.threads)
        ranks = parallel.start(config.parallel, config.run.seed)
        source.check(ranks)
    wanted, description = config.run.weights_dtype, source.beside.description
    dtype = source.stored if wanted is None else BY_NAME[wanted].torch
    with ranks.watchdog.failures(), appearing(out, ranks.is_main) as folder:
        chunks, shard_bytes = source.model(model, ranks).chunks, round(config.shard_gb * 10**9)
        weights.save_weights(folder, chunks, model, ranks, dtype, description.kind, shard_bytes)
        if ranks.is_main:
            source.beside.write(folder, description.model, description.kind, wanted)
    if ranks.is_main:
        files = sorted(out.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 10**9
        name = description.architecture.class_name(description.kind)
        at = "" if source.place is None else f" at {source.place}"
        print(f"{name}{at}: {len(files)} file(s), {size:.3g} GB: {out}")
    parallel.stop(ranks)


def check(config: ConvertConfig, init: Path, out: Path) -> tuple[Source, ModelConfig]:
    """Read what the folder holds, and make a model that holds exactly this.

    Raises `ValueError` for weights that cannot be read, a layout that does not fit, and an `out` that holds anything.
    """
    source = Source.of(init)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "not empty" if out.is_dir() else "a file"
        raise ValueError(f"run.out: {out} is {what}: choose a folder that is not there yet")
    prepare_output(out.absolute().parent)
    model = replace(source.beside.description.model, dtype=source.held, layers="local", vocab_multiple=1)
    padded = padded_vocab(HeadSpec.of(model).vocab_size, model.vocab_multiple, config.parallel.tp)
    parallel.check_layout(config.parallel, model, padded)
    return source, model


@contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Say of which checkpoint it is that something cannot be read."""
    try:
        yield
    except NewerFormat:
        raise
    except ValueError as error:
        raise ValueError(f"run.init: {folder} is a damaged checkpoint ({error}): take another of the run's") from error
