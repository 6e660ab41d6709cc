"""Segments, statistics and their record: what the ops share.

T loss rows, S responses, P prompts (groups).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Set before import: the Triton kernels serve CPU tensors through Triton's interpreter."""

SUMS: tuple[str, ...] = ("tokens", "weight", "kl", "log_ratio", "ratio", "clipped_low", "clipped_high", "entropy")
MAXIMA: tuple[str, ...] = ("ratio",)
MINIMA: tuple[str, ...] = ("ratio",)


@dataclass(frozen=True)
class LossStats:
    """Statistics of the rows with weight != 0, detached. Reduce `sums` by sum, `maxima` by max, `minima` by min.

    sums: [8] in the order of `SUMS`: rows, sum of weights, KL, old - new log-probability, ratio, rows clipped below
    (ratio < 1 - clip_low, A < 0) and above, entropy (0 where the op has none). maxima [1], minima [1]: of the ratio;
    -inf and +inf when there is no row. NaN in a row makes what depends on it NaN.
    """

    sums: Tensor
    maxima: Tensor
    minima: Tensor

    @staticmethod
    def from_packed(stats: Tensor) -> LossStats:
        """Statistics from one tensor [sums | maxima | minima], as the registered ops return it."""
        return LossStats(*stats.split([len(SUMS), len(MAXIMA), len(MINIMA)]))

    def named(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """(sums, maxima, minima) by name, each value a scalar: {"tokens": ..., "kl": ...}, {"ratio": ...}, ..."""
        names_and_values = ((SUMS, self.sums), (MAXIMA, self.maxima), (MINIMA, self.minima))
        sums, maxima, minima = (dict(zip(names, x.unbind(), strict=True)) for names, x in names_and_values)
        return sums, maxima, minima

    @staticmethod
    def of(**sums: Tensor) -> LossStats:
        """Statistics that are sums alone, by name; the others are 0."""
        zero = next(iter(sums.values())).new_zeros(())
        infinity = zero.new_full((1,), float("inf"))
        return LossStats(torch.stack([sums.get(name, zero) for name in SUMS]).detach(), -infinity, infinity)

    def mean(self, name: str) -> Tensor:
        """Mean over rows of the sum called `name`; 0 when there is no row."""
        return self.sums[SUMS.index(name)] / self.sums[SUMS.index("tokens")].clamp(min=1)


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar, differentiable. stats: see `LossStats`."""

    loss: Tensor
    stats: LossStats


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in the dtype of the computation: fp64 stays fp64 (the oracle's), everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def segment_ids(cu: Tensor, total: int) -> Tensor:
    """Segment of each of `total` elements, int64: offsets [0, 2, 2, 5] give [0, 0, 2, 2, 2]."""
    return torch.searchsorted(cu[1:].contiguous(), torch.arange(total, device=cu.device, dtype=cu.dtype), right=True)


def segment_sum(x_T: Tensor, segment_T: Tensor, num_segments: int) -> Tensor:
    """Sum of the elements of each segment, differentiable."""
    return x_T.new_zeros(num_segments).index_add(0, segment_T, x_T)


def pack_stats(
    weight_T: Tensor,
    kl_T: Tensor,
    log_ratio_T: Tensor,
    ratio_T: Tensor,
    clipped_low_T: Tensor,
    clipped_high_T: Tensor,
    entropy_T: Tensor,
) -> Tensor:
    """[sums | maxima | minima] of `LossStats` from its rows; rows of weight 0 are left out. log_ratio is old - new."""
    present_T = weight_T != 0
    columns = (present_T, weight_T, kl_T, log_ratio_T, ratio_T, clipped_low_T, clipped_high_T, entropy_T)
    sums = torch.stack([torch.where(present_T, x_T, 0).sum(dtype=ratio_T.dtype) for x_T in columns])
    infinity = ratio_T.new_full((1,), torch.inf)
    maximum = torch.cat([torch.where(present_T, ratio_T, -torch.inf), -infinity]).amax(0, keepdim=True)
    minimum = torch.cat([torch.where(present_T, ratio_T, torch.inf), infinity]).amin(0, keepdim=True)
    return torch.cat([sums, maximum, minimum]).detach()
