"""GPTModel of the Llama family as this rank's chunks; the last one returns hidden states instead of logits.

N packed tokens, D hidden.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from dsm_train.config import ModelConfig, ParallelConfig
from dsm_train.megatron import platform
from dsm_train.megatron.heads import HeadSpec, ValueLayer
from dsm_train.megatron.layers import Attend, Tokens, block_spec, transformer_engine_available
from dsm_train.megatron.parallel import Parallel, pipeline_layers
from dsm_train.megatron.rope import RotaryEmbedding


class HiddenGPTModel(GPTModel):
    """A GPTModel whose forward ends with the final norm: [N, 1, D], never logits."""

    rotary: RotaryEmbedding
    """Set when it is built; no buffer, which a bf16 model would round."""

    def make_value_head(self) -> None:
        """Replace the language head by one row of zeros."""
        self.output_layer = ValueLayer(self.config.hidden_size, self.config.params_dtype)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """Give the head's weight: this rank's shard of the vocabulary [V, D], tied or not, or a value head's [1, D]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight = self.output_layer.weight
        assert weight is not None, "this rank has no head"
        return weight


def padded_vocab(vocab_size: int, multiple: int, tp: int) -> int:
    """Round the vocabulary up so that it splits evenly over tensor-parallel ranks."""
    unit = multiple * tp
    return -(-vocab_size // unit) * unit


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Decide which layers serve; raises `ValueError` when Transformer Engine is asked for and absent."""
    if model.layers == "transformer_engine" and not transformer_engine_available():
        raise ValueError(
            "model.layers=transformer_engine needs Transformer Engine and CUDA: "
            "pip install --no-build-isolation '.[te]', or set model.layers=auto"
        )
    return model.layers != "local" and transformer_engine_available()


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Translate the model and its layout into Megatron's configuration."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[model.dtype]
    pipelined, interleaved = parallel.pp > 1, parallel.vpp > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if interleaved else None,
        pipeline_model_parallel_layout=_pipeline(model.num_layers, parallel) if pipelined else None,
        sequence_parallel=parallel.sp,
        # Packed micro-batches differ in length, which the pipeline must be told; upstream then insists on this
        # dispatcher even for dense models.
        variable_seq_lengths=pipelined,
        moe_token_dispatcher_type="alltoall",
        # Batched sends to the same peer are matched in the wrong order by the interleaved schedule when pp is 2.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        # The loss is normalised over the optimizer step before its first backward; nobody divides again.
        calculate_per_token_loss=True,
        recompute_granularity="full" if model.recompute else None,
        recompute_method="uniform" if model.recompute else None,
        recompute_num_layers=1 if model.recompute else None,
        cuda_graph_scope=[],  # the default warns that it is deprecated
        use_cpu_initialization=True,
        perform_initialization=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )


def _pipeline(num_layers: int, parallel: ParallelConfig) -> list[list[str]]:
    """List the contents of each part of the pipeline, in the order in which a token passes them."""
    parts = [["decoder"] * layers for layers in pipeline_layers(num_layers, parallel.pp * parallel.vpp)]
    return [["embedding", *parts[0]], *parts[1:-1], [*parts[-1], "loss"]]


def build_model(model: ModelConfig, head: HeadSpec, parallel: Parallel) -> list[HiddenGPTModel]:
    """Build this rank's chunks (several under the interleaved schedule), on its device, with weights still to be set.

    A value head has a weight of its own, whether the language head is tied or not.
    """
    config = transformer_config(model, parallel.config)
    vocab_size = padded_vocab(head.vocab_size, model.vocab_multiple, parallel.config.tp)
    virtual = parallel.config.vpp
    chunks = []
    for turn in range(virtual):
        vp_stage = turn if virtual > 1 else None
        chunk = HiddenGPTModel(
            config,
            block_spec(model, config, uses_transformer_engine(model), vp_stage),
            vocab_size,
            model.max_length,
            pre_process=parallel.has_embedding and turn == 0,
            post_process=parallel.has_head and turn == virtual - 1,
            share_embeddings_and_output_weights=model.tied_head and head.kind == "language",
            position_embedding_type="none",
            pg_collection=parallel.groups,
            vp_stage=vp_stage,
        )
        if head.kind == "value" and chunk.post_process:
            chunk.make_value_head()
        _mark_shards(chunk)
        chunk.rotary = RotaryEmbedding.of(model, platform.device())
        chunks.append(chunk.to(platform.device()))
    return chunks


def _mark_shards(chunk: HiddenGPTModel) -> None:
    """Mark each weight with the dimension along which it is split.

    The gradient norm, our initialisation and our files go by these marks. The layers of megatron-core 0.16 set those of
    matrices only when they draw them themselves, and those of biases always; the layers of 0.19 set all of them.
    """
    for module in chunk.modules():
        for kind, dim in ((ColumnParallelLinear, 0), (VocabParallelEmbedding, 0), (RowParallelLinear, 1)):
            if isinstance(module, kind) and module.weight is not None and not hasattr(module.weight, "partition_dim"):
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def forward_hidden(
    chunk: torch.nn.Module, model: ModelConfig, token_N: Tensor, position_N: Tensor, attend: Attend
) -> Tensor:
    """Run one chunk forward over packed tokens: its output [N, 1, D] (hidden states where the head is).

    Under sequence parallelism this rank's part of it: see `local_length`.
    """
    cos, sin = cast(RotaryEmbedding, get_attr_wrapped_model(chunk, "rotary")).tables(position_N)
    tokens = Tokens(num_tokens=len(token_N), attend=attend, cos_NK=cos, sin_NK=sin)
    config = get_model_config(chunk)
    padding = local_length(len(token_N), config) * _sequence_ranks(config) - len(token_N)
    token_1N, position_1N = (F.pad(x_N, (0, padding))[None] for x_N in (token_N, position_N))
    # A bf16 model's wrapper would cast its output to fp32: our loss ops take the operands as they are.
    precision = {"fp32_output": False} if model.dtype == "bf16" and not isinstance(chunk, HiddenGPTModel) else {}
    return chunk(token_1N, position_1N, None, packed_seq_params=tokens, **precision)


def local_length(num_tokens: int, config: TransformerConfig) -> int:
    """Count the rows of a chunk's input and output on this rank: all tokens, or a share padded to equal shares."""
    return -(-num_tokens // _sequence_ranks(config))


def _sequence_ranks(config: TransformerConfig) -> int:
    return config.tensor_model_parallel_size if config.sequence_parallel else 1


def whole_sequence(output_N1D: Tensor, config: TransformerConfig, *, partial_gradient: bool = True) -> Tensor:
    """Gather a chunk's output [N, D] from the ranks that share it.

    partial_gradient: the gradient of the result is this rank's part of a sum over the ranks, which the backward pass
    sums and splits at once; False: it is the same on every rank, and only split.
    """
    if config.sequence_parallel:
        output_N1D = gather_from_sequence_parallel_region(output_N1D, tensor_parallel_output_grad=partial_gradient)
    return output_N1D.squeeze(1)
