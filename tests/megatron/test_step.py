"""One optimizer step through Megatron's schedule, buffers and optimizer, on one rank.

S responses, T response tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from dsm_train.config import ModelConfig, OptimConfig
from dsm_train.grpo import token_weights
from dsm_train.losses import LossOutput, Names, PolicyLoss, Stats, SupervisedLoss
from dsm_train.megatron import platform, weights
from dsm_train.megatron.heads import LanguageHead
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import MOST_SKIPPED, TrainableModel
from dsm_train.packing.microbatch import MicroBatch, pack, repeat_prompts
from dsm_train.rows import Rows
from dsm_train.types import Sequences, offsets
from dsm_train.update import optimizer_step, step_metrics
from triton_kernels import Objective

TEMPERATURE = 0.8
OBJECTIVE = Objective(clip_low=0.2, clip_high=0.2, kl_coef=0.04)
SEQUENCES = tiny.sequences([3, 1, 6], [4, 9, 1, 3, 2, 7])
REWARD_S = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0, 1.0])
T = SEQUENCES.response_token_T.numel()


def main_gradients(policy: TrainableModel) -> dict[str, Tensor]:
    return {name: p.main_grad.detach().cpu().clone() for name, p in weights.named_weights(policy.chunks)}


def paper_loss(hf: torch.nn.Module, old_S: list[Tensor], ref_S: list[Tensor], advantage_S: Tensor) -> Tensor:
    """DeepSeekMath eq. 3, response by response: -1/S sum_i 1/|o_i| sum_t (min(r A, clip(r) A) - beta k3)."""
    total = torch.zeros((), dtype=torch.float64)
    for s, p in enumerate(SEQUENCES.prompt_of_response_S.tolist()):
        logprob = llama_logprob(hf, SEQUENCES.prompt(p), SEQUENCES.response(s))
        ratio = (logprob - old_S[s]).exp()
        surrogate = torch.minimum(ratio * advantage_S[s], ratio.clamp(0.8, 1.2) * advantage_S[s])
        difference = ref_S[s] - logprob
        k3 = difference.exp() - difference - 1
        total = total - (surrogate - 0.04 * k3).mean() / SEQUENCES.num_responses
    return total


def llama_logprob(hf: torch.nn.Module, prompt: Tensor, response: Tensor) -> Tensor:
    logits = hf(torch.cat([prompt, response])[None]).logits[0, prompt.numel() - 1 : -1, : tiny.VOCAB]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, response[:, None]).squeeze(1)


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    distance = sum(float((got[name].double() - expected[name].double()).detach().square().sum()) for name in got)
    return math.sqrt(distance / sum(float(x.detach().double().square().sum()) for x in expected.values()))


CONFIGS = {"untied": tiny.MODEL, "tied": tiny.tied(), **tiny.ARCHITECTURES}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def problem(request: pytest.FixtureRequest, layout: Parallel) -> tuple[ModelConfig, Rows, float, dict[str, Tensor]]:
    """A batch, and the loss and gradients that plain autograd of the paper's formula gives in fp64."""
    config = request.param
    full = tiny.full_weights(tiny.chunks(layout, config))
    hf = tiny.llama(config, full, torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logprob_S = [
            llama_logprob(hf, SEQUENCES.prompt(p), SEQUENCES.response(s))
            for s, p in enumerate(SEQUENCES.prompt_of_response_S.tolist())
        ]
    # 0.3 apart: some ratios lie outside of 0.8 to 1.2 and are clipped, most are not
    old_S, ref_S = (
        [x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in logprob_S] for _ in range(2)
    )
    # fp32, as the trainer has them
    old_S, ref_S = ([x.float().double() for x in xs] for xs in (old_S, ref_S))
    advantage_S = torch.randn(6, generator=generator)
    loss = paper_loss(hf, old_S, ref_S, advantage_S.double())
    loss.backward()
    gradient = {name: p.grad for name, p in hf.named_parameters()}
    length_S = SEQUENCES.response_cu.diff().long()
    rows = Rows(
        weight_T=token_weights(SEQUENCES.response_cu, "response", 6, T, fixed_length=1),
        advantage_T=advantage_S.repeat_interleave(length_S),
        old_logprob_T=torch.cat(old_S).float(),
        ref_logprob_T=torch.cat(ref_S).float(),
    )
    return config, rows, float(loss.detach()), gradient


@pytest.mark.parametrize("sequences", [SEQUENCES, repeat_prompts(SEQUENCES)], ids=["shared prompts", "repeated"])
@pytest.mark.parametrize("max_tokens", [1000, 16], ids=["one micro-batch", "several"])
def test_gradients_are_the_papers(
    problem: tuple[ModelConfig, Rows, float, dict[str, Tensor]],
    max_tokens: int,
    sequences: Sequences,
    layout: Parallel,
) -> None:
    """Nobody divides: not by micro-batches, not by tokens, not by ranks, not by responses that share a prompt."""
    config, rows, loss, gradient = problem
    policy = tiny.trainable(layout, config)
    micro_batches = pack(sequences, max_tokens, platform.device())
    assert (len(micro_batches) == 1) == (max_tokens == 1000)
    assert any(batch.layout.shares_prompts for batch in micro_batches) == (sequences is SEQUENCES)
    outputs = policy.forward_backward(micro_batches, PolicyLoss(rows, OBJECTIVE, TEMPERATURE))
    assert sum(float(out.loss.detach()) for out in outputs) == pytest.approx(loss, rel=1e-5)
    got = tiny.llama_names(config, main_gradients(policy))
    assert relative_error(got, gradient) < 1e-5
    for name, value in gradient.items():
        assert relative_error({name: got[name]}, {name: value}) < 1e-4, name
    # a second pass over the same batch starts from zero
    policy.forward_backward(micro_batches, PolicyLoss(rows, OBJECTIVE, TEMPERATURE))
    assert relative_error(tiny.llama_names(config, main_gradients(policy)), gradient) < 1e-5


@pytest.mark.parametrize("max_tokens", [1000, 25], ids=["one micro-batch", "several"])
@pytest.mark.parametrize("config", [tiny.MODEL, replace(tiny.MODEL, recompute=True)], ids=["kept", "recomputed"])
def test_shared_and_repeated_prompts_are_the_same_step(config: ModelConfig, max_tokens: int, layout: Parallel) -> None:
    """Groups of 7, 1, 2 and 8, the last larger than a micro-batch; log-probabilities, loss and every gradient."""
    sizes, rng = [7, 1, 2, 8], random.Random(0)
    lengths = [rng.choice([0, 1, 2, 5, 9]) for _ in range(sum(sizes))]
    prompts, responses = (
        [[rng.randrange(tiny.VOCAB) for _ in range(n)] for n in counts] for counts in ([9, 4, 6, 12], lengths)
    )
    sequences = replace(Sequences.from_lists(prompts, responses), group_cu=offsets(sizes))
    rows, generator = sum(lengths), torch.Generator().manual_seed(0)
    logprob_T = tiny.model(layout, config).logprobs(pack(sequences, 1000, platform.device()), rows, TEMPERATURE)
    old_T, ref_T, advantage_T = 0.3 * torch.randn(3, rows, generator=generator)
    given = Rows(torch.rand(rows, generator=generator), 10 * advantage_T, logprob_T + old_T, logprob_T + ref_T)
    losses, gradients, logprobs = [], [], []
    for grouped in (sequences, repeat_prompts(sequences)):
        micro_batches, policy = pack(grouped, max_tokens, platform.device()), tiny.trainable(layout, config)
        assert (len(micro_batches) == 1) == (max_tokens == 1000)
        assert any(batch.layout.shares_prompts for batch in micro_batches) == (grouped is sequences)
        logprobs.append(policy.logprobs(micro_batches, rows, TEMPERATURE))
        outputs = policy.forward_backward(micro_batches, PolicyLoss(given, OBJECTIVE, TEMPERATURE))
        losses.append(sum(float(out.loss.detach()) for out in outputs))
        gradients.append(main_gradients(policy))
    torch.testing.assert_close(*logprobs, rtol=1e-5, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert relative_error(*gradients) < 2e-6
    for name, gradient in gradients[1].items():
        assert relative_error({name: gradients[0][name]}, {name: gradient}) < 1e-5, name


@pytest.mark.parametrize("every", [1, 3], ids=["all tokens", "every third"])
def test_supervised_gradients_are_cross_entropys_of_the_learnt_tokens(every: int, layout: Parallel) -> None:
    policy = tiny.trainable(layout)
    hf = tiny.llama(tiny.MODEL, tiny.full_weights(policy.chunks), torch.float64)
    learnt_T = torch.arange(T) % every == 0
    weight_T = learnt_T.float() / learnt_T.sum()
    loss = torch.zeros((), dtype=torch.float64)
    for s, p in enumerate(SEQUENCES.prompt_of_response_S.tolist()):
        prompt, response = SEQUENCES.prompt(p), SEQUENCES.response(s)
        logits = hf(torch.cat([prompt, response])[None]).logits[0, prompt.numel() - 1 : -1, : tiny.VOCAB]
        rows = weight_T[SEQUENCES.rows_of(torch.tensor([s]))]
        loss = loss + (rows * torch.nn.functional.cross_entropy(logits, response, reduction="none")).sum()
    loss.backward()
    outputs = policy.forward_backward(pack(SEQUENCES, 16, platform.device()), SupervisedLoss(weight_T))
    assert sum(float(out.loss.detach()) for out in outputs) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sum(out.stats.tokens for out in outputs) == learnt_T.sum()
    expected = {name: p.grad for name, p in hf.named_parameters()}
    assert relative_error(tiny.llama_names(tiny.MODEL, main_gradients(policy)), expected) < 1e-5


def test_recomputing_activations_changes_no_gradient(layout: Parallel) -> None:
    gradients = []
    for config in (tiny.MODEL, replace(tiny.MODEL, recompute=True)):
        policy = tiny.trainable(layout, config)
        policy.forward_backward(pack(SEQUENCES, 16, platform.device()), sum_of_logprobs())
        gradients.append(main_gradients(policy))
    assert relative_error(*gradients) < 1e-6


def sum_of_logprobs(scale: float = 1.0) -> SupervisedLoss:
    """A loss whose gradient is easily scaled."""
    return SupervisedLoss(torch.full((T,), scale))


@pytest.mark.parametrize("clip_grad", [0.5, 1e6, 0.0], ids=["clipped", "within", "off"])
def test_the_update_is_adamws(clip_grad: float, layout: Parallel) -> None:
    """Norms and biases, query-key norms among them, do not decay."""
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6, clip_grad=clip_grad)
    policy = tiny.trainable(layout, tiny.BIASES, optim)
    named = dict(weights.named_weights(policy.chunks))
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    groups = [
        {"params": [p for p in copies.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in copies.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6)
    for _ in range(3):
        policy.forward_backward(pack(SEQUENCES, 16, platform.device()), sum_of_logprobs(0.1))
        gradient = main_gradients(policy)
        expected_norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        assert expected_norm > 1
        scale = min(1.0, clip_grad / expected_norm) if clip_grad else 1.0
        for name, copy in copies.items():
            copy.grad = gradient[name] * scale
        adamw.step()
        assert policy.optimizer_step() == pytest.approx(expected_norm, rel=1e-5)
        assert relative_error(named, copies) < 1e-6
    assert policy.steps == 3


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (OptimConfig(lr=1.0), [1.0] * 6),
        # a third, two thirds, then the peak: no step is lost at 0
        (OptimConfig(lr=1.0, warmup_steps=2), [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
        (OptimConfig(lr=1.0, min_lr=0.4, schedule="linear"), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]),
        (OptimConfig(lr=1.0, schedule="cosine"), [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]),
        (OptimConfig(lr=1.0, schedule="multistep"), [1.0] * 8 + [0.316, 0.1]),
        (OptimConfig(lr=1.0, warmup_steps=2, schedule="multistep"), [1 / 3, 2 / 3] + [1.0] * 6 + [0.316, 0.1]),
        (OptimConfig(lr=1.0, warmup_steps=2, schedule="linear"), [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]),
    ],
    ids=[
        "constant",
        "warm-up",
        "linear to a minimum",
        "cosine",
        "multistep",
        "warm-up and multistep",
        "warm-up and linear",
    ],
)
def test_learning_rates(optim: OptimConfig, expected: list[float], layout: Parallel) -> None:
    policy = tiny.trainable(layout, optim=optim, steps=len(expected))
    rates = []
    for _ in expected:
        rates.append(policy.learning_rate)
        assert {group["lr"] for group in policy.optimizer.param_groups} == {policy.learning_rate}
        policy.schedule.step(increment=1)
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_an_optimizer_step_that_is_not_finite_was_never_made(
    where: str, value: float, clip_grad: float, dtype: str, layout: Parallel
) -> None:
    """Weights, moments and schedule after it and another step are those of that other step alone, to the bit."""
    optim = OptimConfig(lr=1e-2, clip_grad=clip_grad, weight_decay=0.1, warmup_steps=3)
    policy, plain = (tiny.trainable(layout, replace(tiny.MODEL, dtype=dtype), optim) for _ in range(2))
    micro_batches = pack(SEQUENCES, 16, platform.device())
    for model in (policy, policy, plain):
        model.forward_backward(micro_batches, sum_of_logprobs())
        if model is policy and policy.steps == 1:
            before = tiny.full_weights(policy.chunks)
            if where == "gradient":
                next(p for _, p in weights.named_weights(policy.chunks)).main_grad[3, 3] = value
            assert math.isfinite(policy.optimizer_step(value if where == "loss" else 0.0)) == (where == "loss")
            assert policy.skipped == 1 and policy.gives_up
            after = tiny.full_weights(policy.chunks)
            assert all(torch.equal(before[name], after[name]) for name in before) and policy.steps == 1
        else:
            model.optimizer_step()
    for model in (policy, plain):
        model.forward_backward(micro_batches, sum_of_logprobs())
        model.optimizer_step()
    assert policy.steps == plain.steps == 2 and policy.skipped == 0 and not policy.gives_up
    assert policy.learning_rate == plain.learning_rate
    for name, weight in tiny.full_weights(plain.chunks).items():
        assert torch.equal(tiny.full_weights(policy.chunks)[name], weight), name


def test_skipping_for_ever_is_no_training(layout: Parallel) -> None:
    policy = tiny.trainable(layout, optim=OptimConfig(lr=1e-3, not_finite="skip"))
    policy.forward_backward(pack(SEQUENCES, 1000, platform.device()), sum_of_logprobs())
    for _ in range(MOST_SKIPPED):
        assert not policy.gives_up
        policy.optimizer_step(math.nan)
    assert policy.gives_up and policy.steps == 0
    policy.optimizer_step()
    assert not policy.gives_up


def test_restarting_leaves_nothing_of_the_old_optimizer(layout: Parallel) -> None:
    """After two restarts a step is that of a new model with the same weights."""
    micro_batches = pack(SEQUENCES, 16, platform.device())
    used = tiny.trainable(layout, optim=OptimConfig(lr=1e-2))
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in used.modules[0].modules()]
    for lr in (2e-2, 1e-3):
        used.forward_backward(micro_batches, sum_of_logprobs())
        used.optimizer_step()
        used.restart(OptimConfig(lr=lr, weight_decay=0.1), total_steps=5)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in used.modules[0].modules()] == hooks
    fresh = tiny.trainable(layout, optim=OptimConfig(lr=1e-3, weight_decay=0.1), steps=5)
    weights.copy_weights(used.chunks, fresh.chunks)
    assert used.learning_rate == fresh.learning_rate == 1e-3
    norms = []
    for policy in (used, fresh):
        policy.forward_backward(micro_batches, sum_of_logprobs())
        norms.append(policy.optimizer_step())
    assert norms[0] == norms[1]
    a, b = tiny.full_weights(used.chunks), tiny.full_weights(fresh.chunks)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_training_keeps_fp32_master_weights(layout: Parallel) -> None:
    """Updates below bf16's resolution add up."""
    config = replace(tiny.MODEL, dtype="bf16")
    policy = tiny.trainable(layout, config, OptimConfig(lr=1e-4))
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    micro_batches = pack(SEQUENCES, 1000, platform.device())
    start = tiny.full_weights(policy.chunks)[name].float()
    for _ in range(10):
        policy.forward_backward(micro_batches, sum_of_logprobs())
        assert math.isfinite(policy.optimizer_step())
    weight = dict(weights.named_weights(policy.chunks))[name]
    assert weight.dtype == torch.bfloat16 and weight.main_param.dtype == torch.float32
    # 10 steps of about 1e-4, where weights are 5e-4 apart, and the model's weight is the rounded master
    assert float((weight.main_param - start).abs().mean()) == pytest.approx(1e-3, rel=0.5)
    assert torch.equal(weight.detach(), weight.main_param.bfloat16())


