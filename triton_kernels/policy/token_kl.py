"""Per-token estimators of KL(policy || reference), from log-probabilities of sampled tokens.

With d = logprob - ref_logprob:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d  (DeepSeekMath eq. 4, never negative).
T loss rows.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from triton_kernels._checks import check_choice, check_tensor
from triton_kernels._common import at_least_fp32
from triton_kernels._register import Variant, autograd_inside_op, custom_op, register_saved_gradient, register_triton
from triton_kernels._triton import LAUNCH_OPTIONS, tl, triton
from triton_kernels.policy.objective import KL, LOG_RATIO_LIMIT

_BLOCK_T = 1024


def token_kl(logprob_T: Tensor, ref_logprob_T: Tensor, estimator: KL = "k3") -> Tensor:
    """KL of each token, fp32 (fp64 for fp64), differentiable in `logprob_T` only: the reference model is frozen.

    k1, k2 and k3 have the gradient of their formula. "k1+" and "k3+" keep the value and take the gradient of k2, which
    is d: unlike that of k1 and k3 it is an unbiased gradient of the KL. k3 clamps d to +-20 before `exp`; beyond, its
    gradient is zero.

    Raises `ValueError` for an unknown estimator and for tensors that do not fit together.
    """
    check_choice("estimator", estimator, get_args(KL))
    check_tensor("logprob_T", logprob_T, ("T",))
    check_tensor("ref_logprob_T", ref_logprob_T, (len(logprob_T),), like=logprob_T)
    return _token_kl(logprob_T, ref_logprob_T.detach(), estimator)[0]


def clamped_log_ratio(x_T: Tensor) -> Tensor:
    """`x_T` within +-20, with a gradient of 0 beyond; torch.clamp would give NaN a gradient of 0 too."""
    x_T = torch.where(x_T > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, x_T)
    return torch.where(x_T < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, x_T)


def kl_estimate(d_T: Tensor, estimator: str) -> Tensor:
    """The estimators in plain PyTorch, differentiable in d = logprob - ref_logprob."""
    k2_T = d_T**2 / 2
    if estimator == "k2":
        return k2_T
    if estimator in ("k3", "k3+"):
        clamped_T = clamped_log_ratio(d_T)
        value_T = torch.expm1(-clamped_T) + clamped_T
    else:
        value_T = d_T * torch.where(d_T.isnan(), torch.nan, 1.0)  # a factor of 1, but that NaN reaches the gradient
    # Straight-through: k2 - k2.detach() is zero with the gradient of k2.
    return value_T.detach() + (k2_T - k2_T.detach()) if estimator.endswith("+") else value_T


def token_kl_reference(logprob_T: Tensor, ref_logprob_T: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """(kl_T, dkl_T / dlogprob_T) in plain PyTorch."""
    with autograd_inside_op():
        logprob_T = at_least_fp32(logprob_T).detach().clone().requires_grad_()
        kl_T = kl_estimate(logprob_T - ref_logprob_T.detach().to(logprob_T.dtype), estimator)
        (dkl_T,) = torch.autograd.grad(kl_T.sum(), logprob_T)
    return kl_T.detach(), dkl_T


_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN: tl.minimum and tl.maximum would hide it."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def kl_and_slope(d, KL: tl.constexpr):
    """KL of each element of d and its derivative."""
    if KL == "k3" or KL == "k3+":
        c = clamp(d, -_LIMIT, _LIMIT)
        # exp(-c) - 1 + c cancels near 0, so its Taylor series, c^2 / 2 - c^3 / 6 + ..., serves there.
        series = 1 / 720 - c * (1 / 5040 - c * (1 / 40320 - c * (1 / 362880)))
        series = 1 / 24 - c * (1 / 120 - c * series)
        series = c * c * (1 / 2 - c * (1 / 6 - c * series))
        kl = tl.where(tl.abs(c) < 0.5, series, tl.exp(-c) - 1 + c)
        slope = tl.where(tl.abs(d) > _LIMIT, 0.0, c - kl)
    elif KL == "k2":
        kl = d * d / 2
        slope = d
    else:
        kl = d
        slope = tl.where(d == d, 1.0, d)  # NaN stays NaN
    if KL == "k1+" or KL == "k3+":
        slope = d
    return kl, slope


@triton.jit
def token_kl_kernel(logprob_ptr, ref_ptr, kl_ptr, dkl_ptr, T, KL: tl.constexpr, BLOCK_T: tl.constexpr):
    """One program per BLOCK_T rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = row < T
    logprob = tl.load(logprob_ptr + row, mask, other=0.0).to(tl.float32)
    ref = tl.load(ref_ptr + row, mask, other=0.0).to(tl.float32)
    kl, slope = kl_and_slope(logprob - ref, KL)
    tl.store(kl_ptr + row, kl, mask)
    tl.store(dkl_ptr + row, slope, mask)


def _token_kl_triton(logprob_T: Tensor, ref_logprob_T: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    if logprob_T.dtype == torch.float64:
        return token_kl_reference(logprob_T, ref_logprob_T, estimator)
    T = logprob_T.numel()
    kl_T, dkl_T = _empty(logprob_T, ref_logprob_T, estimator)
    if T:
        grid = (triton.cdiv(T, _BLOCK_T),)
        token_kl_kernel[grid](
            logprob_T.contiguous(), ref_logprob_T.contiguous(), kl_T, dkl_T, T,
            KL=estimator, BLOCK_T=_BLOCK_T, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return kl_T, dkl_T


def _empty(logprob_T: Tensor, ref_logprob_T: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logprob_T.dtype == torch.float64 else torch.float32
    return logprob_T.new_empty(logprob_T.shape, dtype=dtype), logprob_T.new_empty(logprob_T.shape, dtype=dtype)


_token_kl = custom_op("token_kl", token_kl_reference)
_token_kl.register_fake(_empty)
register_triton(_token_kl, _token_kl_triton)
register_saved_gradient(_token_kl)


def variants() -> list[Variant]:
    """The kernels this op launches."""
    pointers = {"logprob_ptr": "*fp32", "ref_ptr": "*bf16", "kl_ptr": "*fp32", "dkl_ptr": "*fp32", "T": "i32"}
    return [Variant(token_kl_kernel, pointers, {"KL": kl, "BLOCK_T": _BLOCK_T}) for kl in ("k1+", "k2", "k3")]
