"""Weights by their canonical names (layers counted over the whole pipeline): initialisation, copies, files.

Every weight is drawn from a generator of its own, seeded by (seed, name), as the full tensor, of which each rank keeps
its shard: the same model in every layout.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.hf.architectures import HeadKind
from dsm_train.hf.files import Reader
from dsm_train.hf.names import Piece, pieces
from dsm_train.hf.writer import SHARD_BYTES, Entry, split_files, write_index, write_shard
from dsm_train.megatron.heads import HeadSpec, ValueLayer
from dsm_train.megatron.model import HiddenGPTModel, build_model
from dsm_train.megatron.parallel import Parallel

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Canonical names of the norms that Transformer Engine's layers fuse with the linear layer behind them."""
VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Names of the weights with a row per token."""


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
            load_weights(self.init, chunks, self.config, parallel, self.head.kind)
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


@torch.no_grad()
def load_weights(
    folder: Path,
    chunks: Sequence[HiddenGPTModel],
    model: ModelConfig,
    parallel: Parallel,
    kind: HeadKind = "language",
) -> None:
    """Read the slices that this rank holds from a Hugging Face folder, straight into its parameters.

    Rows that pad the vocabulary become 0, and so does a value head where the folder has none.
    """
    parts = _parts(model, kind)
    with Reader(folder) as reader:
        for name, parameter in named_weights(chunks):
            parallel.watchdog.beat()
            if name in (*VOCABULARY_WEIGHTS, "value_head.weight"):
                parameter.zero_()
            for piece in parts[name]:
                if name == "value_head.weight" and piece.hf not in reader.tensors:
                    continue
                start, stop = _range(piece, parameter, parallel)
                part = reader.read(piece.hf, piece.shape, piece.split, start, stop)
                view = piece.view(parameter)
                if piece.split is not None and piece.part == "whole":
                    view = view.narrow(piece.split, 0, stop - start)
                view.copy_(part.reshape(view.shape))


def _parts(model: ModelConfig, kind: HeadKind) -> dict[str, list[Piece]]:
    """List the tensors of the file that make up each weight."""
    parts: dict[str, list[Piece]] = {}
    for piece in pieces(model, kind):
        parts.setdefault(piece.megatron, []).append(piece)
    if kind == "language" and model.tied_head:  # the copy of a tied head where the head is
        parts["output_layer.weight"] = parts["embedding.word_embeddings.weight"]
    return parts


def _range(piece: Piece, parameter: Tensor, parallel: Parallel) -> tuple[int, int]:
    """Find the range of the split dimension that this rank holds; padding of the vocabulary lies beyond its end."""
    if piece.split is None:
        return 0, 0
    size, whole = piece.local_shape(parameter)[piece.split], piece.shape[piece.split]
    start = min(parallel.groups.tp.rank() * size, whole)
    return start, min(start + size, whole)


@torch.no_grad()
def save_weights(
    folder: Path,
    chunks: Sequence[HiddenGPTModel],
    model: ModelConfig,
    parallel: Parallel,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    kind: HeadKind = "language",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights as Hugging Face's tensors; collective, and the main rank writes.

    It receives tensor by tensor, in pieces from the ranks that hold them: no rank ever holds the whole model.

    dtype: of all tensors, or of each by its name.
    """
    if parallel.dp_rank > 0:
        return
    whole = {piece.hf: piece for piece in pieces(model, kind)}
    held, pipeline = dict(named_weights(chunks)), parallel.groups.pp
    holders: list[set[str]] = [set()] * pipeline.size()
    dist.all_gather_object(holders, held.keys() & {piece.megatron for piece in whole.values()}, group=pipeline)
    types = dtype if isinstance(dtype, Mapping) else dict.fromkeys(whole, dtype)
    files = split_files([Entry(name, piece.shape, types[name]) for name, piece in whole.items()], shard_bytes)

    def value(entry: Entry) -> Tensor | None:
        piece = whole[entry.name]
        return _to_main(piece, held.get(piece.megatron), entry.dtype, holders, parallel)

    for file in files:
        if parallel.is_main:
            write_shard(folder, file, value)
        else:
            for entry in file.entries:
                value(entry)
    if parallel.is_main:
        write_index(folder, files)


def _to_main(
    piece: Piece, parameter: Tensor | None, dtype: torch.dtype, holders: Sequence[set[str]], parallel: Parallel
) -> Tensor | None:
    """Gather a tensor over its tensor-parallel ranks to the first, which sends it to the main rank; bytes travel."""
    parallel.watchdog.beat()
    groups = parallel.groups
    holder = next(place for place, names in enumerate(holders) if piece.megatron in names)
    value = None
    if groups.pp.rank() == holder:
        assert parameter is not None
        value = _gather(piece, parameter, dtype, parallel)
    if holder == 0 or groups.tp.rank() > 0:
        return value
    if parallel.is_main:
        received = torch.empty(piece.shape, dtype=dtype)
        dist.recv(received.view(torch.uint8), group=groups.pp, group_src=holder)
        return received
    if value is not None:
        dist.send(value.view(torch.uint8), group=groups.pp, group_dst=0)
    return None


def _gather(piece: Piece, parameter: Tensor, dtype: torch.dtype, parallel: Parallel) -> Tensor | None:
    """Put a tensor together from the tensor-parallel ranks' parts, on the CPU of the first; None on the others."""
    group = parallel.groups.tp
    part = piece.view(parameter.detach()).to("cpu", dtype).reshape(piece.local_shape(parameter)).contiguous()
    if piece.split is None or group.size() == 1:
        whole = part if piece.split is None else part.narrow(piece.split, 0, piece.shape[piece.split])
        return whole if group.rank() == 0 else None
    if group.rank() > 0:
        dist.send(part.view(torch.uint8), group=group, group_dst=0)
        return None
    whole, size = torch.empty(piece.shape, dtype=dtype), part.shape[piece.split]
    for place in range(group.size()):
        if place > 0:
            part = torch.empty_like(part) if place == 1 else part  # the first may be the weight itself
            dist.recv(part.view(torch.uint8), group=group, group_src=place)
        start = min(place * size, piece.shape[piece.split])
        rows = whole.narrow(piece.split, start, min(size, piece.shape[piece.split] - start))
        rows.copy_(part.narrow(piece.split, 0, rows.shape[piece.split]))  # the rest pads the vocabulary
    return whole
