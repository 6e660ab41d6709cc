"""token_kl against its formulas in fp64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from cases import RTOL, assert_at_most_twice_as_far
from torch import Tensor

from triton_kernels import token_kl
from triton_kernels._register import OPS
from triton_kernels.policy.objective import KL
from triton_kernels.policy.token_kl import kl_estimate, token_kl_reference

ESTIMATORS = get_args(KL)


def differences(T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-probabilities that differ by 1e-4 to 3 either way: for small ones exp(-d) - 1 + d would cancel."""
    d_T = torch.logspace(-4, 0.5, T) * (1 - 2 * (torch.arange(T) % 2))
    ref_T = -4 - torch.rand(T, generator=torch.Generator().manual_seed(0))
    return (ref_T + d_T).to(device), ref_T.to(device)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("T", [0, 1, 63, 1100])  # nothing, one, less than a block (1024), more than a block
def test_value_and_gradient(T: int, estimator: KL, device: torch.device) -> None:
    logprob_T, ref_T = differences(T, device)
    logprob_T.requires_grad_()
    kl_T = token_kl(logprob_T, ref_T, estimator)
    (kl_T.sum() * 3).backward()
    exact_T, slope_T = token_kl_reference(logprob_T.double(), ref_T.double(), estimator)
    torch.testing.assert_close(kl_T.double(), exact_T, rtol=RTOL, atol=0)
    torch.testing.assert_close(logprob_T.grad.double(), 3 * slope_T, rtol=RTOL, atol=0)


def test_by_hand(device: torch.device) -> None:
    # Policy twice as likely as the reference model, then half as likely: d = ln 2, -ln 2.
    ln2 = 0.6931471805599453
    logprob_T, ref_T = torch.tensor([-1.0, -1.0], device=device), torch.tensor([-1 - ln2, -1 + ln2], device=device)
    expected = {"k1": [ln2, -ln2], "k2": [ln2**2 / 2, ln2**2 / 2], "k3": [0.5 - 1 + ln2, 2 - 1 - ln2]}
    for estimator, values in expected.items():
        torch.testing.assert_close(token_kl(logprob_T, ref_T, estimator), torch.tensor(values, device=device))


@pytest.mark.parametrize("estimator", ["k1+", "k3+"])
def test_straight_through(estimator: KL, device: torch.device) -> None:
    logprob_T, ref_T = differences(63, device)
    logprob_T.requires_grad_()
    kl_T = token_kl(logprob_T, ref_T, estimator)
    kl_T.sum().backward()
    assert torch.equal(kl_T, token_kl(logprob_T.detach(), ref_T, estimator.removesuffix("+")))
    torch.testing.assert_close(logprob_T.grad, logprob_T.detach() - ref_T)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_differences_stay_finite(estimator: KL, device: torch.device) -> None:
    logprob_T = torch.tensor([-1e4, 0.0, -1e4], device=device, requires_grad=True)
    kl_T = token_kl(logprob_T, torch.tensor([0.0, -1e4, -1e4], device=device), estimator)
    kl_T.sum().backward()
    assert kl_T.isfinite().all() and logprob_T.grad.isfinite().all()
    if estimator == "k3":
        assert torch.equal(logprob_T.grad, torch.zeros_like(logprob_T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    logprob_T, ref_T = (x_T.to(dtype) for x_T in differences(63, device))
    logprob_T.requires_grad_()
    kl_T = token_kl(logprob_T, ref_T)
    kl_T.sum().backward()
    assert kl_T.dtype == torch.float32 and logprob_T.grad.dtype == dtype
    exact = token_kl_reference(logprob_T.double(), ref_T.double(), "k3")
    reference = token_kl_reference(logprob_T, ref_T, "k3")
    assert_at_most_twice_as_far(kl_T.detach(), reference[0], exact[0])
    assert_at_most_twice_as_far(logprob_T.grad, reference[1].to(dtype), exact[1])


def test_noncontiguous_and_nan(device: torch.device) -> None:
    logprob_T, ref_T = differences(126, device)
    assert torch.equal(token_kl(logprob_T[::2], ref_T[::2]), token_kl(logprob_T, ref_T)[::2])
    logprob_T[7] = torch.nan
    assert token_kl(logprob_T, ref_T).isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck(estimator: KL) -> None:
    logprob_T, ref_T = (x_T.double() for x_T in differences(8, torch.device("cpu")))
    logprob_T.requires_grad_()
    assert torch.autograd.gradcheck(lambda x_T: token_kl(x_T, ref_T, estimator), logprob_T)
    assert torch.autograd.gradcheck(lambda x_T: kl_estimate(x_T - ref_T, estimator), logprob_T)


def test_second_derivative_is_refused(device: torch.device) -> None:
    logprob_T, ref_T = differences(8, device)
    logprob_T.requires_grad_()
    (slope_T,) = torch.autograd.grad(token_kl(logprob_T, ref_T).square().sum(), logprob_T, create_graph=True)
    with pytest.raises(RuntimeError):
        slope_T.sum().backward()


@pytest.mark.no_interpret  # what opcheck asks does not depend on what serves the op
def test_opcheck(device: torch.device) -> None:
    logprob_T, ref_T = differences(8, device)
    torch.library.opcheck(OPS["token_kl"], (logprob_T.requires_grad_(), ref_T, "k3"))


def test_errors() -> None:
    x_T = torch.zeros(3)
    with pytest.raises(ValueError, match="k4"):
        token_kl(x_T, x_T, "k4")
    with pytest.raises(ValueError, match=r"\[3\]; got \[2\]"):
        token_kl(x_T, x_T[:2])
