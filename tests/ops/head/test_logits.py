"""logit_stats and logit_gradient against their references in fp64. C rows of a chunk, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import RTOL, relative_error
from torch import Tensor

from triton_kernels._common import INTERPRET
from triton_kernels._register import REFERENCE, implementation
from triton_kernels.head.logits import (
    logit_gradient,
    logit_gradient_reference,
    logit_stats,
    logit_stats_reference,
    logits_held,
    merge,
    reinterpreted,
)

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0, "softcap": None},
    {"temperature": 0.7, "softcap": None},
    {"temperature": 1.3, "softcap": 2.0},
]
# One token; less than a vector and not a multiple of one; vectors without a rest; with one; several blocks of either
# kernel (1024 and 4096) and a rest.
WIDTHS = (1, 7, 64, 211, 5000)
needs_narrow = pytest.mark.skipif(not INTERPRET, reason="on the CPU operands are never narrower than logits")


OfRow = tuple[Tensor, Tensor, Tensor]
"""Inputs of the gradient for each row: entropy, max and log_sum."""


@dataclass(frozen=True)
class Chunk:
    """Logits and what goes with them, in the order of the ops' arguments."""

    logits_CV: Tensor
    target_C: Tensor
    bias_V: Any  # a tensor or None, and so is h_C
    g_C: Tensor
    h_C: Any

    def double(self) -> Chunk:
        """The same in fp64, but for the target."""
        bias_V, h_C = (None if x is None else x.double() for x in (self.bias_V, self.h_C))
        return Chunk(self.logits_CV.double(), self.target_C, bias_V, self.g_C.double(), h_C)

    def stats(self, options: dict[str, Any]) -> Tensor:
        return logit_stats(self.logits_CV, self.target_C, self.bias_V, **options)

    def gradient(self, out_CV: Tensor, of_row: OfRow, options: dict[str, Any]) -> Tensor:
        """`out_CV`, written."""
        logit_gradient(out_CV, self.logits_CV, self.target_C, self.bias_V, self.g_C, self.h_C, *of_row, **options)
        return out_CV


def make(C: int, V: int, device: torch.device, bias: bool = True, h: bool = True, pad: int = 5) -> Chunk:
    """Logits of about 3 in rows `pad` numbers apart; every third target is another shard's, on either side."""
    generator = torch.Generator().manual_seed(1000 * C + V)
    memory = 3 * torch.randn(C, V + pad, generator=generator)
    target_C = torch.randint(0, max(V, 1), (C,), generator=generator)
    target_C[1::6], target_C[4::6] = V, -3
    bias_V, g_C = torch.randn(V, generator=generator).to(device), torch.randn(C, generator=generator).to(device)
    h_C = (torch.rand(C, generator=generator) - 0.5).to(device)
    logits_CV = memory.to(device)[:, :V]
    return Chunk(logits_CV, target_C.to(device), bias_V if bias else None, g_C, h_C if h else None)


def exact_stats(chunk: Chunk, options: dict[str, Any]) -> Tensor:
    chunk = chunk.double()
    return logit_stats_reference(chunk.logits_CV, chunk.target_C, chunk.bias_V, **options)


def of_row(stats_4C: Tensor) -> OfRow:
    _, entropy_C, max_C, log_sum_C = merge(stats_4C[None])
    return entropy_C, max_C, log_sum_C


def exact_gradient(chunk: Chunk, options: dict[str, Any], rows: OfRow | None = None) -> Tensor:
    """With the entropy, max and log_sum of the same distribution, or those given."""
    x = chunk.double()
    out_CV = torch.empty_like(x.logits_CV)
    entropy_C, max_C, log_sum_C = of_row(exact_stats(chunk, options)) if rows is None else rows
    of_row_64 = (entropy_C.double(), max_C.double(), log_sum_C.double())
    logit_gradient_reference(out_CV, x.logits_CV, x.target_C, x.bias_V, x.g_C, x.h_C, *of_row_64, **options)
    return out_CV


