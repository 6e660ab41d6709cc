"""packed_attention against a dense mask in fp64. T packed tokens, H query heads, J key heads, K head size."""

from __future__ import annotations

import pytest
import torch
from cases import RTOL, assert_at_most_twice_as_far, relative_error
from packed_cases import GROUPS, K_VALUE, SEQUENCES, Groups, K, dense, gradients, layout_of, make

from triton_kernels import packed_attention
from triton_kernels._common import INTERPRET
from triton_kernels.attention import launch
from triton_kernels.attention.packed_attention import packed_attention_bwd_reference, packed_attention_fwd_reference

# (sequences or groups, (query heads, key heads), window), for every implementation: the interpreter takes 60 ms for
# each tile of queries and head. Tiles of fp32 have 64 or 32 rows.
CASES: list[tuple[list[int] | Groups, tuple[int, int], int | None]] = [
    (GROUPS, (2, 1), None),
    (GROUPS, (2, 2), 5),
    (SEQUENCES, (1, 1), None),  # 200 tokens: their keys are seen by so many queries that they are cut among programs
    (SEQUENCES, (2, 2), 40),
    ([(70, [33, 0, 33, 33, 33])], (2, 1), None),  # the same of a prompt
    ([(70, [65, 65])], (2, 2), 30),  # a window that ends in the prompt
    ([(63, [64, 0])], (4, 1), 2**40),  # a window longer than any path, and than 32 bits
    ([(1, [1])], (1, 1), None),
    ([1], (1, 1), 1),
    ([0], (2, 1), None),
    ([(0, [])], (1, 1), None),
]


@pytest.mark.parametrize(("sequences", "heads", "window"), CASES)
def test_values_and_gradients(
    sequences: list[int] | Groups, heads: tuple[int, int], window: int | None, device: torch.device
) -> None:
    check(sequences, heads, window, device)


@pytest.mark.no_interpret
@pytest.mark.parametrize(
    ("sequences", "heads", "window"),
    [
        ([(70, [6] * 64), (33, [2] * 7)], (2, 1), None),  # 64 responses and 7
        ([(300, [100] * 7)], (4, 1), 64),
        ([1000, 65], (8, 1), None),
        ([(90, [1000, 63])], (4, 4), 1),
    ],
)
def test_long_segments_and_many_responses(
    sequences: list[int] | Groups, heads: tuple[int, int], window: int | None, device: torch.device
) -> None:
    check(sequences, heads, window, device)


@pytest.mark.slow
@pytest.mark.no_interpret
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 1)])
@pytest.mark.parametrize("sequences", [GROUPS, SEQUENCES, [(300, [100] * 7)], [1000, 65], [(90, [1000, 63])]])
def test_all_combinations(
    sequences: list[int] | Groups, heads: tuple[int, int], window: int | None, device: torch.device
) -> None:
    check(sequences, heads, window, device)


def check(sequences: list[int] | Groups, heads: tuple[int, int], window: int | None, device: torch.device) -> None:
    layout = layout_of(sequences, device)
    inputs = make(layout.num_tokens, heads, torch.float32, device)
    output = packed_attention(*inputs, layout, window=window, return_lse=True)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, sequences, K**-0.5, window)
    ours, theirs = (*output, *gradients(inputs, *output)), (*exact, *gradients(exact_inputs, *exact))
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape and x.dtype == torch.float32
        assert relative_error(x.detach(), y.detach()) < RTOL


