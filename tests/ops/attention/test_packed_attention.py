"""packed_attention against a dense mask in fp64. T packed tokens, H query heads, J key heads, K head size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import RTOL, assert_at_most_twice_as_far, offsets, relative_error
from torch import Tensor

from triton_kernels import PackedLayout, packed_attention
from triton_kernels._common import INTERPRET
from triton_kernels.attention import launch
from triton_kernels.attention.packed_attention import (
    packed_attention_bwd,
    packed_attention_bwd_reference,
    packed_attention_fwd,
    packed_attention_fwd_reference,
)

Groups = list[tuple[int, list[int]]]

# Groups of 1, 2, 7 and no responses; lengths around a power of two; empty prompts and responses; empty groups.
GROUPS: Groups = [(5, [3, 0, 7]), (64, [1, 63]), (0, [4]), (9, []), (1, [65]), (33, [2] * 7), (2, [0, 0]), (0, [])]
SEQUENCES = [1, 64, 0, 63, 65, 5, 200, 1]
HEADS = [(4, 4), (4, 1)]  # one key head per query head, one for all
K, K_VALUE = 8, 6
# (sequences or groups, (query heads, key heads), window): what every implementation is held against.
CASES: list[tuple[list[int] | Groups, tuple[int, int], int | None]] = [
    (GROUPS, (4, 1), None),
    (GROUPS, (2, 2), 5),
    (SEQUENCES, (2, 2), None),
    (SEQUENCES, (4, 1), 40),
    ([1000, 1], (1, 1), None),  # keys that many queries see: cut among programs
    ([(70, [6] * 64)], (2, 1), None),  # the same of a prompt, with 64 responses
    ([(70, [65] * 7)], (2, 2), 30),  # a window that ends in the prompt
    ([(63, [64, 0])], (8, 1), None),
    ([(1, [1])], (1, 1), None),
    ([1], (1, 1), 1),
    ([0], (2, 1), None),
    ([(0, [])], (1, 1), None),
]


def layout_of(sequences: list[int] | Groups, device: torch.device) -> PackedLayout:
    """From the lengths of sequences, or of each group's prompt and responses."""
    groups = [x for x in sequences if isinstance(x, tuple)]
    if not groups:
        return PackedLayout.from_cu_seqlens(offsets([x for x in sequences if isinstance(x, int)], device))
    prompts = torch.tensor([prompt for prompt, _ in groups], device=device)
    responses = torch.tensor([length for _, lengths in groups for length in lengths], dtype=torch.int32, device=device)
    return PackedLayout.from_groups(prompts, responses, offsets([len(lengths) for _, lengths in groups], device))


def segments_of(sequences: list[int] | Groups) -> list[tuple[range, int, range]]:
    """(rows, position of the first, rows of the prompt) of each segment."""
    segments, row = [], 0
    for x in sequences:
        prompt, responses = x if isinstance(x, tuple) else (x, [])
        prompt_rows = range(row, row + prompt)
        segments.append((prompt_rows, 0, range(0)))
        row += prompt
        for response in responses:
            segments.append((range(row, row + response), prompt, prompt_rows))
            row += response
    return segments


def positions_of(sequences: list[int] | Groups) -> Tensor:
    return torch.tensor([at for rows, first, _ in segments_of(sequences) for at in range(first, first + len(rows))])


