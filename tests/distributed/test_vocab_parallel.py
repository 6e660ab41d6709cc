"""The vocabulary split over two and three ranks of gloo, against the whole of it in fp64. T loss rows, V vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vocab_worker
from ranks import run_ranks
from torch import Tensor
from vocab_worker import CASES, GRPO_CASES, Case, lost
from vocabulary import SHARDS, V, relative_error

RTOL = 1e-5
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all cases in one set of processes: over three ranks, and over two of them."""
    out = tmp_path_factory.mktemp("vocab")
    run_ranks(vocab_worker.main, 3, out)
    return out


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, written: Path) -> Ranks:
    """Results of every rank of the group."""
    return [torch.load(written / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def dense(case: Case) -> list[Tensor | None]:
    """logprob_T, entropy_T and gradients of the whole vocabulary from all logits at once, in fp64."""
    tensors, target_T = case.tensors()
    hidden_TD, weight_VD, bias_V = inputs = [x.double().requires_grad_(i in case.wants) for i, x in enumerate(tensors)]
    z_TV = hidden_TD @ weight_VD.T
    z_TV = z_TV + bias_V if case.bias else z_TV
    z_TV = z_TV if case.softcap is None else case.softcap * torch.tanh(z_TV / case.softcap)
    log_p_TV = (z_TV / case.temperature).log_softmax(-1)
    entropy_T = -(log_p_TV.exp() * log_p_TV.masked_fill(log_p_TV == -torch.inf, 0)).sum(-1)
    logprob_T = log_p_TV.gather(1, target_T[:, None])[:, 0]
    grad_T = torch.linspace(-1, 2, case.T, dtype=torch.float64)
    ((grad_T * logprob_T).sum() + case.entropy * (grad_T.flip(0) * entropy_T).sum()).backward()
    return [logprob_T.detach(), entropy_T.detach(), *(x.grad for x in inputs)]


def whole(ranks: Ranks, name: str) -> list[Tensor | None]:
    """Rank 0's result with the gradients of weight and bias put together from all ranks."""
    results = [rank[name]["result"] for rank in ranks]
    shards = zip(*(result[-2:] for result in results), strict=True)
    return [*results[0][:-2], *(None if x[0] is None else torch.cat(x) for x in shards)]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, ranks: Ranks) -> None:
    case = CASES[name]
    ours, exact = whole(ranks, name), dense(case)
    for x, y in zip(ours[:2], exact[:2], strict=True):
        assert x.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(x.double(), y, rtol=RTOL, atol=RTOL)
    for x, y in zip(ours[2:], exact[2:], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == case.dtype and x.shape == y.shape
            assert relative_error(x, y) < (4e-3 if case.dtype == torch.bfloat16 else RTOL)


@pytest.mark.parametrize("name", GRPO_CASES)
def test_loss_and_gradients_with_garbage_in_absent_rows(name: str, ranks: Ranks) -> None:
    case = GRPO_CASES[name]
    inputs, (target_T, *rows, response_cu) = case.tensors()
    rows = [None if x is None else x.double() for x in rows]
    exact = lost(case, [x.double() for x in inputs], [target_T, *rows, response_cu])
    *values, dhidden_TD, dweight_VD, dbias_V = whole(ranks, name)
    for x, y in zip(values, exact, strict=False):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), y.detach(), rtol=RTOL, atol=RTOL)
    for x, y in zip((dhidden_TD, dweight_VD, dbias_V), exact[-3:], strict=True):
        assert relative_error(x, y) < RTOL
    assert not dhidden_TD[rows[-1] == 0].any()


@pytest.mark.parametrize("name", [*CASES, *GRPO_CASES])
def test_ranks_agree_to_the_bit_and_in_every_run(name: str, ranks: Ranks) -> None:
    results = [rank[name]["result"][:-2] for rank in ranks]
    for result in results[1:]:
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    assert all(rank[name]["again"] for rank in ranks)


@pytest.mark.parametrize("name", [*CASES, *GRPO_CASES])
def test_the_parts_of_the_hidden_gradient_sum_to_the_whole(name: str, ranks: Ranks) -> None:
    dhidden_TD, parts = ranks[0][name]["result"][-3], [rank[name]["part"] for rank in ranks]
    if dhidden_TD is None:
        assert parts == [None] * len(ranks)
        return
    tolerance = 8e-3 if dhidden_TD.dtype == torch.bfloat16 else RTOL
    assert relative_error(torch.stack(parts).double().sum(0), dhidden_TD.double()) < tolerance
    shards = (CASES | GRPO_CASES)[name].shards
    for part, shard in zip(parts, SHARDS[shards][len(ranks)], strict=True):
        assert shard > 0 or not part.any()
    if dhidden_TD.any() and min(SHARDS[shards][len(ranks)]) > 1:
        assert not any(torch.equal(part, dhidden_TD) for part in parts)


def test_removed_target_has_logprob_minus_infinity(ranks: Ranks) -> None:
    for rank in ranks:
        logprob_T, entropy_T = rank["removed target"]
        assert logprob_T.item() == -torch.inf and entropy_T.isfinite().all()


def test_every_rank_refuses_what_does_not_fit(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["refusals"] == {
            "rows": f"every rank of tp_group must give the same rows; got {list(range(1, len(ranks) + 1))} rows, "
            "in rank order",
            "high": f"target_T must lie in 0..{V - 1}; got {V}",
            "low": f"target_T must lie in 0..{V - 1}; got -1",
            "fine": "none",
        }