def assert_stats(stats_4C: Tensor, exact_4C: Tensor) -> None:
    """The same infinities too. The sums inherit the rounding of s, 1e-6 where s is 16."""
    assert stats_4C.dtype == torch.float32
    for of_s, rtol in ((0, 1e-6), (2, 1e-6), (1, RTOL), (3, RTOL)):
        torch.testing.assert_close(stats_4C[of_s].double(), exact_4C[of_s], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("V", WIDTHS)
def test_stats(V: int, bias: bool, options: dict[str, Any], device: torch.device) -> None:
    chunk = make(3, V, device, bias)
    assert_stats(chunk.stats(options), exact_stats(chunk, options))


# Rows: nothing, one, more than threads.
@pytest.mark.parametrize("C", [0, 1, 33])
def test_number_of_rows(C: int, device: torch.device) -> None:
    chunk = make(C, 211, device)
    stats_4C = chunk.stats(OPTIONS[2])
    assert_stats(stats_4C, exact_stats(chunk, OPTIONS[2]))
    out_CV = chunk.gradient(torch.empty_like(chunk.logits_CV), of_row(stats_4C), OPTIONS[2])
    assert relative_error(out_CV, exact_gradient(chunk, OPTIONS[2])) < RTOL


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("h", "in_place"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("V", WIDTHS)
def test_gradient(V: int, h: bool, in_place: bool, options: dict[str, Any], device: torch.device) -> None:
    C = 3
    chunk = make(C, V, device, bias=h, h=h)
    rows = of_row(chunk.stats(options))
    exact_CV = exact_gradient(chunk, options)
    before_CV = chunk.logits_CV.clone()
    out_CV = chunk.logits_CV if in_place else chunk.logits_CV.new_empty(C, V)
    chunk.gradient(out_CV, rows, options)
    # With one token of probability 1 the gradient is rounding errors.
    if V == 1:
        torch.testing.assert_close(out_CV.double(), exact_CV, rtol=0, atol=1e-6)
    else:
        assert relative_error(out_CV, exact_CV) < RTOL
    assert in_place or torch.equal(chunk.logits_CV, before_CV)


def test_gradient_is_that_of_logprob_and_entropy(device: torch.device) -> None:
    """By autograd through `merge`, whose derivative the op has to be: the reference shares the op's formula."""
    chunk, options = make(33, 211, device).double(), OPTIONS[2]
    chunk = replace(chunk, target_C=chunk.target_C.clamp(0, 210))
    logits_CV = chunk.logits_CV.clone().requires_grad_()
    z_CV = 2.0 * torch.tanh((logits_CV + chunk.bias_V) / 2.0)
    log_p_CV = (z_CV / 1.3).log_softmax(-1)
    logprob_C = log_p_CV.gather(1, chunk.target_C[:, None])[:, 0]
    entropy_C = -(log_p_CV.exp() * log_p_CV).sum(-1)
    (exact_CV,) = torch.autograd.grad((chunk.g_C * logprob_C + chunk.h_C * entropy_C).sum(), logits_CV)
    stats_4C = chunk.stats(options)
    assert stats_4C.dtype == torch.float64
    torch.testing.assert_close(merge(stats_4C[None])[0], logprob_C.detach())
    out_CV = chunk.gradient(torch.empty_like(logits_CV), of_row(stats_4C), options)
    assert relative_error(out_CV, exact_CV) < 1e-12


@pytest.mark.parametrize("options", OPTIONS)
def test_no_tokens(options: dict[str, Any], device: torch.device) -> None:
    chunk = make(3, 0, device, bias=False)
    assert chunk.stats(options).tolist() == [[-torch.inf] * 3, [0.0] * 3, [-torch.inf] * 3, [0.0] * 3]
    nothing = torch.zeros(3, device=device)
    assert chunk.gradient(chunk.logits_CV, (nothing, nothing, nothing), options).shape == (3, 0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("V", [7, 5000])
def test_extreme_logits(V: int, options: dict[str, Any], device: torch.device) -> None:
    """+-1e4. Divided by a temperature they round by 1e-3, all alike, so that the distribution stays exact."""
    chunk = make(8, V, device, bias=False)
    sign_CV = torch.where(chunk.logits_CV > 0, 1.0, -1.0)
    sign_CV[0], sign_CV[1] = 1, -1  # uniform, high and low
    chunk = replace(chunk, logits_CV=1e4 * sign_CV)
    stats_4C = chunk.stats(options)
    assert_stats(stats_4C, exact_stats(chunk, options))
    rows = of_row(stats_4C)
    out_CV = chunk.gradient(torch.empty_like(chunk.logits_CV), rows, options)
    assert out_CV.isfinite().all()
    assert relative_error(out_CV, exact_gradient(chunk, options)) < RTOL


@pytest.mark.parametrize("V", [7, 5000])
def test_rising_logits(V: int, device: torch.device) -> None:
    """Every block raises the maximum, by more than exp can hold; the sums so far must follow."""
    chunk = make(3, V, device, bias=False)
    rising_V = torch.linspace(-300, 0, V, device=device)
    chunk = replace(chunk, logits_CV=torch.stack([rising_V, rising_V / 100, rising_V.flip(0)]))
    assert_stats(chunk.stats(OPTIONS[0]), exact_stats(chunk, OPTIONS[0]))


@pytest.mark.parametrize("V", [7, 5000])
def test_bias_removes_tokens(V: int, device: torch.device) -> None:
    """A prefix longer than a block, so that a row begins without a maximum; the target of some rows among them."""
    options, removed = OPTIONS[1], V - 3
    chunk = make(6, V, device)
    chunk.bias_V[:removed] = -torch.inf
    chunk.target_C[:] = torch.tensor([0, removed - 1, removed, V - 1, V, -1], device=device)
    stats_4C = chunk.stats(options)
    assert_stats(stats_4C, exact_stats(chunk, options))
    assert stats_4C[2].isinf().tolist() == [True, True, False, False, True, True]
    rows = of_row(stats_4C)
    out_CV = chunk.gradient(torch.empty_like(chunk.logits_CV), rows, options)
    assert relative_error(out_CV, exact_gradient(chunk, options)) < RTOL
    assert torch.equal(out_CV[2:, :removed], torch.zeros(4, removed, device=device))


@pytest.mark.parametrize("V", [7, 5000])
def test_bias_removes_a_whole_shard(V: int, device: torch.device) -> None:
    chunk = make(6, V, device)
    chunk.bias_V[:] = -torch.inf
    stats_4C = chunk.stats(OPTIONS[0])
    assert stats_4C.tolist() == [[-torch.inf] * 6, [0.0] * 6, [-torch.inf] * 6, [0.0] * 6]
    whole = (torch.ones(6, device=device), torch.zeros(6, device=device), torch.ones(6, device=device))
    out_CV = chunk.gradient(torch.empty_like(chunk.logits_CV), whole, OPTIONS[0])
    assert torch.equal(out_CV, exact_gradient(chunk, OPTIONS[0], whole).float())


def test_nan_stays_visible(device: torch.device) -> None:
    chunk = make(3, 211, device)
    chunk.logits_CV[1, 100] = torch.nan
    for options in OPTIONS:
        rows = of_row(chunk.stats(options))
        assert rows[2].isnan().tolist() == [False, True, False]
        out_CV = chunk.gradient(torch.empty_like(chunk.logits_CV), rows, options)
        assert out_CV.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bias(dtype: torch.dtype, device: torch.device) -> None:
    chunk, options = make(5, 211, device), OPTIONS[0]
    chunk = replace(chunk, bias_V=chunk.bias_V.to(dtype))
    stats_4C = chunk.stats(options)
    assert_stats(stats_4C, exact_stats(chunk, options))
    rows = of_row(stats_4C)
    out_CV = chunk.gradient(torch.empty_like(chunk.logits_CV), rows, options)
    assert relative_error(out_CV, exact_gradient(chunk, options)) < RTOL


def test_targets_of_32_bits(device: torch.device) -> None:
    chunk = make(9, 211, device)
    short = replace(chunk, target_C=chunk.target_C.to(torch.int32))
    stats_4C = chunk.stats(OPTIONS[0])
    assert torch.equal(short.stats(OPTIONS[0]), stats_4C)
    outs = [x.gradient(torch.empty_like(x.logits_CV), of_row(stats_4C), OPTIONS[0]) for x in (chunk, short)]
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_narrow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("options", "dtype"), [(OPTIONS[0], torch.bfloat16), (OPTIONS[2], torch.float16)])
# A block's narrow values lie over wide ones of the same block, and in a longer row over those of an earlier block.
@pytest.mark.parametrize("V", [1, 211, 5000, 9001])
def test_narrow_gradient_in_place(V: int, options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    chunk = make(5, V, torch.device(device), pad=7)
    rows = of_row(chunk.stats(options))
    exact_CV = exact_gradient(chunk, options)
    apart_CV = chunk.gradient(torch.empty_like(chunk.logits_CV, dtype=dtype), rows, options)
    out_CV = reinterpreted(chunk.logits_CV, dtype)
    assert out_CV.shape == (5, V) and out_CV.data_ptr() == chunk.logits_CV.data_ptr()
    chunk.gradient(out_CV, rows, options)
    assert torch.equal(out_CV, apart_CV)
    assert relative_error(out_CV, exact_CV) < torch.finfo(dtype).eps  # the interpreter does not round to bf16 but cut


def test_rows_far_apart(device: torch.device) -> None:
    """The second row begins beyond 2^31 elements. The pages between are never touched, so they cost nothing."""
    stride, V, options = 2**31 + 64, 211, OPTIONS[0]
    try:
        memory = torch.empty(stride + V, device=device)
    except RuntimeError:
        pytest.skip("cannot reserve 8 GiB")
    near = make(2, V, device)
    far = replace(near, logits_CV=memory.as_strided((2, V), (stride, 1)).copy_(near.logits_CV))
    stats_4C = near.stats(options)
    assert torch.equal(far.stats(options), stats_4C)
    rows = of_row(stats_4C)
    expected_CV = near.gradient(torch.empty_like(near.logits_CV), rows, options)
    assert torch.equal(far.gradient(far.logits_CV, rows, options), expected_CV)


def test_logits_held(device: torch.device) -> None:
    """One tensor where both ops are kernels, so that a workspace holds as many rows."""
    kernels = {implementation(op, device.type) for op in ("logit_stats", "logit_gradient")}
    hidden = torch.empty(1, device=device)
    assert logits_held(hidden) == (4 if REFERENCE in kernels else 1)
    assert logits_held(hidden.double()) == 4
