"""Work balanced over real data-parallel ranks: no response lost, doubled or changed, and evener shares."""

from __future__ import annotations

from typing import Any

import balance_worker
import pytest
import torch
from balance_worker import CASES
from ranks import run_ranks

from dsm_train.types import Rollouts, Sequences, offsets
from dsm_train.update import Rows
from triton_kernels import group_advantage

Ranks = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Results of the ranks of every case."""
    out = tmp_path_factory.mktemp("balance")
    for world in (2, 3):
        names = [name for name, replicas in CASES.items() if len(replicas) == world]
        run_ranks(balance_worker.main, world, out, *names)
    return {
        name: [torch.load(out / f"{name}-{rank}.pt", weights_only=False) for rank in range(len(replicas))]
        for name, replicas in CASES.items()
    }


def responses(work: list[tuple[Sequences, Rows]]) -> list[tuple[list[int], list[int], list[list[float]]]]:
    """Prompt, response and rows of every response of all replicas, in rank order."""
    found = []
    for sequences, rows in work:
        for s, p in enumerate(sequences.prompt_of_response_S.tolist()):
            own = rows.take(sequences.rows_of(torch.tensor([s])))
            values = [value.tolist() for value in own.present().values()]
            found.append((sequences.prompt(p).tolist(), sequences.response(s).tolist(), values))
    return found


@pytest.mark.parametrize("name", CASES)
def test_no_response_is_lost_or_doubled_and_rows_travel_with_theirs(name: str, ranks: Ranks) -> None:
    before, after = ([rank[when] for rank in ranks[name]] for when in ("before", "after"))
    expected = [length for replica in CASES[name] for group in replica for length in group]
    assert [len(response) for _, response, _ in responses(before)] == expected
    # in the same order, bit for bit: a float equals itself alone, and each row has four numbers of its own
    assert responses(after) == responses(before)
    assert all(len(values) == 4 for _, _, values in responses(after))


@pytest.mark.parametrize("name", CASES)
def test_shares_are_as_even_as_a_cut_allows(name: str, ranks: Ranks) -> None:
    before, after = ([rank["cost"][i] for rank in ranks[name]] for i in (0, 1))
    # responses cost what they did, and a group that is cut has its prompt twice
    own_before, own_after = (sum(rank["own"][i] for rank in ranks[name]) for i in (0, 1))
    prompts_before, prompts_after = (
        sum(rank[when][0].num_prompts for rank in ranks[name]) for when in ("before", "after")
    )
    assert own_before == own_after
    assert (sum(after) > sum(before)) == (prompts_after > prompts_before) and sum(after) >= sum(before)
    if name == "off":
        assert after == before
    elif name.startswith("uneven"):
        # a share is off by one response at most; before, one replica had nearly everything
        assert max(after) < 0.65 * max(before) and max(after) < 1.3 * sum(after) / len(after)
    else:
        assert max(after) <= max(before)


def test_a_replica_without_work_gets_a_share_and_one_may_end_without(ranks: Ranks) -> None:
    def counts(name: str) -> list[int]:
        return [rank["after"][0].num_responses for rank in ranks[name]]

    assert counts("nothing") == [3, 4] or counts("nothing") == [4, 3]
    assert sorted(counts("nothing3")) == [1, 2, 2]
    assert counts("nothing_at_all") == [0, 0]
    assert sorted(counts("fewer_than_replicas3")) == [0, 1, 1]
    # the giant is alone but for what is small beside it
    assert max(counts("giant")) < 8


@pytest.mark.parametrize("name", CASES)
def test_groups_stay_together_but_for_one_at_each_cut(name: str, ranks: Ranks) -> None:
    groups = sum(len(replica) for replica in CASES[name])
    after = [rank["after"][0] for rank in ranks[name]]
    assert sum(sequences.num_prompts for sequences in after) <= groups + len(after) - 1
    for sequences in after:
        prompts = [tuple(sequences.prompt(p).tolist()) for p in range(sequences.num_prompts)]
        assert len(set(prompts)) == len(prompts) and bool((sequences.group_cu.diff() > 0).all())


@pytest.mark.parametrize("name", [name for name in CASES if name != "nothing_at_all"])
def test_weights_and_advantages_are_of_all_replicas(name: str, ranks: Ranks) -> None:
    rollouts: list[Rollouts] = [rank["rollouts"] for rank in ranks[name]]
    lengths = [n for replica in CASES[name] for group in replica for n in group]
    averages = ("response", "token", "fixed")
    weight = {average: sum(rank["weight"][average] for rank in ranks[name]) for average in averages}
    assert weight["token"] == pytest.approx(1, rel=1e-5)
    assert weight["response"] == pytest.approx(sum(n > 0 for n in lengths) / len(lengths), rel=1e-5)
    assert weight["fixed"] == pytest.approx(sum(lengths) / (64 * len(lengths)), rel=1e-5)
    # the scale "batch" is the deviation of all replicas' rewards
    group_cu = offsets([len(group) for replica in CASES[name] for group in replica])
    advantage_S = group_advantage(torch.cat([r.reward_S for r in rollouts]), group_cu, "batch")
    expected = advantage_S.repeat_interleave(torch.tensor(lengths))
    assert torch.equal(torch.cat([rank["advantage_T"] for rank in ranks[name]]), expected)
