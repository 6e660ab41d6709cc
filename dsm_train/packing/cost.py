"""Additive costs of responses (tokens, or floating-point operations), and even cuts of a line of responses.

Responses that are computed together share their group's prompt: it counts once in every part that holds one of them.
S responses, P prompts (groups).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.types import Sequences


@dataclass(frozen=True)
class Cost:
    """Additive cost of a line of responses.

    A slice costs the sum of its responses plus each distinct prompt once. Non-negative integers.
    """

    own_S: Tensor
    """Cost of each response without its prompt."""
    prompt_P: Tensor
    """Cost of each prompt."""
    group_cu: Tensor
    """Offsets of the groups, in responses [P + 1]."""

    @staticmethod
    def concatenate(parts: Sequence[Cost]) -> Cost:
        """Concatenate costs; each part keeps prompts of its own."""
        size_P = torch.cat([part.group_cu.diff() for part in parts])
        return Cost(
            torch.cat([part.own_S for part in parts]),
            torch.cat([part.prompt_P for part in parts]),
            torch.cat([size_P.new_zeros(1), size_P.cumsum(0)]),
        )

    @cached_property
    def sums(self) -> tuple[list[int], list[int]]:
        """(begin, end), [S + 1] each: responses i..j - 1, at least one, cost end[j] - begin[i]. Exact at any size."""
        size_P = self.group_cu.diff().long()
        group_S = torch.repeat_interleave(size_P).tolist()
        own = [0, *accumulate(self.own_S.tolist())]
        prompts = [0, *accumulate(torch.where(size_P > 0, self.prompt_P, 0).tolist())]
        begin = [own[s] + prompts[group] for s, group in enumerate(group_S)]
        end = [own[s + 1] + prompts[group + 1] for s, group in enumerate(group_S)]
        total = own[-1] + prompts[-1]
        return [*begin, total], [0, *end]

    @property
    def total(self) -> int:
        """Cost of all responses together."""
        return self.sums[1][-1]

    @property
    def largest(self) -> int:
        """Cost of the most expensive response, with its prompt."""
        begin, end = self.sums
        return max((last - first for first, last in zip(begin[:-1], end[1:], strict=True)), default=0)

    def reach(self, first: int, limit: int) -> int:
        """Find the end of the longest slice from `first` that costs at most `limit`, by bisection."""
        begin, end = self.sums
        return bisect_right(end, begin[first] + limit) - 1


def token_cost(sequences: Sequences) -> Cost:
    """Count packed tokens: all of a prompt, and all of a response but the last, which predicts nothing."""
    kept_S = (sequences.response_cu.diff() - 1).clamp(min=0)
    return Cost(kept_S.long(), sequences.prompt_cu.diff().long(), sequences.group_cu)


def estimated_cost(sequences: Sequences, model: ModelConfig, vocab_size: int) -> Cost:
    """Estimate the floating-point operations of a training step.

    3 * (2 n W + 4 a layers * heads * head_size + 2 r hidden * vocab_size), for n packed tokens, a pairs of tokens that
    see each other, r loss rows and the W weights of all layers: two operations per weight and token, attention's two
    products, and a backward pass of twice the forward (Narayanan et al., arXiv 2104.04473, appendix). A prompt of p
    tokens has p^2 / 2 pairs, a response of k packed tokens k p + k^2 / 2. The head sees loss rows alone.
    """
    heads, D, K = model.num_heads, model.hidden_size, model.kv_channels
    weights = model.num_layers * (2 * D * K * (heads + model.num_kv_heads) + 3 * D * model.ffn_size)
    attention = model.num_layers * heads * K
    tokens, r = token_cost(sequences), sequences.response_cu.diff().long()
    p, k, p_S = tokens.prompt_P, tokens.own_S, tokens.prompt_P[sequences.prompt_of_response_S]
    # p * p and k * (2 p + k) are twice the pairs.
    own_S = 6 * (k * weights + k * (2 * p_S + k) * attention + r * (D * vocab_size))
    return Cost(own_S, 6 * (p * weights + p * p * attention), sequences.group_cu)


def fewest_parts(cost: Cost, limit: int) -> int:
    """Count the consecutive parts of at most `limit` that hold all responses; none of them may cost more."""
    return len(_fill((cost, limit))) - 1


def cut_evenly(cost: Cost, count: int, size: Cost | None = None, max_size: int = 0) -> list[int]:
    """Cut a line into `count` consecutive parts whose largest cost is the least possible: boundaries [count + 1].

    `size`: no part is larger than `max_size`. A part may be empty. Binary search over the largest part's cost; greedy
    fill tests whether a bound is feasible. Raises `ValueError` when the sizes need more parts.
    """
    sizes = [] if size is None else [(size, max_size)]
    if size is not None and (size.largest > max_size or fewest_parts(size, max_size) > count):
        raise ValueError(f"{len(size.own_S)} sequences need more than {count} parts of at most {max_size} tokens")
    low, high = cost.largest, cost.total
    while low < high:
        middle = (low + high) // 2
        if len(_fill((cost, middle), *sizes)) - 1 <= count:
            high = middle
        else:
            low = middle + 1
    cuts = _fill((cost, high), *sizes)
    return cuts + cuts[-1:] * (count + 1 - len(cuts))


def _fill(*limits: tuple[Cost, int]) -> list[int]:
    """Fill parts greedily: boundaries of the fewest that keep all limits. Optimal, as a sub-slice never costs more."""
    cuts, end = [0], len(limits[0][0].own_S)
    while cuts[-1] < end:
        cuts.append(min(cost.reach(cuts[-1], limit) for cost, limit in limits))
    return cuts
