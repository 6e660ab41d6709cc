"""Tensors of a Hugging Face folder and the part of a Megatron weight that each is; serves reading and writing.

V vocabulary, D hidden, F feed-forward, Q all queries' rows (heads * K), P all keys' rows (key heads * K), K head size.
Tensor parallelism splits V, F, Q and P, wherever they stand in a shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.hf.architectures import HeadKind

Part = Literal["whole", "query", "key", "value", "gate", "up"]
_SPLIT = "VFQP"
_LAYER, _MEGATRON_LAYER = "model.layers.{}.", "decoder.layers.{}."


@dataclass(frozen=True)
class _Row:
    """Row of the table: name in the file, name in Megatron, letters of the shape, and when there is such a tensor."""

    hf: str
    megatron: str
    shape: str
    part: Part = "whole"
    flag: str = ""
    """Field of ModelConfig that says so; empty: always."""


_EMBEDDING = _Row("model.embed_tokens.weight", "embedding.word_embeddings.weight", "VD")
_NORM = _Row("model.norm.weight", "decoder.final_layernorm.weight", "D")
_HEADS = {
    "language": _Row("lm_head.weight", "output_layer.weight", "VD"),
    "value": _Row("score.weight", "value_head.weight", "1D"),
}
_LAYERS = (
    _Row("input_layernorm.weight", "input_layernorm.weight", "D"),
    _Row("self_attn.q_proj.weight", "self_attention.linear_qkv.weight", "QD", "query"),
    _Row("self_attn.q_proj.bias", "self_attention.linear_qkv.bias", "Q", "query", "qkv_bias"),
    _Row("self_attn.k_proj.weight", "self_attention.linear_qkv.weight", "PD", "key"),
    _Row("self_attn.k_proj.bias", "self_attention.linear_qkv.bias", "P", "key", "qkv_bias"),
    _Row("self_attn.v_proj.weight", "self_attention.linear_qkv.weight", "PD", "value"),
    _Row("self_attn.v_proj.bias", "self_attention.linear_qkv.bias", "P", "value", "qkv_bias"),
    _Row("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", "K", flag="qk_norm"),
    _Row("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", "K", flag="qk_norm"),
    _Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "DQ"),
    _Row("self_attn.o_proj.bias", "self_attention.linear_proj.bias", "D", flag="output_bias"),
    _Row("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "D"),
    _Row("mlp.gate_proj.weight", "mlp.linear_fc1.weight", "FD", "gate"),
    _Row("mlp.gate_proj.bias", "mlp.linear_fc1.bias", "F", "gate", "mlp_bias"),
    _Row("mlp.up_proj.weight", "mlp.linear_fc1.weight", "FD", "up"),
    _Row("mlp.up_proj.bias", "mlp.linear_fc1.bias", "F", "up", "mlp_bias"),
    _Row("mlp.down_proj.weight", "mlp.linear_fc2.weight", "DF"),
    _Row("mlp.down_proj.bias", "mlp.linear_fc2.bias", "D", flag="mlp_bias"),
)


@dataclass(frozen=True)
class Piece:
    """A tensor of the folder: the part of a Megatron weight that it is."""

    hf: str
    megatron: str
    part: Part
    shape: tuple[int, ...]
    """Whole shape, without padding of the vocabulary."""
    split: int | None
    """Dimension that tensor parallelism splits."""
    queries: int
    """Queries per key head."""
    head_size: int

    def view(self, weight: Tensor) -> Tensor:
        """View this part of a rank's weight; rows of queries, keys and values as [key heads, their number, K, ...].

        A weight of queries, keys and values has, per key head, a block [its queries | key | value]; one of the
        feed-forward layer is [gate | up].
        """
        if self.part == "whole":
            return weight
        if self.part in ("gate", "up"):
            return weight.chunk(2)[self.part == "up"]
        blocks = weight.view(-1, self.queries + 2, self.head_size, *weight.shape[1:])
        first = {"query": 0, "key": self.queries, "value": self.queries + 1}[self.part]
        return blocks[:, first : first + (self.queries if self.part == "query" else 1)]

    def local_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Shape of this tensor on a rank that holds `weight`, padding of the vocabulary included."""
        view = self.view(weight)
        return tuple(view.shape if view.dim() == len(self.shape) else view.flatten(0, 2).shape)


def pieces(model: ModelConfig, kind: HeadKind) -> list[Piece]:
    """List all tensors of a model, in the order in which they are written."""
    return list(_pieces(model, kind))


def _pieces(model: ModelConfig, kind: HeadKind) -> Iterator[Piece]:
    yield _piece(_EMBEDDING, model)
    for layer in range(model.num_layers):
        for row in _LAYERS:
            if not row.flag or getattr(model, row.flag):
                yield _piece(row, model, _LAYER.format(layer), _MEGATRON_LAYER.format(layer))
    yield _piece(_NORM, model)
    if kind == "value" or not model.tied_head:
        yield _piece(_HEADS[kind], model)


def _piece(row: _Row, model: ModelConfig, prefix: str = "", megatron: str = "") -> Piece:
    assert model.vocab_size is not None, "it is filled from the tokenizer before there are weights"
    sizes = {
        "1": 1,
        "V": model.vocab_size,
        "D": model.hidden_size,
        "F": model.ffn_size,
        "K": model.kv_channels,
        "Q": model.num_heads * model.kv_channels,
        "P": model.num_kv_heads * model.kv_channels,
    }
    return Piece(
        prefix + row.hf,
        megatron + row.megatron,
        row.part,
        tuple(sizes[letter] for letter in row.shape),
        next((dim for dim, letter in enumerate(row.shape) if letter in _SPLIT), None),
        model.num_heads // model.num_kv_heads,
        model.kv_channels,
    )
