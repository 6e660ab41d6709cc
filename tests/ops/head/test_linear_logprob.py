"""linear_logprob against dense logits in fp64. T loss rows, V vocabulary, D hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import RTOL, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_kernels import linear_logprob
from triton_kernels._common import INTERPRET
from triton_kernels.head.linear_logprob import (
    linear_logprob_bwd,
    linear_logprob_bwd_chunked,
    linear_logprob_fwd,
    linear_logprob_fwd_chunked,
    merge,
)

V, D = 211, 24
MANY = 80 if INTERPRET else 1000  # the interpreter takes a second for a hundred rows
PLAIN: dict[str, Any] = {"temperature": 1.0, "softcap": None}
OPTIONS = [PLAIN, {"temperature": 0.7, "softcap": None}, {"temperature": 1.3, "softcap": 2.0}]


def dense(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """logprob_T and entropy_T from all logits at once."""
    z_TV = hidden_TD @ weight_VD.T
    z_TV = z_TV if bias_V is None else z_TV + bias_V
    z_TV = z_TV if softcap is None else softcap * torch.tanh(z_TV / softcap)
    log_p_TV = (z_TV / temperature).log_softmax(-1)
    entropy_T = -(log_p_TV.exp() * log_p_TV.masked_fill(log_p_TV == -torch.inf, 0)).sum(-1)
    return log_p_TV.gather(1, target_T[:, None])[:, 0], entropy_T


def make(T: int, dtype: torch.dtype, device: torch.device, bias: bool = True) -> tuple[list[Tensor], Tensor]:
    """[hidden_TD (not contiguous), weight_VD, bias_V], which want gradients, and target_T."""
    generator = torch.Generator().manual_seed(T)
    hidden_TD = torch.randn(D, T, generator=generator).T
    weight_VD, bias_V = torch.randn(V, D, generator=generator) / 2, torch.randn(V, generator=generator)
    target_T = torch.randint(0, V, (T,), generator=generator).to(device)
    tensors = [hidden_TD, weight_VD, bias_V] if bias else [hidden_TD, weight_VD]
    return [x.to(device, dtype).requires_grad_() for x in tensors], target_T


def gradients(inputs: list[Tensor], logprob_T: Tensor, entropy_T: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a sum over both outputs with weights of both signs."""
    weight_T = torch.linspace(-1, 2, len(logprob_T), device=logprob_T.device, dtype=torch.float64)
    return torch.autograd.grad((weight_T * logprob_T + weight_T.flip(0) * entropy_T).sum(), inputs)


