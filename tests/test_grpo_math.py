"""GRPO's mathematics: weights of the averages, presets, and the rows that a minibatch trains on.

S responses, T response tokens, P prompts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from dsm_train.config import AlgorithmConfig
from dsm_train.grpo import PRESETS, Algorithm, algorithm, token_weights
from dsm_train.megatron.parallel import Parallel
from dsm_train.packing.microbatch import pack
from dsm_train.types import Rollouts, Sequences
from dsm_train.update import Rows, minibatches
from triton_kernels import Objective, group_advantage

RESPONSE_CU = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)  # lengths 2, 0, 3, 1


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        # eq. 3: each of the 4 responses weighs 1/4, shared evenly by its tokens; the empty one's share is lost
        ("response", [1 / 8, 1 / 8, 1 / 12, 1 / 12, 1 / 12, 1 / 4]),
        ("token", [1 / 6] * 6),
        ("fixed", [1 / 40] * 6),  # 4 responses of at most 10 tokens
    ],
)
def test_weights_by_hand(average: str, expected: list[float]) -> None:
    weight_T = token_weights(RESPONSE_CU, average, num_responses=4, num_tokens=6, fixed_length=10)
    torch.testing.assert_close(weight_T, torch.tensor(expected))


@pytest.mark.parametrize("average", ["response", "token", "fixed"])
def test_weights_of_replicas_are_those_of_the_whole(average: str) -> None:
    """Counts are of the whole step, so a replica's weights do not depend on how the step is split."""
    whole = token_weights(RESPONSE_CU, average, 4, 6, fixed_length=10)
    first = token_weights(RESPONSE_CU[:3], average, 4, 6, fixed_length=10)
    second = token_weights(RESPONSE_CU[2:] - 2, average, 4, 6, fixed_length=10)
    assert torch.equal(torch.cat([first, second]), whole)


def test_the_papers_advantage_by_hand() -> None:
    # rewards 1, 0, 0, 1: mean 1/2, sample deviation sqrt(1/3)
    reward_S, group_cu = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 4], dtype=torch.int32)
    a = 0.5 * 3**0.5
    torch.testing.assert_close(group_advantage(reward_S, group_cu), torch.tensor([a, -a, -a, a]), rtol=1e-5, atol=0)


def test_presets_are_the_papers() -> None:
    assert PRESETS["grpo"] == Algorithm(
        Objective(clip_low=0.2, clip_high=0.2, kl_coef=0.04, kl="k3", ratio="token", surrogate="clip"),
        average="response",
        scale="std",
    )
    assert (PRESETS["dr_grpo"].average, PRESETS["dr_grpo"].scale) == ("fixed", "none")
    assert (PRESETS["dapo"].objective.clip_low, PRESETS["dapo"].objective.clip_high) == (0.2, 0.28)
    assert PRESETS["dapo"].average == PRESETS["cispo"].average == "token"
    assert PRESETS["gspo"].objective.ratio == "sequence"
    assert PRESETS["cispo"].objective.surrogate == "cispo"
    assert [name for name, preset in PRESETS.items() if preset.objective.kl_coef > 0] == ["grpo"]


def test_configuration_overrides_the_preset_and_zero_is_a_value() -> None:
    assert algorithm(AlgorithmConfig()) == PRESETS["grpo"]
    changed = algorithm(AlgorithmConfig(kl_coef=0.0, clip_high=0.3, average="token", scale="loo", kl="k2"))
    assert changed.objective == replace(PRESETS["grpo"].objective, kl_coef=0.0, clip_high=0.3, kl="k2")
    assert (changed.average, changed.scale) == ("token", "loo")


