"""Weights by their canonical names (layers counted over the whole pipeline): initialisation, copies, files.

Every weight is drawn from a generator of its own, seeded by (seed, name), as the full tensor, of which each rank keeps
its shard: the same model in every layout.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsm_train.config import ModelConfig, RopeScaling
from dsm_train.data.tokenizer import Tokenizer
from dsm_train.megatron.heads import HeadSpec, ValueLayer
from dsm_train.megatron.model import HiddenGPTModel, build_model
from dsm_train.megatron.parallel import Parallel

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Canonical names of the norms that Transformer Engine's layers fuse with the linear layer behind them."""
WEIGHTS_FILE = "model.safetensors"
MODEL_FILE = "model.json"
_TOKENIZER = "tokenizer"
VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Names of the weights with a row per token."""
_AS_GIVEN = ("layers", "attention", "dtype", "recompute", "logits_mib", "vocab_multiple", "max_length")


def named_weights(chunks: Sequence[HiddenGPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (canonical name, parameter) of every weight on this rank."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name == "output_layer.weight" and isinstance(chunk.output_layer, ValueLayer):
                name = "value_head.weight"
            match = _LAYER.match(name)
            if match:
                layer = int(chunk.decoder.layers[int(match[1])].layer_number) - 1  # type: ignore[arg-type]
                name = f"decoder.layers.{layer}.{_FUSED.get(match[2], match[2])}"
            yield name, parameter


def shard(name: str, full: Tensor, parameter: torch.nn.Parameter, parallel: Parallel) -> Tensor:
    """Cut this rank's part out of a full weight."""
    tp, rank = parallel.groups.tp.size(), parallel.groups.tp.rank()
    if tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    if "linear_fc1" in name:  # [gate | up], each split on its own
        return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])
    return full.chunk(tp, dim=_partition_dim(parameter))[rank]


def _partition_dim(parameter: torch.nn.Parameter) -> int:
    """Read the dimension along which Megatron splits a weight; an attribute of its own on the parameter."""
    return getattr(parameter, "partition_dim")  # noqa: B009


def _full_shape(parameter: torch.nn.Parameter, tp: int) -> list[int]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[_partition_dim(parameter)] *= tp
    return shape


@dataclass(frozen=True)
class ModelSpec:
    """A model to build: its shape, its head, and where its weights come from."""

    config: ModelConfig
    head: HeadSpec
    init: Path | None
    """Folder of weights; None: drawn by `seed`."""
    seed: int = 0

    def chunks(self, parallel: Parallel) -> list[HiddenGPTModel]:
        """Build this rank's part of the model, with its initial weights."""
        chunks = build_model(self.config, self.head, parallel)
        if self.init is not None:
            load_weights(self.init, chunks, parallel)
        else:
            initialise(chunks, self.config, self.seed, parallel)
        return chunks


@torch.no_grad()
def initialise(chunks: Sequence[HiddenGPTModel], model: ModelConfig, seed: int, parallel: Parallel) -> None:
    """Draw all weights: normal(0, init_std), norms 1, biases 0, projections into the residual / sqrt(2 num_layers).

    A value head starts at 0: so do all values.
    """
    for name, parameter in named_weights(chunks):
        if "norm" in name or name.endswith(".bias") or name == "value_head.weight":
            parameter.fill_(1.0 if "norm" in name else 0.0)
            continue
        # A tied head on another pipeline rank must start as the embedding's copy.
        tied_copy = model.tied_head and name == "output_layer.weight"
        drawn_as = "embedding.word_embeddings.weight" if tied_copy else name
        generator = torch.Generator().manual_seed(_name_seed(seed, drawn_as))
        std = model.init_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= (2 * model.num_layers) ** 0.5
        full = torch.randn(_full_shape(parameter, parallel.groups.tp.size()), generator=generator) * std
        parameter.copy_(shard(name, full, parameter, parallel))


