"""Tiny models and batches that the trainer's tests share.

S responses, P prompts, T response tokens, D hidden, V vocabulary, K head size.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsm_train.config import ModelConfig, OptimConfig, RopeScaling
from dsm_train.megatron import weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import HiddenGPTModel, build_model
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, TrainableModel
from dsm_train.types import Sequences

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 50  # padded to 64, so that 14 rows of the head belong to no token
HEAD = HeadSpec(VOCAB)
# An initial scale of 0.3 keeps the tokens' logits well apart. Two query heads per key head: grouped-query attention.
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=48,
    vocab_size=VOCAB,
    max_length=64,
    init_std=0.3,
)
BIASES = replace(MODEL, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, head_size=12)
"""Everything that a layer may have at once; a head of another size than hidden_size / num_heads."""
ARCHITECTURES = {
    "Llama": replace(
        MODEL, rope=RopeScaling("llama3", factor=8.0, original_length=32), rope_base=500.0, qkv_bias=True,
        output_bias=True, mlp_bias=True,
    ),
    "Mistral": replace(MODEL, num_kv_heads=1, head_size=16, rope_base=500.0),
    "Qwen2": replace(MODEL, tied_head=True, qkv_bias=True, rope=RopeScaling("yarn", factor=4.0, original_length=16)),
    "Qwen3": replace(MODEL, head_size=16, num_kv_heads=4, qk_norm=True),
    "Qwen3 with biases": replace(MODEL, head_size=12, qk_norm=True, qkv_bias=True, output_bias=True),
}  # fmt: skip
"""Models as transformers knows them, between them with every choice that ours has."""


def chunks(layout: Parallel, config: ModelConfig = MODEL, seed: int = 0) -> list[HiddenGPTModel]:
    """This rank's chunks with seeded weights, norms and biases included: ones and zeros would hide a missing one."""
    built = build_model(config, HEAD, layout)
    weights.initialise(built, config, seed, layout)
    with torch.no_grad():
        for name, parameter in weights.named_weights(built):
            if parameter.dim() == 1:
                parts = layout.groups.tp.size() if getattr(parameter, "tensor_model_parallel", False) else 1
                full = torch.randn(parts * len(parameter), generator=torch.Generator().manual_seed(seed))
                parameter.add_(weights.shard(name, 0.1 * full, parameter, layout))
    return built


def model(layout: Parallel, config: ModelConfig = MODEL, seed: int = 0) -> Model:
    """A model that is not trained."""
    return Model(config, HEAD, chunks(layout, config, seed), layout)


def trainable(
    layout: Parallel, config: ModelConfig = MODEL, optim: OptimConfig | None = None, steps: int = 10
) -> TrainableModel:
    """A model with its optimizer."""
    return TrainableModel(config, HEAD, chunks(layout, config), layout, optim or OptimConfig(lr=1e-3), steps)


def sequences(prompt_lengths: Sequence[int], response_lengths: Sequence[int], seed: int = 0) -> Sequences:
    """Random tokens; the responses are shared out evenly among the prompts."""
    rng = random.Random(seed)
    prompts, responses = (
        [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
        for lengths in (prompt_lengths, response_lengths)
    )
    return Sequences.from_lists(prompts, responses, len(responses) // len(prompts))


def llama(config: ModelConfig, full: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Transformers' model of the same shape with these weights (canonical names)."""
    from transformers import AutoModelForCausalLM  # takes longer to import than most that uses this file runs

    hf = AutoModelForCausalLM.from_config(
        transformers_config(config, full["embedding.word_embeddings.weight"].shape[0]), attn_implementation="eager"
    ).to(dtype)
    hf.load_state_dict(llama_names(config, full), strict=not config.tied_head)
    return hf


def transformers_config(config: ModelConfig, vocab_size: int) -> PretrainedConfig:
    """Transformers' configuration of the architecture that has the biases and norms of ours."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    shape = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.kv_channels,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.rope.original_length or config.max_length,
        "rope_parameters": rope_parameters(config),
        "tie_word_embeddings": config.tied_head,
    }
    if config.qkv_bias and not config.output_bias:  # Qwen2 and its biases belong together
        assert not config.qk_norm and not config.mlp_bias
        return Qwen2Config(**shape)
    if config.qk_norm:
        assert not config.mlp_bias
        return Qwen3Config(**shape, attention_bias=config.output_bias)
    return LlamaConfig(**shape, attention_bias=config.output_bias, mlp_bias=config.mlp_bias)


def rope_parameters(config: ModelConfig) -> dict[str, object]:
    """Rotary scaling in transformers' words: those that the kind reads."""
    scaling = config.rope
    words = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    }.get(scaling.kind, ())
    given = {word: getattr(scaling, word) for word in words if getattr(scaling, word) is not None}
    if scaling.kind in ("llama3", "yarn"):
        given["original_max_position_embeddings"] = scaling.original_length
    kind = "default" if scaling.kind == "none" else scaling.kind
    return {"rope_type": kind, "rope_theta": config.rope_base, **given}


def llama_names(config: ModelConfig, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by canonical name to tensors by Llama's names; weights or gradients alike, as nothing is computed."""
    per_group, K = config.num_heads // config.num_kv_heads, config.kv_channels
    out: dict[str, Tensor] = {}
    for name, value in full.items():
        if not name.startswith("decoder.layers."):
            out[_OUTSIDE[name]] = value
            continue
        _, _, layer, part = name.split(".", 3)
        prefix = f"model.layers.{layer}."
        module, kind = part.rsplit(".", 1)  # weight, bias
        if module == "self_attention.linear_qkv":  # a block [queries of the group | key | value] per group
            blocks = value.view(config.num_kv_heads, per_group + 2, K, *value.shape[1:])
            split = {"q": blocks[:, :per_group], "k": blocks[:, per_group], "v": blocks[:, per_group + 1]}
            out |= {f"{prefix}self_attn.{n}_proj.{kind}": x.reshape(-1, *value.shape[1:]) for n, x in split.items()}
        elif module == "mlp.linear_fc1":
            gate, up = value.chunk(2)
            out |= {f"{prefix}mlp.gate_proj.{kind}": gate, f"{prefix}mlp.up_proj.{kind}": up}
        else:
            out[f"{prefix}{_INSIDE[module]}.{kind}"] = value
    return out


def full_weights(built: Sequence[HiddenGPTModel]) -> dict[str, Tensor]:
    """Copies of the weights of a model that is not split."""
    return {name: parameter.detach().clone() for name, parameter in weights.named_weights(built)}


def tied(config: ModelConfig = MODEL) -> ModelConfig:
    """The same model with a tied head."""
    return replace(config, tied_head=True)


_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_INSIDE = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
