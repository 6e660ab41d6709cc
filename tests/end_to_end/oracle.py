"""Runs of stage `grpo` on a tiny model, and how far they are from Algorithm 1 written a second time (algorithm_1.py).

A run records what it samples. The oracle starts from the same weights and the same responses, and computes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from algorithm_1 import PAPERS, Recipe, Response, train
from commands import TINY, metrics, run, run_on_ranks, torchrun, write_sevens
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

STAGES = 3
SMALL = (
    *TINY,
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "data.prompt_template={question}=",
    "sampling.max_new_tokens=5",
)
GRPO = (
    *SMALL,
    "run.max_tokens=30",  # several micro-batches in every update, which cut groups
    f"steps={STAGES}",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "rewards.unfinished=keep",  # half of the responses are cut off
    "optim.lr=1e-3",
    # Adam's first steps are the sign of a gradient, and of one that would be 0 the sign is rounding: not with this eps.
    "optim.eps=1e-5",
)
OFF_POLICY = ("algorithm.epochs=2", "algorithm.minibatches=2")

LOGPROB, RELATIVE, ABSOLUTE, UPDATE = 1e-4, 1e-4, 1e-5, 0.02
"""How far fp32 may be from fp64: log-probabilities of tokens; numbers of a step; weights, in learning rates."""


@dataclass(frozen=True)
class Start:
    """Start of the runs: weights and data."""

    weights: Path
    questions: Path

    @property
    def arguments(self) -> tuple[str, str]:
        """The keys that say so."""
        return f"run.init={self.weights}", f"data.path={self.questions}"


@dataclass(frozen=True)
class Trained:
    """Records of a run of the command line."""

    config: dict[str, Any]
    stages: list[dict[str, list[Any]]]
    """The columns of each exploration stage's record."""
    metrics: list[dict[str, Any]]
    weights: dict[str, Tensor]


def make_start(folder: Path, *model: str) -> Start:
    """A model that gives the right answer to a part of its questions, whose norms and head have been trained."""
    questions = write_sevens(folder / "questions.jsonl")
    run("sft", *SMALL, f"data.path={questions}", "sft.steps=10", "sft.batch=16", "sft.optim.lr=1e-2",
        f"run.out={folder}", *model)  # fmt: skip
    return Start(folder / "weights", questions)


def trained(start: Start, out: Path, *arguments: str, ranks: int = 1, launched: bool = False) -> Trained:
    """Run stage `grpo` in this process, or on several ranks, `launched` with torchrun or forked."""
    command = ["grpo", *GRPO, *start.arguments, f"run.out={out}", *recorded(out), *arguments]
    if launched:
        result = torchrun(ranks, "-m", "dsm_train", *command)
        assert result.returncode == 0, result.stderr
    elif ranks > 1:
        run_on_ranks(ranks, out.parent, *command)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda *_, **__: None)  # drawing takes longer than training does
            run(*command)
    return read(out)


def recorded(out: Path) -> tuple[str, str]:
    """The keys for a record of every stage, as `read` looks for it."""
    return f"record={out / 'step.parquet'}", "record_step=0"


def read(out: Path) -> Trained:
    """Read what a run left in its folder."""
    return Trained(
        yaml.safe_load((out / "config.yaml").read_text()),
        [pq.read_table(out / f"step-{step}.parquet").to_pydict() for step in range(1, STAGES + 1)],
        [row for row in metrics(out) if "loss" in row],
        load_file(out / "weights" / "model.safetensors"),
    )


def recipe(config: Mapping[str, Any], vocabulary: int) -> Recipe:
    """Read the settings of a run from its configuration."""
    algorithm, sampling, optim = config["algorithm"], config["sampling"], config["optim"]
    names = {"kl_coef": "beta", "entropy_coef": "entropy"}
    given = ("clip_low", "clip_high", "kl_coef", "kl", "entropy_coef", "average", "scale")
    chosen = {names.get(name, name): algorithm[name] for name in given if algorithm[name] is not None}
    return Recipe(
        **PAPERS[algorithm["preset"]] | chosen,
        mu=algorithm["epochs"],
        minibatches=algorithm["minibatches"],
        reference_every=algorithm["reference_every"],
        stages=config["steps"],
        temperature=sampling["temperature"],
        longest=sampling["max_new_tokens"],
        vocabulary=vocabulary,
        warmup=optim["warmup_steps"],
        betas=(optim["beta1"], optim["beta2"]),
        **{name: optim[name] for name in ("lr", "min_lr", "schedule", "weight_decay", "eps", "clip_grad")},
    )


def differences(start: Start, result: Trained) -> dict[str, float]:
    """Distance of the run from Algorithm 1, in tolerances, by name of what differs; {}: nothing does."""
    policy = AutoModelForCausalLM.from_pretrained(start.weights, dtype=torch.float64, attn_implementation="eager")
    policy.get_input_embeddings().padding_idx = None  # a pad token that was sampled is a token like any other
    vocabulary = Tokenizer.from_file(str(start.weights / "tokenizer.json")).get_vocab_size()
    asked = recipe(result.config, vocabulary)
    names = ("group", "prompt_token", "response_token", "reward")
    explored = [
        [Response(*values) for values in zip(*(columns[name] for name in names), strict=True)]
        for columns in result.stages
    ]
    away: dict[str, float] = {}
    for stage, columns, row in zip(train(policy, explored, asked), result.stages, result.metrics, strict=True):
        logprobs = {"rollout_logprob": stage.policy_logprobs, "old_logprob": stage.policy_logprobs,
                    "ref_logprob": stage.reference_logprobs}  # fmt: skip
        distances = [
            *((name, _of_logprobs(columns[name], logprobs[name])) for name in logprobs),
            *((name, _of_numbers(row[name], value)) for name, value in stage.metrics.items() if name in row),
        ]
        for name, distance in distances:
            away[name] = _larger(away.get(name, 0.0), distance)
    for name, weight in policy.named_parameters():
        distance = _largest(result.weights[name] - weight.detach()) / (UPDATE * asked.lr)
        away["weights"] = _larger(away.get("weights", 0.0), distance)
    return {name: distance for name, distance in away.items() if not distance <= 1}


def _of_logprobs(recorded: list[list[float] | None], expected: list[Tensor]) -> float:
    """Distance of the tokens' log-probabilities in a record, where it has any."""
    pairs = [(torch.tensor(r), e) for r, e in zip(recorded, expected, strict=True) if r is not None]
    return max((_largest(r - e) / LOGPROB for r, e in pairs), default=0.0)


def _of_numbers(logged: float | None, expected: float) -> float:
    """Distance of a number in metrics.jsonl, where null stands for what is not finite."""
    if logged is None or not math.isfinite(expected):
        return 0.0 if logged is None and not math.isfinite(expected) else math.inf
    return abs(logged - expected) / (RELATIVE * abs(expected) + ABSOLUTE)


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _larger(a: float, b: float) -> float:
    """The larger one; NaN is larger than any."""
    return math.inf if math.isnan(a) or math.isnan(b) else max(a, b)
