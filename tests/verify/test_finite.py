"""What verify-step says of steps that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from dsm_train.losses import PolicyLoss, Stats
from dsm_train.verify.comparison import Replayed, Step
from dsm_train.verify.finite import broken_values, not_finite
from dsm_train.verify.synthetic import synthetic_rollouts

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
BATCH = synthetic_rollouts(50, 40, seed=0)


def step(**changes: object) -> Step:
    weights = {EMBEDDING: torch.ones(4, 3), HEAD: torch.ones(4, 3)}
    gradient = {name: torch.ones(4, 3) for name in weights}
    return replace(
        Step(1.0, 1.0, 2.0, 0.01, gradient, weights, weights, 0.0, Stats.nothing(PolicyLoss.names), 2, 5, 0), **changes
    )


def said(here: list[Step], there: list[Step]) -> list[str]:
    text = not_finite(Replayed(here, []), Replayed(there, []), "tp2", "one rank", BATCH)
    return [] if text is None else text.splitlines()


def test_finite_steps_are_compared() -> None:
    assert not said([step()], [step()])


def test_what_is_not_finite_in_both_is_not_of_the_layout() -> None:
    nan = torch.full((4, 3), torch.nan)
    bad = step(loss=math.nan, grad_norm=math.nan, gradient={EMBEDDING: nan, HEAD: nan})
    broken = replace(bad, before={EMBEDDING: torch.ones(4, 3), HEAD: torch.tensor([[1.0, -torch.inf]])})
    assert said([bad], [broken]) == [
        f"tp2: loss nan, gradient norm nan; gradients that are not finite: 2 of 2, the first {EMBEDDING}",
        f"one rank: loss nan, gradient norm nan; gradients that are not finite: 2 of 2, the first {EMBEDDING}",
        f"weights that are not finite: 1 of 2, the first {HEAD}",
        "FAIL: loss or gradient is not finite in both layouts: look at the batch and the weights",
    ]


def test_what_is_not_finite_in_one_is_of_the_layout() -> None:
    bad = step(grad_norm=math.inf, gradient={EMBEDDING: torch.ones(4, 3), HEAD: torch.tensor([[torch.inf]])})
    # the second of four steps, after which the layout gives up
    assert said([step(), bad], [step()] * 4) == [
        f"step 2: tp2: loss 1, gradient norm inf; gradients that are not finite: 1 of 2, the first {HEAD}",
        "FAIL: loss or gradient is not finite in tp2 alone, and finite in one rank: look at the layout",
    ]
    assert said([step()], [bad])[-1].endswith("in one rank alone, and finite in tp2: look at the layout")
    same = not_finite(Replayed([bad], []), Replayed([step()], []), "one rank", "one rank", BATCH)  # packed otherwise
    assert same is not None and same.endswith("in one rank alone, and finite in one rank: look at the layout")


def test_a_norm_that_overflows_has_finite_gradients() -> None:
    (line, _, _) = said([step(grad_norm=math.inf)], [step(grad_norm=math.inf)])
    assert line.endswith("gradients that are not finite: none, it is their norm that overflows")


def test_recorded_values_that_are_not_finite_are_counted() -> None:
    assert not broken_values(BATCH)
    assert BATCH.old_logprob_T is not None
    total = len(BATCH.old_logprob_T)
    bad = replace(BATCH, old_logprob_T=BATCH.old_logprob_T.index_fill(0, torch.tensor([0, 3]), -torch.inf))
    assert broken_values(bad) == [f"2 of {total} old log-probabilities are not finite"]
