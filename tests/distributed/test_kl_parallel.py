"""`linear_kl` with the vocabulary split over two and three ranks of gloo, against the whole of it in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kl_worker
import pytest
import torch
from kl_worker import CASES, Case
from ranks import run_ranks
from torch import Tensor
from vocabulary import SHARDS, relative_error

RTOL = 1e-5
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all cases in one set of processes: over three ranks, and over two of them."""
    out = tmp_path_factory.mktemp("kl")
    run_ranks(kl_worker.main, 3, out)
    return out


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, written: Path) -> Ranks:
    """Results of every rank of the group."""
    return [torch.load(written / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def dense(case: Case) -> list[Tensor | None]:
    """kl_T and the gradients, of all logits at once, in fp64. Removed tokens get -1e4: autograd has no 0 * inf."""
    heads = [x.double().clamp(min=-1e4) for x in case.tensors()]
    heads = [x.requires_grad_(i in case.wants) for i, x in enumerate(heads)]
    log_p_TV, log_q_TV = (
        log_softmax(case, *head, softcap)
        for head, softcap in ((heads[:3], case.softcap), (heads[3:], case.ref_softcap))
    )
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    (torch.linspace(-1, 2, case.T, dtype=torch.float64) * kl_T).sum().backward()
    return [kl_T.detach(), *(x.grad for x in heads)]


def log_softmax(case: Case, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, softcap: float | None) -> Tensor:
    z_TV = hidden_TD @ weight_VD.T
    z_TV = z_TV + bias_V if case.bias else z_TV
    z_TV = z_TV if softcap is None else softcap * torch.tanh(z_TV / softcap)
    return (z_TV / case.temperature).log_softmax(-1)


def whole(ranks: Ranks, name: str) -> list[Tensor | None]:
    """Rank 0's result with the gradients of weights and biases put together from all ranks."""
    results = zip(*(rank[name]["result"] for rank in ranks), strict=True)
    return [x[0] if i in (0, 1, 4) or x[0] is None else torch.cat(x) for i, x in enumerate(results)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.equal])
def test_values_and_gradients(name: str, ranks: Ranks) -> None:
    case = CASES[name]
    (kl_T, *ours), (exact_T, *exact) = whole(ranks, name), dense(case)
    assert kl_T.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(kl_T.double(), exact_T, rtol=RTOL, atol=RTOL)
    for x, y in zip(ours, exact, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == case.dtype and x.shape == y.shape
            assert relative_error(x, y) < (4e-3 if case.dtype == torch.bfloat16 else RTOL)


def test_equal_heads_have_no_divergence(ranks: Ranks) -> None:
    assert not any(x.any() for x in whole(ranks, "equal"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit_and_in_every_run(name: str, ranks: Ranks) -> None:
    for i in (0, 1, 4):  # kl_T and both hidden states' gradients
        first, *others = (rank[name]["result"][i] for rank in ranks)
        assert all(x is first is None or torch.equal(x, first) for x in others)
    assert all(rank[name]["again"] for rank in ranks)


@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_the_hidden_gradients_sum_to_the_whole(name: str, ranks: Ranks) -> None:
    case = CASES[name]
    for i, parts in zip((1, 4), zip(*(rank[name]["parts"] for rank in ranks), strict=True), strict=True):
        dhidden = ranks[0][name]["result"][i]
        if dhidden is None:
            assert parts == (None,) * len(ranks)
            continue
        tolerance = 8e-3 if case.dtype == torch.bfloat16 else RTOL
        assert relative_error(torch.stack(parts).double().sum(0), dhidden.double()) < tolerance
        shards = SHARDS[case.shards][len(ranks)]
        assert all(shard > 0 or not part.any() for part, shard in zip(parts, shards, strict=True))
        if dhidden.any() and min(shards) > 1 and not case.extreme:
            assert not any(torch.equal(part, dhidden) for part in parts)


def test_every_rank_refuses_rows_that_differ(ranks: Ranks) -> None:
    rows = list(range(1, len(ranks) + 1))
    for rank in ranks:
        assert rank["refusals"] == [
            f"every rank of tp_group must give the same rows; got {rows} rows, in rank order",
            "none",
        ]