def fp64(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


# Nothing, one row, and enough for several chunks: 64 KiB hold 64 rows of 211 logits, or 16 where 4 are held.
@pytest.mark.parametrize(
    ("T", "bias", "options"),
    [(0, True, PLAIN), (1, False, OPTIONS[1]), (9, True, OPTIONS[1]), (9, False, OPTIONS[2]), (MANY, True, OPTIONS[2])],
)
def test_values_and_gradients(T: int, bias: bool, options: dict[str, Any], device: torch.device) -> None:
    inputs, target_T = make(T, torch.float32, device, bias)
    hidden_TD, weight_VD, bias_V = (*inputs, None)[:3]
    output = linear_logprob(hidden_TD, weight_VD, target_T, **options, bias_V=bias_V, workspace_bytes=2**16)
    exact_inputs = fp64(inputs)
    exact = dense(exact_inputs[0], exact_inputs[1], target_T, exact_inputs[2] if bias else None, **options)
    assert output.logprob_T.dtype == output.entropy_T.dtype == torch.float32
    for ours, theirs in zip((output.logprob_T, output.entropy_T), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=RTOL, atol=RTOL)
    pairs = zip(gradients(inputs, output.logprob_T, output.entropy_T), gradients(exact_inputs, *exact), strict=True)
    for ours, theirs in pairs:
        assert relative_error(ours, theirs) < RTOL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_fp32_logits(dtype: torch.dtype, device: torch.device) -> None:
    inputs, target_T = make(9, dtype, device)
    output = linear_logprob(*inputs[:2], target_T, bias_V=inputs[2])
    exact_inputs = fp64(inputs)
    exact = dense(*exact_inputs[:2], target_T, exact_inputs[2], **PLAIN)
    assert ((output.logprob_T - exact[0]).abs() <= RTOL * (1 + exact[0].abs())).all()
    assert ((output.entropy_T - exact[1]).abs() <= RTOL * (1 + exact[1].abs())).all()
    pairs = zip(gradients(inputs, output.logprob_T, output.entropy_T), gradients(exact_inputs, *exact), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < 4e-3


def test_extreme_logits(device: torch.device) -> None:
    # Whole numbers up to 1e4, so that the products are exact: two close ones on top, all equal, all far apart.
    logits_TV = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4], [1e4, 0, -1e4]], device=device)
    hidden_TD, weight_VD = torch.eye(3, device=device).requires_grad_(), logits_TV.T.contiguous().requires_grad_()
    target_T = torch.tensor([1, 2, 1], device=device)
    output = linear_logprob(hidden_TD, weight_VD, target_T)
    inputs = [hidden_TD, weight_VD]
    exact_inputs = fp64(inputs)
    exact = dense(*exact_inputs, target_T, None, **PLAIN)
    torch.testing.assert_close(output.logprob_T.double(), exact[0], rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(output.entropy_T.double(), exact[1], rtol=RTOL, atol=RTOL)
    pairs = zip(gradients(inputs, output.logprob_T, output.entropy_T), gradients(exact_inputs, *exact), strict=True)
    for ours, theirs in pairs:
        assert relative_error(ours, theirs) < RTOL


def test_bias_of_minus_infinity_removes_a_token(device: torch.device) -> None:
    (hidden_TD, weight_VD, bias_V), target_T = make(9, torch.float32, device)
    removed = 7
    target_T[target_T == removed] = 8
    with torch.no_grad():
        bias_V[removed] = -torch.inf
    output = linear_logprob(hidden_TD, weight_VD, target_T, bias_V=bias_V)
    ours = gradients([hidden_TD, weight_VD, bias_V], output.logprob_T, output.entropy_T)

    kept_V = torch.arange(V, device=device) != removed
    inputs = [hidden_TD.detach().double().requires_grad_(), weight_VD.detach()[kept_V].double().requires_grad_()]
    inputs.append(bias_V.detach()[kept_V].double().requires_grad_())
    exact = dense(inputs[0], inputs[1], target_T - (target_T > removed).long(), inputs[2], **PLAIN)
    theirs = gradients(inputs, *exact)
    torch.testing.assert_close(output.entropy_T.double(), exact[1], rtol=RTOL, atol=RTOL)
    assert relative_error(ours[0], theirs[0]) < RTOL
    assert relative_error(ours[1][kept_V], theirs[1]) < RTOL
    assert not ours[1][removed].any() and not ours[2][removed].any()


def test_target_removed_by_bias_has_logprob_minus_infinity(device: torch.device) -> None:
    (hidden_TD, weight_VD, bias_V), target_T = make(1, torch.float32, device)
    with torch.no_grad():
        bias_V[target_T] = -torch.inf
    output = linear_logprob(hidden_TD, weight_VD, target_T, bias_V=bias_V)
    assert output.logprob_T.item() == -torch.inf and output.entropy_T.isfinite().all()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_of_one_input_or_one_output_alone(wanted: int, device: torch.device) -> None:
    inputs, target_T = make(9, torch.float32, device)
    output = linear_logprob(*inputs[:2], target_T, bias_V=inputs[2])
    both = torch.autograd.grad(output.logprob_T.sum() + output.entropy_T.sum(), inputs[wanted])[0]
    alone = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    for_logprob = torch.autograd.grad(
        linear_logprob(*alone[:2], target_T, bias_V=alone[2]).logprob_T.sum(), alone[wanted]
    )
    for_entropy = torch.autograd.grad(
        linear_logprob(*alone[:2], target_T, bias_V=alone[2]).entropy_T.sum(), alone[wanted]
    )
    assert relative_error(for_logprob[0] + for_entropy[0], both) < RTOL


def test_scoring_keeps_no_graph(device: torch.device) -> None:
    inputs, target_T = make(1, torch.float32, device)
    with torch.no_grad():
        output = linear_logprob(*inputs[:2], target_T)
    assert not output.logprob_T.requires_grad and not output.entropy_T.requires_grad


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.no_interpret
def test_no_tensor_of_rows_times_vocabulary() -> None:
    # The references themselves: a dispatch mode sees a registered op from outside only.
    T = MANY
    (hidden_TD, weight_VD, bias_V), target_T = make(T, torch.float32, torch.device("cpu"))
    tensors = [x.detach() for x in (hidden_TD, weight_VD)]
    workspace_bytes = T * V  # a quarter of what the logits of all rows would take in fp32
    with Largest() as largest:
        stats_4T = linear_logprob_fwd_chunked(*tensors, target_T, bias_V.detach(), 1.0, 2.0, workspace_bytes)
        logprob_T, *saved = merge(stats_4T[None])
        linear_logprob_bwd_chunked(
            logprob_T, logprob_T, *tensors, target_T, bias_V.detach(), *saved, 1.0, 2.0, workspace_bytes, [True] * 3
        )
    assert max(T * D, V * D) <= largest.numel <= max(T * D, V * D, workspace_bytes // 4)


def test_chunks_do_not_change_the_result(device: torch.device) -> None:
    inputs, target_T = make(1000, torch.float64, device)
    results = []
    for workspace_bytes in (1, 2**16, None):  # one row at a time, many chunks, one chunk
        output = linear_logprob(*inputs[:2], target_T, bias_V=inputs[2], workspace_bytes=workspace_bytes)
        results.append((output.logprob_T, output.entropy_T, *gradients(inputs, output.logprob_T, output.entropy_T)))
    for x, y, z in zip(*results, strict=True):
        torch.testing.assert_close(x, z)
        torch.testing.assert_close(y, z)


@pytest.mark.no_interpret  # what opcheck asks does not depend on what serves the op
@pytest.mark.parametrize(("bias", "options"), [(False, OPTIONS[0]), (True, OPTIONS[2])])
def test_opcheck(bias: bool, options: dict[str, Any], device: torch.device) -> None:
    inputs, target_T = make(5, torch.float32, device, bias)
    hidden_TD, weight_VD, bias_V = (*inputs, None)[:3]
    settings = (*options.values(), 2**12)
    tensors = [None if x is None else x.detach() for x in (hidden_TD, weight_VD, target_T, bias_V)]
    torch.library.opcheck(linear_logprob_fwd, (*tensors, *settings))
    logprob_T, *saved = merge(linear_logprob_fwd(*tensors, *settings)[None])
    for needs in ([True, True, bias], [False, True, False]):
        torch.library.opcheck(linear_logprob_bwd, (logprob_T, None, *tensors, *saved, *settings, needs))


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_pieces_of_the_vocabulary_merge_to_the_whole(options: dict[str, Any], device: torch.device) -> None:
    # One device plays all ranks: nothing, most, one token that the bias removes, nothing, the rest.
    cuts = [0, 0, 150, 151, 151, V]
    inputs, target_T = make(9, torch.float32, device)
    target_T[target_T == 150] = 0
    with torch.no_grad():
        inputs[2][150] = -torch.inf
    hidden_TD, weight_VD, bias_V = (x.detach() for x in inputs)
    settings = (*options.values(), 2**12)
    shards = [
        (hidden_TD, weight_VD[start:stop], target_T - start, bias_V[start:stop])
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    logprob_T, *saved = merge(torch.stack([linear_logprob_fwd(*shard, *settings) for shard in shards]))
    whole = linear_logprob(*inputs[:2], target_T, bias_V=inputs[2], **options)
    torch.testing.assert_close(logprob_T, whole.logprob_T, rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(saved[0], whole.entropy_T, rtol=RTOL, atol=RTOL)
    parts = [linear_logprob_bwd(logprob_T, logprob_T, *shard, *saved, *settings, [True] * 3) for shard in shards]
    dhidden, dweight, dbias = zip(*parts, strict=True)
    ours = [torch.stack(dhidden).sum(0), torch.cat(dweight), torch.cat(dbias)]
    theirs = torch.autograd.grad((logprob_T * (whole.logprob_T + whole.entropy_T)).sum(), inputs)
    for x, y in zip(ours, theirs, strict=True):
        assert relative_error(x, y) < RTOL


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, Any], device: torch.device) -> None:
    (hidden_TD, weight_VD, bias_V), target_T = make(3, torch.float64, device)
    inputs = [x.detach().requires_grad_() for x in (hidden_TD[:, :4], weight_VD[:11, :4], bias_V[:11])]

    def both(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
        output = linear_logprob(hidden_TD, weight_VD, target_T % 11, bias_V=bias_V, **options)
        return output.logprob_T, output.entropy_T

    assert torch.autograd.gradcheck(both, inputs)


def test_same_bits_every_time(device: torch.device) -> None:
    inputs, target_T = make(9 if INTERPRET else MANY, torch.float32, device)
    runs = []
    for _ in range(2):
        output = linear_logprob(*inputs[:2], target_T, bias_V=inputs[2])
        runs.append((output.logprob_T, *gradients(inputs, output.logprob_T, output.entropy_T)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias_V": torch.zeros(3)}, r"bias_V must have the shape \[5\]; got \[3\]"),
        ({"target_T": torch.tensor([0, 5])}, r"target_T must lie in 0..4; got 5"),
        ({"target_T": torch.tensor([-1, 0])}, r"target_T must lie in 0..4; got -1"),
        ({"target_T": torch.tensor([0.0, 1.0])}, "target_T must hold int32, int64; got torch.float32"),
        ({"weight_VD": torch.zeros(5, 4)}, r"weight_VD must have the shape \[V, 3\]; got \[5, 4\]"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden_TD": torch.zeros(2, 3), "weight_VD": torch.zeros(5, 3), "target_T": torch.tensor([0, 4])}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | change))
