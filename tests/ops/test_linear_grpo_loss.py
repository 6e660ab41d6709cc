"""linear_grpo_loss against dense logits and the plain objective in fp64. T loss rows, V vocabulary, D hidden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import OBJECTIVES, RTOL, Rows, make_rows, relative_error
from test_linear_logprob import dense
from torch import Tensor

from triton_kernels import LinearGrpoLoss, Objective, grpo_loss, linear_grpo_loss
from triton_kernels._common import SUMS
from triton_kernels.grpo_loss import objective_arguments, policy_loss

V, D = 97, 16
LENGTHS = [5, 0, 40, 18]  # an empty response among others
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0, "softcap": None},
    {"temperature": 0.8, "softcap": 2.0, "workspace_bytes": 2**13},  # several chunks
]


def make(device: torch.device, garbage: bool = True) -> tuple[list[Tensor], Tensor, Rows]:
    """[hidden_TD, weight_VD, bias_V], which want gradients, target_T, and rows whose old log-probabilities are near.

    With `garbage` the rows of weight 0 hold NaN, infinities, and targets out of range.
    """
    rows = make_rows(LENGTHS, device, garbage)
    T = len(rows.weight_T)
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(*shape, generator=generator).to(device) for shape in ((T, D), (V, D), (V,))]
    target_T = torch.randint(0, V, (T,), generator=generator).to(device)
    logprob_T, _ = dense(tensors[0], tensors[1], target_T, tensors[2], 1.0, None)
    assert rows.old_logprob_T is not None and rows.ref_logprob_T is not None
    shift_T = logprob_T - rows.logprob_T
    rows = replace(rows, old_logprob_T=rows.old_logprob_T + shift_T, ref_logprob_T=rows.ref_logprob_T + shift_T)
    absent_T = rows.weight_T == 0
    tensors[0][absent_T] = torch.nan
    target_T[absent_T] = -5
    return [x.requires_grad_() for x in tensors], target_T, rows


def ours(inputs: list[Tensor], target_T: Tensor, rows: Rows, objective: Objective, **options: Any) -> LinearGrpoLoss:
    return linear_grpo_loss(inputs[0], inputs[1], target_T, *rows.args()[1:], objective, bias_V=inputs[2], **options)


def exact(
    inputs: list[Tensor], target_T: Tensor, rows: Rows, objective: Objective, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """loss, logprob_T, entropy_T and gradients in fp64, of the rows that are present."""
    present_T = rows.weight_T != 0
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    hidden_TD = torch.where(present_T[:, None], inputs[0], 0)
    logprob_T, entropy_T = dense(hidden_TD, inputs[1], target_T.clamp(min=0), inputs[2], temperature, softcap)
    rows = replace(rows.to(torch.float64), logprob_T=logprob_T)
    without_entropy = objective_arguments(replace(objective, entropy_coef=0.0))
    loss = policy_loss(*rows.args(), *without_entropy)[0] - objective.entropy_coef * (rows.weight_T * entropy_T).sum()
    gradients = torch.autograd.grad(loss, inputs)
    return loss.detach(), logprob_T.detach() * present_T, entropy_T.detach() * present_T, gradients


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("objective", [*OBJECTIVES[::3], Objective(entropy_coef=0.3), Objective(kl_coef=0.0)])
def test_loss_and_gradients_with_garbage_in_absent_rows(
    objective: Objective, options: dict[str, Any], device: torch.device
) -> None:
    inputs, target_T, rows = make(device)
    output = ours(inputs, target_T, rows, objective, **options)
    gradients = torch.autograd.grad(output.loss, inputs)
    loss, logprob_T, entropy_T, exact_gradients = exact(
        inputs, target_T, rows, objective, options["temperature"], options["softcap"]
    )
    torch.testing.assert_close(output.loss.double(), loss, rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(output.logprob_T.double(), logprob_T, rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(output.entropy_T.double(), entropy_T, rtol=RTOL, atol=RTOL)
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert relative_error(x, y) < RTOL
    assert not gradients[0][rows.weight_T == 0].any()
    assert not output.logprob_T.requires_grad and not output.entropy_T.requires_grad


def test_statistics(device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    output = ours(inputs, target_T, rows, Objective(entropy_coef=0.1))
    plain = grpo_loss(output.logprob_T, *rows.args()[1:], Objective())
    entropy = SUMS.index("entropy")
    assert torch.equal(output.stats.sums[:entropy], plain.stats.sums[:entropy])
    assert torch.equal(output.stats.maxima, plain.stats.maxima)
    torch.testing.assert_close(output.stats.sums[entropy], output.entropy_T.sum())
    torch.testing.assert_close(output.stats.mean("entropy"), output.entropy_T[rows.weight_T != 0].mean())
    assert not output.stats.sums.requires_grad


@pytest.mark.parametrize("on_policy", [False, True])
def test_truncated_importance_sampling_is_a_factor_of_the_advantage(on_policy: bool, device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    objective = Objective(tis_clip=1.2)
    plain = replace(objective, tis_clip=None)
    if on_policy:
        rows = replace(rows, old_logprob_T=None)
    old_T = ours(inputs, target_T, rows, plain).logprob_T if on_policy else rows.old_logprob_T
    assert old_T is not None
    log_ratio_T = torch.linspace(-1, 1, len(old_T), device=device)  # both sides of log(1.2)
    log_ratio_T[-1] = 500.0  # exp of it overflows
    output = ours(inputs, target_T, rows, objective, rollout_logprob_T=old_T - log_ratio_T)
    factor_T = log_ratio_T.exp().clamp(max=1.2)
    expected = ours(inputs, target_T, replace(rows, advantage_T=rows.advantage_T * factor_T), plain)
    torch.testing.assert_close(output.loss, expected.loss)
    pairs = zip(torch.autograd.grad(output.loss, inputs), torch.autograd.grad(expected.loss, inputs), strict=True)
    for x, y in pairs:
        assert relative_error(x, y) < RTOL


def test_on_policy_gradient_is_that_of_the_old_logprobs_given(device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    none = ours(inputs, target_T, replace(rows, old_logprob_T=None), Objective())
    given = ours(inputs, target_T, replace(rows, old_logprob_T=none.logprob_T), Objective())
    assert torch.equal(none.loss, given.loss)
    for x, y in zip(torch.autograd.grad(none.loss, inputs), torch.autograd.grad(given.loss, inputs), strict=True):
        assert relative_error(x, y) < RTOL


def test_bf16(device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    half = [x.detach().bfloat16().requires_grad_() for x in inputs]
    output = ours(half, target_T, rows, Objective(entropy_coef=0.1))
    loss, logprob_T, _, exact_gradients = exact(half, target_T, rows, Objective(entropy_coef=0.1), 1.0, None)
    assert ((output.logprob_T - logprob_T).abs() <= RTOL * (1 + logprob_T.abs())).all()
    torch.testing.assert_close(output.loss.double(), loss, rtol=RTOL, atol=RTOL)
    for x, y in zip(torch.autograd.grad(output.loss, half), exact_gradients, strict=True):
        assert relative_error(x, y) < 4e-3


def test_no_rows(device: torch.device) -> None:
    hidden_TD, weight_VD = torch.zeros(0, D, device=device, requires_grad=True), torch.ones(V, D, device=device)
    empty_T, cu = torch.zeros(0, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    output = linear_grpo_loss(hidden_TD, weight_VD, empty_T.long(), None, empty_T, empty_T, empty_T, cu, Objective())
    output.loss.backward()
    assert output.loss.item() == 0 and hidden_TD.grad is not None and hidden_TD.grad.shape == (0, D)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (Objective(tis_clip=2.0), {}, "tis_clip=2.0 needs rollout_logprob_T"),
        (Objective(), {"workspace_bytes": 0}, "workspace_bytes must be above 0; got 0"),
        (Objective(), {"temperature": -1.0}, "temperature must be above 0; got -1.0"),
        (Objective(tis_clip=2.0), {"rollout_logprob_T": torch.zeros(2)}, r"rollout_logprob_T must have .* got \(2,\)"),
    ],
)
def test_errors(objective: Objective, options: dict[str, Any], message: str) -> None:
    inputs, target_T, rows = make(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        ours(inputs, target_T, rows, objective, **options)


def test_a_split_response_is_refused() -> None:
    inputs, target_T, rows = make(torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="cp_group has 2 ranks"):
        ours(inputs, target_T, rows, Objective(), cp_group=torch.distributed.ProcessGroup(0, 2))
