"""What is particular to packed_attention's C++: threads, tiles of any ratio of heads, strides, processors without AVX2.

T packed tokens, H query heads, J key heads, K head size, V head size of the values.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import RTOL, offsets, relative_error
from torch import Tensor

from triton_kernels import PackedLayout
from triton_kernels._register import implementation
from triton_kernels.attention.packed_attention import (
    packed_attention_bwd,
    packed_attention_bwd_reference,
    packed_attention_fwd,
    packed_attention_fwd_reference,
)

pytestmark = [
    pytest.mark.no_interpret,
    pytest.mark.skipif(implementation("packed_attention_fwd", "cpu") != "C++", reason="csrc is not built"),
]

CPU = torch.device("cpu")
# Around a block of columns (64) and a tile of one head (128), and shorter than any.
SEQUENCES = [63, 1, 128, 0, 65, 64, 129, 7, 200]
# 64 responses, some empty, to a prompt longer than a part of a group has to be.
GROUP = (520, [(37 * i) % 60 for i in range(64)])


def sequences() -> PackedLayout:
    return PackedLayout.from_cu_seqlens(offsets(SEQUENCES, CPU))


def groups() -> PackedLayout:
    prompt, responses = GROUP
    lengths = torch.tensor([*responses, 3, 9], dtype=torch.int32)
    return PackedLayout.from_groups(torch.tensor([prompt, 40]), lengths, offsets([len(responses), 2], CPU))


def run(
    layout: PackedLayout, heads: tuple[int, int], sizes: tuple[int, int], window: int | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """(out, lse, dq, dk, dv) of the C++ in `dtype` and of the reference in fp64; all inputs are strided."""
    (H, J), (K, V), T = heads, sizes, layout.num_tokens
    generator = torch.Generator().manual_seed(T + H)
    qkv = torch.randn(T, H * K + J * K + J * V, generator=generator, dtype=dtype)
    q, k, v = (x.unflatten(1, (-1, n)) for x, n in zip(qkv.split([H * K, J * K, J * V], 1), (K, K, V), strict=True))
    do = torch.randn(H, T, V, generator=generator, dtype=dtype).transpose(0, 1)
    dlse = torch.randn(H, T, generator=generator, dtype=dtype)
    where = (layout.positions_T, layout.segments_N5, [], K**-0.5, window)
    out, lse = packed_attention_fwd(q, k, v, *where)
    ours = [out, lse, *packed_attention_bwd(do, dlse, q, k, v, out, lse, *where)]
    exact = (q.double(), k.double(), v.double())
    results = packed_attention_fwd_reference(*exact, *where)
    gradients = packed_attention_bwd_reference(do.double(), dlse.double(), *exact, *results, *where)
    return ours, [*results, *gradients]


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("heads", [(3, 3), (8, 2), (8, 1), (6, 2)])
@pytest.mark.parametrize("sizes", [(32, 32), (24, 40), (5, 17)])
def test_tiles(sizes: tuple[int, int], heads: tuple[int, int], window: int | None) -> None:
    for x, exact in zip(*run(sequences(), heads, sizes, window, torch.float32), strict=True):
        assert relative_error(x, exact) < RTOL


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, RTOL), (torch.float64, 1e-13)])
def test_a_prompt_of_many_responses(dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    for x, exact in zip(*run(groups(), (4, 2), (16, 8), window, dtype), strict=True):
        assert x.dtype == dtype
        assert relative_error(x, exact) < tolerance


def test_bits_do_not_depend_on_threads() -> None:
    threads, results = torch.get_num_threads(), []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(run(groups(), (4, 2), (16, 8), None, torch.float32)[0])
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))


def test_gradients_without_that_of_lse_and_of_an_expanded_gradient() -> None:
    layout = sequences()
    q, k, v = (torch.randn(layout.num_tokens, heads, 8) for heads in (4, 2, 2))
    where = (layout.positions_T, layout.segments_N5, [], 0.3, None)
    out, lse = packed_attention_fwd(q, k, v, *where)
    expanded = torch.ones(()).expand_as(out)
    ours = packed_attention_bwd(expanded, None, q, k, v, out, lse, *where)
    zeros = torch.zeros_like(lse)
    theirs = packed_attention_bwd(expanded.contiguous(), zeros, q, k, v, out, lse, *where)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("segment", [(0, 9, 0, 0, 9), (4, 4, 4, 4, 4), (2, 4, 1, 3, 4), (-1, 2, -1, -1, 2)])
def test_segments_outside_of_the_buffer(segment: tuple[int, ...]) -> None:
    x = torch.zeros(8, 1, 4)
    with pytest.raises(ValueError, match=rf"buffer of 8 tokens; got start {segment[0]}, end {segment[1]}"):
        packed_attention_fwd(x, x, x, torch.arange(8), torch.tensor([segment], dtype=torch.int32), [], 1.0, None)


def test_without_avx2() -> None:
    # The same file on a processor that has none, as PyTorch tells.
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this is such a processor")
    tests = [f"{__file__}::{test.__name__}" for test in (test_tiles, test_a_prompt_of_many_responses)]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], env=environment, check=True, timeout=300)
