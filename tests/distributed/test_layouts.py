"""Layouts of two and four ranks over gloo against one rank: weights, log-probabilities, rollouts and training steps.

The responses of a group share their prompt there, and each has a copy of it on one rank.
"""

from __future__ import annotations

from typing import Any

import layout_worker
import pytest
import tiny
import torch
from layout_worker import CASES
from ranks import run_ranks
from torch import Tensor

from dsm_train.megatron import weights
from dsm_train.types import Rollouts

FOUR = ["tp2_sp_pp2", "pp2_vpp2_dp2"]
LAYOUTS = [name for name in CASES if not name.startswith("one")]
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of the ranks of every layout; all layouts of a size run in the same processes."""
    out = tmp_path_factory.mktemp("layouts")
    written: Results = {}
    ones = [name for name in CASES if name.startswith("one")]
    for world, names in ((1, ones), (2, [name for name in LAYOUTS if name not in FOUR]), (4, FOUR)):
        run_ranks(layout_worker.main, world, out, *names)
        for name in names:
            written[name] = [torch.load(out / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]
    return written


def one_rank(name: str, results: Results) -> dict[str, Any]:
    """The same model on one rank."""
    kind = next((kind for kind in ("tied", "uneven") if kind in name), None)
    return results[f"one_{kind}" if kind else "one"][0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_know_their_place(name: str, results: Results) -> None:
    config, _ = CASES[name]
    world = len(results[name])
    dp = world // (config.tp * config.pp)
    for rank, result in enumerate(results[name]):
        tp_rank, pp_rank, dp_rank = rank % config.tp, rank // (config.tp * dp), rank // config.tp % dp
        assert result["sizes"] == (config.tp, config.pp, dp)
        assert result["place"] == (tp_rank, pp_rank, dp_rank)
        # losses are counted once per replica: on the last stage, by the first rank of a tensor-parallel group
        assert result["losses"] == (pp_rank == config.pp - 1 and tp_rank == 0)
        replicas = [rank + (r - dp_rank) * config.tp for r in range(dp)]
        assert result["gathered"] == replicas
        assert result["exchanged"] == [(replica, dp_rank) for replica in replicas]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_from_the_same_weights(name: str, results: Results) -> None:
    assert_same_weights(results[name][0]["initial"], one_rank(name, results)["initial"])
    assert all(result["initial"] == {} for result in results[name][1:])


@pytest.mark.parametrize(("name", "layers"), [("pp2", {0, 1}), ("pp2_uneven", {0, 1}), ("pp2_vpp2", {0, 2})])
def test_stages_hold_their_layers(name: str, layers: set[int], results: Results) -> None:
    first, last = (result["local"] for result in results[name])
    assert not first.keys() & last.keys()
    held = [{int(key.split(".")[2]) for key in local if key.startswith("decoder.layers")} for local in (first, last)]
    assert held == [layers, set(range(CASES[name][1].num_layers)) - layers]


@pytest.mark.parametrize("name", ["tp2", "tp2_sp"])
def test_tensor_parallel_ranks_hold_slices(name: str, results: Results) -> None:
    whole = results[name][0]["initial"]
    shards = [result["local"] for result in results[name]]
    for key, full in whole.items():
        if "norm" in key:
            assert all(torch.equal(shard[key], full) for shard in shards)
        elif "linear_fc1" in key:
            gate, up = (half.chunk(2) for half in full.chunk(2))
            assert all(torch.equal(shards[r][key], torch.cat([gate[r], up[r]])) for r in range(2))
        else:
            dim = 1 if "linear_proj" in key or "linear_fc2" in key else 0
            assert torch.equal(torch.cat([shard[key] for shard in shards], dim), full)


@pytest.mark.parametrize("name", LAYOUTS)
def test_log_probabilities_are_those_of_one_rank(name: str, results: Results) -> None:
    expected = one_rank(name, results)["logprob"]
    for result in results[name]:
        torch.testing.assert_close(result["logprob"], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(result["logprob"], results[name][0]["logprob"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_rollouts_differ_only_where_a_decision_was_close(name: str, results: Results) -> None:
    whole: Rollouts = one_rank(name, results)["rollouts"]
    for result in results[name]:
        mine, again = result["rollouts"], result["again"]
        for field in ("rollout_logprob_T", "margin_T", "finished_S"):
            assert torch.equal(getattr(mine, field), getattr(again, field))
        assert torch.equal(mine.sequences.response_token_T, again.sequences.response_token_T)
        dp_rank, dp_size = result["place"][2], result["sizes"][2]
        for s in range(mine.sequences.num_responses):
            p, sample = divmod(s, 4)
            same_until_close(whole, (p * dp_size + dp_rank) * 4 + sample, mine, s)


def same_until_close(a: Rollouts, i: int, b: Rollouts, j: int) -> None:
    """Responses i of a and j of b agree up to a token whose margin is below 1e-4."""
    first, other = a.sequences.response(i).tolist(), b.sequences.response(j).tolist()
    at = next((t for t, (x, y) in enumerate(zip(first, other, strict=False)) if x != y), None)
    if at is None:
        assert len(first) == len(other)
    else:
        assert float(a.margin_T[int(a.sequences.response_cu[i]) + at]) < 1e-4


def test_most_decisions_are_not_close(results: Results) -> None:
    rollouts: Rollouts = results["one"][0]["rollouts"]
    assert rollouts.margin_T.numel() > 50 and float((rollouts.margin_T > 1e-4).float().mean()) > 0.95


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_step(name: str, results: Results) -> None:
    expected = one_rank(name, results)
    for result in results[name]:
        for step, other in zip(result["steps"], expected["steps"], strict=True):
            for key in ("loss", "grad_norm", "lr"):
                assert step[key] == pytest.approx(other[key], rel=1e-5)
            torch.testing.assert_close(step["sums"], other["sums"], rtol=1e-5, atol=1e-5)
            assert step["shares"] and not other["shares"]
        assert result["copies"] == 0.0
        for step, other in zip(result["supervised"], expected["supervised"], strict=True):
            assert step == pytest.approx(other, rel=1e-4)
    # AdamW's first steps divide a gradient by its own size, so that rounding counts where the gradient is tiny
    for key, value in expected["trained"].items():
        trained = results[name][0]["trained"][key][: len(value)]
        torch.testing.assert_close(trained, value, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_loss_on_values_has_the_same_gradient(name: str, results: Results) -> None:
    """A value head is whole on every rank, and so is its gradient of the states, which sequence parallelism splits."""
    gradient, expected = (run[0]["value"]["gradient"] for run in (results[name], [one_rank(name, results)]))
    assert gradient.keys() == expected.keys() and "output_layer.weight" not in gradient
    assert gradient["value_head.weight"].shape == (1, CASES[name][1].hidden_size)
    for key, value in expected.items():
        if key == "embedding.word_embeddings.weight":  # rows that pad the vocabulary differ in number
            gradient[key], value = (x[: tiny.VOCAB] for x in (gradient[key], value))
        assert float((gradient[key] - value).norm()) <= 1e-5 * float(value.norm()), key
        assert float(value.norm()) > 1e-3, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_rollouts_see_the_updated_weights_on_every_rank(name: str, results: Results) -> None:
    for result in results[name]:
        peers = [other for other in results[name] if other["place"][2] == result["place"][2]]
        assert all(torch.equal(result["sampled"], other["sampled"]) for other in peers)
        assert not torch.equal(result["sampled"], result["rollouts"].sequences.response_token_T)


@pytest.mark.parametrize("name", LAYOUTS)
def test_saved_weights_are_loaded_as_they_were(name: str, results: Results) -> None:
    """But for the rows that pad the vocabulary, which no token has, and which come back as zeros."""
    main = results[name][0]
    assert main["loaded"].keys() == main["trained"].keys()
    for key, value in main["trained"].items():
        loaded = main["loaded"][key]
        rows = tiny.VOCAB if key in weights.VOCABULARY_WEIGHTS else len(value)
        assert torch.equal(loaded[:rows], value[:rows]) and not loaded[rows:].any(), key


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise; the vocabulary may be padded further in one."""
    assert a.keys() == b.keys() and len(a) > 10
    for key in a:
        rows = min(len(a[key]), len(b[key]))
        assert torch.equal(a[key][:rows], b[key][:rows]), key
        assert len(a[key]) == len(b[key]) or rows >= layout_worker.tiny.VOCAB