def test_a_step_reports_the_whole_step(layout: Parallel) -> None:
    """Loss and statistics are the same however the step is cut into micro-batches."""
    rows = Rows(
        weight_T=token_weights(SEQUENCES.response_cu, "response", 6, T, fixed_length=1),
        advantage_T=torch.randn(T, generator=torch.Generator().manual_seed(0)),
    )
    results = []
    for max_tokens in (16, 1000):
        policy = tiny.trainable(layout, optim=OptimConfig(lr=1e-3))
        loss = PolicyLoss(rows, Objective(kl_coef=0.0), TEMPERATURE)
        results.append(optimizer_step(policy, pack(SEQUENCES, max_tokens, platform.device()), loss))
    several, one = results
    assert several.lr == one.lr == 1e-3
    assert several.loss == pytest.approx(one.loss, rel=1e-5)
    assert several.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    torch.testing.assert_close(dict(several.stats.sums), dict(one.stats.sums), rtol=1e-5, atol=1e-6)
    numbers = step_metrics([one])
    assert numbers["ratio"] == pytest.approx(1.0) and numbers["entropy"] > 0  # on-policy
    assert numbers["clipped_low"] == numbers["clipped_high"] == 0
    assert numbers["ratio_max"] == numbers["ratio_min"] == pytest.approx(1.0)


