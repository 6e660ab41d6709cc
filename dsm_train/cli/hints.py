"""Hints for unknown keys: a slip, another trainer's name, or a key of another stage."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

ELSEWHERE: dict[str, tuple[str, ...]] = {
    # Batches and steps. A stage has the first of these that it knows.
    "per_device_train_batch_size": ("algorithm.prompts_per_step", "sft.batch"),
    "train_batch_size": ("algorithm.prompts_per_step", "sft.batch"),
    "global_batch_size": ("algorithm.prompts_per_step", "sft.batch"),
    "num_generations": ("algorithm.group_size",),
    "n": ("algorithm.group_size",),
    "micro_batch_size": ("run.max_tokens",),
    "ppo_micro_batch_size_per_gpu": ("run.max_tokens",),
    "gradient_accumulation_steps": ("run.max_tokens",),
    "ppo_mini_batch_size": ("algorithm.minibatches",),
    "num_iterations": ("algorithm.epochs",),
    "ppo_epochs": ("algorithm.epochs",),
    "max_steps": ("steps", "sft.steps"),
    "train_iters": ("steps", "sft.steps"),
    "total_training_steps": ("steps", "sft.steps"),
    "num_train_epochs": ("sft.epochs", "steps"),
    "eval_steps": ("eval.every",),
    "eval_interval": ("eval.every",),
    "test_freq": ("eval.every",),
    # Algorithm.
    "beta": ("algorithm.kl_coef",),
    "kl_loss_coef": ("algorithm.kl_coef",),
    "kl_coef": ("algorithm.kl_coef",),
    "kl_loss_type": ("algorithm.kl",),
    "epsilon": ("algorithm.clip_low and algorithm.clip_high",),
    "cliprange": ("algorithm.clip_low and algorithm.clip_high",),
    "clip_ratio": ("algorithm.clip_low and algorithm.clip_high",),
    "clip_ratio_low": ("algorithm.clip_low",),
    "epsilon_high": ("algorithm.clip_high",),
    "clip_ratio_high": ("algorithm.clip_high",),
    "entropy_coeff": ("algorithm.entropy_coef",),
    "loss_type": ("algorithm.preset",),
    "adv_estimator": ("algorithm.preset",),
    "loss_agg_mode": ("algorithm.average",),
    "scale_rewards": ("algorithm.scale",),
    "ref_model_sync_steps": ("algorithm.reference_every",),
    # Sampling.
    "max_completion_length": ("sampling.max_new_tokens",),
    "max_response_length": ("sampling.max_new_tokens",),
    "max_new_tokens": ("sampling.max_new_tokens",),
    "max_prompt_length": ("model.max_length",),
    # Rewards.
    "rewards.numeric": ("rewards.functions",),
    "rewards.format": ("rewards.functions",),
    "reward_funcs": ("rewards.functions",),
    "reward_weights": ("rewards.functions",),
    "custom_reward_function.path": ("rewards.functions",),
    "custom_reward_function.name": ("rewards.functions",),
    # Optimizer.
    "learning_rate": ("optim.lr",),
    "adam_beta1": ("optim.beta1",),
    "adam_beta2": ("optim.beta2",),
    "adam_epsilon": ("optim.eps",),
    "adam_eps": ("optim.eps",),
    "max_grad_norm": ("optim.clip_grad",),
    "lr_scheduler_type": ("optim.schedule",),
    "lr_decay_style": ("optim.schedule",),
    "lr_warmup_iters": ("optim.warmup_steps",),
    "lr_warmup_steps": ("optim.warmup_steps",),
    # Parallelism.
    "tensor_model_parallel_size": ("parallel.tp",),
    "tensor_parallel_size": ("parallel.tp",),
    "pipeline_model_parallel_size": ("parallel.pp",),
    "pipeline_parallel_size": ("parallel.pp",),
    "virtual_pipeline_model_parallel_size": ("parallel.vpp",),
    "sequence_parallel": ("parallel.sp",),
    "use_distributed_optimizer": ("parallel.distributed_optimizer",),
    "overlap_grad_reduce": ("parallel.overlap",),
    "distributed_timeout_minutes": ("parallel.timeout_minutes",),
    # Model.
    "num_hidden_layers": ("model.num_layers",),
    "num_attention_heads": ("model.num_heads",),
    "num_key_value_heads": ("model.num_kv_heads",),
    "num_query_groups": ("model.num_kv_heads",),
    "head_dim": ("model.head_size",),
    "intermediate_size": ("model.ffn_size",),
    "ffn_hidden_size": ("model.ffn_size",),
    "rope_theta": ("model.rope_base",),
    "rotary_base": ("model.rope_base",),
    "rms_norm_eps": ("model.norm_eps",),
    "tie_word_embeddings": ("model.tied_head",),
    "initializer_range": ("model.init_std",),
    "init_method_std": ("model.init_std",),
    "max_position_embeddings": ("model.max_length",),
    "seq_length": ("model.max_length",),
    "bf16": ("model.dtype",),
    "torch_dtype": ("model.dtype",),
    "attn_implementation": ("model.attention",),
    "gradient_checkpointing": ("model.recompute",),
    "recompute_granularity": ("model.recompute",),
    # Files.
    "model_name_or_path": ("run.init",),
    "model.path": ("run.init",),
    "pretrained_checkpoint": ("run.init",),
    "load": ("run.init",),
    "output_dir": ("run.out",),
    "default_local_dir": ("run.out",),
    "save": ("run.out",),
    "dataset_name": ("data.path",),
    "train_files": ("data.path",),
    "val_files": ("data.heldout_path",),
    "tokenizer_name_or_path": ("data.tokenizer",),
    "overwrite_output_dir": ("run.overwrite",),
}
"""Keys of other trainers (TRL, verl, Megatron-LM, Hugging Face), whole or by their last component, and ours."""


def unknown_key(key: str, known: Collection[str], stages: Sequence[str] = ()) -> str:
    """Say that a key is unknown, and what was probably meant.

    known: the keys that there are; stages: names of other stages that have the key.
    """
    meant = _renamed(key, known) or _nearest(key, known, same_field=bool(stages))
    if stages:
        return f"{key} is a key of {', '.join(stages)} alone" + (f"; did you mean {meant}?" if meant else "")
    return f"unknown key {key!r}" + (f"; did you mean {meant}?" if meant else "; --help lists them all")


def _renamed(key: str, known: Collection[str]) -> str | None:
    """Return the quoted name of another trainer's key here, or None."""
    last = key.rsplit(".", 1)[-1]
    for candidate in ELSEWHERE.get(key, ELSEWHERE.get(last, ())):
        names = [_in_section(key, name, known) for name in candidate.split(" and ")]
        if None not in names:
            return " and ".join(map(repr, names))
    return None


def _in_section(key: str, name: str, known: Collection[str]) -> str | None:
    """Return the known key that is, or ends in, this name: in the section of `key` if there is one."""
    section = key.rpartition(".")[0]
    ending = [other for other in known if other == name or other.endswith(f".{name}")]
    ending.sort(key=lambda other: (other.rpartition(".")[0] != section, other != name))
    return ending[0] if ending else None


def _nearest(name: str, known: Collection[str], same_field: bool) -> str | None:
    """Return the quoted known key most like this one, by all of it or by its last component, or None.

    same_field: only a key whose last component is the same.
    """

    def likeness(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, last), whole

    if same_field:
        known = [candidate for candidate in known if candidate.split(".")[-1] == name.split(".")[-1]]
    best = max(known, key=likeness, default=None)
    return repr(best) if best is not None and likeness(best)[0] >= 0.6 else None
