"""The scoring kernel against statistics of dense logits in fp64, and a row's bits against its batch.

T loss rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import RTOL
from torch import Tensor

from triton_kernels._common import INTERPRET
from triton_kernels.head.logits import logit_stats_reference, merge
from triton_kernels.head.scoring import TILES, Tile, architecture, launch_scoring, launch_tile

PLAIN: dict[str, Any] = {"bias_V": None, "temperature": 1.0, "softcap": None}
WORKSPACE = 2**26


# Every tile once: fp32 has one. In the interpreter a product of bf16 is wrong.
CASES = [
    ("sm_90", torch.float32),
    ("sm_90", torch.float16),
    ("sm_90", torch.bfloat16),
    ("sm_80", torch.float16),
    ("sm_80", torch.bfloat16),
    ("default", torch.float16),
]
Inputs = tuple[Tensor, Tensor, Tensor]


def tile_of(name: str, dtype: torch.dtype, device: torch.device) -> Tile:
    """The architecture's tile, if this machine can run it."""
    tile = TILES[name][dtype.itemsize]
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("on the CPU the kernel needs TRITON_INTERPRET=1")
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's product of bf16 is wrong")
    if device.type == "cuda" and TILES[architecture(device)][dtype.itemsize] != tile:
        pytest.skip(f"this GPU has the tiles of {architecture(device)}")
    return tile


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}".replace("torch.", ""))
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[Tile, torch.dtype]:
    """Each tile that ships, with each type it multiplies."""
    name, dtype = request.param
    return tile_of(name, dtype, device), dtype


@pytest.fixture
def fp32(device: torch.device) -> Tile:
    """The tile of fp32, for what does not depend on the tile."""
    return tile_of("sm_90", torch.float32, device)


