"""What counts as a difference between two steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsm_train.losses import PolicyLoss, Stats
from dsm_train.verify.comparison import (
    TOLERANCES,
    Line,
    Replayed,
    Step,
    compare,
    compare_step,
    gradient_difference,
    update_difference,
)

HEAD, NORM = "output_layer.weight", "decoder.layers.0.input_layernorm.weight"


def step(**changes: object) -> Step:
    """A step of two weights in which every weight moves by 0.01."""
    generator = torch.Generator().manual_seed(0)
    weight = {name: torch.randn(shape, generator=generator) for name, shape in ((HEAD, (4, 3)), (NORM, (3,)))}
    gradient = {name: torch.randn(value.shape, generator=generator) for name, value in weight.items()}
    after = {name: value - 0.01 * gradient[name].sign() for name, value in weight.items()}
    stats = Stats.nothing(PolicyLoss.names)
    return replace(Step(1e-7, 0.5, 2.0, 0.01, gradient, weight, after, 0.0, stats, 2, 5, 0), **changes)


def changed(tensors: dict[str, Tensor], name: str, value: Tensor) -> dict[str, Tensor]:
    return tensors | {name: value}


def wrong(here: Step) -> dict[str, Line]:
    return {line.name: line for line in compare_step(here, step(), TOLERANCES["fp32"]) if not line.holds}


def test_a_step_is_itself() -> None:
    assert not wrong(step())


def test_a_loss_is_judged_by_the_size_of_its_terms() -> None:
    assert not wrong(step(loss=1e-7 + 0.9e-5 * 0.5))  # its terms cancel to 1e-7: relative to that it is far off
    assert wrong(step(loss=1e-7 + 1.1e-5 * 0.5)).keys() == {"loss"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_differs(value: float) -> None:
    bad = torch.full((3,), value)
    here = step(loss=value, grad_norm=value, apart=value)
    here = replace(here, gradient=changed(here.gradient, NORM, bad), after=changed(here.after, NORM, bad))
    assert wrong(here).keys() == {
        "loss", "gradient norm", "gradient input_layernorm", "updated weights", "copies on several ranks",
    }  # fmt: skip
    assert wrong(here)["updated weights"].worst == NORM


def test_gradients_of_zero_are_equal() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert gradient_difference(zero, zero) == 0
    assert gradient_difference(one, zero) == math.inf and gradient_difference(zero, one) == 1


def test_rows_that_pad_the_vocabulary_have_no_gradient() -> None:
    whole = torch.randn(4, 3)
    assert gradient_difference(torch.cat([whole, torch.zeros(2, 3)]), whole) == 0
    assert gradient_difference(whole, torch.cat([whole, torch.zeros(2, 3)])) == 0
    assert gradient_difference(torch.cat([whole, torch.full((2, 3), 1e-3)]), whole) > 1e-5


def test_a_weight_without_a_gradient_to_speak_of_does_not_count() -> None:
    small = changed(step().gradient, NORM, torch.tensor([1.0, 1e-4, 0.0]))
    there = step(gradient=small)
    for element, counts in ((0, True), (1, False), (2, True)):  # a gradient of exactly 0 moves nothing, in any layout
        after = there.after[NORM].clone()
        after[element] += 1e-3
        here = replace(there, after=changed(there.after, NORM, after))
        assert (update_difference(NORM, here, there, counted=1e-3) > 1e-3) == counts


def test_the_last_digit_of_a_weight_is_not_the_updates() -> None:
    there = step()
    large = {name: value + 1000.0 for name, value in there.before.items()}  # a digit of 6e-5, an update of 1e-2
    there = replace(there, before=large, after={name: value - 0.01 for name, value in large.items()})
    for off, counts in ((6e-5, False), (3e-4, True)):
        here = replace(there, after={name: value + off for name, value in there.after.items()})
        assert (update_difference(HEAD, here, there, counted=1e-3) > 1e-3) == counts


def test_log_probabilities_are_compared_by_stage_and_steps_by_number() -> None:
    def replayed(shift: float, lr: float) -> Replayed:
        logprob_T = torch.tensor([-3.0, -1.0])
        later = step(lr=lr)
        return Replayed([step(), later], [{"old": logprob_T}, {"old": logprob_T + shift}])

    lines = compare(replayed(1e-2, 0.02), replayed(0.0, 0.01), TOLERANCES["fp32"])
    wrong = {line.name: line.difference for line in lines if not line.holds}
    assert wrong.keys() == {"old log-probability of stage 2", "step 2: learning rate"}
    assert wrong["old log-probability of stage 2"] == pytest.approx(1e-2 / 2, rel=1e-3)  # of the token at -1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_halved_gradient_is_found_in_a_later_step_too(dtype: str) -> None:
    halved = step(gradient={name: value / 2 for name, value in step().gradient.items()}, grad_norm=1.0)
    lines = compare(Replayed([step(), halved], []), Replayed([step(), step()], []), TOLERANCES[dtype])
    wrong = {line.name for line in lines if not line.holds}
    assert {"step 2: gradient norm", "step 2: gradient output_layer", "step 2: gradient input_layernorm"} <= wrong
