"""A vocabulary of V tokens split over ranks of gloo: over all of a world, and over its last two."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

V = 48
REMOVED = [3, 31]
"""Tokens with a bias of -inf; 31 is a shard of its own in the uneven split over three ranks."""

SHARDS = {
    "even": {2: [24, 24], 3: [16, 16, 16]},
    "uneven": {2: [31, 17], 3: [31, 1, 16]},
    "empty first": {2: [0, 48], 3: [0, 20, 28]},
    "empty last": {2: [48, 0], 3: [31, 17, 0]},
}
"""Tokens of each rank, by the number of ranks."""


def shard(shards: str, group: ProcessGroup) -> slice:
    """This rank's tokens."""
    return slice(*list(pairwise([0, *accumulate(SHARDS[shards][group.size()])]))[group.rank()])


def each_group(rank: int, world: int, store: dist.Store) -> Iterator[ProcessGroup]:
    """The groups that this rank is in: the world, and its last two, whose ranks there are not those in the world."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    last_two = dist.new_group([world - 2, world - 1])
    yield from [dist.group.WORLD, last_two] if rank >= world - 2 else [dist.group.WORLD]
    dist.destroy_process_group()


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm of the difference; absolute where `exact` is zero."""
    norm, error = exact.norm(), (x.double() - exact).norm()
    return float(error / norm if norm > 0 else error)