def make(T: int, V: int, D: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """hidden_TD, weight_VD with logits of deviation 2, and target_T, some of which are in other shards."""
    generator = torch.Generator().manual_seed(T + V)
    hidden_TD = torch.randn(T, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator) * (2 / D**0.5)
    target_T = torch.randint(-V // 4, V + V // 4 + 1, (T,), generator=generator)
    return hidden_TD.to(device, dtype), weight_VD.to(device, dtype), target_T.to(device)


def score(tile: Tile, inputs: Inputs, workspace: int = WORKSPACE, **options: Any) -> Tensor:
    return launch_tile(tile, *inputs, **PLAIN | options, workspace_bytes=workspace)


def check(stats_4T: Tensor, inputs: Inputs, **options: Any) -> None:
    """Statistics, and the log-probability and entropy they give, against fp64 on the same inputs."""
    hidden_TD, weight_VD, target_T = inputs
    options = PLAIN | options
    if options["bias_V"] is not None:
        options["bias_V"] = options["bias_V"].double()
    exact_4T = logit_stats_reference(hidden_TD.double() @ weight_VD.double().T, target_T, **options)
    assert stats_4T.dtype == torch.float32
    torch.testing.assert_close(stats_4T.double(), exact_4T, rtol=RTOL, atol=RTOL)
    for ours, theirs in zip(merge(stats_4T[None])[:2], merge(exact_4T[None])[:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=RTOL, atol=RTOL, equal_nan=True)


# V: less than one tile; several tiles of one split, the last one cut; more than one split. D: no multiple of a tile.
# T: nothing, one row, one tile of rows or less, more than one tile.
@pytest.mark.parametrize(("T", "V", "D"), [(0, 100, 48), (1, 1100, 24), (63, 700, 80), (130, 100, 48), (130, 1100, 24)])
def test_statistics(T: int, V: int, D: int, case: tuple[Tile, torch.dtype], device: torch.device) -> None:
    tile, dtype = case
    inputs = make(T, V, D, dtype, device)
    check(score(tile, inputs), inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("temperature", "softcap"), [(0.7, None), (1.3, 2.0), (1.0, 30.0)])
def test_options(bias: bool, temperature: float, softcap: float | None, fp32: Tile, device: torch.device) -> None:
    inputs = make(63, 700, 48, torch.float32, device)
    bias_V = torch.linspace(-2, 2, 700, device=device) if bias else None
    options = {"bias_V": bias_V, "temperature": temperature, "softcap": softcap}
    check(score(fp32, inputs, **options), inputs, **options)


# The merge takes 32 splits at once: one more, and in it one token. 16 tiles of rows run side by side: two groups of
# them, the second one not full, times two splits: every pair has its program.
@pytest.mark.parametrize(("T", "V"), [(2, 33 * 1024 + 1), (2200, 1030)])
def test_long_grids(T: int, V: int, device: torch.device) -> None:
    tile = tile_of("sm_90", torch.float16, device)
    inputs = make(T, V, 16, torch.float16, device)
    check(score(tile, inputs), inputs)


def test_shard_without_tokens(fp32: Tile, device: torch.device) -> None:
    stats_4T = score(fp32, make(5, 0, 16, torch.float32, device))
    assert (stats_4T[0::2] == -torch.inf).all() and not stats_4T[1::2].any()


def test_target_of_another_shard(fp32: Tile, device: torch.device) -> None:
    hidden_TD, weight_VD, _ = make(6, 100, 16, torch.float32, device)
    # Next to this shard, within its last tile, and garbage that 32 bits would take for one of its ids.
    target_T = torch.tensor([-1, 100, 101, 2**32 + 3, 3 - 2**32, -(2**40)], device=device)
    assert (score(fp32, (hidden_TD, weight_VD, target_T))[2] == -torch.inf).all()


def test_extreme_logits(fp32: Tile, device: torch.device) -> None:
    # Whole numbers up to 1e4, so that products are exact: two close ones on top, in different splits; all equal; one
    # on top of the last split, after a split of the lowest; one on top of the first.
    logits_TV = torch.full((4, 1100), -1e4, device=device)
    logits_TV[0, 3], logits_TV[0, 1099] = 1e4, 1e4 - 1
    logits_TV[2, 1050] = logits_TV[3, 0] = 1e4
    inputs = (torch.eye(4, device=device), logits_TV.T.contiguous(), torch.tensor([1099, 7, 1050, 1], device=device))
    check(score(fp32, inputs), inputs)


# One token, one tile and more, a whole split, everything.
@pytest.mark.parametrize("removed", [slice(7, 8), slice(100, 600), slice(0, 1024), slice(None)])
def test_bias_of_minus_infinity_removes_tokens(removed: slice, fp32: Tile, device: torch.device) -> None:
    inputs = make(63, 1100, 16, torch.float32, device)
    bias_V = torch.linspace(-2, 2, 1100, device=device)
    bias_V[removed] = -torch.inf
    stats_4T = score(fp32, inputs, bias_V=bias_V)
    assert not stats_4T.isnan().any()
    check(stats_4T, inputs, bias_V=bias_V)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's word for the absent rows
def test_row_does_not_depend_on_its_batch(case: tuple[Tile, torch.dtype], device: torch.device) -> None:
    tile, dtype = case
    hidden_TD, weight_VD, target_T = make(200, 1100, 40, dtype, device)
    if device.type == "cpu":
        # NumPy's product, unlike a GPU's, depends on a row's place in its tile; of small whole numbers it is exact.
        hidden_TD, weight_VD = hidden_TD.round(), (4 * weight_VD).round()
    stats_4T = score(tile, (hidden_TD, weight_VD, target_T))

    def same(rows: Any, workspace: int = WORKSPACE) -> bool:
        return score(tile, (hidden_TD[rows], weight_VD, target_T[rows]), workspace).equal(stats_4T[:, rows])

    # Alone; at another place of a tile; in a batch of another size; in another order; in many launches.
    permutation = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(device)
    assert same([17]) and same(slice(17, 147)) and same(slice(0, 64)) and same(permutation)
    assert same(slice(None), workspace=1)
    # Among rows that are absent and hold garbage.
    absent_T = torch.arange(200, device=device) % 3 != 0
    garbage = hidden_TD.masked_fill(absent_T[:, None], torch.nan), weight_VD, target_T.masked_fill(absent_T, 2**40)
    assert score(tile, garbage)[:, ~absent_T].equal(stats_4T[:, ~absent_T])


def test_memory_layout_does_not_matter(device: torch.device) -> None:
    tile = tile_of("sm_90", torch.float16, device)  # its descriptors refuse what is not aligned
    inputs = make(63, 700, 64, torch.float16, device)
    hidden_TD, weight_VD, target_T = inputs
    stats_4T = score(tile, inputs)
    assert stats_4T.equal(score(tile, (hidden_TD.T.contiguous().T, weight_VD.T.contiguous().T, target_T.int())))
    # Rows with a stride, an address that is no multiple of 16, targets and biases with a stride.
    wide_TD = torch.cat([hidden_TD, hidden_TD], 1)
    odd_VD = torch.cat([weight_VD.new_zeros(1), weight_VD.flatten()])[1:].view_as(weight_VD)
    assert odd_VD.data_ptr() % 16
    target_T = torch.stack([target_T, target_T], 1)[:, 0]
    assert stats_4T.equal(score(tile, (wide_TD[:, :64], odd_VD, target_T)))
    bias_V = torch.linspace(-2, 2, 1400, device=device)[::2]
    assert score(tile, inputs, bias_V=bias_V).equal(score(tile, inputs, bias_V=bias_V.contiguous()))


@pytest.mark.skipif(not INTERPRET, reason="a GPU multiplies bf16 itself")
def test_bf16_in_the_interpreter() -> None:
    inputs = make(63, 300, 48, torch.bfloat16, torch.device("cpu"))
    check(launch_scoring(*inputs, **PLAIN, workspace_bytes=WORKSPACE), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_size(dtype: torch.dtype) -> None:
    inputs = make(1000, 20_001, 1024, dtype, torch.device("cuda"))
    check(launch_scoring(*inputs, **PLAIN, workspace_bytes=WORKSPACE), inputs)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    # 2^31 + 2^24 elements in the weight; the targets are its last rows.
    hidden_TD, weight_VD, _ = make(64, 2**15 + 2**8, 2**16, torch.bfloat16, torch.device("cuda"))
    inputs = hidden_TD, weight_VD, len(weight_VD) - 1 - torch.arange(64, device="cuda")
    stats_4T = launch_scoring(*inputs, **PLAIN, workspace_bytes=WORKSPACE)
    tail = slice(-256, None)  # the whole in fp64 would take 16 GiB
    exact_T = (hidden_TD.double() * weight_VD[tail].double().flip(0)[:64]).sum(1)
    torch.testing.assert_close(stats_4T[2].double(), exact_T, rtol=RTOL, atol=10 * RTOL)
