"""linear_grpo_loss against dense logits and the plain objective in fp64. T loss rows, V vocabulary, D hidden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import OBJECTIVES, RTOL, Rows, make_rows, relative_error
from test_linear_logprob import dense
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from triton_kernels import LinearGrpoLoss, Objective, grpo_loss, linear_grpo_loss
from triton_kernels._common import SUMS
from triton_kernels.head.linear_grpo_loss import linear_grpo_loss_op
from triton_kernels.head.policy_gradient import Settings, loss_and_gradients
from triton_kernels.head.policy_logits import PolicyRows
from triton_kernels.policy.grpo_loss import policy_loss
from triton_kernels.policy.objective import objective_arguments

V, D = 97, 16
LENGTHS = [3, 0, 9, 4]  # an empty response among others
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


CASES = [*OBJECTIVES[::3], Objective(entropy_coef=0.3), Objective(entropy_coef=0.3, kl_coef=0.0)]


@pytest.mark.parametrize(("objective", "options"), [(o, OPTIONS[i % 2]) for i, o in enumerate(CASES)])
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
    torch.testing.assert_close(output.stats.sums[:entropy], plain.stats.sums[:entropy], rtol=1e-6, atol=1e-6)
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
        (Objective(tis_clip=2.0), {"rollout_logprob_T": torch.zeros(2)}, r"rollout_logprob_T must have .* got \[2\]"),
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


SEQUENCE = Objective(ratio="sequence", clip_low=0.05, clip_high=0.05)


# A row takes 640 bytes: 97 fp32 logits, padded to 128, hidden state and its gradient. 6 rows: the longest response of 9
# does not fit; 10 rows: several chunks of whole responses; none: one chunk.
@pytest.mark.parametrize("workspace_bytes", [6 * 640, 10 * 640, None])
@pytest.mark.parametrize("objective", [SEQUENCE, replace(SEQUENCE, surrogate="cispo", entropy_coef=0.2), Objective()])
def test_the_workspace_changes_no_result(
    objective: Objective, workspace_bytes: int | None, device: torch.device
) -> None:
    inputs, target_T, rows = make(device)
    output = ours(inputs, target_T, rows, objective, workspace_bytes=workspace_bytes)
    loss, logprob_T, _, exact_gradients = exact(inputs, target_T, rows, objective, 1.0, None)
    torch.testing.assert_close(output.loss.double(), loss, rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(output.logprob_T.double(), logprob_T, rtol=RTOL, atol=RTOL)
    for x, y in zip(torch.autograd.grad(output.loss, inputs), exact_gradients, strict=True):
        assert relative_error(x, y) < RTOL


@pytest.mark.parametrize("objective", [Objective(kl_coef=0.0), replace(SEQUENCE, kl_coef=0.0), Objective()])
def test_dropping_rows_without_a_gradient_changes_no_result(objective: Objective, device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    if objective.kl_coef == 0:
        rows = replace(rows, ref_logprob_T=None)
    kept, dropped = (
        ours(inputs, target_T, rows, objective, drop_zero_rows=drop, workspace_bytes=2**14) for drop in (False, True)
    )
    torch.testing.assert_close(dropped.loss, kept.loss)
    torch.testing.assert_close(dropped.logprob_T, kept.logprob_T)
    torch.testing.assert_close(dropped.entropy_T, kept.entropy_T)
    torch.testing.assert_close(dropped.stats.sums, kept.stats.sums)
    pairs = zip(torch.autograd.grad(dropped.loss, inputs), torch.autograd.grad(kept.loss, inputs), strict=True)
    assert all(relative_error(x, y) < RTOL for x, y in pairs)


class Gemms(TorchDispatchMode):
    """Counts matrix products and their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.rows.append(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_each_product_is_computed_once_and_none_in_the_backward_pass(
    wanted: tuple[bool, bool], products: int, device: torch.device
) -> None:
    inputs, target_T, rows = make(device)
    settings = Settings(Objective(), 1.0, None, 2**26, drop_zero_rows=False, shards=[V])
    of_rows = PolicyRows(target_T, rows.old_logprob_T, rows.ref_logprob_T, None, rows.advantage_T, rows.weight_T)
    with Gemms() as gemms, torch.no_grad():  # from inside: a dispatch mode does not see into a registered op
        loss_and_gradients(inputs[0], inputs[1], inputs[2], of_rows, rows.response_cu, settings, [*wanted, False])
    assert len(gemms.rows) == products or (not any(wanted) and not gemms.rows)  # scoring is a registered op, too
    for x, want in zip(inputs, (*wanted, False), strict=True):
        x.requires_grad_(want)
    if any(wanted):
        output = ours(inputs, target_T, rows, Objective())
        with Gemms() as gemms:
            output.loss.backward()
        assert gemms.rows == []
        assert [x.grad is not None for x in inputs[:2]] == list(wanted)


# In one pass, and in two: a workspace that holds one row.
@pytest.mark.parametrize("options", [{}, {"workspace_bytes": 1}])
@pytest.mark.parametrize("field", ["hidden_TD", "advantage_T", "old_logprob_T", "ref_logprob_T", "rollout_logprob_T"])
def test_nan_in_a_row_that_counts_reaches_loss_gradient_and_statistics(
    field: str, options: dict[str, Any], device: torch.device
) -> None:
    inputs, target_T, rows = make(device)
    row = 1
    assert rows.weight_T[row] != 0 and rows.old_logprob_T is not None
    objective = Objective(tis_clip=2.0, ratio="sequence" if options else "token")
    rollout_T = rows.old_logprob_T.clone()
    given = {"hidden_TD": inputs[0].data, "rollout_logprob_T": rollout_T} | vars(rows)
    given[field][row] = torch.nan
    if field != "rollout_logprob_T":
        objective = replace(objective, tis_clip=None)
    output = ours(inputs, target_T, rows, objective, rollout_logprob_T=rollout_T, **options)
    dhidden_TD, dweight_VD, dbias_V = torch.autograd.grad(output.loss, inputs)
    assert output.loss.isnan() and output.stats.sums.isnan().any()
    assert dhidden_TD[row].isnan().all() and dweight_VD.isnan().any() and dbias_V.isnan().any()
    assert dhidden_TD[LENGTHS[0] :].isfinite().all()  # the other responses


def test_without_grad_mode_there_is_no_gradient_work(device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    with torch.no_grad():
        quiet = ours(inputs, target_T, rows, Objective(entropy_coef=0.1))
    loud = ours(inputs, target_T, rows, Objective(entropy_coef=0.1))
    assert not quiet.loss.requires_grad and loud.loss.requires_grad
    torch.testing.assert_close(quiet.loss, loud.loss)
    torch.testing.assert_close(quiet.logprob_T, loud.logprob_T)


def test_the_factor_from_above_scales_the_gradients_and_may_come_twice(device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    output = ours(inputs, target_T, rows, Objective())
    once = torch.autograd.grad(output.loss, inputs, retain_graph=True)
    thrice = torch.autograd.grad(3 * output.loss, inputs, retain_graph=True)
    again = torch.autograd.grad(output.loss, inputs)
    for x, y, z in zip(once, thrice, again, strict=True):
        torch.testing.assert_close(3 * x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, device: torch.device) -> None:
    inputs, target_T, rows = make(device)

    def loss(*tensors: Tensor) -> Tensor:
        return ours([tensors[0].tanh(), *tensors[1:]], target_T, rows, Objective()).loss

    expected = torch.autograd.grad(loss(*inputs), inputs)
    checkpoint(loss, *inputs, use_reentrant=reentrant).backward()
    for x, y in zip(inputs, expected, strict=True):
        assert x.grad is not None
        present = ~y.isnan()  # the tanh of an absent row's NaN has the gradient 0 * NaN
        torch.testing.assert_close(x.grad[present], y[present])


def test_two_runs_have_the_same_bits(device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    first, second = (ours(inputs, target_T, rows, Objective(entropy_coef=0.1)) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.stats.sums, second.stats.sums)
    pairs = zip(torch.autograd.grad(first.loss, inputs), torch.autograd.grad(second.loss, inputs), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_logits_and_one_token_responses(scale: float, device: torch.device) -> None:
    T = 4
    generator = torch.Generator().manual_seed(2)
    hidden_TD, weight_VD = (torch.randn(n, D, generator=generator) for n in (T, V))
    hidden_TD *= scale / float((hidden_TD @ weight_VD.T).abs().max())
    tensors = [x.to(device).requires_grad_() for x in (hidden_TD, weight_VD)]
    target_T = (hidden_TD @ weight_VD.T).argmax(1).to(device)
    cu = torch.arange(T + 1, dtype=torch.int32, device=device)
    row_T = torch.linspace(-1, 1, T, device=device)
    output = linear_grpo_loss(*tensors, target_T, None, row_T, row_T, row_T.abs(), cu, Objective(entropy_coef=0.1))
    gradients = torch.autograd.grad(output.loss, tensors)
    assert all(bool(x.isfinite().all()) for x in (output.loss, output.logprob_T, output.entropy_T, *gradients))
    exact_T, _ = dense(*(x.detach() for x in tensors), target_T, None, 1.0, None)
    # the product itself is rounded: 1e4 has a last digit of 1e-3 in fp32
    torch.testing.assert_close(output.logprob_T.double(), exact_T.double(), rtol=RTOL, atol=RTOL * (1 + scale / 10))


def test_small_weights_do_not_underflow_in_fp16(device: torch.device) -> None:
    inputs, target_T, rows = make(device)
    half = [x.detach().half().requires_grad_() for x in inputs]
    rows = replace(rows, weight_T=rows.weight_T * 1e-7)  # of a batch of ten million tokens
    output = ours(half, target_T, rows, Objective(entropy_coef=0.1))
    loss, _, _, exact_gradients = exact(half, target_T, rows, Objective(entropy_coef=0.1), 1.0, None)
    torch.testing.assert_close(output.loss.double(), loss, rtol=RTOL, atol=0)
    torch.testing.assert_close(output.stats.sums[SUMS.index("weight")], rows.weight_T.sum())
    factor = 1e7  # what a loss scale does
    for x, y in zip(torch.autograd.grad(factor * output.loss, half), exact_gradients, strict=True):
        assert relative_error(x.double() / factor, y) < 4e-3


@pytest.mark.no_interpret  # what opcheck asks does not depend on what serves the op
@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False], [False, False, False]])
def test_opcheck(needs: list[bool], device: torch.device) -> None:
    inputs, target_T, rows = make(device, garbage=False)
    constants = (target_T, rows.old_logprob_T, rows.ref_logprob_T, None, *rows.args()[3:])
    settings = (0.8, 2.0, 2**13, False, needs, *objective_arguments(Objective(entropy_coef=0.1)))
    torch.library.opcheck(linear_grpo_loss_op, (*(x.detach() for x in inputs), *constants, *settings))