def test_metrics_of_several_steps_are_means_and_extremes(layout: Parallel) -> None:
    rows = Rows(
        weight_T=token_weights(SEQUENCES.response_cu, "response", 6, T, fixed_length=1),
        advantage_T=torch.ones(T),
        old_logprob_T=torch.full((T,), -4.0),
    )
    policy = tiny.trainable(layout, optim=OptimConfig(lr=1e-3))
    loss = PolicyLoss(rows, Objective(kl_coef=0.0), TEMPERATURE)
    micro_batches = pack(SEQUENCES, 1000, platform.device())
    results = [optimizer_step(policy, micro_batches, loss) for _ in range(2)]
    both, each = step_metrics(results), [step_metrics([r]) for r in results]
    assert both["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2)
    assert both["ratio_max"] == max(each[0]["ratio_max"], each[1]["ratio_max"])
    assert both["ratio_min"] == min(each[0]["ratio_min"], each[1]["ratio_min"])
    assert both["lr"] == each[1]["lr"]


def test_the_loss_sees_states_and_head_of_the_rows(layout: Parallel) -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def loss(head: LanguageHead, batch: MicroBatch) -> LossOutput:
        seen.append((tuple(head.hidden_TD.shape), tuple(head.weight_VD.shape), batch.target_T.numel()))
        return LossOutput(head.hidden_TD.sum() * 0, Stats.nothing(Names(("tokens",))))

    policy = tiny.trainable(layout)
    policy.forward_backward(pack(SEQUENCES, 16, platform.device()), loss)
    assert all(hidden == (rows, 32) and weight == (tiny.VOCAB, 32) for hidden, weight, rows in seen)
    assert sum(rows for *_, rows in seen) == T


def test_a_micro_batch_without_response_tokens_adds_nothing(layout: Parallel) -> None:
    sequences = Sequences.from_lists([[1, 2, 3], [4, 5]], [[], [6, 7]])
    policy = tiny.trainable(layout)
    micro_batches = pack(sequences, 3, platform.device())
    assert [b.target_T.numel() for b in micro_batches] == [0, 2]
    rows = Rows(torch.tensor([0.5, 0.5]), torch.ones(2))
    objective = Objective(kl_coef=0.0)
    both = optimizer_step(policy, micro_batches, PolicyLoss(rows, objective, 1.0))
    assert math.isfinite(both.loss) and math.isfinite(both.grad_norm) and both.grad_norm > 0
