"""Algorithm 1 of DeepSeekMath (arXiv 2402.03300), written a second time from the papers and docs/numerics.md.

The oracle of whole training runs: samples and rewards are given, everything else is computed here in fp64 by autograd
and torch.optim. It imports nothing of what it judges.

S responses, L tokens of the longest prompt with its response, less the last. Sequences are padded on the right, which a
causal model does not notice. Position l of [S, L] is the prediction of token l + 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Response:
    """One answer to the question of a group."""

    group: int
    prompt: list[int]
    tokens: list[int]
    reward: float


@dataclass(frozen=True)
class Recipe:
    """Everything that the run was asked for."""

    # The objective, equations 3 and 4.
    clip_low: float
    clip_high: float
    beta: float
    kl: str
    entropy: float
    ratio: str
    surrogate: str
    average: str
    scale: str
    # The loops: mu passes over an exploration stage in minibatches; every so many stages the reference is renewed.
    mu: int
    minibatches: int
    reference_every: int
    stages: int
    # Sampling.
    temperature: float
    longest: int
    vocabulary: int
    # AdamW.
    lr: float
    min_lr: float
    warmup: int
    schedule: str
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip_grad: float

    @property
    def on_policy(self) -> bool:
        """True when an exploration stage is used for a single update, whose old policy is the policy itself."""
        return self.mu * self.minibatches == 1


# Each paper's objective: DeepSeekMath; Dr. GRPO (2503.20783); DAPO (2503.14476); GSPO (2507.18071); CISPO (2506.13585).
PAPERS: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.04, "average": "response", "scale": "std"},
    "dr_grpo": {"average": "fixed", "scale": "none"},
    "dapo": {"clip_high": 0.28, "average": "token", "scale": "std"},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "ratio": "sequence", "average": "response", "scale": "std"},
    "cispo": {"clip_low": 1.0, "clip_high": 0.28, "surrogate": "cispo", "average": "token", "scale": "std"},
}
COMMON = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.0, "kl": "k3", "entropy": 0.0, "ratio": "token"}
PAPERS = {name: COMMON | {"surrogate": "clip"} | paper for name, paper in PAPERS.items()}


@dataclass(frozen=True)
class Stage:
    """An exploration stage: what was to be learnt from, and what the updates did."""

    policy_logprobs: list[Tensor]
    """Log-probabilities of each response's tokens, before the updates."""
    reference_logprobs: list[Tensor]
    metrics: dict[str, float]
    """Numbers by their names in metrics.jsonl; those of tokens are means over an update's tokens, then over updates."""


def train(policy: torch.nn.Module, explored: Sequence[Sequence[Response]], recipe: Recipe) -> list[Stage]:
    """Algorithm 1 on what each exploration stage sampled; `policy` (tokens [S, L] to logits) is left trained."""
    optimizer = adamw(policy, recipe)
    reference = copy.deepcopy(policy)
    updates, results = 0, []
    for stage, responses in enumerate(explored):
        if recipe.reference_every and stage % recipe.reference_every == 0:
            reference = copy.deepcopy(policy)
        batch = Batch(responses)
        batch.advantage_S = advantages(responses, recipe.scale)
        with torch.no_grad():
            batch.old_SL, _ = logprobs_and_entropy(policy, batch, recipe)
            batch.ref_SL, _ = logprobs_and_entropy(reference, batch, recipe)
        done: list[dict[str, float]] = []
        for _ in range(recipe.mu):
            for index_S in minibatches(responses, recipe):
                loss, statistics = grpo(policy, batch.take(index_S), recipe)
                done.append(statistics | update(policy, optimizer, loss, learning_rate(updates, recipe), recipe))
                updates += 1
        results.append(Stage(batch.split(batch.old_SL), batch.split(batch.ref_SL), mean_of(done)))
    return results


class Batch:
    """Responses side by side."""

    def __init__(self, responses: Sequence[Response]) -> None:
        sequences = [r.prompt + r.tokens for r in responses]
        longest = max(len(sequence) for sequence in sequences)
        self.input_SL = torch.tensor([s[:-1] + [0] * (longest - len(s)) for s in sequences])
        self.target_SL = torch.tensor([s[1:] + [0] * (longest - len(s)) for s in sequences])
        self.present_SL = torch.zeros_like(self.input_SL, dtype=torch.bool)
        for s, r in enumerate(responses):
            self.present_SL[s, len(r.prompt) - 1 :][: len(r.tokens)] = True
        self.advantage_S = torch.zeros(len(responses), dtype=torch.float64)
        self.old_SL = self.ref_SL = torch.zeros_like(self.input_SL, dtype=torch.float64)

    def take(self, index_S: list[int]) -> Batch:
        """Some of the responses."""
        taken = copy.copy(self)
        for name, value in vars(self).items():
            setattr(taken, name, value[index_S])
        return taken

    def split(self, value_SL: Tensor) -> list[Tensor]:
        """The values of each response's tokens."""
        return [value_L[present_L] for value_L, present_L in zip(value_SL, self.present_SL, strict=True)]


