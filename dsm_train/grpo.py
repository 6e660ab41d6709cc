"""The mathematics of GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1 and Algorithm 1): presets, advantages, weights.

S responses, T response tokens (loss rows), P prompts (groups).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dsm_train.config import AlgorithmConfig, Average, Scale
from dsm_train.rewards.config import RewardConfig
from triton_kernels import Objective


@dataclass(frozen=True)
class Algorithm:
    """A member of the family: its objective, its average, the scale of its advantage, and how often it updates."""

    objective: Objective
    average: Average = "response"
    scale: Scale = "std"
    minibatches: int = 1
    """Optimizer steps in a pass over an exploration stage's rollouts."""
    epochs: int = 1
    """mu, the passes over them."""
    finished_only: bool = False
    """Leave the responses that the length limit cut off out of advantages and loss."""

    @property
    def updates(self) -> int:
        """Optimizer steps per exploration stage."""
        return self.minibatches * self.epochs

    @property
    def has_reference(self) -> bool:
        """True when a reference model is kept, for the KL penalty."""
        return self.objective.kl_coef > 0

    @property
    def on_policy(self) -> bool:
        """True when each rollout is learnt from once, by the policy that sampled it: the ratio is 1."""
        return self.updates == 1


PRESETS: dict[str, Algorithm] = {
    # arXiv 2402.03300: eq. 3, mean per response and then over the group; the clip range is PPO's.
    "grpo": Algorithm(Objective()),
    # arXiv 2503.20783: no division by the group's deviation nor by the response's length; no KL.
    "dr_grpo": Algorithm(Objective(kl_coef=0.0), average="fixed", scale="none"),
    # arXiv 2503.14476: clip-higher, token mean; no KL.
    "dapo": Algorithm(Objective(clip_high=0.28, kl_coef=0.0), average="token"),
    # arXiv 2507.18071: importance ratio of the sequence; no KL.
    "gspo": Algorithm(Objective(clip_low=3e-4, clip_high=4e-4, kl_coef=0.0, ratio="sequence")),
    # arXiv 2506.13585: detached clipped ratio as a weight, no lower bound, token mean; no KL.
    "cispo": Algorithm(Objective(clip_low=1.0, clip_high=0.28, kl_coef=0.0, surrogate="cispo"), average="token"),
}


def algorithm(config: AlgorithmConfig, rewards: RewardConfig | None = None) -> Algorithm:
    """Override the preset by what the configuration sets; `rewards` decides about responses that were cut off."""
    preset = PRESETS[config.preset]
    shared = {field.name for field in fields(Objective)} & {field.name for field in fields(config)}
    overrides = {name: getattr(config, name) for name in shared}
    objective = replace(preset.objective, **{name: value for name, value in overrides.items() if value is not None})
    if config.reference_every and objective.kl_coef == 0:
        raise ValueError(
            "algorithm.reference_every renews the reference model, and kl_coef = 0 keeps none: set one of them"
        )
    average, scale = config.average or preset.average, config.scale or preset.scale
    finished_only = rewards is not None and rewards.unfinished == "mask"
    return Algorithm(objective, average, scale, config.minibatches, config.epochs, finished_only)


def token_weights(
    response_cu: Tensor, average: Average, num_responses: int, num_tokens: int, fixed_length: int
) -> Tensor:
    """Weight of each response token in the loss of one optimizer step: weight_T.

    num_responses, num_tokens: totals of the whole step, over all data-parallel ranks. The weights sum to 1 over the
    step, except for "fixed", which divides by the constant num_responses * fixed_length (Dr. GRPO).
    """
    length_S = response_cu.diff().long()
    if average == "response":  # (1/S) sum_i (1/|o_i|) sum_t: eq. 3
        weight_S = 1.0 / (num_responses * length_S.clamp(min=1).float())
    elif average == "token":
        weight_S = torch.full(length_S.shape, 1.0 / max(num_tokens, 1))
    else:
        weight_S = torch.full(length_S.shape, 1.0 / (max(num_responses, 1) * fixed_length))
    return weight_S.repeat_interleave(length_S)


def moves_policy(advantage_S: Tensor, objective: Objective) -> Tensor:
    """Mark the responses with a gradient: all, unless advantage, KL and entropy bonus are all 0."""
    return (advantage_S != 0) | (objective.kl_coef > 0) | (objective.entropy_coef != 0)
