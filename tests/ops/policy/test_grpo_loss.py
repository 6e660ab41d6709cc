"""grpo_loss against its fp64 reference, which differentiates the paper's formula by autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    LENGTHS,
    OBJECTIVES,
    RTOL,
    Rows,
    assert_at_most_twice_as_far,
    make_rows,
    offsets,
    oracle,
    relative_error,
)
from torch import Tensor

from triton_kernels import LossOutput, Objective, grpo_loss
from triton_kernels._common import INTERPRET, SUMS
from triton_kernels._register import OPS
from triton_kernels.policy.grpo_loss import grpo_loss_reference, policy_loss
from triton_kernels.policy.objective import objective_arguments


def loss_and_gradient(rows: Rows, objective: Objective, upstream: float = 1.0) -> tuple[LossOutput, Tensor]:
    """Output of the op, and the gradient of upstream * loss."""
    leaf_T = rows.logprob_T.detach().clone().requires_grad_()
    out = grpo_loss(*replace(rows, logprob_T=leaf_T).args(), objective)
    (upstream * out.loss).backward()
    return out, leaf_T.grad


def packed(out: LossOutput) -> Tensor:
    """Its statistics as one tensor."""
    return torch.cat([out.stats.sums, out.stats.maxima, out.stats.minima])


def assert_matches_oracle(rows: Rows, objective: Objective) -> None:
    """Loss, gradient under an upstream factor, statistics."""
    out, gradient_T = loss_and_gradient(rows, objective, upstream=3.0)
    loss, exact_T, stats_N, absolute_terms = oracle(rows, objective)
    assert out.loss.dtype == torch.float32 and not packed(out).requires_grad
    assert abs(float(out.loss.detach()) - float(loss)) <= RTOL * float(absolute_terms)
    assert relative_error(gradient_T, 3 * exact_T) <= RTOL
    # Sums have terms of order 1 and either sign: their scale is the number of rows.
    torch.testing.assert_close(packed(out).double(), stats_N, rtol=RTOL, atol=RTOL * max(1.0, float(stats_N[0])))


def name(objective: Objective) -> str:
    bound = "".join(f"-{field}" for field in ("dual_clip", "delta") if getattr(objective, field))
    return f"{objective.surrogate}-{objective.ratio}-{objective.kl}{bound}"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_every_objective(objective: Objective, device: torch.device) -> None:
    assert_matches_oracle(make_rows([5, 0, 40, 18], device), objective)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_length(lengths: list[int], ratio: str, device: torch.device) -> None:
    assert_matches_oracle(make_rows(lengths, device), Objective(ratio=ratio))


@pytest.mark.parametrize("absent", [{"old_logprob_T"}, {"ref_logprob_T"}, {"old_logprob_T", "ref_logprob_T"}], ids=str)
@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective(ratio="sequence"), Objective(surrogate="cispo"), Objective(dual_clip=3.0)],
    ids=name,
)
def test_without_old_or_reference(objective: Objective, absent: set[str], device: torch.device) -> None:
    rows = replace(make_rows([5, 0, 40, 18], device), **dict.fromkeys(absent))
    assert_matches_oracle(rows, replace(objective, kl_coef=0.0 if "ref_logprob_T" in absent else 0.04))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows(lengths: list[int], device: torch.device) -> None:
    out, gradient_T = loss_and_gradient(make_rows(lengths, device), Objective(ratio="sequence"))
    assert out.loss == 0 and gradient_T.shape == (0,)
    assert packed(out).tolist() == [0.0] * len(SUMS) + [-math.inf, math.inf]
    assert out.stats.mean("kl") == 0


def test_by_hand(device: torch.device) -> None:
    # Two responses of a group with rewards 1 and 0: advantages +-0.5 / sqrt(0.5). Ratios 1.5, 0.5 | 0.5 and
    # pi_ref / pi 2, 1 | 0.5. Mean over each response, then over the group: weights 1/4, 1/4 | 1/2.
    old_T = torch.tensor([-1.0, -2.0, -3.0], device=device)
    logprob_T = old_T + torch.tensor([1.5, 0.5, 0.5], device=device).log()
    ref_T = logprob_T + torch.tensor([2.0, 1.0, 0.5], device=device).log()
    a, beta, ln2 = 0.5 / math.sqrt(0.5), 0.04, math.log(2)
    advantage_T, weight_T = torch.tensor([a, a, -a], device=device), torch.tensor([0.25, 0.25, 0.5], device=device)
    rows = Rows(logprob_T, old_T, ref_T, advantage_T, weight_T, offsets([2, 1], device))
    out, gradient_T = loss_and_gradient(rows, Objective(clip_low=0.2, clip_high=0.2, kl_coef=beta))
    # Eq. 3: 1.5 is clipped to 1.2; 0.5 counts as it is for A > 0 and as 0.8 for A < 0. Eq. 4: 2 - ln 2 - 1, 0, ...
    kl = [1 - ln2, 0, ln2 - 0.5]
    loss = -(0.25 * (1.2 * a - beta * kl[0]) + 0.25 * 0.5 * a + 0.5 * (-0.8 * a - beta * kl[2]))
    assert float(out.loss.detach()) == pytest.approx(loss, rel=1e-5)
    # A clipped ratio passes no gradient; d KL / d logprob = 1 - pi_ref / pi.
    expected_T = torch.tensor([0.25 * beta * (1 - 2), -0.25 * 0.5 * a, 0.5 * beta * (1 - 0.5)], device=device)
    torch.testing.assert_close(gradient_T, expected_T)
    named, maxima, minima = out.stats.named()
    sums = {name: x.item() for name, x in named.items()}
    expected = {"tokens": 3, "weight": 1, "kl": sum(kl), "log_ratio": -math.log(1.5 * 0.5 * 0.5), "ratio": 2.5}
    assert sums == pytest.approx(expected | {"clipped_low": 1, "clipped_high": 1, "entropy": 0}, rel=1e-5)
    assert (maxima["ratio"].item(), minima["ratio"].item()) == pytest.approx((1.5, 0.5), rel=1e-5)


@pytest.mark.parametrize(
    "objective", [Objective(ratio="sequence", kl_coef=0), Objective(ratio="sequence", surrogate="cispo")]
)
def test_sequence_ratio_is_the_geometric_mean_of_present_rows(objective: Objective, device: torch.device) -> None:
    rows = make_rows([5, 3], device)
    out, _ = loss_and_gradient(rows, objective)
    log_ratio_T = (rows.logprob_T - rows.old_logprob_T).where(rows.weight_T != 0, torch.nan)
    ratio_S = torch.stack([log_ratio_T[:5].nanmean().exp(), log_ratio_T[5:].nanmean().exp()])
    torch.testing.assert_close(torch.cat([out.stats.maxima, out.stats.minima]), ratio_S.sort(descending=True).values)


def test_edge_of_the_clip_passes_the_gradient(device: torch.device) -> None:
    # On-policy with clip range 0: the ratio 1 lies on both edges.
    rows = replace(make_rows([6], device, garbage=False), old_logprob_T=None, ref_logprob_T=None)
    _, gradient_T = loss_and_gradient(rows, Objective(clip_low=0, clip_high=0, kl_coef=0))
    torch.testing.assert_close(gradient_T, -rows.weight_T * rows.advantage_T)


@pytest.mark.parametrize("objective", OBJECTIVES[::3], ids=name)
def test_extreme_log_ratios_stay_finite(objective: Objective, device: torch.device) -> None:
    rows = make_rows([4, 4, 4, 4], device, garbage=False)
    sign_T = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1] * 2, device=device)
    rows = replace(rows, logprob_T=rows.old_logprob_T + 1e4 * sign_T, advantage_T=sign_T.roll(2))
    out, gradient_T = loss_and_gradient(rows, objective)
    assert out.loss.isfinite() and gradient_T.isfinite().all() and packed(out).isfinite().all()
    if objective.surrogate == "clip" and objective.kl == "k3":
        assert torch.equal(gradient_T, torch.zeros_like(gradient_T))


def test_absent_rows_change_nothing(device: torch.device) -> None:
    rows = make_rows([5, 0, 40, 18], device)
    present_T = rows.weight_T != 0
    kept = Rows(*(x[present_T] for x in rows.args()[:5]), offsets([4, 0, 32, 14], device))
    for objective in (Objective(), Objective(ratio="sequence")):
        out, gradient_T = loss_and_gradient(rows, objective)
        expected, expected_T = loss_and_gradient(kept, objective)
        torch.testing.assert_close(packed(out), packed(expected))
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(gradient_T[present_T], expected_T)
        assert torch.equal(gradient_T[~present_T], torch.zeros_like(gradient_T[~present_T]))


@pytest.mark.parametrize("field", ["logprob_T", "old_logprob_T", "ref_logprob_T", "advantage_T", "weight_T"])
def test_nan_in_a_present_row_is_seen(field: str, device: torch.device) -> None:
    rows = make_rows([6], device, garbage=False)
    getattr(rows, field)[3] = torch.nan
    assert loss_and_gradient(rows, Objective())[0].loss.isnan()
    if field == "logprob_T":
        on_policy = replace(rows, old_logprob_T=None, ref_logprob_T=None)
        assert loss_and_gradient(on_policy, Objective(kl_coef=0))[0].loss.isnan()


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(ratio="sequence"), Objective(surrogate="cispo")], ids=name
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, objective: Objective, device: torch.device) -> None:
    rows = make_rows([5, 0, 40, 18], device).to(dtype)
    out, gradient_T = loss_and_gradient(rows, objective)
    loss, exact_T, _, absolute_terms = oracle(rows, objective)
    reference_loss, reference_T, _ = grpo_loss_reference(*rows.args(), *objective_arguments(objective))
    assert out.loss.dtype == torch.float32 and gradient_T.dtype == dtype
    assert abs(out.loss - loss) <= 2 * abs(reference_loss - loss) + RTOL * absolute_terms
    assert_at_most_twice_as_far(gradient_T, reference_T.to(dtype), exact_T)


def test_noncontiguous(device: torch.device) -> None:
    rows = make_rows([5, 0, 40, 18], device)
    strided = Rows(*(x.repeat_interleave(2)[::2] for x in rows.args()[:5]), rows.response_cu)
    out, gradient_T = loss_and_gradient(rows, Objective())
    other, other_T = loss_and_gradient(strided, Objective())
    assert torch.equal(out.loss, other.loss) and torch.equal(gradient_T, other_T)


def test_same_bits_every_time(device: torch.device) -> None:
    rows = make_rows([30] * (4 if INTERPRET else 100), device)
    threads = torch.get_num_threads()
    results = []
    for num_threads in (1, 4, 4):
        torch.set_num_threads(num_threads)
        out, gradient_T = loss_and_gradient(rows, Objective(ratio="sequence"))
        results.append(torch.cat([out.loss.detach()[None], packed(out), gradient_T]))
    torch.set_num_threads(threads)
    assert results[0].equal(results[1]) and results[1].equal(results[2])


@pytest.mark.parametrize("objective", OBJECTIVES[2::5], ids=name)
def test_gradcheck(objective: Objective) -> None:
    rows = make_rows([3, 0, 4], torch.device("cpu"), seed=1).to(torch.float64)
    leaf_T = torch.where(rows.weight_T != 0, rows.logprob_T, 0).requires_grad_()
    if objective.surrogate == "cispo":
        # Its clipped ratio is detached, so only where it does not move is the gradient a derivative.
        objective = replace(objective, clip_low=0.0, clip_high=0.0)

    def loss(x_T: Tensor) -> Tensor:
        return grpo_loss(*replace(rows, logprob_T=x_T).args(), objective).loss

    def reference(x_T: Tensor) -> Tensor:
        return policy_loss(*replace(rows, logprob_T=x_T).args(), *objective_arguments(objective))[0]

    assert torch.autograd.gradcheck(loss, leaf_T)
    assert torch.autograd.gradcheck(reference, leaf_T)


@pytest.mark.no_interpret  # what opcheck asks does not depend on what serves the op
@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence", dual_clip=3.0)], ids=name)
def test_opcheck(objective: Objective, device: torch.device) -> None:
    rows = make_rows([3, 4], device, garbage=False)
    rows.logprob_T.requires_grad_()
    torch.library.opcheck(OPS["grpo_loss"], (*rows.args(), *objective_arguments(objective)))


def test_errors() -> None:
    rows = make_rows([3, 4], torch.device("cpu"))
    int64_cu = rows.response_cu.long()
    short_cu = offsets([3, 3], torch.device("cpu"))
    cases = [
        (replace(rows, ref_logprob_T=None), Objective(), "kl_coef is 0.04: give ref_logprob_T"),
        (rows, Objective(tis_clip=2.0), "tis_clip is 2.0: linear_grpo_loss takes it"),
        (rows, Objective(entropy_coef=0.1), "entropy_coef is 0.1: linear_grpo_loss takes it"),
        (replace(rows, advantage_T=rows.advantage_T[:2]), Objective(), r"advantage_T .*\[7\]; got \[2\]"),
        (replace(rows, old_logprob_T=rows.advantage_T[:2]), Objective(), r"old_logprob_T .*\[7\]; got \[2\]"),
        (
            replace(rows, logprob_T=rows.logprob_T[None]),
            Objective(),
            r"logprob_T must .* got \[1, 7\]",
        ),
        (replace(rows, response_cu=int64_cu), Objective(), "response_cu must hold int32"),
        (replace(rows, response_cu=short_cu), Objective(), "response_cu must start at 0, never decrease and end at 7"),
    ]
    for bad, objective, message in cases:
        with pytest.raises(ValueError, match=message):
            grpo_loss(*bad.args(), objective)
