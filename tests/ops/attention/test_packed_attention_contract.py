"""packed_attention as PyTorch's autograd, autocast, inference mode and compiler see it, and the errors of a user."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import relative_error
from packed_cases import GROUPS, K, dense, gradients, layout_of, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_kernels import PackedLayout, packed_attention
from triton_kernels._common import INTERPRET
from triton_kernels.attention import launch
from triton_kernels.attention.packed_attention import (
    packed_attention_bwd,
    packed_attention_fwd,
    packed_attention_fwd_reference,
)
from triton_kernels.attention.packed_layout import make_key_tiles, make_query_tiles

SMALL = [(3, [2, 0, 4])]
CPU = torch.device("cpu")


@pytest.mark.no_interpret
@pytest.mark.parametrize(("sequences", "window"), [([*SMALL, (2, [1])], None), (SMALL, 2), ([4, 2], None), ([0], 2)])
def test_opcheck(sequences: Any, window: int | None, device: torch.device) -> None:
    layout = layout_of(sequences, device)
    inputs = make(layout.num_tokens, (4, 2), torch.float32, device)
    arguments = (layout.positions_T, layout.segments_N5, launch.tables(layout, *inputs, window), 0.3, window)
    torch.library.opcheck(packed_attention_fwd, (*inputs, *arguments))
    inputs = [x.detach() for x in inputs]
    out, lse_HT = packed_attention_fwd(*inputs, *arguments)
    for grad_lse_HT in (None, lse_HT):
        torch.library.opcheck(packed_attention_bwd, (out, grad_lse_HT, *inputs, out, lse_HT, *arguments))


@pytest.mark.no_interpret
def test_opcheck_of_the_work_tables() -> None:
    segments_N5 = layout_of(GROUPS, CPU).segments_N5.long()
    torch.library.opcheck(make_query_tiles, (segments_N5, 16, 5, CPU))
    torch.library.opcheck(make_key_tiles, (segments_N5, 16, 8, 2, None, CPU))


@pytest.mark.no_interpret  # the reference serves fp64 there, which test_the_reference checks
@pytest.mark.parametrize(("heads", "window"), [((4, 4), None), ((4, 1), 2)])
def test_gradcheck(heads: tuple[int, int], window: int | None, device: torch.device) -> None:
    layout = layout_of([(3, [2, 0, 4])], device)
    inputs = make(layout.num_tokens, heads, torch.float64, device, size=3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(q, k, v, layout, window=window, return_lse=True), inputs
    )


def test_output_alone_and_no_graph(device: torch.device) -> None:
    layout = layout_of(SMALL, device)
    inputs = make(layout.num_tokens, (4, 2), torch.float32, device)
    with torch.no_grad():
        out = packed_attention(*inputs, layout)
    assert isinstance(out, Tensor) and not out.requires_grad
    assert torch.equal(out, packed_attention(*inputs, layout, return_lse=True)[0])


@pytest.mark.no_interpret
def test_only_the_gradients_asked_for(device: torch.device) -> None:
    layout = layout_of(SMALL, device)
    q, k, v = make(layout.num_tokens, (2, 1), torch.float32, device)
    everything = torch.autograd.grad(packed_attention(q, k, v, layout).sin().sum(), (q, k, v))
    for i, x in enumerate((q, k, v)):
        alone = [y if y is x else y.detach() for y in (q, k, v)]
        [gradient] = torch.autograd.grad(packed_attention(*alone, layout).sin().sum(), [x])
        assert torch.equal(gradient, everything[i])


def test_backward_reads_each_saved_tensor_once(device: torch.device) -> None:
    layout = layout_of(SMALL, device)
    inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
    reads: list[int] = []

    def read(saved: tuple[int, Tensor]) -> Tensor:
        reads.append(saved[0])
        return saved[1]

    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(len(saved)) or len(saved), x), read):
        out = packed_attention(*inputs, layout)
    out.backward(torch.ones_like(out))
    assert len(reads) == len(saved) >= 7 and len(set(reads)) == len(reads)


def test_checkpointed_and_offloaded_activations(device: torch.device) -> None:
    layout = layout_of(SMALL, device)
    inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
    expected = torch.autograd.grad(packed_attention(*inputs, layout).sin().sum(), inputs)
    out = checkpoint(lambda *qkv: packed_attention(*qkv, layout), *inputs, use_reentrant=False)
    assert isinstance(out, Tensor)
    with torch.autograd.graph.save_on_cpu():
        offloaded = packed_attention(*inputs, layout)
    for x in (out, offloaded):
        ours = torch.autograd.grad(x.sin().sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    layout = layout_of(SMALL, device)
    q, k, v = make(layout.num_tokens, (2, 1), torch.float32, device)
    [dq] = torch.autograd.grad(packed_attention(q, k, v, layout).sin().sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="packed_attention has no second derivative"):
        dq.sum().backward()


def test_a_layout_made_for_generation_serves_training(device: torch.device) -> None:
    with torch.inference_mode():
        layout = layout_of(SMALL, device)
        inference_inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
        packed_attention(*inference_inputs, layout)  # the work tables are made here
        layout.key_tiles(16, 16, 1, None), layout.query_tiles(16, None)
    inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
    output = packed_attention(*inputs, layout, return_lse=True)
    other = packed_attention(*inputs, layout_of(SMALL, device), return_lse=True)
    for x, y in zip(gradients(inputs, *output), gradients(inputs, *other), strict=True):
        assert torch.equal(x, y)
    tiles = layout.key_tiles(16, 16, 1, None)
    tensors = (layout.positions_T, layout.segments_N5, layout.query_tiles(16, None), tiles.items_I5, tiles.sums_M4)
    assert not any(x.is_inference() for x in tensors)


def test_inference_mode_changes_nothing(device: torch.device) -> None:
    layout = layout_of(SMALL, device)
    inputs = make(layout.num_tokens, (2, 1), torch.float32, device)
    expected = packed_attention(*inputs, layout, return_lse=True)
    with torch.inference_mode():
        ours = packed_attention(*inputs, layout, return_lse=True)
        where = (layout.positions_T, layout.segments_N5, [], K**-0.5, None)
        reference = packed_attention_fwd_reference(*inputs, *where)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    assert relative_error(reference[0], expected[0].detach()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    layout = layout_of(SMALL, device)
    inputs = make(layout.num_tokens, (2, 1), dtype, device)
    expected = packed_attention(*inputs, layout, return_lse=True)
    expected_gradients = gradients(inputs, *expected)
    where = (layout.positions_T, layout.segments_N5, [], K**-0.5, None)
    reference = packed_attention_fwd_reference(*(x.detach() for x in inputs), *where)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = packed_attention(*inputs, layout, return_lse=True)
        ours_gradients = gradients(inputs, *ours)
        cast_reference = packed_attention_fwd_reference(*(x.detach() for x in inputs), *where)
    for x, y in zip((*ours, *ours_gradients), (*expected, *expected_gradients), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert all(torch.equal(x, y) for x, y in zip(cast_reference, reference, strict=True))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.no_interpret), 2])
def test_compiled_without_a_graph_break(window: int | None, device: torch.device) -> None:
    """One graph serves layouts of all lengths; their work tables are made inside it."""

    def attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        once = packed_attention(q, k, v, layout, window=window)
        return packed_attention(q + once, k, v, layout, window=window, return_lse=True)

    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, groups in enumerate(([(4, [3, 2, 5])], [(7, [6]), (5, [0, 5])], [(3, []), (2, [1, 1, 6, 9])])):
        layout = layout_of(groups, device)
        inputs = make(layout.num_tokens, (2, 1), torch.float32, device, value_size=K)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            ours = compiled(*inputs, layout)
        theirs = attention(*inputs, layout_of(groups, device))
        for x, y in zip((*ours, *gradients(inputs, *ours)), (*theirs, *gradients(inputs, *theirs)), strict=True):
            assert torch.equal(x, y)


def test_layouts_are_equal_only_to_themselves() -> None:
    layout, other = layout_of(SMALL, CPU), layout_of(SMALL, CPU)
    assert layout == layout and layout != other and len({layout, other, layout}) == 2


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (PackedLayout.from_cu_seqlens, (int32(0, 3, 2),), r"never decrease; got \[0, 3, 2\]"),
        (PackedLayout.from_cu_seqlens, (int32(1, 3),), r"must start at 0 and never decrease; got \[1, 3\]"),
        (PackedLayout.from_cu_seqlens, (torch.tensor([0, 3]),), "must be int32 offsets .* got torch.int64"),
        (PackedLayout.from_cu_seqlens, (int32(),), r"must be int32 offsets \[n \+ 1\]; got none"),
        (PackedLayout.from_cu_seqlens, ([0, 3],), "must be int32 offsets .* got a list in place of a tensor"),
        (PackedLayout.from_cu_seqlens, (int32(0, 3).to("meta"),), "got a tensor on meta, which has no values"),
        (PackedLayout.from_cu_seqlens, (int32(*range(30), 7, 40),), r"never decrease; got \[29, 7\] .* 30 of 32"),
        (PackedLayout.from_groups, (int32(3), int32(1, -2), int32(0, 2)), r"response_len_S must be at least 0 .*-2"),
        (PackedLayout.from_groups, (torch.tensor([2**62]), int32(), int32(0, 0)), "prompt_len_P must .* below 2.31"),
        (PackedLayout.from_groups, (int32(3).float(), int32(1), int32(0, 1)), "prompt_len_P must be int32 or int64"),
        (PackedLayout.from_groups, (int32(3), [1], int32(0, 1)), "response_len_S must be int32 .* got a list"),
        (PackedLayout.from_groups, (int32(3), int32(1, 2), int32(0, 1)), "end at 2, the number of .* got 2 that"),
        (PackedLayout.from_groups, (int32(3, 4), int32(1), int32(0, 1)), r"must have 2 \+ 1 offsets"),
    ],
)
def test_layout_errors(build: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*arguments)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), r"must have the layout's 5 tokens; got q \(4, 2, 8\)"),
        ((5, 3, 8), (5, 2, 8), (5, 2, 8), r"divides that of q; got q \(5, 3, 8\)"),
        ((5, 2, 8), (5, 2, 8), (5, 1, 8), "one number of heads"),
        ((5, 2, 8), (5, 2, 4), (5, 2, 8), "q and k must share a head size"),
        ((5, 2, 0), (5, 2, 0), (5, 2, 8), "none may be 0"),
        ((5, 16), (5, 2, 8), (5, 2, 8), r"must be \[tokens, heads, head size\]"),
    ],
)
def test_shape_errors(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), PackedLayout.from_cu_seqlens(int32(0, 2, 5)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), "1", torch.tensor(1.0)])
def test_scale_errors(scale: Any) -> None:
    x = torch.zeros(5, 1, 8)
    with pytest.raises(ValueError, match="scale must be a number above 0 and finite, or None for 1 / sqrt"):
        packed_attention(x, x, x, PackedLayout.from_cu_seqlens(int32(0, 5)), scale=scale)


@pytest.mark.parametrize("window", [0, -1, 2.0, float("nan"), True, "2", torch.tensor(2)])
def test_window_errors(window: Any) -> None:
    x = torch.zeros(5, 1, 8)
    with pytest.raises(ValueError, match="window must be a whole number of at least 1, or None for no window; got "):
        packed_attention(x, x, x, PackedLayout.from_cu_seqlens(int32(0, 5)), window=window)


def test_type_and_device_errors() -> None:
    x: Any
    x, cu = torch.zeros(5, 1, 8), int32(0, 5)
    layout: Any = PackedLayout.from_cu_seqlens(cu)
    for arguments, message in [
        ((x, x.double(), x, layout), "share a dtype; got torch.float32, torch.float64, torch.float32"),
        ((x, x.to("meta"), x, layout), "share a device; got cpu, meta, cpu, cpu"),
        ((x, x, x, PackedLayout.from_cu_seqlens(cu, device="meta")), "share a device; got cpu, cpu, cpu, meta"),
        ((*[x.long()] * 3, layout), "must be bf16, fp16, fp32 or fp64; got torch.int64"),
        ((*[x.to(torch.float8_e4m3fn)] * 3, layout), "must be bf16, fp16, fp32 or fp64; got torch.float8_e4m3fn"),
        ((x.tolist(), x, x, layout), "must be dense tensors; got a list, a torch.strided tensor"),
        ((x, x, None, layout), "must be dense tensors; .* a NoneType"),
        ((x.to_sparse(), x, x, layout), "must be dense tensors; got a torch.sparse_coo tensor"),
        ((x, x, x, cu), "layout must be a PackedLayout, .* got a Tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_attention(*arguments)


def test_shapes_alone_pass_on_meta() -> None:
    x = torch.zeros(5, 2, 8, device="meta")
    out, lse_TH = packed_attention(x, x, x, PackedLayout.from_cu_seqlens(int32(0, 5), device="meta"), return_lse=True)
    assert out.is_meta and out.shape == x.shape and lse_TH.shape == (5, 2)


def test_heads_that_no_tile_holds() -> None:
    x, layout = torch.zeros(5, 1, 264), PackedLayout.from_cu_seqlens(int32(0, 5))
    if not INTERPRET:
        assert packed_attention(x, x, x, layout).shape == x.shape
        return
    with pytest.raises(ValueError, match="at most 256 .* got 264"):
        packed_attention(x, x, x, layout)


@pytest.mark.no_interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layout_of_two_small_groups(dtype: torch.dtype) -> None:
    """Prompts, responses and groups may be empty in any position."""
    choices = [(prompt, lengths) for prompt in (0, 1, 3) for lengths in ([], [0], [2], [0, 2], [2, 0])]
    for first in choices:
        for second in choices:
            layout = layout_of([first, second], CPU)
            inputs = make(layout.num_tokens, (2, 1), dtype, CPU)
            output = packed_attention(*inputs, layout, return_lse=True)
            exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
            exact = dense(*exact_inputs, [first, second], K**-0.5, None)
            ours, theirs = (*output, *gradients(inputs, *output)), (*exact, *gradients(exact_inputs, *exact))
            for x, y in zip(ours, theirs, strict=True):
                assert relative_error(x.detach(), y.detach()) < 1e-5, (first, second)
