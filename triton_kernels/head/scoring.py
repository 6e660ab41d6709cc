"""Triton kernels that score without logits: the statistics of softmax(s) straight from hidden states and weight.

s = z / temperature;  z = softcap tanh(z / softcap);  z = hidden weight' + bias

A program multiplies a tile of rows with one split of the vocabulary, tile after tile, and keeps four numbers per row of
the tokens so far (see `logit_stats_reference`); a second kernel merges the splits in their order. Tiles and
splits follow from the architecture and the operands' type alone, and the binary is the same for every number of rows:
a row's result has the same bits whatever else is in the batch.

T loss rows, V vocabulary (shard), D hidden, S splits of the vocabulary, C rows of one launch in whole tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_kernels._register import Variant
from triton_kernels._triton import HAS_TRITON, LAUNCH_OPTIONS, tl, triton
from triton_kernels.head.logit_kernels import LOG_ZERO, tanh

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

_LOG_ZERO = tl.constexpr(LOG_ZERO)
_ALIGNED = 64
"""Columns are a multiple of it, so that no tile is cut in D."""
_GROUP_T = 16
"""Tiles of rows that run side by side: their hidden states stay in the L2 cache while they share the weight's tiles."""
_SPLIT_V = 1024
"""Tokens of a split: few, so that a handful of rows fills a GPU; several tiles long, so that starting costs little."""
_MERGE = {"BLOCK_T": 32, "BLOCK_S": 32}


@dataclass(frozen=True)
class Tile:
    """Rows, tokens and columns that a program multiplies at once. With `descriptors` the TMA unit (sm_90) loads."""

    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def constants(self) -> dict[str, object]:
        """Compile-time constants of the kernel."""
        blocks = {"BLOCK_T": self.block_t, "BLOCK_V": self.block_v, "BLOCK_D": self.block_d}
        return {"DESCRIPTORS": self.descriptors, "SPLIT_V": _SPLIT_V, "GROUP_T": _GROUP_T, **blocks}

    def options(self) -> dict[str, int]:
        """num_warps and num_stages of the launch, and what all launches have."""
        return LAUNCH_OPTIONS | {"num_warps": self.num_warps, "num_stages": self.num_stages}


_DTYPES = {2: ("bf16", "fp16"), 4: ("fp32",)}
_FP32 = Tile(64, 64, 32, 4, 2)
TILES: dict[str, dict[int, Tile]] = {
    "sm_90": {2: Tile(128, 256, 64, 8, 4, descriptors=True), 4: _FP32},
    "sm_80": {2: Tile(128, 128, 64, 8, 4), 4: _FP32},
    "default": {2: Tile(128, 128, 32, 8, 3), 4: _FP32},
}
"""Tile by architecture and bytes per operand. "default" fits every GPU's shared memory. A result's last bits depend on
the tile."""

_CAPABILITIES = {"sm_90": (90,), "sm_80": (80,), "default": (80, 90, 100)}

_jit: Any = functools.partial(triton.jit, do_not_specialize=["T", "stats_stride"]) if HAS_TRITON else triton.jit
"""One binary for every number of rows: 1 and multiples of 16 would otherwise get their own."""


@triton.jit
def joined(largest, total, weighted, tile_largest, tile_total, tile_weighted):
    """Statistics (max, sum exp(s - max), sum exp(s - max) (s - max)) of two sets of tokens; -inf, 0, 0 of none."""
    larger = tl.maximum(largest, tile_largest)
    base = tl.where(larger == float("-inf"), 0.0, larger)
    shift = tl.maximum(largest - base, _LOG_ZERO)
    tile_shift = tl.maximum(tile_largest - base, _LOG_ZERO)
    scale = tl.exp(shift)
    tile_scale = tl.exp(tile_shift)
    weighted = scale * (weighted + shift * total) + tile_scale * (tile_weighted + tile_shift * tile_total)
    return larger, scale * total + tile_scale * tile_total, weighted


