"""Responses shared out over data-parallel replicas by estimated cost.

Replicas that sampled long responses would keep the others waiting in every optimizer step. S responses, T loss rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch

from dsm_train.megatron.parallel import Parallel
from dsm_train.packing.cost import Load, cut_evenly
from dsm_train.types import Sequences
from dsm_train.update import Rows


def balance(sequences: Sequences, rows: Rows, cost: Load, parallel: Parallel) -> tuple[Sequences, Rows]:
    """This replica's share of the work of all: the line of their responses, in rank order, cut where costs are even.

    Consecutive parts keep groups together: at most one group is cut between two replicas, and its prompt counts for
    both; that a replica's micro-batches may cut groups once more is not foreseen. Rows travel with their responses, and
    as they are weighted by then, a step does not depend on who computes them. Collective; a share may be empty.
    """
    if parallel.dp_size == 1 or not parallel.config.balance:
        return sequences, rows
    costs = [cast(Load, cost) for cost in parallel.gather_over_data(cost)]
    cuts = torch.tensor(cut_evenly(Load.concatenate(costs), parallel.dp_size))
    begin, count = sum(len(cost.own_S) for cost in costs[: parallel.dp_rank]), sequences.num_responses
    mine = [torch.arange(first, last) for first, last in pairwise((cuts - begin).clamp(0, count).tolist())]
    parts = [(sequences.take(index_S), rows.take(sequences.rows_of(index_S))) for index_S in mine]
    received = [cast(tuple[Sequences, Rows], part) for part in parallel.exchange_over_data(parts)]
    return Sequences.concatenate([part for part, _ in received]), Rows.concatenate([part for _, part in received])
