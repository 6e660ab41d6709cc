"""Launchers of packed attention's Triton kernels. Tiles follow architecture, type and head size, never lengths.

One binary serves every layout, and nothing is tuned at run time. T packed tokens, H query heads, J key heads, K head
size, V head size of the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from triton_kernels._common import INTERPRET
from triton_kernels._register import Variant
from triton_kernels._triton import HAS_TRITON, LAUNCH_OPTIONS, triton
from triton_kernels.attention.kernels import (
    add_slots_kernel,
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_forward_kernel,
)
from triton_kernels.attention.packed_layout import PackedLayout

LARGEST_HEAD = 256
_BLOCK_SUM = 1024


@dataclass(frozen=True)
class Tile:
    """Queries and keys that a program multiplies at once, its warps, and stages: blocks in flight plus one."""

    queries: int
    keys: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """Compile-time constants of the kernel."""
        return {"BLOCK_Q": self.queries, "BLOCK_K": self.keys}

    def options(self) -> dict[str, int]:
        """num_warps, num_stages and the options of every launch."""
        return LAUNCH_OPTIONS | {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels, and the most columns of a head's first part (see `parts`)."""

    forward: Tile
    dq: Tile
    dkv: Tile
    first_part: int | None = 256


_FP32 = {
    64: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 64, 8, 1), 128),
    128: Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1), 128),
    256: Tiles(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), 128),
}
TILES: dict[str, dict[int, dict[int, Tiles]]] = {
    "sm_90": {
        2: {
            64: Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(64, 128, 8, 3)),
            128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
            192: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3)),
            256: Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
        },
        4: _FP32,
    },
    "default": {
        2: {
            64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), None),
            128: Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), None),
            256: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), None),
        },
        4: _FP32,
    },
}
"""Tiles by architecture, bytes per operand and largest head size. "default" fits sm_80.

With two stages a block is loaded only when the one before it is used up; three overlap. Eight warps want 128 rows
(queries, or keys of dkv): with fewer, two warps compute the same.
"""

_CAPABILITIES = {"sm_90": (90,), "default": (80, 100)}


def tables(layout: PackedLayout, q_THK: Tensor, k: Tensor, v: Tensor, window: int | None) -> list[Tensor]:
    """Work tables: query tiles of forward and of dq, then `KeyTiles`; none where Triton does not serve.

    Raises `ValueError` for heads larger than 256, and for a group whose offsets do not fit 32 bits.
    """
    if not _is_served(q_THK):
        return []
    if max(q_THK.shape[2], v.shape[2]) > LARGEST_HEAD:
        raise ValueError(
            f"head sizes are at most {LARGEST_HEAD} on a GPU; got {q_THK.shape[2]} and, of the values, {v.shape[2]}"
        )
    stride = k.shape[1] * max(k.shape[2], v.shape[2])
    if layout.longest_group * stride >= 2**31:
        raise ValueError(
            f"a sequence or group has at most 2^31 / {stride} = {2**31 // stride} tokens with such heads; "
            f"got {layout.longest_group}"
        )
    tiles = _tiles(q_THK, v)
    keys = layout.key_tiles(tiles.dkv.keys, tiles.dkv.queries, k.shape[1], window)
    forward, dq = (layout.query_tiles(tile.queries, window) for tile in (tiles.forward, tiles.dq))
    return [forward, dq, keys.items_I5, keys.sums_M4, keys.slots_Z0]


def _is_served(q_THK: Tensor) -> bool:
    return (INTERPRET or (q_THK.is_cuda and HAS_TRITON)) and q_THK.dtype != torch.float64


def _tiles(q_THK: Tensor, v: Tensor) -> Tiles:
    by_size = TILES[architecture(q_THK.device)][_served_dtype(q_THK).itemsize]
    return by_size[min(size for size in by_size if size >= max(q_THK.shape[2], v.shape[2]))]


def _served_dtype(x: Tensor) -> torch.dtype:
    """Type of the kernels' operands: bf16 becomes fp32 in the interpreter, whose product of bf16 is wrong."""
    return torch.float32 if x.dtype == torch.bfloat16 and not x.is_cuda else x.dtype