def rollouts() -> Rollouts:
    sequences = tiny.sequences([2, 3], [2, 1, 3, 2])
    T = sequences.response_token_T.numel()
    return Rollouts(
        sequences=sequences,
        prompt_id_P=torch.tensor([7, 8]),
        rollout_logprob_T=torch.zeros(T),
        margin_T=torch.ones(T),
        finished_S=torch.ones(4, dtype=torch.bool),
        weight_version=0,
        reward_S=torch.tensor([1.0, 0.0, 0.0, 3.0]),
        ref_logprob_T=-torch.arange(T).float(),
        old_logprob_T=torch.arange(T).float(),
    )


def test_rows_carry_their_responses_advantage(layout: Parallel) -> None:
    ((part, rows),) = minibatches(rollouts(), Algorithm(Objective(), scale="none"), 4, layout)
    assert part.num_responses == 4
    # centred on the group's mean: 1/2 for the first group, 3/2 for the second
    assert rows.advantage_T.tolist() == [0.5, 0.5, -0.5, -1.5, -1.5, -1.5, 1.5, 1.5]
    torch.testing.assert_close(rows.weight_T, torch.tensor([1 / 8, 1 / 8, 1 / 4, *[1 / 12] * 3, 1 / 8, 1 / 8]))
    assert torch.equal(rows.old_logprob_T, torch.arange(8.0)) and torch.equal(rows.ref_logprob_T, -torch.arange(8.0))


@pytest.mark.parametrize("average", ["response", "token"])
def test_each_minibatch_is_an_optimizer_step_of_its_own(layout: Parallel, average: str) -> None:
    algo = Algorithm(Objective(), average=average)
    (whole, all_rows), parts = (
        *minibatches(rollouts(), algo, 4, layout),
        minibatches(rollouts(), replace(algo, minibatches=2), 4, layout),
    )
    assert [part.num_prompts for part, _ in parts] == [1, 1]
    assert torch.equal(torch.cat([part.response_token_T for part, _ in parts]), whole.response_token_T)
    for name in ("advantage_T", "old_logprob_T", "ref_logprob_T"):
        assert torch.equal(torch.cat([getattr(rows, name) for _, rows in parts]), getattr(all_rows, name))
    for _, rows in parts:
        assert float(rows.weight_T.sum()) == pytest.approx(1.0)


def test_on_policy_rows_have_no_old_log_probabilities(layout: Parallel) -> None:
    on_policy = replace(rollouts(), old_logprob_T=None, ref_logprob_T=None)
    ((_, rows),) = minibatches(on_policy, PRESETS["dapo"], 4, layout)
    assert rows.old_logprob_T is None and rows.ref_logprob_T is None


def test_groups_may_be_ragged(layout: Parallel) -> None:
    """Three responses to the first prompt, one to the second: group sizes are the sequences' own."""
    whole = rollouts()
    sequences = replace(whole.sequences, group_cu=torch.tensor([0, 3, 4], dtype=torch.int32))
    ((part, rows),) = minibatches(replace(whole, sequences=sequences), Algorithm(Objective(), scale="none"), 4, layout)
    assert part.group_cu.tolist() == [0, 3, 4]
    # rewards 1, 0, 0 about 1/3; a group of one has advantage 0, and stays for its KL
    torch.testing.assert_close(rows.advantage_T, torch.tensor([2 / 3, 2 / 3, *[-1 / 3] * 4, 0, 0]))


def test_minibatches_that_do_not_divide_the_groups_are_all_there(layout: Parallel) -> None:
    parts = minibatches(rollouts(), replace(PRESETS["grpo"], minibatches=3), 4, layout)
    assert [part.num_responses for part, _ in parts] == [0, 2, 2]
    assert all(rows.weight_T.numel() == part.response_token_T.numel() for part, rows in parts)


NO_KL = Algorithm(Objective(kl_coef=0.0), scale="none")