@triton.jit
def product(
    hidden, weight, first_t, first_v, T, V, D,
    DESCRIPTORS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden weight' of one tile in fp32. Rows beyond T and tokens beyond V hold any number."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    if DESCRIPTORS:
        for d in range(0, D, BLOCK_D):
            acc = tl.dot(hidden.load([first_t, d]), weight.load([first_v, d]).T, acc)
    else:
        column = tl.arange(0, BLOCK_D)
        row = tl.arange(0, BLOCK_T)
        token = tl.arange(0, BLOCK_V)
        # Offsets in the tile fit 32 bits, which saves the registers of as many pointers.
        hidden_offset = tl.where(row < T - first_t, row, 0)[:, None] * D + column[None, :]
        weight_offset = tl.where(token < V - first_v, token, 0)[None, :] * D + column[:, None]
        hidden += D.to(tl.int64) * first_t
        weight += D.to(tl.int64) * first_v
        for _ in range(0, D, BLOCK_D):
            # "ieee" is for fp32 operands: TF32 has 10 bits.
            acc = tl.dot(tl.load(hidden + hidden_offset), tl.load(weight + weight_offset), acc, input_precision="ieee")
            hidden += BLOCK_D
            weight += BLOCK_D
    return acc


@_jit
def scoring_kernel(
    hidden, weight, target_ptr, bias_ptr, partial_ptr, T, V, D, stride, softcap, inverse_temperature,
    HAS_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, SPLIT_V: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of rows and one split of the vocabulary: a column of partial [S, 4, C] for each row, C = stride."""
    num_splits = tl.cdiv(V, SPLIT_V)
    group = tl.program_id(0) // (GROUP_T * num_splits)
    within = tl.program_id(0) % (GROUP_T * num_splits)
    group_size = tl.minimum(tl.cdiv(T, BLOCK_T) - group * GROUP_T, GROUP_T)
    first_t = (group * GROUP_T + within % group_size) * BLOCK_T
    split = within // group_size

    t = first_t + tl.arange(0, BLOCK_T)
    target = tl.load(target_ptr + t, t < T, other=-1).to(tl.int64)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    at_target = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    for first_v in range(split * SPLIT_V, tl.minimum((split + 1) * SPLIT_V, V), BLOCK_V):
        z = product(hidden, weight, first_t, first_v, T, V, D, DESCRIPTORS, BLOCK_T, BLOCK_V, BLOCK_D)
        v = first_v + tl.arange(0, BLOCK_V)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + v, v < V, other=0.0).to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            z = softcap * tanh(z * (1.0 / softcap))  # a division here would spill registers
        s = tl.where(v[None, :] < V, z * inverse_temperature, float("-inf"))
        at_target = tl.maximum(at_target, tl.max(tl.where(v[None, :] == target[:, None], s, float("-inf")), 1))
        tile_largest = tl.max(s, 1)
        s -= tl.where(tile_largest == float("-inf"), 0.0, tile_largest)[:, None]  # a bias can remove all its tokens
        e = tl.exp(s)
        largest, total, weighted = joined(
            largest, total, weighted, tile_largest, tl.sum(e, 1), tl.sum(e * tl.maximum(s, _LOG_ZERO), 1)
        )

    partial_ptrs = partial_ptr + split.to(tl.int64) * 4 * stride + t
    tl.store(partial_ptrs, largest)
    tl.store(partial_ptrs + stride, total)
    tl.store(partial_ptrs + 2 * stride, at_target)
    tl.store(partial_ptrs + 3 * stride, weighted)


@_jit
def merge_splits_kernel(
    partial_ptr, stats_ptr, T, num_splits, stride, stats_stride, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Columns of stats [4, T] from partial [S, 4, C], C = stride: blocks of splits one after another."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    at_target = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        ptrs = partial_ptr + split.to(tl.int64)[:, None] * 4 * stride + t[None, :]
        inside = (split < num_splits)[:, None] & (t < T)[None, :]
        split_largest = tl.load(ptrs, inside, other=float("-inf"))
        split_total = tl.load(ptrs + stride, inside, other=0.0)
        split_weighted = tl.load(ptrs + 3 * stride, inside, other=0.0)
        at_target = tl.maximum(at_target, tl.max(tl.load(ptrs + 2 * stride, inside, other=float("-inf")), 0))

        block_largest = tl.max(split_largest, 0)
        base = tl.where(block_largest == float("-inf"), 0.0, block_largest)
        shift = tl.maximum(split_largest - base[None, :], _LOG_ZERO)
        scale = tl.exp(shift)
        block_weighted = tl.sum(scale * (split_weighted + shift * split_total), 0)
        block_total = tl.sum(scale * split_total, 0)
        largest, total, weighted = joined(largest, total, weighted, block_largest, block_total, block_weighted)
    tl.store(stats_ptr + t, largest, t < T)
    tl.store(stats_ptr + stats_stride + t, total, t < T)
    tl.store(stats_ptr + 2 * stats_stride + t, at_target, t < T)
    tl.store(stats_ptr + 3 * stats_stride + t, weighted, t < T)


def launch_scoring(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    local_target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
) -> Tensor:
    """Statistics of this shard, fp32 [4, T], as `logit_stats_reference` gives them of the logits; not for fp64.

    Beside them, memory holds 16 bytes per row and split, within the workspace (for at least one tile of rows), and a
    copy of an operand that is strided or whose D is no multiple of 64.
    """
    if hidden_TD.dtype == torch.bfloat16 and not hidden_TD.is_cuda:  # the interpreter's product of bf16 is wrong
        hidden_TD, weight_VD = hidden_TD.float(), weight_VD.float()
    tile = TILES[architecture(hidden_TD.device)][hidden_TD.element_size()]
    return launch_tile(tile, hidden_TD, weight_VD, local_target_T, bias_V, temperature, softcap, workspace_bytes)


def launch_tile(
    tile: Tile,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    local_target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
) -> Tensor:
    """`launch_scoring` with a given tile."""
    T, V = len(hidden_TD), len(weight_VD)
    stats_4T = hidden_TD.new_empty(4, T, dtype=torch.float32)
    if V == 0:
        stats_4T[0::2], stats_4T[1::2] = -torch.inf, 0
        return stats_4T
    hidden_TD, weight_VD, local_target_T = _aligned(hidden_TD), _aligned(weight_VD), local_target_T.contiguous()
    weight = _source(weight_VD, tile, tile.block_v)
    num_splits = triton.cdiv(V, _SPLIT_V)
    C = tile.block_t * max(1, min(triton.cdiv(T, tile.block_t), workspace_bytes // (16 * num_splits * tile.block_t)))
    partial_S4C = stats_4T.new_empty(num_splits, 4, C)
    for start in range(0, T, C):
        hidden_CD, target_C = hidden_TD[start : start + C], local_target_T[start : start + C]
        rows = len(hidden_CD)
        scoring_kernel[(triton.cdiv(rows, tile.block_t) * num_splits,)](
            _source(hidden_CD, tile, tile.block_t), weight, target_C,
            None if bias_V is None else bias_V.contiguous(), partial_S4C,
            rows, V, hidden_CD.shape[1], C, softcap or 0.0, 1.0 / temperature,
            HAS_SOFTCAP=softcap is not None, **tile.constants(), **tile.options(),
        )  # fmt: skip
        merge_splits_kernel[(triton.cdiv(rows, _MERGE["BLOCK_T"]),)](
            partial_S4C, stats_4T[:, start:], rows, num_splits, C, T, **_MERGE, **LAUNCH_OPTIONS
        )
    return stats_4T


def architecture(device: torch.device) -> str:
    """Key of `TILES`."""
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "default"
    return name if name in TILES else "default"


def _aligned(x: Tensor) -> Tensor:
    """`x` with a multiple of `_ALIGNED` columns and rows that begin at multiples of 16 bytes; a copy where need be."""
    x = torch.nn.functional.pad(x.contiguous(), (0, -x.shape[1] % _ALIGNED))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _source(x: Tensor, tile: Tile, rows: int) -> Any:
    """The kernel's argument: a TMA descriptor of blocks of so many rows, or the tensor."""
    return TensorDescriptor.from_tensor(x, [rows, tile.block_d]) if tile.descriptors else x


def variants() -> list[Variant]:
    """The kernels that scoring launches: every tile plain, and with all options on; fp16 as bf16, plain."""
    partial = {"partial_ptr": "*fp32", "T": "i32", "stride": "i32"}
    merge = partial | {"stats_ptr": "*fp32", "num_splits": "i32", "stats_stride": "i32"}
    kernels = [Variant(merge_splits_kernel, merge, _MERGE, multiples_of_16=("stride",))]
    capabilities: dict[tuple[Tile, str], tuple[int, ...]] = {}
    for name, tiles in TILES.items():
        for tile, dtype in ((tile, dtype) for size, tile in tiles.items() for dtype in _DTYPES[size]):
            capabilities[tile, dtype] = _CAPABILITIES[name]  # "default" is last, and covers what it shares
    for (tile, dtype), launched_on in capabilities.items():
        signature = partial | {
            "hidden": _source_type(dtype, tile, tile.block_t), "weight": _source_type(dtype, tile, tile.block_v),
            "target_ptr": "*i64", "bias_ptr": "*fp32", "V": "i32", "D": "i32", "softcap": "fp32",
            "inverse_temperature": "fp32",
        }  # fmt: skip
        plain = {"bias_ptr": None, "HAS_SOFTCAP": False}
        for options in (plain,) if dtype == "fp16" else (plain, {"HAS_SOFTCAP": True}):
            constants = tile.constants() | options
            kernels.append(Variant(scoring_kernel, signature, constants, tile.options(), ("D", "stride"), launched_on))
    return kernels


def _source_type(dtype: str, tile: Tile, rows: int) -> str:
    return f"tensordesc<{dtype}[{rows}, {tile.block_d}]>" if tile.descriptors else f"*{dtype}"
