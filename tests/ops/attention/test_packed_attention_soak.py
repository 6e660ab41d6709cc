"""packed_attention on hundreds of random layouts: values, gradients, and the same bits in a second run.

On a GPU this shows races and reads beyond a tile, which neither the interpreter nor compilation can. The CPU runs 100,
all but a few of them slow. Each layout is named by its seed: `-k "[cuda-1017"` runs one again.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from cases import RTOL, assert_at_most_twice_as_far, relative_error
from packed_cases import Groups, dense, gradients, layout_of, make, positions_of
from torch import Tensor

from triton_kernels import packed_attention

_GPU_LAYOUTS, _CPU_LAYOUTS, _FAST_LAYOUTS = 400, 100, 8


@dataclass(frozen=True)
class Draw:
    """A random problem."""

    sequences: list[int] | Groups
    heads: tuple[int, int]
    sizes: tuple[int, int]
    window: int | None
    dtype: torch.dtype


def draw_sequences(generator: random.Random, longest: int) -> list[int] | Groups:
    """Draw log-uniform lengths, often next to a multiple of a tile."""

    def length(longest: int) -> int:
        n = int(2 ** generator.uniform(0, math.log2(longest)))
        return generator.choice([n, n, n, 0, max(0, -(-n // 64) * 64 + generator.choice([-1, 0, 1]))])

    if generator.random() < 0.3:
        return [length(longest) for _ in range(generator.randint(1, 12))]
    sizes = [generator.choice([0, 1, 2, 7, 16, 64]) for _ in range(generator.randint(1, 4))]
    return [(length(longest), [length(longest // 4) for _ in range(size)]) for size in sizes]


def draw(seed: int, most_tokens: int, dtypes: list[torch.dtype]) -> Draw:
    """Draw a problem of at most `most_tokens` tokens, so that a dense mask fits."""
    generator = random.Random(seed)
    sequences = draw_sequences(generator, most_tokens // 2)
    while len(positions_of(sequences)) > most_tokens:
        sequences = draw_sequences(generator, most_tokens // 2)
    key_heads, ratio = generator.choice([1, 2, 3]), generator.choice([1, 4, 8])
    return Draw(
        sequences,
        (key_heads * ratio, key_heads),
        generator.choice([(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (40, 72)]),
        generator.choice([None, None, 1, 65, 300]),
        generator.choice(dtypes),
    )


def run(case: Draw, inputs: list[Tensor], layout: object) -> tuple[Tensor, ...]:
    output = packed_attention(*inputs, layout, window=case.window, return_lse=True)
    return (*(x.detach() for x in output), *gradients(inputs, *output))


@pytest.mark.no_interpret
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, id=f"cpu-{seed}", marks=[pytest.mark.slow] * (seed >= _FAST_LAYOUTS))
        for seed in range(_CPU_LAYOUTS)
    ]
    + [pytest.param(seed, id=f"cuda-{seed}", marks=pytest.mark.gpu) for seed in range(1000, 1000 + _GPU_LAYOUTS)],
)
def test_random_layouts(seed: int) -> None:
    on_gpu = seed >= 1000
    device = torch.device("cuda" if on_gpu else "cpu")
    halves = [torch.bfloat16, torch.float16]
    case = draw(seed, 4096 if on_gpu else 160, [*halves, *halves, torch.float32] if on_gpu else [torch.float32])
    layout = layout_of(case.sequences, device)
    inputs = make(layout.num_tokens, case.heads, case.dtype, device, *case.sizes)
    ours, again = run(case, inputs, layout), run(case, inputs, layout_of(case.sequences, device))
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True)), case

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
        output = dense(*copies, case.sequences, case.sizes[0] ** -0.5, case.window)
        return (*(x.detach() for x in output), *gradients(copies, *output))

    exact = plain(torch.float64)
    assert relative_error(ours[1], exact[1]) < RTOL, case
    for x, y, z in zip(ours, plain(case.dtype), exact, strict=True):
        if case.dtype == torch.float32:
            assert relative_error(x, z) < RTOL, case
        else:
            assert_at_most_twice_as_far(x, y, z)