def architecture(device: torch.device) -> str:
    """Key of `TILES`."""
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "default"
    return name if name in TILES else "default"


def launch_forward(
    q_THK: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out [T, H, V], lse [H, T]); not for fp64."""
    T, H, _ = q_THK.shape
    out, lse_HT = (
        q_THK.new_empty(T, H, v.shape[2], dtype=_served_dtype(q_THK)),
        q_THK.new_empty(H, T, dtype=torch.float32),
    )
    if out.numel():
        rows, tiles, queries_I5 = _rows(q_THK, k, v), _tiles(q_THK, v), tables[0]
        attention_forward_kernel[(len(queries_I5) * H,)](
            *rows, out, lse_HT, queries_I5, T, *_sizes(*rows), scale, min(window or 0, T),
            **_widths(q_THK.shape[2], v.shape[2], tiles.first_part), HAS_WINDOW=window is not None,
            **tiles.forward.constants(), **tiles.forward.options(),
        )  # fmt: skip
    return out.to(q_THK.dtype), lse_HT


def launch_backward(
    grad_out: Tensor,
    grad_lse_HT: Tensor | None,
    q_THK: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_HT: Tensor,
    positions_T: Tensor,
    tables: list[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THK, dk, dv); not for fp64."""
    (T, H, K), (_, J, V) = q_THK.shape, v.shape
    dtype, tiles = _served_dtype(q_THK), _tiles(q_THK, v)
    dq, dk, dv = (x.new_empty(x.shape, dtype=dtype) for x in (q_THK, k, v))
    if not out.numel():
        return dq.zero_().to(q_THK.dtype), dk.zero_().to(k.dtype), dv.zero_().to(v.dtype)
    inputs = _rows(q_THK, k, v)
    sizes, window_or_0 = _sizes(*inputs), min(window or 0, T)  # no path is longer than T, which fits 32 bits
    constants = {**_widths(K, V, tiles.first_part), "HAS_WINDOW": window is not None}
    grad_out, out = grad_out.to(dtype).contiguous(), out.to(dtype)
    grad_lse_HT = None if grad_lse_HT is None else grad_lse_HT.float().contiguous()
    _, queries_I5, keys_I5, sums_M4, slots_Z0 = tables
    delta_HT = torch.empty_like(lse_HT)
    attention_dq_kernel[(len(queries_I5) * H,)](
        *inputs, out, grad_out, lse_HT, grad_lse_HT, delta_HT, dq, queries_I5, T, *sizes, scale, window_or_0,
        **constants, **tiles.dq.constants(), **tiles.dq.options(),
    )  # fmt: skip
    block = tiles.dkv.keys
    dk_slots, dv_slots = (x.new_empty(len(slots_Z0), J, block, x.shape[2], dtype=torch.float32) for x in (k, v))
    attention_dkv_kernel[(len(keys_I5) * J,)](
        *inputs, grad_out, lse_HT, delta_HT, positions_T, keys_I5, dk, dv, dk_slots, dv_slots,
        T, *sizes, scale, window_or_0, **constants, **tiles.dkv.constants(), **tiles.dkv.options(),
    )  # fmt: skip
    if len(slots_Z0):
        for slots, gradient in ((dk_slots, dk), (dv_slots, dv)):
            width = gradient.shape[2]
            add_slots_kernel[(len(sums_M4) * J * triton.cdiv(block * width, _BLOCK_SUM),)](
                slots, gradient, sums_M4, J, WIDTH=width, BLOCK_K=block, BLOCK=_BLOCK_SUM, **LAUNCH_OPTIONS
            )
    return dq.to(q_THK.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _rows(*inputs: Tensor) -> list[Tensor]:
    """Inputs as the kernels read them: columns of a head contiguous, offsets within a group in 32 bits."""
    served = [x.to(_served_dtype(x)) for x in inputs]
    return [x if x.stride(2) == 1 and len(x) * x.stride(0) < 2**31 else x.contiguous() for x in served]


def _sizes(q_THK: Tensor, k: Tensor, v: Tensor) -> list[int]:
    """(H, R, row and head strides of q, k and v)."""
    return [q_THK.shape[1], q_THK.shape[1] // k.shape[1], *(n for x in (q_THK, k, v) for n in x.stride()[:2])]


def _widths(K: int, V: int, first_part: int | None) -> dict[str, int]:
    """Head sizes, each with the two parts in which the kernels load it."""
    (k_first, k_second), (v_first, v_second) = parts(K, first_part), parts(V, first_part)
    return {"K": K, "K_FIRST": k_first, "K_SECOND": k_second, "V": V, "V_FIRST": v_first, "V_SECOND": v_second}


def parts(width: int, first_part: int | None) -> tuple[int, int]:
    """Split `width` columns into one power of two that holds them, or into two; the second may be 0.

    Products need powers of two, at least 16. Two parts waste nothing, 192 = 128 + 64, but take registers: `first_part`
    is the most columns of the first, and None asks for one part.
    """
    rounded = max(16, 1 << (width - 1).bit_length())
    if first_part is None or rounded == width <= first_part or width <= 16:
        return rounded, 0
    first = min(first_part, 1 << (width.bit_length() - 1))
    second = max(16, 1 << (width - first - 1).bit_length())
    return (rounded, 0) if first + second == rounded <= first_part else (first, second)


_MAX_SPILL_BYTES = 16
"""A tile fills the registers; a few that are spilled outside of the loops cost nothing."""
_LEDGER_HEADS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))