def logprobs_and_entropy(model: torch.nn.Module, batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_<t) [S, L], and the entropy of pi(. | q, o_<t), both at the sampling temperature."""
    logits_SLV = model(batch.input_SL).logits[..., : recipe.vocabulary]
    logprob_SLV = (logits_SLV / recipe.temperature).log_softmax(-1)
    entropy_SL = -(logprob_SLV.exp() * logprob_SLV).sum(-1)
    return logprob_SLV.gather(-1, batch.target_SL[..., None]).squeeze(-1), entropy_SL


def advantages(responses: Sequence[Response], scale: str) -> Tensor:
    """The group-relative reward of each response [S], section 4.1.2: the deviations are those of samples, plus 1e-6."""
    everything = torch.tensor([r.reward for r in responses], dtype=torch.float64)
    values = []
    for _, members in groupby(responses, key=lambda r: r.group):
        reward_G = torch.tensor([r.reward for r in members], dtype=torch.float64)
        from_mean_G, size = reward_G - reward_G.mean(), len(reward_G)
        if (reward_G == reward_G[0]).all():
            from_mean_G = torch.zeros(size, dtype=torch.float64)
        values.append(
            {
                "std": from_mean_G / (reward_G.std() + 1e-6),
                "none": from_mean_G,
                "loo": reward_G - (reward_G.sum() - reward_G) / (size - 1),
                "batch": from_mean_G / (everything.std() + 1e-6),
            }[scale]
        )
    return torch.cat(values)


def minibatches(responses: Sequence[Response], recipe: Recipe) -> list[list[int]]:
    """Responses of each update: as many groups for each, in order."""
    size = (max(r.group for r in responses) + 1) // recipe.minibatches
    return [[s for s, r in enumerate(responses) if r.group // size == m] for m in range(recipe.minibatches)]


def grpo(policy: torch.nn.Module, batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """The loss of one update, minus equation 3, and its statistics."""
    logprob_SL, entropy_SL = logprobs_and_entropy(policy, batch, recipe)
    old_SL = logprob_SL.detach() if recipe.on_policy else batch.old_SL
    length_S, A_SL = batch.present_SL.sum(1), batch.advantage_S[:, None].expand_as(logprob_SL)
    log_ratio_SL = torch.where(batch.present_SL, logprob_SL - old_SL, 0.0)
    if recipe.ratio == "sequence":
        ratio_SL = (log_ratio_SL.sum(1) / length_S.clamp(min=1)).exp()[:, None].expand_as(logprob_SL)
    else:
        ratio_SL = log_ratio_SL.exp()
    low, high = 1 - recipe.clip_low, 1 + recipe.clip_high
    if recipe.surrogate == "cispo":
        surrogate_SL = ratio_SL.clamp(low, high).detach() * A_SL * logprob_SL
    else:
        surrogate_SL = torch.minimum(ratio_SL * A_SL, ratio_SL.clamp(low, high) * A_SL)
    kl_SL = kl_estimate(logprob_SL - batch.ref_SL, recipe.kl)
    gain_SL = surrogate_SL - recipe.beta * kl_SL + recipe.entropy * entropy_SL
    loss = -torch.where(batch.present_SL, token_weights(length_S, recipe)[:, None] * gain_SL, 0.0).sum()
    of_tokens = {
        "kl": kl_SL,
        "entropy": entropy_SL,
        "ratio": ratio_SL,
        "log_ratio": -log_ratio_SL,
        "clipped_low": (ratio_SL < low) & (A_SL < 0),
        "clipped_high": (ratio_SL > high) & (A_SL > 0),
    }
    # Responses that cannot move the policy are no part of the statistics.
    counted_SL = batch.present_SL & (A_SL != 0) if recipe.beta == recipe.entropy == 0 else batch.present_SL
    statistics = {name: float(value_SL.detach()[counted_SL].double().mean()) for name, value_SL in of_tokens.items()}
    ratios = ratio_SL.detach()[counted_SL].tolist()
    return loss, statistics | {
        "ratio_max": max(ratios, default=-math.inf),
        "ratio_min": min(ratios, default=math.inf),
        "loss": float(loss.detach()),
    }


def token_weights(length_S: Tensor, recipe: Recipe) -> Tensor:
    """How each token of a response counts [S]; for "response" and "token" they sum to 1 over the update."""
    responses, length_S = len(length_S), length_S.double()
    if recipe.average == "response":
        return 1 / (responses * length_S.clamp(min=1))
    return torch.ones_like(length_S) / {"token": length_S.sum(), "fixed": responses * recipe.longest}[recipe.average]


def kl_estimate(d: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) per token from d = log pi - log pi_ref; k3 is equation 4."""
    value = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator.removesuffix("+")]
    if estimator.endswith("+"):  # the gradient of k2, whatever the value
        value = value.detach() + d**2 / 2 - (d**2 / 2).detach()
    return value


def update(
    policy: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, recipe: Recipe
) -> dict[str, float]:
    """One step down the gradient of the loss, clipped."""
    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    factor = min(1.0, recipe.clip_grad / (float(norm) + 1e-6)) if recipe.clip_grad else 1.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * factor
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return {"grad_norm": float(norm), "lr": lr}


def adamw(policy: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Weights decay, except those of norms."""
    matrices, vectors = ([p for p in policy.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def learning_rate(updates: int, recipe: Recipe) -> float:
    """After so many updates: a linear warm-up to lr that starts above 0, then the decay to min_lr."""
    if updates < recipe.warmup:
        return recipe.lr * (updates + 1) / (recipe.warmup + 1)
    total = recipe.stages * recipe.mu * recipe.minibatches
    done = (updates - recipe.warmup) / (total - recipe.warmup)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[recipe.schedule]
    return recipe.min_lr + left * (recipe.lr - recipe.min_lr)


def mean_of(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Numbers of a stage from those of its updates: the mean of those that have one, the extremes, the last lr."""
    values = {name: [u[name] for u in updates if not math.isnan(u[name])] for name in updates[0]}
    means = {name: sum(of) / len(of) if of else math.nan for name, of in values.items()}
    return means | {
        "ratio_max": max(values["ratio_max"]),
        "ratio_min": min(values["ratio_min"]),
        "lr": values["lr"][-1],
    }