@pytest.mark.parametrize(("sequences", "heads", "window"), CASES)
def test_the_reference(sequences: list[int] | Groups, heads: tuple[int, int], window: int | None) -> None:
    """The oracle of other tests, and what serves fp64, against autograd of a dense mask."""
    layout = layout_of(sequences, torch.device("cpu"))
    inputs = make(layout.num_tokens, heads, torch.float64, torch.device("cpu"))
    arguments = (layout.positions_T, layout.segments_N5, [], 0.3, window)
    out, lse_HT = packed_attention_fwd_reference(*(x.detach() for x in inputs), *arguments)
    exact = dense(*inputs, sequences, 0.3, window)
    grad_out, grad_lse_HT = torch.randn_like(out), torch.randn_like(lse_HT)
    saved = (*(x.detach() for x in inputs), out, lse_HT)
    ours = packed_attention_bwd_reference(grad_out, grad_lse_HT, *saved, *arguments)
    theirs = torch.autograd.grad(exact, inputs, (grad_out, grad_lse_HT.T))
    for x, y in zip((out, lse_HT.T, *ours), (*exact, *theirs), strict=True):
        torch.testing.assert_close(x, y.detach())


def test_repeated_prompts_give_the_same(device: torch.device) -> None:
    # The shared prompt's gradient is the sum over the copies.
    prompt, responses = 9, [5, 0, 11]
    shared = layout_of([(prompt, responses)], device)
    repeated = layout_of([prompt + length for length in responses], device)
    starts = [prompt + sum(responses[:i]) for i in range(len(responses))]
    rows = [[*range(prompt), *range(at, at + n)] for at, n in zip(starts, responses, strict=True)]
    row = torch.tensor(sum(rows, []), device=device)
    inputs = make(shared.num_tokens, (4, 2), torch.float64, device)
    out, out_repeated = packed_attention(*inputs, shared), packed_attention(*(x[row] for x in inputs), repeated)
    torch.testing.assert_close(out[row], out_repeated)
    assert torch.equal(shared.positions_T[row], repeated.positions_T)
    is_response_T = torch.arange(len(row), device=device) >= 0
    at = 0
    for length in responses:
        is_response_T[at : at + prompt] = False
        at += prompt + length
    ours = torch.autograd.grad(out[prompt:].sin().sum(), inputs)
    theirs = torch.autograd.grad(out_repeated[is_response_T].sin().sum(), inputs)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    groups: Groups = [(64, [1, 63]), (0, [4]), (1, [65])]
    layout = layout_of(groups, device)
    inputs = make(layout.num_tokens, (2, 1), dtype, device)
    output = packed_attention(*inputs, layout, return_lse=True)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, groups, K**-0.5, None)
    assert relative_error(output[1].detach(), exact[1].detach()) < RTOL  # statistics are fp32
    ours, theirs = (output[0], *gradients(inputs, *output)), (exact[0], *gradients(exact_inputs, *exact))
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == dtype
        assert relative_error(x.detach(), y.detach()) < 4e-3


