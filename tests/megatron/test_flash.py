"""flash-attn as core attention: how its calls are composed, in fp64 by a stand-in; itself where there is a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flash_stand_in
import pytest
import tiny
import torch
from torch import Tensor

from dsm_train.config import ModelConfig
from dsm_train.losses import SupervisedLoss
from dsm_train.megatron import platform
from dsm_train.megatron.flash import FlashAttend, Kernels, core_attention
from dsm_train.megatron.layers import Attend, PackedAttend
from dsm_train.megatron.parallel import Parallel
from dsm_train.packing.microbatch import pack
from dsm_train.types import offsets
from triton_kernels import PackedLayout

STAND_IN = Kernels(flash_stand_in.forward, flash_stand_in.backward)
# Prompt and response lengths by group; without a prompt, a sequence on its own.
GROUPS = {
    "sequences": [(0, [5]), (0, [1]), (0, [17])],
    "a group": [(4, [3, 1, 6])],
    "empty responses, in each place": [(3, [0, 2, 0, 5, 0]), (2, [0, 0]), (1, [4])],
    "groups among sequences": [(0, [7]), (5, [2, 9]), (0, [3]), (1, [1, 1, 1, 1, 1, 1, 1]), (9, [4]), (0, [2])],
}


def layout_of(groups: list[tuple[int, list[int]]], device: torch.device | None = None) -> PackedLayout:
    prompt_P, response_S = [prompt for prompt, _ in groups], [n for _, responses in groups for n in responses]
    lengths = (torch.tensor(prompt_P), torch.tensor(response_S), offsets([len(responses) for _, responses in groups]))
    return PackedLayout.from_groups(*(x.to(device or "cpu") for x in lengths))


def results(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a sum with weights of both signs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(1, *inputs, 0.3)
    weight = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def random_inputs(layout: PackedLayout, heads: int, key_heads: int, head_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.num_tokens, count, head_size) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 1)])
def test_the_parts_join_to_packed_attention(groups: list[tuple[int, list[int]]], heads: int, key_heads: int) -> None:
    layout = layout_of(groups)
    inputs = random_inputs(layout, heads, key_heads, 8)
    flash = FlashAttend(layout, STAND_IN)
    assert len(flash.parts) == (2 if layout.shares_prompts else 1)
    for mine, expected in zip(results(flash, inputs), results(PackedAttend(layout), inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_views_of_one_projection_are_taken() -> None:
    """Megatron hands in slices, which are not contiguous."""
    layout = layout_of(GROUPS["groups among sequences"])
    wide = torch.randn(layout.num_tokens, 2, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = list(wide.chunk(3, -1))
    assert not inputs[0].is_contiguous()
    for mine, expected in zip(
        results(FlashAttend(layout, STAND_IN), inputs), results(PackedAttend(layout), inputs), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [tiny.BIASES, tiny.ARCHITECTURES["Llama"]], ids=["query-key norms", "scaling"])
def test_a_model_is_the_same_with_it(config: ModelConfig, layout: Parallel) -> None:
    """Heads of any size, normalised and rotated before either attention sees them: log-probabilities and gradients."""
    sequences = tiny.sequences([3, 1, 6], [4, 9, 1, 0, 2, 7])
    T = sequences.response_token_T.numel()
    results = []
    for attend in (PackedAttend, partial(FlashAttend, kernels=STAND_IN)):
        policy, micro_batches = tiny.trainable(layout, config), pack(sequences, 100, platform.device())
        policy.attend = attend
        policy.forward_backward(micro_batches, SupervisedLoss(torch.ones(T)))
        results.append({"logprob": policy.logprobs(micro_batches, T, 1.0), **policy.gradients()})
    for name, expected in results[0].items():
        assert float((results[1][name] - expected).norm() / expected.norm()) < 1e-5, name


def test_where_it_cannot_serve_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = replace(tiny.MODEL, attention="flash", dtype="bf16")
    assert core_attention(tiny.MODEL) == "dsm packed_attention"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="model.attention=flash needs a CUDA GPU.* or set model.attention=dsm"):
            core_attention(flash)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    versions = "dsm_train.megatron.flash.flash_version"
    monkeypatch.setattr(versions, lambda: "2.10.1")
    assert core_attention(flash) == "flash-attn 2.10.1"
    for model, message in (
        (replace(flash, dtype="fp32"), "needs model.dtype=bf16; got fp32"),
        (replace(flash, head_size=12), "a multiple of 8 up to 256; got 12"),
        (replace(flash, head_size=264), "a multiple of 8 up to 256; got 264"),
    ):
        with pytest.raises(ValueError, match=message):
            core_attention(model)
    for version, message in (("2.7.4.post1", "2.8 or later; got 2.7.4"), ("", "is not installed: pip install")):
        monkeypatch.setattr(versions, lambda version=version: version)
        with pytest.raises(ValueError, match=message):
            core_attention(flash)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_flash_attn_itself(groups: list[tuple[int, list[int]]]) -> None:
    """In bf16 at most twice as far from fp64 as packed_attention, and the same bits twice."""
    pytest.importorskip("flash_attn")
    lengths = [(61 * prompt, [37 * n for n in responses]) for prompt, responses in groups]
    on_cpu, layout = layout_of(lengths), layout_of(lengths, torch.device("cuda"))
    inputs = [x.bfloat16() for x in random_inputs(on_cpu, 4, 2, 64)]
    exact = results(PackedAttend(on_cpu), [x.double() for x in inputs])
    inputs = [x.cuda() for x in inputs]
    ours = results(PackedAttend(layout), inputs)
    flash, again = (results(FlashAttend(layout), inputs) for _ in range(2))
    for mine, other, expected, twin in zip(flash, ours, exact, again, strict=True):
        assert torch.equal(mine, twin)
        error, allowed = ((x.double().cpu() - expected).norm() for x in (mine, other))
        assert error <= 2 * allowed