def variants() -> list[Variant]:
    """Kernels for the ledger: bf16 at usual head sizes, at 128 also fp16 and a window; fp32 at those of its tiles."""
    kernels: list[Variant] = []
    for name, by_bytes in TILES.items():
        for K, V in _LEDGER_HEADS:
            size = min(size for size in by_bytes[2] if size >= max(K, V))
            for dtype, window in (("bf16", False), ("bf16", True), ("fp16", False)) if K == 128 else (("bf16", False),):
                kernels += _specialisations(by_bytes[2][size], K, V, dtype, window, _CAPABILITIES[name])
    for size, tiles in _FP32.items():
        kernels += _specialisations(tiles, size, size, "fp32", False, (80, 90, 100))
    return kernels


_INTEGERS = ("T", "H", "R", "q_stride", "q_head", "k_stride", "k_head", "v_stride", "v_head", "window")
_STATISTICS = ("lse_ptr", "grad_lse_ptr", "delta_ptr", "dk_slots_ptr", "dv_slots_ptr")
_TYPES = {
    **dict.fromkeys(_INTEGERS, "i32"), **dict.fromkeys(_STATISTICS, "*fp32"), "scale": "fp32",
    "tiles_ptr": "*i32", "items_ptr": "*i32", "position_ptr": "*i64",
}  # fmt: skip


def _specialisations(
    tiles: Tiles, K: int, V: int, dtype: str, window: bool, capabilities: tuple[int, ...]
) -> list[Variant]:
    """Variants of the three kernels and of the sum of slots."""
    kernels = []
    for kernel, tile in (
        (attention_forward_kernel, tiles.forward), (attention_dq_kernel, tiles.dq), (attention_dkv_kernel, tiles.dkv)
    ):  # fmt: skip
        constants = {**_widths(K, V, tiles.first_part), "HAS_WINDOW": window, **tile.constants()}
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: _TYPES.get(name, f"*{dtype}") for name in names}
        aligned = tuple(name for name in names if name.endswith(("_stride", "_head")))
        if "grad_lse_ptr" in signature:  # as training launches it
            constants["grad_lse_ptr"] = None
            del signature["grad_lse_ptr"]
        kernels.append(Variant(kernel, signature, constants, tile.options(), aligned, capabilities, _MAX_SPILL_BYTES))
    for width in {K, V} if dtype != "fp16" and not window else ():
        signature = {"slots_ptr": "*fp32", "out_ptr": f"*{dtype}", "sums_ptr": "*i32", "J": "i32"}
        constants = {"WIDTH": width, "BLOCK_K": tiles.dkv.keys, "BLOCK": _BLOCK_SUM}
        kernels.append(Variant(add_slots_kernel, signature, constants, LAUNCH_OPTIONS, (), capabilities))
    return kernels