@pytest.mark.parametrize("architecture", [None, *launch.TILES])
@pytest.mark.parametrize("sizes", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (80, 72)])
def test_tiles_of_every_head_size(
    sizes: tuple[int, int], architecture: str | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the tiles of half precision, those of other GPUs through the interpreter."""
    if INTERPRET == (architecture is None):
        pytest.skip("the device's own tiles; those of every GPU under TRITON_INTERPRET=1")
    if architecture is not None:
        monkeypatch.setattr(launch, "architecture", lambda _: architecture)
    # 130: one row more than the longest tile, and a whole block of keys for the response after it.
    groups: Groups = [(130, [5, 0]), (3, [1])]
    layout = layout_of(groups, device)
    inputs = make(layout.num_tokens, (2, 1), torch.float16, device, *sizes)
    output = packed_attention(*inputs, layout, return_lse=True)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, groups, sizes[0] ** -0.5, None)
    plain_inputs = [x.detach().requires_grad_() for x in inputs]
    plain = dense(*plain_inputs, groups, sizes[0] ** -0.5, None)
    assert relative_error(output[1].detach(), exact[1].detach()) < RTOL  # statistics are fp32
    ours, reference, theirs = (
        (o[0], *gradients(x, *o)) for x, o in ((inputs, output), (plain_inputs, plain), (exact_inputs, exact))
    )
    for x, y, z in zip(ours, reference, theirs, strict=True):
        assert_at_most_twice_as_far(x.detach(), y.detach(), z.detach())


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_scores(extreme: float, device: torch.device) -> None:
    groups: Groups = [(33, [40, 2]), (0, [4])]
    layout = layout_of(groups, device)
    # Whole numbers tie. The largest score becomes 1e4, where an fp32 lse resolves 1e-3, and so p is good to 1e-3.
    inputs = [x.detach().round().requires_grad_() for x in make(layout.num_tokens, (2, 1), torch.float32, device)]
    with torch.no_grad():
        inputs[0].mul_(extreme / abs(extreme))
    scale = abs(extreme) / float(torch.einsum("thk,sjk->thsj", inputs[0].detach(), inputs[1].detach()).abs().max())
    output = packed_attention(*inputs, layout, scale=scale, return_lse=True)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, groups, scale, None)
    assert relative_error(output[1].detach(), exact[1].detach()) < RTOL
    ours, theirs = (output[0], *gradients(inputs, *output)), (exact[0], *gradients(exact_inputs, *exact))
    for x, y in zip(ours, theirs, strict=True):
        assert relative_error(x.detach(), y.detach()) < 2e-3


@pytest.mark.parametrize(("poisoned", "what"), [(0, "all"), (1, "keys and values"), (2, "all")])
def test_a_response_cannot_reach_the_others(poisoned: int, what: str, device: torch.device) -> None:
    prompt, length, responses = 9, 5, 3
    layout = layout_of([(prompt, [length] * responses)], device)
    inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
    first = prompt + poisoned * length
    bad_T = torch.zeros(layout.num_tokens, dtype=torch.bool, device=device)
    bad_T[first : first + length] = True
    results = []
    for value in (None, torch.nan, torch.inf):
        dirty = [x.detach().clone() for x in inputs]
        if value is not None:
            for x in dirty if what == "all" else dirty[1:]:
                x[bad_T] = value
        dirty = [x.requires_grad_() for x in dirty]
        out, lse_TH = packed_attention(*dirty, layout, return_lse=True)
        dq, dk, dv = gradients(dirty, out, lse_TH)
        # The gradients of the prompt's keys and values are sums over all responses.
        own_T = ~bad_T
        own_T[:prompt] = False
        results.append((out[~bad_T], lse_TH[~bad_T], dq[~bad_T], dk[own_T], dv[own_T]))
    for dirty in results[1:]:
        for x, y in zip(results[0], dirty, strict=True):
            assert torch.equal(x, y)


def test_responses_may_come_in_any_order(device: torch.device) -> None:
    prompt, lengths = 70, [33, 5, 0, 1, 34]
    order = [3, 0, 4, 2, 1]
    begin = [prompt + sum(lengths[:i]) for i in range(len(lengths))]
    row = torch.tensor([*range(prompt), *(t for i in order for t in range(begin[i], begin[i] + lengths[i]))])
    row = row.to(device)
    layout, other = (layout_of([(prompt, x)], device) for x in (lengths, [lengths[i] for i in order]))
    inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
    moved = [x.detach()[row].requires_grad_() for x in inputs]
    grad_out = torch.randn(layout.num_tokens, 2, K_VALUE, generator=torch.Generator().manual_seed(0)).to(device)
    out, out_moved = packed_attention(*inputs, layout), packed_attention(*moved, other)
    assert torch.equal(out[row], out_moved)
    ours = torch.autograd.grad(out, inputs, grad_out)
    theirs = torch.autograd.grad(out_moved, moved, grad_out[row])
    assert torch.equal(ours[0][row], theirs[0])
    for x, y in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(x[row][prompt:], y[prompt:])
        assert relative_error(y[:prompt], x[:prompt]) < RTOL  # a sum over the responses, in another order


def test_same_bits_every_time(device: torch.device) -> None:
    groups: Groups = [(70, [33, 0, 33, 33, 33])]  # the prompt's gradient is a sum of slots
    inputs = make(layout_of(groups, device).num_tokens, (2, 1), torch.float32, device)
    runs = []
    for _ in range(2):
        output = packed_attention(*inputs, layout_of(groups, device), return_lse=True)
        runs.append((*output, *gradients(inputs, *output)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
