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

from dsm_train.config import ModelConfig, OptimConfig
from dsm_train.megatron import weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import HiddenGPTModel, build_model
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, TrainableModel
from dsm_train.types import Sequences

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCAB = 50  # padded to 64, so that 14 rows of the head belong to no token
HEAD = HeadSpec(VOCAB)
# An initial scale of 0.3 keeps the tokens' logits well apart. Two query heads per key head: grouped-query attention.
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, max_length=64, init_std=0.3)


def chunks(layout: Parallel, config: ModelConfig = MODEL, seed: int = 0) -> list[HiddenGPTModel]:
    """This rank's chunks with seeded weights, norms included: all ones would hide a norm that is not applied."""
    built = build_model(config, HEAD, layout)
    weights.initialise(built, config, seed, layout)
    with torch.no_grad():
        for name, parameter in weights.named_weights(built):
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
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


def llama(config: ModelConfig, full: Mapping[str, Tensor], dtype: torch.dtype) -> LlamaForCausalLM:
    """Transformers' model of the same shape with these weights (canonical names)."""
    from transformers import LlamaConfig, LlamaForCausalLM  # takes longer to import than most that uses this file runs

    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=full["embedding.word_embeddings.weight"].shape[0],
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.kv_channels,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_base,
            tie_word_embeddings=config.tied_head,
            attn_implementation="eager",
        )
    ).to(dtype)
    hf.load_state_dict(llama_names(config, full), strict=not config.tied_head)
    return hf


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
        if part == "self_attention.linear_qkv.weight":  # a block [queries of the group | key | value] per group
            blocks = value.view(config.num_kv_heads, per_group + 2, K, -1)
            split = {"q": blocks[:, :per_group], "k": blocks[:, per_group], "v": blocks[:, per_group + 1]}
            out |= {f"{prefix}self_attn.{n}_proj.weight": x.reshape(-1, value.shape[1]) for n, x in split.items()}
        elif part == "mlp.linear_fc1.weight":
            gate, up = value.chunk(2)
            out |= {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
        else:
            out[prefix + _INSIDE[part]] = value
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
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
