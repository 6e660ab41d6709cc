"""The layer spec: Megatron's transformer layer around our core attention and our RMSNorm.

N packed tokens, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.megatron.rope import rotate
from triton_kernels import PackedLayout, packed_attention


class Attend(Protocol):
    """Attention of a forward pass: `attend(layer, q_NHK, k, v, scale) -> out_NHK`."""

    def __call__(self, layer: int, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, scale: float, /) -> Tensor: ...


@dataclass(frozen=True)
class PackedAttend:
    """Causal attention within each sequence of a packed buffer."""

    layout: PackedLayout

    def __call__(self, layer: int, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, scale: float) -> Tensor:
        return packed_attention(q_NHK, k_NHK, v_NHK, self.layout, scale=scale)


@dataclass
class Tokens(PackedSeqParams):
    """Arguments of our core attention in one forward pass; they travel through Megatron as `packed_seq_params`."""

    qkv_format: str = "thd"
    # The base class gives its fields defaults, so these need them too; they are always given.
    num_tokens: int = field(kw_only=True)
    """N, without the padding that sequence parallelism may have added behind."""
    attend: Attend = field(kw_only=True)
    cos_NK: Tensor = field(kw_only=True)
    sin_NK: Tensor = field(kw_only=True)


class CoreAttention(torch.nn.Module):
    """Rotary embedding at explicit positions, then the attention that the forward pass asks for."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert config.kv_channels is not None, "TransformerConfig sets it when it is not given"
        self.layer = layer_number
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Tokens,
        **kwargs: Any,
    ) -> Tensor:
        tokens, padding = packed_seq_params, len(query) - packed_seq_params.num_tokens
        query, key, value = (x[: tokens.num_tokens] for x in (query, key, value))
        query, key = (rotate(x, tokens.cos_NK, tokens.sin_NK) for x in (query, key))
        out = tokens.attend(self.layer, query, key, value, self.scale).flatten(1)
        return torch.nn.functional.pad(out, (0, 0, 0, padding)).unsqueeze(1) if padding else out.unsqueeze(1)


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight. Megatron's own wrapper of torch's refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradient of weights so marked over the tensor-parallel ranks.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter's)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def transformer_engine_available() -> bool:
    """True when Transformer Engine is installed and there is a CUDA device for it."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


def block_spec(model: ModelConfig, config: TransformerConfig, transformer_engine: bool, vp_stage: int | None) -> Any:
    """Specify the layers of a chunk: Transformer Engine's or Megatron's local ones, with our core attention."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer: Any = get_gpt_layer_with_transformer_engine_spec()
        norm: Any = TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp
    mlp = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules  # megatron-core 0.19: a partial
    attention.core_attention = CoreAttention
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    if model.output_bias:
        attention.linear_proj = with_bias(attention.linear_proj)
    if model.mlp_bias:
        mlp.linear_fc1, mlp.linear_fc2 = with_bias(mlp.linear_fc1), with_bias(mlp.linear_fc2)
    # The final norm is named here too: a bare layer spec would take Megatron's default.
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm)


def with_bias(linear: Any) -> Any:
    """Make a parallel linear layer that has a bias: Megatron's `add_bias_linear` would give one to every layer."""

    class Biased(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"bias": True})

    return Biased