def _name_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def copy_weights(source: Sequence[HiddenGPTModel], target: Sequence[HiddenGPTModel]) -> None:
    """Make `target` (same layout) hold the weights of `source`."""
    for from_, to in zip(source, target, strict=True):
        for parameter, value in zip(to.parameters(), from_.parameters(), strict=True):
            parameter.copy_(value)


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Read a weight's gradient from the data-parallel buffers, fp32."""
    return getattr(parameter, "main_grad")  # noqa: B009 (an attribute of Megatron's)


@torch.no_grad()
def gather_full(
    chunks: Sequence[HiddenGPTModel],
    parallel: Parallel,
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter,
) -> dict[str, Tensor]:
    """Gather `value` of every weight (itself, its gradient, ...) as full tensors by canonical name, on the main CPU.

    {} on other ranks. Collective. A tied head on another pipeline rank is a copy, and left out.
    """
    if parallel.dp_rank > 0:
        return {}
    whole = {name: _whole(name, parameter, value(parameter), parallel) for name, parameter in named_weights(chunks)}
    if chunks[0].share_embeddings_and_output_weights:
        whole.pop("output_layer.weight", None)
    pipeline, groups = parallel.groups.pp, parallel.groups
    if pipeline.size() == 1 or groups.tp.rank() > 0:
        return whole if parallel.is_main else {}
    shapes: list[Any] = [None] * pipeline.size()
    dist.all_gather_object(shapes, {name: (x.shape, x.dtype) for name, x in whole.items()}, group=pipeline)
    for place in range(1, pipeline.size()):
        source = dist.get_process_group_ranks(pipeline)[place]
        for name, (shape, dtype) in shapes[place].items():
            parallel.watchdog.beat()
            if parallel.is_main:
                whole[name] = torch.empty(shape, dtype=dtype)
                dist.recv(whole[name], src=source, group=pipeline)
            elif parallel.rank == source:
                dist.send(whole[name], dst=0, group=pipeline)
    return whole if parallel.is_main else {}


def _whole(name: str, parameter: torch.nn.Parameter, part: Tensor, parallel: Parallel) -> Tensor:
    """Put a weight together from the tensor-parallel ranks' parts, on the CPU: the inverse of `shard`."""
    parallel.watchdog.beat()  # a large model takes its time
    group = parallel.groups.tp
    if group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return part.detach().to("cpu", copy=True).contiguous()  # the weight itself goes on changing
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.detach().contiguous(), group=group)
    if "linear_fc1" in name:
        halves = zip(*(x.chunk(2) for x in parts), strict=True)
        return torch.cat([torch.cat(half) for half in halves]).cpu()
    return torch.cat(parts, dim=_partition_dim(parameter)).cpu()


@torch.no_grad()
def difference_of_copies(
    chunks: Sequence[HiddenGPTModel],
    parallel: Parallel,
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter,
) -> float:
    """Find the largest difference between two ranks' copies of the same weight, or `value` of it. Collective.

    Copies: data-parallel replicas, weights that tensor parallelism does not split, and a tied head's.
    """
    largest = torch.zeros(())
    for name, parameter in named_weights(chunks):
        parallel.watchdog.beat()
        groups = [parallel.groups.dp]
        if not getattr(parameter, "tensor_model_parallel", False):
            groups.append(parallel.groups.tp)
        if chunks[0].share_embeddings_and_output_weights and name in VOCABULARY_WEIGHTS:
            groups.append(parallel.groups.embd)
        mine = value(parameter).detach().float()
        for group in groups:
            if group.size() > 1:
                extremes = torch.stack([mine, -mine])  # the maximum of the second is minus the minimum
                dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
                largest = torch.maximum(largest, extremes.sum(0).max().cpu())
    return float(parallel.all_reduce(largest, dist.ReduceOp.MAX))