def test_responses_that_cannot_move_the_policy_are_left_out(layout: Parallel) -> None:
    scored = replace(rollouts(), reward_S=torch.tensor([1.0, 1.0, 0.0, 3.0]), ref_logprob_T=None)
    ((part, rows),) = minibatches(scored, NO_KL, 4, layout)
    assert part.num_prompts == 1 and torch.equal(part.prompt(0), scored.sequences.prompt(1))
    assert torch.equal(part.response_token_T, scored.sequences.response_token_T[3:])
    assert torch.equal(rows.old_logprob_T, torch.arange(3.0, 8.0))
    # weighted with those left out: 4 responses
    torch.testing.assert_close(rows.weight_T, torch.tensor([*[1 / 12] * 3, 1 / 8, 1 / 8]))
    for objective in (Objective(), Objective(kl_coef=0.0, entropy_coef=0.01)):
        ((part, _),) = minibatches(scored, replace(NO_KL, objective=objective), 4, layout)
        assert part.num_responses == 4


def test_a_step_may_have_nothing_to_learn_from(layout: Parallel) -> None:
    ((part, rows),) = minibatches(replace(rollouts(), reward_S=torch.ones(4)), NO_KL, 4, layout)
    assert part.num_responses == part.num_prompts == rows.weight_T.numel() == 0
    assert len(pack(part, 10, torch.device("cpu"))) == 1


@pytest.mark.parametrize("average", ["response", "token", "fixed"])
def test_a_replica_may_have_no_response(layout: Parallel, average: str) -> None:
    nothing = Rollouts(
        Sequences.from_lists([], []), *(torch.empty(0) for _ in range(4)), weight_version=0, reward_S=torch.empty(0)
    )
    ((part, rows), _) = minibatches(nothing, replace(NO_KL, average=average, minibatches=2), 4, layout)
    assert part.num_responses == rows.weight_T.numel() == rows.advantage_T.numel() == 0


def test_taking_rows_keeps_what_is_absent_absent(layout: Parallel) -> None:
    ((_, rows),) = minibatches(replace(rollouts(), old_logprob_T=None), PRESETS["grpo"], 4, layout)
    taken = rows.take(torch.tensor([5, 0]))
    assert taken.old_logprob_T is None
    assert taken.ref_logprob_T.tolist() == [-5.0, 0.0]
    joined = Rows.concatenate([taken, rows])
    assert joined.old_logprob_T is None
    assert torch.equal(joined.ref_logprob_T, torch.cat([taken.ref_logprob_T, rows.ref_logprob_T]))


@pytest.mark.parametrize("average", ["response", "token", "fixed"])
@pytest.mark.parametrize("scale", ["std", "batch"])
def test_masked_responses_are_as_if_they_were_never_sampled(average: str, scale: str, layout: Parallel) -> None:
    whole = replace(rollouts(), finished_S=torch.tensor([True, False, True, True]))
    algo = Algorithm(Objective(), average=average, scale=scale, finished_only=True)
    ((part, rows),) = minibatches(whole, algo, 4, layout)
    ((expected_part, expected),) = minibatches(
        whole.take(whole.finished_S.nonzero().squeeze(1)), replace(algo, finished_only=False), 4, layout
    )
    assert part.num_responses == 3 and torch.equal(part.response_token_T, expected_part.response_token_T)
    for name, value in expected.present().items():
        assert torch.equal(rows.present()[name], value), name
    # a response without a verdict is masked likewise
    unjudged = replace(whole, finished_S=torch.ones(4, dtype=torch.bool), reward_S=whole.reward_S.clone())
    unjudged.reward_S[1] = torch.nan
    ((part, rows),) = minibatches(unjudged, replace(algo, finished_only=False), 4, layout)
    assert part.num_responses == 3 and torch.equal(part.response_token_T, expected_part.response_token_T)
    for name, value in expected.present().items():
        assert torch.equal(rows.present()[name], value), name
    # and with the other three gone, minibatches are still those of all questions
    alone = replace(whole, finished_S=torch.tensor([False, False, False, True]))
    first, second = minibatches(alone, replace(algo, minibatches=2), 4, layout)
    assert (first[0].num_responses, second[0].num_responses) == (0, 1)
