"""linear_kl against dense log-softmaxes in fp64. T rows, V vocabulary, D and E hidden sizes of policy and reference."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import pytest
import torch
from cases import RTOL, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_kernels import linear_kl
from triton_kernels.head.kl_logits import kl_gradient, kl_gradient_reference, kl_stats, kl_stats_reference, merge_kl
from triton_kernels.head.linear_kl import linear_kl_bwd, linear_kl_bwd_chunked, linear_kl_fwd, linear_kl_fwd_chunked
from triton_kernels.head.logits import reinterpreted

V, D, E = 211, 12, 20
TWO_BLOCKS = 4099
"""A vocabulary of more than one block of the Triton kernels, and not a multiple of any."""

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5, "softcap": 3.0},
    {"temperature": 2.0, "softcap": 2.0, "ref_softcap": 5.0},
]


def make(T: int, V: int, device: torch.device, dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Any]:
    """[hidden, weight, bias] of the policy, then of the reference, which want gradients; a bias may be None.

    Hidden states are not contiguous.
    """
    generator = torch.Generator().manual_seed(T)
    tensors: list[Any] = []
    for width in (D, E):
        hidden = torch.randn(width, T, generator=generator).T
        tensors += [hidden, torch.randn(V, width, generator=generator) / 2, torch.randn(V, generator=generator)]
    return [x.to(device, dtype).requires_grad_() if bias or x.dim() > 1 else None for x in tensors]


def fp64(heads: list[Any]) -> list[Any]:
    return [None if x is None else x.detach().double().requires_grad_() for x in heads]


def fused(heads: list[Any], **options: Any) -> Tensor:
    hidden_TD, weight_VD, bias_V, ref_hidden_TE, ref_weight_VE, ref_bias_V = heads
    return linear_kl(
        hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE, bias_V=bias_V, ref_bias_V=ref_bias_V, **options
    )


def log_softmax(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    z_TV = hidden_TD @ weight_VD.T
    z_TV = z_TV if bias_V is None else z_TV + bias_V
    z_TV = z_TV if softcap is None else softcap * torch.tanh(z_TV / softcap)
    return (z_TV / temperature).log_softmax(-1)


def dense(
    heads: list[Any], temperature: float = 1.0, softcap: float | None = None, ref_softcap: float | None = None
) -> Tensor:
    """sum_v p_v (log p_v - log q_v) from all logits at once."""
    log_p_TV = log_softmax(*heads[:3], temperature, softcap)
    log_q_TV = log_softmax(*heads[3:], temperature, ref_softcap)
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)


def gradients(heads: list[Any], kl_T: Tensor) -> list[Tensor]:
    """Gradients of a sum with weights of both signs, by every tensor that is given."""
    weight_T = torch.linspace(-1, 2, len(kl_T), device=kl_T.device, dtype=torch.float64)
    return list(torch.autograd.grad((weight_T * kl_T).sum(), [x for x in heads if x is not None]))


def assert_same(heads: list[Any], kl_T: Tensor, exact_heads: list[Any], exact_T: Tensor) -> None:
    """The rule for fp32: values and every gradient within 1e-5."""
    torch.testing.assert_close(kl_T.double(), exact_T, rtol=RTOL, atol=RTOL)
    for ours, theirs in zip(gradients(heads, kl_T), gradients(exact_heads, exact_T), strict=True):
        assert relative_error(ours, theirs) < RTOL


@pytest.mark.parametrize(("bias", "options"), [(False, OPTIONS[0]), (True, OPTIONS[1]), (True, OPTIONS[2])])
# Nothing, one row of two blocks, and enough for several chunks: 16 KiB hold 8 rows of both heads' logits.
@pytest.mark.parametrize(("T", "V"), [(0, V), (1, TWO_BLOCKS), (19, V)])
def test_values_and_gradients(T: int, V: int, bias: bool, options: dict[str, Any], device: torch.device) -> None:
    heads = make(T, V, device, bias=bias)
    exact_heads = fp64(heads)
    kl_T = fused(heads, workspace_bytes=2**14, **options)
    assert kl_T.dtype == torch.float32 and (kl_T > 0).all()
    assert_same(heads, kl_T, exact_heads, dense(exact_heads, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_fp32_logits(dtype: torch.dtype, device: torch.device) -> None:
    heads = make(9, V, device, dtype)
    exact_heads = fp64(heads)
    kl_T, exact_T = fused(heads), dense(exact_heads)
    assert ((kl_T - exact_T).abs() <= RTOL * (1 + exact_T)).all()
    for ours, theirs in zip(gradients(heads, kl_T), gradients(exact_heads, exact_T), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < 4e-3


def from_logits(logits_TV: Tensor, ref_logits_TV: Tensor) -> list[Any]:
    """Heads whose logits are these, exactly: hidden states are rows of the identity."""
    heads: list[Any] = []
    for x_TV in (logits_TV, ref_logits_TV):
        heads += [torch.eye(len(x_TV), device=x_TV.device), x_TV.T.contiguous(), None]
    return [None if x is None else x.requires_grad_() for x in heads]


def test_extreme_logits(device: torch.device) -> None:
    # Each head puts its mass elsewhere and far above the rest, in each order of the blocks; close ones on top; equal.
    logits_TV = torch.full((4, TWO_BLOCKS), -1e4, device=device)
    ref_logits_TV = logits_TV.clone()
    logits_TV[0, 5], ref_logits_TV[0, -1] = 1e4, 1e4
    logits_TV[1, -1], ref_logits_TV[1, 5] = 1e4, 1e4
    logits_TV[2, 5], logits_TV[2, -1], ref_logits_TV[2, -2:] = 1e4 - 1, 1e4, torch.tensor([1e4, 1e4 - 2])
    heads = from_logits(logits_TV, ref_logits_TV)
    exact_heads = fp64(heads)
    kl_T = fused(heads)
    torch.testing.assert_close(kl_T[:2], torch.full((2,), 2e4, device=device), rtol=RTOL, atol=0)
    assert kl_T[3] == 0
    assert_same(heads, kl_T, exact_heads, dense(exact_heads))


@pytest.mark.parametrize("options", OPTIONS[:1] + [{"temperature": 0.5}])
# A token of each block, and a whole block.
@pytest.mark.parametrize("removed", [[7, 4098], list(range(4096))])
def test_tokens_removed_by_both_heads_count_nothing(
    removed: list[int], options: dict[str, Any], device: torch.device
) -> None:
    heads = make(3, TWO_BLOCKS, device)
    kept_V = torch.ones(TWO_BLOCKS, dtype=torch.bool, device=device)
    kept_V[removed] = False
    with torch.no_grad():
        for bias_V in (heads[2], heads[5]):
            bias_V[~kept_V] = -torch.inf
    kl_T = fused(heads, **options)
    ours = gradients(heads, kl_T)
    exact_heads = fp64([x if i % 3 == 0 else x[kept_V] for i, x in enumerate(heads)])
    exact_T = dense(exact_heads, **options)
    torch.testing.assert_close(kl_T.double(), exact_T, rtol=RTOL, atol=RTOL)
    for i, (x, y) in enumerate(zip(ours, gradients(exact_heads, exact_T), strict=True)):
        assert i % 3 == 0 or not x[~kept_V].any()
        assert relative_error(x if i % 3 == 0 else x[kept_V], y) < RTOL


def test_a_token_removed_by_the_policy_alone_adds_nothing(device: torch.device) -> None:
    heads = make(9, V, device)
    with torch.no_grad():
        heads[2][7] = -torch.inf
    exact_heads = fp64(heads)
    with torch.no_grad():
        exact_heads[2][7] = -1e4  # p is 0 in fp64 too, without 0 * inf
    assert_same(heads, fused(heads), exact_heads, dense(exact_heads))


@pytest.mark.parametrize("removed", [7, 4098])
def test_a_token_removed_by_the_reference_alone_makes_the_kl_infinite(removed: int, device: torch.device) -> None:
    logits_TV, ref_logits_TV = torch.randn(2, 3, TWO_BLOCKS, generator=torch.Generator().manual_seed(0)).to(device)
    block = slice(0, 4096) if removed < 4096 else slice(4096, None)
    logits_TV[1, block] = -1e4  # in this row the policy never takes the token, which is a likely one of its block
    heads = from_logits(logits_TV, ref_logits_TV)
    heads[5] = torch.zeros(TWO_BLOCKS, device=device)
    heads[5][removed] = -torch.inf
    kl_T = fused(heads)
    assert kl_T[[0, 2]].tolist() == [torch.inf] * 2
    exact_heads = fp64(heads)
    exact_heads[5] = exact_heads[5].detach().clamp(min=-1e4)
    exact_T = dense(exact_heads)
    torch.testing.assert_close(kl_T[1].double(), exact_T[1], rtol=RTOL, atol=RTOL)
    # Rows with an upstream gradient of 0 add nothing, infinite or not.
    inputs, exact_inputs = ([x for x in these if x is not None and x.requires_grad] for these in (heads, exact_heads))
    theirs = torch.autograd.grad(exact_T[1], exact_inputs[:4])
    for x, y in zip(torch.autograd.grad(kl_T[1], inputs), theirs, strict=True):
        assert relative_error(x, y) < RTOL


def test_equal_heads_have_no_divergence(device: torch.device) -> None:
    policy = make(7, TWO_BLOCKS, device)[:3]
    heads = [*policy, *(x.detach().clone().requires_grad_() for x in policy)]
    kl_T = fused(heads, softcap=3.0, ref_softcap=3.0, temperature=0.7, workspace_bytes=2**19)
    assert not kl_T.any()
    assert not any(gradient.any() for gradient in gradients(heads, kl_T))


def test_small_divergence_is_not_negative_beyond_rounding(device: torch.device) -> None:
    heads = make(9, TWO_BLOCKS, device)
    heads[3:] = [(x.detach() * (1 + 1e-3)).requires_grad_() for x in heads[:3]]
    kl_T, exact_T = fused(heads), dense(fp64(heads))
    assert exact_T.max() < 1e-3
    assert ((kl_T - exact_T).abs() < 5e-6).all() and (kl_T > -1e-6).all()


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {3}, {4}, {5}, {0, 1, 2}, {3, 4, 5}, {1, 3}])
def test_gradients_only_where_wanted(wanted: set[int], device: torch.device) -> None:
    heads = make(7, V, device)
    everything = gradients(heads, fused(heads))
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(heads)]
    weight_T = torch.linspace(-1, 2, 7, device=device, dtype=torch.float64)
    (weight_T * fused(some)).sum().backward()
    for i, (x, y) in enumerate(zip(some, everything, strict=True)):
        assert (x.grad is None) == (i not in wanted)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y)


def test_swapped_heads_give_the_other_direction(device: torch.device) -> None:
    heads = make(7, V, device)
    exact_heads = fp64(heads)
    kl_T = fused([*heads[3:], *heads[:3]], temperature=0.8, softcap=3.0, ref_softcap=5.0)
    exact_T = dense([*exact_heads[3:], *exact_heads[:3]], temperature=0.8, softcap=3.0, ref_softcap=5.0)
    assert_same(heads, kl_T, exact_heads, exact_T)
    assert ((kl_T - fused(heads, temperature=0.8, softcap=5.0, ref_softcap=3.0)).abs() > 1e-2).any()


def test_scoring_saves_nothing(device: torch.device) -> None:
    heads, saved = make(5, V, device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            assert not fused(heads).requires_grad
        fused([x.detach() for x in heads])
        assert not saved
        fused(heads)
    assert saved


class Memory(TorchDispatchMode):
    """Bytes of the tensors made inside, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def forget(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in given | self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result


@pytest.mark.no_interpret
@pytest.mark.parametrize("bias", [False, True])
def test_memory_is_bounded_by_the_workspace(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The references themselves: a dispatch mode sees a registered op from outside only.
    module = importlib.import_module("triton_kernels.head.linear_kl")  # the package has the function by this name
    monkeypatch.setattr(module, "kl_stats", kl_stats_reference)
    monkeypatch.setattr(module, "kl_gradient", kl_gradient_reference)
    T, V, workspace_bytes = 400, 501, 2**18
    heads = [None if x is None else x.detach() for x in make(T, V, torch.device("cpu"), bias=bias)]
    settings, needs = (0.7, 2.0, 3.0, workspace_bytes), [True, True, bias] * 2
    with Memory() as forward:
        stats_5T = linear_kl_fwd_chunked(*heads, *settings)
    _, rows_5T = merge_kl(stats_5T[None])
    with Memory() as backward:
        results = linear_kl_bwd_chunked(stats_5T[1], *heads, rows_5T, *settings, needs)
    few = 2**13  # what is of the rows of a chunk alone
    for peak, kept in ((forward.most, stats_5T.nbytes), (backward.most, sum(x.nbytes for x in results))):
        assert workspace_bytes / 2 < peak - kept <= workspace_bytes + few < T * V * 4 / 2


def test_chunks_do_not_change_the_result(device: torch.device) -> None:
    heads = make(64, V, device, torch.float64)
    results = []
    for workspace_bytes in (1, 2**17, None):  # one row at a time, several chunks, one chunk
        kl_T = fused(heads, workspace_bytes=workspace_bytes)
        results.append((kl_T, *gradients(heads, kl_T)))
    for x, y, z in zip(*results, strict=True):
        torch.testing.assert_close(x, z)
        torch.testing.assert_close(y, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradient_in_the_memory_of_the_logits(
    wanted: tuple[bool, bool], dtype: torch.dtype, device: torch.device
) -> None:
    # Rows are padded, as linear_kl's are.
    generator = torch.Generator().manual_seed(0)
    memory_2CV = torch.randn(2, 5, 4160, generator=generator).to(device)
    logits_CV, ref_logits_CV = memory_2CV[:, :, :TWO_BLOCKS]
    settings = (0.7, 2.0, None)
    _, rows_5C = merge_kl(kl_stats(logits_CV, ref_logits_CV, None, None, *settings)[None])
    g_C = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], device=device)
    expected = [torch.empty_like(x, dtype=torch.float64) for x in (logits_CV, ref_logits_CV)]
    exact = [x.double() for x in (logits_CV, ref_logits_CV)]
    kl_gradient_reference(*exact, *expected, None, None, g_C.double(), rows_5C.double(), *settings)
    outs = [
        reinterpreted(x, dtype) if want else None for x, want in zip((logits_CV, ref_logits_CV), wanted, strict=True)
    ]
    kl_gradient(logits_CV, ref_logits_CV, *outs, None, None, g_C, rows_5C, *settings)
    for out_CV, exact_CV, logits, before in zip(outs, expected, (logits_CV, ref_logits_CV), exact, strict=True):
        if out_CV is None:
            assert torch.equal(logits.double(), before)
        else:
            assert out_CV.data_ptr() == logits.data_ptr() and not out_CV[2].any()
            assert relative_error(out_CV, exact_CV) < (RTOL if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_pieces_of_the_vocabulary_merge_to_the_whole(options: dict[str, Any], device: torch.device) -> None:
    # One device plays all ranks: nothing, most, one token (which both biases remove, unless a softcap brings it back),
    # nothing, the rest.
    cuts, needs = [0, 0, 150, 151, 151, V], [True] * 6
    heads = make(7, V, device)
    if "softcap" not in options:
        with torch.no_grad():
            heads[2][150] = heads[5][150] = -torch.inf
    kl_T = fused(heads, **options)
    settings = (options["temperature"], options.get("softcap"), options.get("ref_softcap"), 2**16)
    shards = [
        [x.detach() if i % 3 == 0 else x.detach()[start:stop] for i, x in enumerate(heads)]
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    merged_T, rows_5T = merge_kl(torch.stack([linear_kl_fwd(*shard, *settings) for shard in shards]))
    torch.testing.assert_close(merged_T, kl_T, rtol=RTOL, atol=RTOL)
    grad_T = torch.linspace(-1, 2, 7, device=device)
    parts = [linear_kl_bwd(grad_T, *shard, rows_5T, *settings, needs) for shard in shards]
    for i, (part, whole) in enumerate(zip(zip(*parts, strict=True), gradients(heads, kl_T), strict=True)):
        assert relative_error(torch.stack(part).sum(0) if i % 3 == 0 else torch.cat(part), whole) < RTOL


@pytest.mark.no_interpret  # what opcheck asks does not depend on what serves the op
@pytest.mark.parametrize(("bias", "options"), [(False, OPTIONS[0]), (True, OPTIONS[1])])
def test_opcheck(bias: bool, options: dict[str, Any], device: torch.device) -> None:
    heads = [None if x is None else x.detach() for x in make(5, V, device, bias=bias)]
    settings = (options["temperature"], options.get("softcap"), options.get("ref_softcap"))
    torch.library.opcheck(linear_kl_fwd, (*heads, *settings, 2**16))
    kl_T, rows_5T = merge_kl(linear_kl_fwd(*heads, *settings, 2**16)[None])
    for needs in ([True, True, bias] * 2, [False, True, False, False, False, False]):
        torch.library.opcheck(linear_kl_bwd, (kl_T, *heads, rows_5T, *settings, 2**16, needs))
    logits = (heads[0] @ heads[1].T, heads[3] @ heads[4].T)
    torch.library.opcheck(kl_stats, (*logits, heads[2], heads[5], *settings))
    outs = [torch.empty_like(x) for x in logits]
    for wanted in (outs, [outs[0], None]):
        torch.library.opcheck(kl_gradient, (*logits, *wanted, heads[2], heads[5], kl_T, rows_5T, *settings))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, Any], device: torch.device) -> None:
    heads = [x.detach()[:11, :4] if x.dim() > 1 else x.detach()[:11] for x in make(3, V, device, torch.float64)]
    assert torch.autograd.gradcheck(lambda *heads: fused(list(heads), **options), [x.requires_grad_() for x in heads])


def test_same_bits_every_time(device: torch.device) -> None:
    heads = make(9, V, device)
    runs = []
    for _ in range(2):
        kl_T = fused(heads, workspace_bytes=2**16)
        runs.append((kl_T, *gradients(heads, kl_T)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_softcap": 0.0}, "ref_softcap must be a finite number above 0, or None for off; got 0.0"),
        ({"bias_V": torch.zeros(3)}, r"^bias_V must have the shape \[5\]; got \[3\]"),
        ({"ref_bias_V": torch.zeros(3)}, r"ref_bias_V must have the shape \[5\]; got \[3\]"),
        ({"weight_VD": torch.zeros(5, 4)}, r"^weight_VD must have the shape \[V, 3\]; got \[5, 4\]"),
        ({"ref_hidden_TE": torch.zeros(2, 3)}, r"ref_weight_VE must have the shape \[V, 3\]; got \[5, 4\]"),
        ({"ref_hidden_TE": torch.zeros(3, 4)}, "must have the same rows; got 2 and 3"),
        ({"ref_weight_VE": torch.zeros(6, 4)}, "must have the same vocabulary; got 5 and 6"),
        ({"hidden_TD": torch.zeros(2, 3).double(), "weight_VD": torch.zeros(5, 3).double()}, "fp64 goes with fp64"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_TD": torch.zeros(2, 3),
        "weight_VD": torch.zeros(5, 3),
        "ref_hidden_TE": torch.zeros(2, 4),
        "ref_weight_VE": torch.zeros(5, 4),
    }
    with pytest.raises(ValueError, match=message):
        linear_kl(**(arguments | change))
