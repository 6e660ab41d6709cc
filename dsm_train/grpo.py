"""GRPO's mathematics (DeepSeekMath, arXiv 2402.03300, section 4.1 and Algorithm 1), and nothing else.

S responses, T response tokens (loss rows), P prompts (groups).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor

from dsm_train.config import AlgorithmConfig
from dsm_train.megatron.parallel import Parallel
from dsm_train.types import Rollouts, Sequences, offsets
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
        weight_S = torch.full(length_S.shape, 1.0 / (max(num_responses, 1) * fixed_length))
    return weight_S.repeat_interleave(length_S)


def token_rows(
    rollouts: Rollouts, algo: Algorithm, minibatches: int, fixed_length: int, parallel: Parallel
) -> list[tuple[Sequences, Rows]]:
    """What each minibatch (some groups of every replica) trains on: sequences, and what the loss needs of their tokens.

    Outcome supervision (section 4.1.2): the advantage of every token is its response's group-relative reward. Weights
    are normalised over the minibatch of all data-parallel replicas, before responses that cannot move the policy are
    left out: those with advantage 0, when there is neither KL nor entropy bonus. Collective; a replica may have none.
    """
    sequences, cu = rollouts.sequences, rollouts.sequences.response_cu
    groups = [sequences.num_prompts * i // minibatches for i in range(minibatches + 1)]
    cuts = list(pairwise(sequences.group_cu[groups].tolist()))
    mine = torch.tensor([(last - first, int(cu[last] - cu[first])) for first, last in cuts])
    counts = torch.stack([cast(Tensor, count) for count in parallel.gather_over_data(mine)]).sum(0).tolist()
    weights = [
        token_weights(cu[first : last + 1], algo.average, num_responses, num_tokens, fixed_length)
        for (first, last), (num_responses, num_tokens) in zip(cuts, counts, strict=True)
    ]
    advantage_S = _advantages(rollouts.reward_S, sequences.group_cu, algo.scale, parallel)
    advantage_T = advantage_S.repeat_interleave(cu.diff().long())
    rows = Rows(torch.cat(weights), advantage_T, rollouts.old_logprob_T, rollouts.ref_logprob_T)
    moves_S = (advantage_S != 0) | (algo.objective.kl_coef > 0) | (algo.objective.entropy_coef != 0)
    kept = [first + moves_S[first:last].nonzero().squeeze(1) for first, last in cuts]
    return [(sequences.take(index_S), rows.take(sequences.rows_of(index_S))) for index_S in kept]


def _advantages(reward_S: Tensor, group_cu: Tensor, scale: Scale, parallel: Parallel) -> Tensor:
    """Group-relative advantages of this replica's responses; the scale "batch" needs everyone's rewards."""
    replicas = [cast(tuple[Tensor, Tensor], value) for value in parallel.gather_over_data((reward_S, group_cu.diff()))]
    rewards = [reward for reward, _ in replicas]
    all_cu = offsets(torch.cat([size_P for _, size_P in replicas]).tolist())
    return group_advantage(torch.cat(rewards), all_cu, scale).split([len(r) for r in rewards])[parallel.dp_rank]