def save_weights(
    folder: Path,
    chunks: Sequence[HiddenGPTModel],
    model: ModelConfig,
    parallel: Parallel,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write `model.safetensors` (full tensors by canonical name) and `model.json`, each in one atomic rename.

    model.json has the model's configuration, and vocabulary size and fingerprint of its tokenizer.

    All ranks call it; the main rank writes, for which it holds the whole model in CPU memory.
    """
    tensors = gather_full(chunks, parallel)
    if not parallel.is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{WEIGHTS_FILE}.tmp")
    known = {} if tokenizer is None else {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint()}
    (folder / f"{MODEL_FILE}.tmp").write_text(json.dumps(asdict(model) | {_TOKENIZER: known}, indent=1) + "\n")
    for file in (WEIGHTS_FILE, MODEL_FILE):
        (folder / f"{file}.tmp").replace(folder / file)


def saved_model(folder: Path, model: ModelConfig, given: Collection[str] = ("model.max_length",)) -> ModelConfig:
    """Read the configuration of saved weights; how to run them (`_AS_GIVEN`) stays as in `model`.

    given: keys that the user set; without model.max_length among them, the length is that of the weights too.

    Raises `ValueError` when the folder holds no weights, or none that this trainer wrote.
    """
    for file in (WEIGHTS_FILE, MODEL_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"run.init: {folder} holds no {file}; give a folder written by a stage of this trainer")
    try:
        described = json.loads((folder / MODEL_FILE).read_text())
        values: dict[str, Any] = {name: value for name, value in described.items() if name != _TOKENIZER}
        values["rope"] = RopeScaling(**values.get("rope", {}))
        saved = ModelConfig(**values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"run.init: {folder / MODEL_FILE} does not describe a model ({error}): write it anew"
        ) from error
    kept = [name for name in _AS_GIVEN if name != "max_length" or "model.max_length" in given]
    return replace(saved, **{name: getattr(model, name) for name in kept})


def check_model(folder: Path, saved: ModelConfig, asked: ModelConfig, given: Mapping[str, str]) -> None:
    """Raise `ValueError` for a value of `model` that the user set and the saved weights have otherwise.

    given: the keys that the user set, each with its place.
    """
    for name, value in asdict(saved).items():
        key, wanted = f"model.{name}", getattr(asked, name)
        if key in given and name not in _AS_GIVEN and wanted != value:
            raise ValueError(
                f"{given[key]}{key} = {wanted}, and the weights of run.init = {folder} have {value}: leave {key} out, "
                "or start without run.init"
            )


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` when the weights cannot be read, or were trained with another tokenizer."""
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            rows = file.get_slice("embedding.word_embeddings.weight").get_shape()[0]
    except SafetensorError as error:
        raise ValueError(f"run.init: {folder / WEIGHTS_FILE} is damaged ({error}): write it anew") from error
    if rows < tokenizer.vocab_size:
        raise ValueError(
            f"run.init: {folder} has weights for {rows} tokens, and the tokenizer {tokenizer.vocab_size}: use the "
            "tokenizer that lies beside the weights"
        )
    known = json.loads((folder / MODEL_FILE).read_text()).get(_TOKENIZER)
    if known and known["fingerprint"] != tokenizer.fingerprint():
        raise ValueError(
            f"run.init: {folder} was trained with another tokenizer ({known['vocab_size']} tokens, "
            f"{known['fingerprint']}) than the one given ({tokenizer.vocab_size} tokens, {tokenizer.fingerprint()}): "
            "use the tokenizer that lies beside the weights"
        )


@torch.no_grad()
def load_weights(folder: Path, chunks: Sequence[HiddenGPTModel], parallel: Parallel) -> None:
    """Read weights written by `save_weights` into this rank's shards.

    The vocabulary may be padded differently now: missing rows become zero.
    """
    full = load_file(folder / WEIGHTS_FILE)
    for name, parameter in named_weights(chunks):
        if chunks[0].share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"  # the copy of a tied head where the head is
        if name not in full:
            raise ValueError(
                f"run.init: {folder / WEIGHTS_FILE} has no weight {name}; was it written with another model?"
            )
        value, shape = full[name], _full_shape(parameter, parallel.groups.tp.size())
        if list(value.shape) != shape and name in VOCABULARY_WEIGHTS:
            value = torch.nn.functional.pad(value[: shape[0]], (0, 0, 0, max(0, shape[0] - value.shape[0])))
        if list(value.shape) != shape:
            raise ValueError(f"run.init: weight {name} of {folder} has shape {list(value.shape)}, the model {shape}")
        parameter.copy_(shard(name, value, parameter, parallel))
