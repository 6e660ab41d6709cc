"""Counter-based random numbers and token sampling.

B rows, V vocabulary.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.sampling import counter_uniform, sample, sample_counter

LOGITS_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -30.0])


def uniform(count: int, seed: int = 0, step: int = 0) -> Tensor:
    """Numbers of one step: 100 prompts, and as many samples and positions as it takes."""
    i = torch.arange(count)
    return counter_uniform(seed, step, i % 100, i // 100 % 10, i // 1000)


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def test_numbers_are_uniform() -> None:
    u = uniform(100_000)
    assert u.dtype == torch.float64 and float(u.min()) > 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / 1e5) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 4 * (1 / 180 / 1e5) ** 0.5
    # 99 degrees of freedom: above 149 once in a thousand seeds
    assert chi_square(torch.histc(u, 100, 0, 1), torch.full((100,), 1000.0, dtype=torch.float64)) < 149


def test_neighbouring_counters_are_independent() -> None:
    """The pair of numbers of two consecutive positions fills the unit square evenly."""
    position = torch.arange(100_000)
    zero = torch.zeros_like(position)
    u = counter_uniform(0, 0, zero, zero, position)
    cell = (u[:-1] * 10).long() * 10 + (u[1:] * 10).long()
    assert chi_square(torch.bincount(cell, minlength=100).double(), torch.full((100,), 999.99).double()) < 149


def test_a_first_occurrence_counts_as_none_and_every_other_pair_differs() -> None:
    counter = sample_counter(torch.arange(64), torch.arange(100))
    assert torch.equal(counter[:64], torch.arange(64)) and counter.unique().numel() == 6400
    u = counter_uniform(0, 0, torch.zeros_like(counter), counter, torch.zeros_like(counter))
    assert u.unique().numel() == 6400


def test_numbers_depend_on_every_counter_and_on_nothing_else() -> None:
    values = list(itertools.product(range(3), range(-1, 2), range(3), range(3), range(3)))
    seeds, steps, prompts, samples, positions = (torch.tensor(column) for column in zip(*values, strict=True))
    one_by_one = torch.cat(
        [
            counter_uniform(int(a), int(b), c[None], d[None], e[None])
            for a, b, c, d, e in zip(seeds, steps, prompts, samples, positions, strict=True)
        ]
    )
    assert one_by_one.unique().numel() == len(values)
    in_one_call = counter_uniform(1, -1, prompts, samples, positions)
    assert torch.equal(in_one_call[(seeds == 1) & (steps == -1)], one_by_one[(seeds == 1) & (steps == -1)])


def test_numbers_are_splitmix64_of_the_counters() -> None:
    """Against the same in Python's integers, so that they are the same on every machine."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for counters in ((1, 2, 3, 4, 5), (2**40, 0, 2**62, 1000, 0)):
        seed, step, *rest = counters
        state = mix(seed)
        for counter in (step, *rest):
            state = mix(state ^ counter)
        u = counter_uniform(seed, step, *(torch.tensor([c]) for c in rest))
        assert u.item() == ((state >> 12) + 0.5) / 2**52


def expected_probabilities(sampling: SamplingConfig) -> Tensor:
    """Softmax at the temperature, cut to the top k, then to the nucleus, token by token."""
    prob = (LOGITS_V.double() / sampling.temperature).softmax(-1)
    order = prob.argsort(descending=True).tolist()
    kept = order[: sampling.top_k] if sampling.top_k else order
    mass, nucleus = 0.0, []
    for token in kept:
        if mass < sampling.top_p * float(prob[kept].sum()):
            nucleus.append(token)
        mass += float(prob[token])
    out = torch.zeros_like(prob)
    out[nucleus] = prob[nucleus]
    return out / out.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.5),
        SamplingConfig(temperature=3.0),
        SamplingConfig(top_k=2),
        SamplingConfig(top_k=100),  # more than there are: all
        SamplingConfig(top_p=0.7),
        SamplingConfig(top_p=0.01),  # one token at least
        SamplingConfig(temperature=2.0, top_k=4, top_p=0.8),
    ],
    ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}",
)
def test_frequencies_follow_the_distribution(sampling: SamplingConfig) -> None:
    chosen = sample(LOGITS_V.expand(20_000, -1), uniform(20_000), sampling)
    observed, prob = torch.bincount(chosen.token_B, minlength=6).double(), expected_probabilities(sampling)
    assert bool((observed[prob == 0] == 0).all())
    likely = prob > 1e-3
    # 5 degrees of freedom at most: above 20.5 once in a thousand seeds
    assert chi_square(observed[likely], 20_000 * prob[likely]) < 20.5
    # the log-probability is over the whole vocabulary, truncated or not
    full = (LOGITS_V / sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(chosen.logprob_B, full[chosen.token_B])


def test_greedy_takes_the_best_and_reports_its_lead() -> None:
    chosen = sample(LOGITS_V[None], None, SamplingConfig(temperature=0.0))
    assert chosen.token_B.tolist() == [0]
    torch.testing.assert_close(chosen.logprob_B, LOGITS_V.log_softmax(-1)[:1])
    torch.testing.assert_close(chosen.margin_B, torch.tensor([1.0]))


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(top_k=3)], ids=["all", "top_k"])
def test_a_change_within_the_margin_changes_no_token(sampling: SamplingConfig) -> None:
    u = uniform(1000)
    logits = LOGITS_V.expand(1000, -1)
    chosen = sample(logits, u, sampling)
    # the margin is a distance in cumulative probability, so the random number may move by it over the total
    total = expected_total(sampling)
    for direction in (-1, 1):
        inside = (u + direction * 0.99 * chosen.margin_B.double() / total).clamp(1e-12, 1 - 1e-12)
        assert torch.equal(sample(logits, inside, sampling).token_B, chosen.token_B)
    outside = [
        sample(logits, (u + sign * 1.01 * chosen.margin_B.double() / total).clamp(0, 1 - 1e-12), sampling).token_B
        for sign in (-1, 1)
    ]
    interior = (u - chosen.margin_B / total > 1e-3) & (u + chosen.margin_B / total < 1 - 1e-3)
    changed = (outside[0] != chosen.token_B) | (outside[1] != chosen.token_B)
    assert int(interior.sum()) > 100 and bool(changed[interior].all())


def expected_total(sampling: SamplingConfig) -> float:
    prob = LOGITS_V.double().softmax(-1)
    return float(prob.topk(sampling.top_k or 6).values.sum())


@pytest.mark.parametrize("u", [1e-17, 1 - 2.0**-53])
def test_the_edges_of_the_unit_interval_give_possible_tokens(u: float) -> None:
    # the last two tokens are cut off: the largest number must not fall on them
    chosen = sample(LOGITS_V[None], torch.tensor([u], dtype=torch.float64), SamplingConfig(top_k=4))
    assert chosen.token_B.item() == (0 if u < 0.5 else 3)


def test_sampling_without_numbers_raises() -> None:
    with pytest.raises(ValueError, match="random numbers"):
        sample(LOGITS_V[None], None, SamplingConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0 and finite; got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_values_that_cannot_be(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingConfig(**arguments)  # type: ignore[arg-type]


def test_truncation_is_said_where_it_is_in_effect() -> None:
    assert SamplingConfig().notes() == SamplingConfig(temperature=0, top_p=0.5).notes() == []
    (line,) = SamplingConfig(top_p=0.9, top_k=5).notes()
    assert line.startswith("sampling.top_p = 0.9 and sampling.top_k = 5: ") and "log-probabilities of the full" in line