def dense(
    q_THK: Tensor, k: Tensor, v: Tensor, sequences: list[int] | Groups, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out, lse_TH) by a mask of T x T, set up segment by segment."""
    T, position_T = len(q_THK), positions_of(sequences).to(q_THK.device)
    visible_TT = torch.zeros(T, T, dtype=torch.bool, device=q_THK.device)
    for rows, _, prompt_rows in segments_of(sequences):
        for seen in (rows, prompt_rows):
            visible_TT[rows.start : rows.stop, seen.start : seen.stop] = True
    distance_TT = position_T[:, None] - position_T
    visible_TT &= (distance_TT >= 0) & (distance_TT < (window or T + 1))
    k, v = (x.repeat_interleave(q_THK.shape[1] // k.shape[1], 1) for x in (k, v))
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k) * scale
    scores_HTT = scores_HTT.masked_fill(~visible_TT, -torch.inf)
    return torch.einsum("hts,shk->thk", scores_HTT.softmax(-1), v), scores_HTT.logsumexp(-1).T


def make(
    T: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device, size: int = K, value_size: int = K_VALUE
) -> list[Tensor]:
    """[q, k, v], which want gradients; q is not contiguous."""
    generator = torch.Generator().manual_seed(T)
    H, J = heads
    q_THK = torch.randn(H, T, size, generator=generator).transpose(0, 1)
    k, v = torch.randn(T, J, size, generator=generator), torch.randn(T, J, value_size, generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (q_THK, k, v)]


def gradients(inputs: list[Tensor], out: Tensor, lse_TH: Tensor) -> tuple[Tensor, ...]:
    weights = [
        torch.linspace(-1, 2, x.numel(), device=x.device, dtype=torch.float64).view(x.shape) for x in (out, lse_TH)
    ]
    return torch.autograd.grad((out * weights[0]).sum() + (lse_TH * weights[1]).sum(), inputs)


@pytest.mark.parametrize(("sequences", "heads", "window"), CASES)
def test_values_and_gradients(
    sequences: list[int] | Groups, heads: tuple[int, int], window: int | None, device: torch.device
) -> None:
    check(sequences, heads, window, device)


@pytest.mark.no_interpret
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("heads", [*HEADS, (8, 1)])
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
    arguments = (layout.positions_T, layout.segments_N5, [], 0, 0.3, window)
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
    layout = layout_of(GROUPS, device)
    inputs = make(layout.num_tokens, (2, 1), dtype, device)
    output = packed_attention(*inputs, layout, return_lse=True)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, GROUPS, K**-0.5, None)
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
    groups: Groups = [(70, [33, 0, 130]), (3, [1])]
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
    layout = layout_of(GROUPS, device)
    # Whole numbers tie; the largest score becomes 1e4, where an fp32 lse resolves 1e-3, and so p is good to 1e-3.
    inputs = [x.detach().round().requires_grad_() for x in make(layout.num_tokens, (4, 2), torch.float32, device)]
    with torch.no_grad():
        inputs[0].mul_(extreme / abs(extreme))
    scale = abs(extreme) / float(torch.einsum("thk,sjk->thsj", inputs[0].detach(), inputs[1].detach()).abs().max())
    output = packed_attention(*inputs, layout, scale=scale, return_lse=True)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, GROUPS, scale, None)
    assert relative_error(output[1].detach(), exact[1].detach()) < RTOL
    ours, theirs = (output[0], *gradients(inputs, *output)), (exact[0], *gradients(exact_inputs, *exact))
    for x, y in zip(ours, theirs, strict=True):
        assert relative_error(x.detach(), y.detach()) < 2e-3


@pytest.mark.parametrize(("poisoned", "what"), [(0, "all"), (3, "keys and values"), (6, "all")])
def test_a_response_cannot_reach_the_others(poisoned: int, what: str, device: torch.device) -> None:
    prompt, length, responses = 9, 5, 7
    layout = layout_of([(prompt, [length] * responses), (4, [3, 5])], device)
    inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
    first = prompt + poisoned * length
    bad_T = torch.zeros(layout.num_tokens, dtype=torch.bool, device=device)
    bad_T[first : first + length] = True
    results = []
    for value in (None, torch.nan, torch.inf, 1e30):
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
    prompt, lengths = 70, [33, 5, 0, 64, 1]
    order = [3, 0, 4, 2, 1]
    begin = [prompt + sum(lengths[:i]) for i in range(len(lengths))]
    row = torch.tensor([*range(prompt), *(t for i in order for t in range(begin[i], begin[i] + lengths[i]))])
    row = row.to(device)
    layout, other = (layout_of([(prompt, x)], device) for x in (lengths, [lengths[i] for i in order]))
    inputs = make(layout.num_tokens, (4, 2), torch.float32, device)
    moved = [x.detach()[row].requires_grad_() for x in inputs]
    grad_out = torch.randn(layout.num_tokens, 4, K_VALUE, generator=torch.Generator().manual_seed(0)).to(device)
    out, out_moved = packed_attention(*inputs, layout), packed_attention(*moved, other)
    assert torch.equal(out[row], out_moved)
    ours = torch.autograd.grad(out, inputs, grad_out)
    theirs = torch.autograd.grad(out_moved, moved, grad_out[row])
    assert torch.equal(ours[0][row], theirs[0])
    for x, y in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(x[row][prompt:], y[prompt:])
        assert relative_error(y[:prompt], x[:prompt]) < RTOL  # a sum over the responses, in another order


def test_same_bits_every_time(device: torch.device) -> None:
    layout = layout_of(GROUPS, device)
    inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
    runs = []
    for _ in range(2):
        output = packed_attention(*inputs, layout_of(GROUPS, device), return_lse=True)
        runs.append((*output, *gradients(inputs, *output)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("sequences", [GROUPS, SEQUENCES, [0]])
def test_positions(sequences: list[int] | Groups, device: torch.device) -> None:
    layout = layout_of(sequences, device)
    assert layout.positions_T.dtype == torch.int64
    assert layout.positions_T.tolist() == positions_of(sequences).tolist()


@pytest.mark.parametrize("sequences", [[(3, [2, 0, 4]), (2, [1])], [4, 2], [0]])
@pytest.mark.parametrize("window", [None, 2])
def test_opcheck(sequences: list[int] | Groups, window: int | None, device: torch.device) -> None:
    layout = layout_of(sequences, device)
    inputs = make(layout.num_tokens, (4, 2), torch.float32, device)
    work, num_slots = launch.tables(layout, *inputs, window)
    tables = (layout.positions_T, layout.segments_N5, work, num_slots, 0.3, window)
    torch.library.opcheck(packed_attention_fwd, (*inputs, *tables))
    inputs = [x.detach() for x in inputs]
    out, lse_HT = packed_attention_fwd(*inputs, *tables)
    for grad_lse_HT in (None, lse_HT):
        torch.library.opcheck(packed_attention_bwd, (out, grad_lse_HT, *inputs, out, lse_HT, *tables))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 2])
def test_gradcheck(heads: tuple[int, int], window: int | None, device: torch.device) -> None:
    layout = layout_of([(3, [2, 0, 4])], device)
    inputs = make(layout.num_tokens, heads, torch.float64, device, size=3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(q, k, v, layout, window=window, return_lse=True), inputs
    )


def test_output_alone_and_no_graph(device: torch.device) -> None:
    layout = layout_of(GROUPS, device)
    inputs = make(layout.num_tokens, (4, 2), torch.float32, device)
    with torch.no_grad():
        out = packed_attention(*inputs, layout)
    assert isinstance(out, Tensor) and not out.requires_grad
    assert torch.equal(out, packed_attention(*inputs, layout, return_lse=True)[0])


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (PackedLayout.from_cu_seqlens, (int32(0, 3, 2),), r"never decrease; got \[0, 3, 2\]"),
        (PackedLayout.from_cu_seqlens, (int32(1, 3),), r"must start at 0 and never decrease; got \[1, 3\]"),
        (PackedLayout.from_cu_seqlens, (torch.tensor([0, 3]),), "must be int32 offsets .* got torch.int64"),
        (PackedLayout.from_groups, (int32(3), int32(1, -2), int32(0, 2)), r"response_len_S must be at least 0; .*-2"),
        (PackedLayout.from_groups, (int32(3).float(), int32(1), int32(0, 1)), "prompt_len_P must be int32 or int64"),
        (
            PackedLayout.from_groups,
            (int32(3), int32(1, 2), int32(0, 1)),
            "end at 2, the number of responses; got 2 that",
        ),
        (PackedLayout.from_groups, (int32(3, 4), int32(1), int32(0, 1)), r"must have 2 \+ 1 offsets"),
        (PackedLayout.from_cu_seqlens, (int32(*range(30), 7, 40),), r"never decrease; got \[29, 7\] .* 30 of 32"),
    ],
)
def test_layout_errors(build: Any, arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*arguments)


@pytest.mark.parametrize(
    ("q", "k", "v", "window", "message"),
    [
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), None, r"the layout has 5 tokens .* got q \(4, 2, 8\)"),
        ((5, 3, 8), (5, 2, 8), (5, 2, 8), None, r"divides that of q; got q \(5, 3, 8\)"),
        ((5, 2, 8), (5, 2, 8), (5, 1, 8), None, "one number of heads"),
        ((5, 2, 8), (5, 2, 4), (5, 2, 8), None, "q and k must share a head size"),
        ((5, 2, 0), (5, 2, 0), (5, 2, 8), None, "none may be 0"),
        ((5, 16), (5, 2, 8), (5, 2, 8), None, r"must be \[tokens, heads, head size\]"),
        ((5, 2, 8), (5, 2, 8), (5, 2, 8), 0, "window must be at least 1, or None for no window; got 0"),
    ],
)
def test_errors(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], window: int | None, message: str) -> None:
    layout = PackedLayout.from_cu_seqlens(int32(0, 2, 5))
    with pytest.raises(ValueError, match=message):
        packed_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), layout, window=window)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scale_error(scale: float) -> None:
    x = torch.zeros(5, 1, 8)
    with pytest.raises(ValueError, match="scale must be above 0 and finite"):
        packed_attention(x, x, x, PackedLayout.from_cu_seqlens(int32(0, 5)), scale=scale)


def test_dtype_and_device_errors() -> None:
    x, layout = torch.zeros(5, 1, 8), PackedLayout.from_cu_seqlens(int32(0, 5))
    with pytest.raises(ValueError, match="share a dtype; got torch.float32, torch.float64, torch.float32"):
        packed_attention(x, x.double(), x, layout)
    with pytest.raises(ValueError, match="share a device; got cpu, meta, cpu, cpu"):
        packed_attention(x, x.to("meta"), x, layout)
    with pytest.raises(ValueError, match="must be floating point; got torch.int64"):
        packed_attention(x.long(), x.long(), x.long(), layout)


def test_heads_that_no_tile_holds() -> None:
    x, layout = torch.zeros(5, 1, 264), PackedLayout.from_cu_seqlens(int32(0, 5))
    if not INTERPRET:
        assert packed_attention(x, x, x, layout).shape == x.shape
        return
    with pytest.raises(ValueError, match="at most 256 .* got 264"):
        packed_attention(x, x, x, layout)
