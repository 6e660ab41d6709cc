"""Balance: responses shared out over data-parallel replicas by estimated cost.

Replicas that sampled long responses would keep the others waiting in every optimizer step. S responses, T loss rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dsm_train.megatron.parallel import Parallel
from dsm_train.packing.cost import Cost, cut_evenly
from dsm_train.rows import Rows
from dsm_train.types import Sequences


def balance(sequences: Sequences, rows: Rows, cost: Cost, parallel: Parallel) -> tuple[Sequences, Rows]:
    """Exchange responses so that replicas have even costs: the line of all of them, in rank order, cut evenly.

    At most one group is split between two replicas (its prompt is computed twice). Weights are already global, so
    moving a response changes no number. Not modelled: packing may split groups again. Collective; a share may be empty.
    """
    if parallel.dp_size == 1 or not parallel.config.balance:
        return sequences, rows
    costs = parallel.gather_over_data(cost)
    cuts = torch.tensor(cut_evenly(Cost.concatenate(costs), parallel.dp_size))
    begin, count = sum(len(cost.own_S) for cost in costs[: parallel.dp_rank]), sequences.num_responses
    mine = [torch.arange(first, last) for first, last in pairwise((cuts - begin).clamp(0, count).tolist())]
    parts = [(sequences.take(index_S), rows.take(sequences.rows_of(index_S))) for index_S in mine]
    received = parallel.exchange_over_data(parts)
    return Sequences.concatenate([part for part, _ in received]), Rows.concatenate([part for _, part in received])


def deal(cost: Cost, parallel: Parallel) -> Tensor:
    """Index this replica's part of responses that every replica holds: a line cut evenly by cost, or dealt in turn.

    A part may be empty.
    """
    if not parallel.config.balance:
        return torch.arange(parallel.dp_rank, len(cost.own_S), parallel.dp_size)
    cuts = cut_evenly(cost, parallel.dp_size)
    return torch.arange(cuts[parallel.dp_rank], cuts[parallel.dp_rank + 1])
