"""GRPO's mathematics (DeepSeekMath, arXiv 2402.03300, section 4.1 and Algorithm 1), and nothing else.

S responses, T response tokens (loss rows), P prompts (groups).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dsm_train.config import AlgorithmConfig
from dsm_train.megatron.parallel import Parallel
from dsm_train.stages import GrpoConfig
from dsm_train.types import Rollouts, Sequences
from dsm_train.update import Rows
from triton_kernels import Objective, group_advantage

Average = Literal["response", "token", "fixed"]
Scale = Literal["std", "none", "loo", "batch"]


@dataclass(frozen=True)
class Algorithm:
    """A member of the family: its objective, how it averages, and the scale of its advantage."""

    objective: Objective
    average: Average = "response"
    scale: Scale = "std"


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


def algorithm(config: AlgorithmConfig) -> Algorithm:
    """The preset with what the configuration overrides."""
    preset = PRESETS[config.preset]
    overrides = {name: getattr(config, name) for name in ("clip_low", "clip_high", "kl_coef", "kl", "entropy_coef")}
    objective = replace(preset.objective, **{name: value for name, value in overrides.items() if value is not None})
    if config.reference_every and objective.kl_coef == 0:
        raise ValueError(
            "algorithm.reference_every renews the reference model, and kl_coef = 0 keeps none: set one of them"
        )
    return Algorithm(objective, config.average or preset.average, config.scale or preset.scale)


def token_weights(
    response_cu: Tensor, average: Average, num_responses: int, num_tokens: int, fixed_length: int
) -> Tensor:
    """weight_T: how each token counts in the loss of one optimizer step.

    num_responses, num_tokens: of the whole step, over all data-parallel ranks. Every choice sums to 1 over the step,
    but for "fixed", which divides by the constant num_responses * fixed_length (Dr. GRPO).
    """
    length_S = response_cu.diff().long()
    if average == "response":  # (1/S) sum_i (1/|o_i|) sum_t: eq. 3
        weight_S = 1.0 / (num_responses * length_S.clamp(min=1).float())
    elif average == "token":
        weight_S = torch.full(length_S.shape, 1.0 / max(num_tokens, 1))
    else:
        weight_S = torch.full(length_S.shape, 1.0 / (num_responses * fixed_length))
    return weight_S.repeat_interleave(length_S)


def token_rows(
    rollouts: Rollouts, algo: Algorithm, config: GrpoConfig, parallel: Parallel
) -> list[tuple[Sequences, Rows]]:
    """What each minibatch trains on: its sequences, and advantage, weight and log-probabilities of their tokens.

    Outcome supervision (section 4.1.2): the advantage of every token is its response's group-relative reward.
    """
    advantage_S = _advantages(rollouts.reward_S, algo.scale, config.algorithm.group_size, parallel)
    groups = rollouts.sequences.num_prompts // config.algorithm.minibatches
    parts = []
    for first in range(0, rollouts.sequences.num_prompts, groups):
        part, span_S, span_T = rollouts.sequences.groups(first, first + groups)
        num_tokens = sum(n for n in parallel.gather_over_data(part.response_token_T.numel()) if isinstance(n, int))
        rows = Rows(
            token_weights(
                part.response_cu,
                algo.average,
                part.num_responses * parallel.dp_size,
                num_tokens,
                config.sampling.max_new_tokens,
            ),
            advantage_S[span_S].repeat_interleave(part.response_cu.diff().long()),
            None if rollouts.old_logprob_T is None else rollouts.old_logprob_T[span_T],
            None if rollouts.ref_logprob_T is None else rollouts.ref_logprob_T[span_T],
        )
        parts.append(without_idle(part, rows, advantage_S[span_S], algo.objective))
    return parts


def without_idle(part: Sequences, rows: Rows, advantage_S: Tensor, objective: Objective) -> tuple[Sequences, Rows]:
    """Leave out responses that cannot move the policy, for nothing is computed of them: no advantage, and no KL.

    The weights were normalised with them, so the gradient is the same. One stays when all are idle: the collectives of
    an optimizer step need every rank.
    """
    keep_S = advantage_S != 0
    if objective.kl_coef > 0 or objective.entropy_coef != 0 or bool(keep_S.all()):
        return part, rows
    if not keep_S.any():
        keep_S[0] = True
    kept, keep_T = part.select(keep_S)
    return kept, rows.take(keep_T, torch.device("cpu"))


def _advantages(reward_S: Tensor, scale: Scale, group_size: int, parallel: Parallel) -> Tensor:
    """Group-relative advantages of this replica's responses; the scale "batch" needs everyone's rewards."""
    replicas = [value for value in parallel.gather_over_data(reward_S) if isinstance(value, Tensor)]
    group_cu = torch.arange(0, sum(r.numel() for r in replicas) + 1, group_size, dtype=torch.int32)
    return group_advantage(torch.cat(replicas), group_cu, scale).split([r.numel() for r in replicas])[parallel.dp_rank]
