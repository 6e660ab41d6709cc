"""Promises of every public op: saved tensors are read once, it compiles, constants get no gradient, errors are clear.

T loss rows, S responses, P groups, J steps, V vocabulary, D and E hidden sizes. `packed_attention` has its own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import make_rows, offsets, relative_error
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from triton_kernels import (
    LinearLogprob,
    LossOutput,
    Objective,
    group_advantage,
    group_grpo_loss,
    grpo_loss,
    linear_grpo_loss,
    linear_kl,
    linear_logprob,
    process_advantage,
    token_kl,
)

pytestmark = pytest.mark.no_interpret  # nothing here depends on what serves the op

CPU = torch.device("cpu")
T, V, D, E = 12, 33, 8, 4
LENGTHS = [5, 0, 4, 3]


@dataclass(frozen=True)
class Call:
    """One call of a public op; `wants` are the arguments that get a gradient."""

    op: Callable[..., Any]
    arguments: dict[str, Any]
    wants: tuple[str, ...] = ()

    def outputs(self, **changed: Any) -> list[Tensor]:
        """The differentiable results."""
        result = self.op(**(self.arguments | changed))
        if isinstance(result, LossOutput):
            return [result.loss]
        return [result.logprob_T, result.entropy_T] if isinstance(result, LinearLogprob) else [result]

    def leaves(self) -> list[Tensor]:
        """Copies of what wants a gradient."""
        return [self.arguments[name].clone().requires_grad_() for name in self.wants]

    def total(self, *leaves: Tensor) -> Tensor:
        """A scalar that depends on every output, after an operation on what wants a gradient."""
        changed = {name: x.sin() for name, x in zip(self.wants, leaves, strict=True)}
        return torch.stack([(x * x).sum() for x in self.outputs(**changed)]).sum()


def calls() -> dict[str, Call]:
    rows = make_rows(LENGTHS, CPU, garbage=False)
    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = torch.randn(T, D, generator=generator), torch.randn(V, D, generator=generator)
    head = {"hidden_TD": hidden_TD, "weight_VD": weight_VD, "bias_V": torch.randn(V, generator=generator)}
    target_T = torch.randint(0, V, (T,), generator=generator)
    constants = {
        "old_logprob_T": rows.old_logprob_T,
        "ref_logprob_T": rows.ref_logprob_T,
        "weight_T": rows.weight_T,
        "response_cu": rows.response_cu,
        "objective": Objective(),
    }
    policy = {"logprob_T": rows.logprob_T, **constants}
    reward_S, group_cu = torch.tensor([1.0, 0.0, 0.5, 2.0]), offsets([2, 2], CPU)
    steps = {"step_reward_J": torch.tensor([1.0, 0.0, 0.5, 2.0]), "step_end_J": torch.tensor([1, 4, 3, 2])}
    steps |= {"step_cu": offsets([2, 0, 1, 1], CPU), "response_cu": rows.response_cu, "group_cu": group_cu}
    linear = {**head, "target_T": target_T, **constants, "advantage_T": rows.advantage_T}
    linear |= {"rollout_logprob_T": rows.old_logprob_T}
    sequence = {"objective": Objective(ratio="sequence", entropy_coef=0.1), "workspace_bytes": 1}
    ref = {"ref_hidden_TE": torch.randn(T, E, generator=generator), "ref_weight_VE": torch.randn(V, E)}
    ref |= {"ref_bias_V": torch.randn(V, generator=generator)}
    return {
        "group_advantage": Call(group_advantage, {"reward_S": reward_S, "group_cu": group_cu}),
        "process_advantage": Call(process_advantage, steps),
        "token_kl": Call(token_kl, {"logprob_T": rows.logprob_T, "ref_logprob_T": rows.ref_logprob_T}, ("logprob_T",)),
        "grpo_loss": Call(grpo_loss, {**policy, "advantage_T": rows.advantage_T}, ("logprob_T",)),
        "group_grpo_loss": Call(
            group_grpo_loss, {**policy, "reward_S": reward_S, "group_cu": group_cu}, ("logprob_T",)
        ),
        "linear_logprob": Call(linear_logprob, {**head, "target_T": target_T}, tuple(head)),
        "linear_grpo_loss": Call(linear_grpo_loss, linear, tuple(head)),
        "linear_grpo_loss in two passes": Call(linear_grpo_loss, linear | sequence, tuple(head)),
        "linear_kl": Call(linear_kl, {**head, **ref}, (*head, *ref)),
    }


CALLS = calls()
each = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
DIFFERENTIABLE = {name: call for name, call in CALLS.items() if call.wants}
each_differentiable = pytest.mark.parametrize("call", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)


def gradients(total: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total(*leaves), leaves)


@each_differentiable
def test_the_backward_pass_reads_saved_tensors_once(call: Call) -> None:
    expected = gradients(call.total, call.leaves())
    times_read: list[int] = []

    def pack(x: Tensor) -> tuple[int, Tensor]:
        times_read.append(0)
        return len(times_read) - 1, x

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        times_read[packed[0]] += 1
        return packed[1]

    with saved_tensors_hooks(pack, unpack):
        gradients(call.total, call.leaves())
    assert times_read and max(times_read) == 1
    with save_on_cpu():
        from_cpu = gradients(call.total, call.leaves())
    leaves = call.leaves()
    again = torch.autograd.grad(checkpoint(call.total, *leaves, use_reentrant=False), leaves)
    for x, y, z in zip(expected, from_cpu, again, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@each
def test_compiles_into_one_graph(call: Call) -> None:
    torch._dynamo.reset()  # the calls share their code
    compiled = torch.compile(call.total, fullgraph=True, backend="aot_eager")
    leaves = call.leaves()
    torch.testing.assert_close(compiled(*leaves), call.total(*leaves))
    if leaves:
        for x, y in zip(gradients(compiled, leaves), gradients(call.total, leaves), strict=True):
            assert relative_error(x, y) < 1e-6


@each
def test_inference_mode_gives_the_same(call: Call) -> None:
    with torch.inference_mode():
        quiet = call.outputs()
    for x, y in zip(quiet, call.outputs(), strict=True):
        torch.testing.assert_close(x.clone(), y)


@each
def test_constants_get_no_gradient(call: Call) -> None:
    constants = {
        name: x.clone().requires_grad_()
        for name, x in call.arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point() and name not in call.wants
    }
    leaves = dict(zip(call.wants, call.leaves(), strict=True))
    outputs = call.outputs(**constants, **leaves)
    if not call.wants:
        assert not any(x.requires_grad for x in outputs)
        return
    torch.stack([x.sum() for x in outputs]).sum().backward()
    assert all(x.grad is None for x in constants.values())
    assert all(x.grad is not None for x in leaves.values())
    without = call.leaves()
    torch.stack([x.sum() for x in call.outputs(**dict(zip(call.wants, without, strict=True)))]).sum().backward()
    for x, y in zip(leaves.values(), without, strict=True):
        assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


@each
def test_every_tensor_must_be_a_tensor_of_its_kind_on_the_device_of_the_rest(call: Call) -> None:
    for name, x in call.arguments.items():
        if isinstance(x, Tensor):
            with pytest.raises(ValueError, match="must be on|must share|must be on one device"):
                call.op(**(call.arguments | {name: x.to("meta")}))
            with pytest.raises(ValueError, match=f"{name} must be a tensor; got list"):
                call.op(**(call.arguments | {name: x.tolist()}))
            with pytest.raises(ValueError, match=f"{name} must hold .*; got torch.complex64"):
                call.op(**(call.arguments | {name: x.to(torch.complex64)}))
            with pytest.raises(ValueError, match=f"{name} must have the shape"):
                call.op(**(call.arguments | {name: x[None]}))


@pytest.mark.parametrize(
    ("ops", "change", "message"),
    [
        ("linear", {"temperature": 0.0}, "temperature must be a finite number above 0; got 0.0"),
        ("linear", {"temperature": float("inf")}, "temperature must be a finite number above 0; got inf"),
        ("linear", {"temperature": "hot"}, "temperature must be a finite number above 0; got 'hot'"),
        ("linear", {"softcap": -1.0}, "softcap must be a finite number above 0, or None for off; got -1.0"),
        ("linear", {"softcap": float("inf")}, "softcap must be .*; got inf"),
        ("linear", {"workspace_bytes": 0}, "workspace_bytes must be a whole number of bytes above 0"),
        ("linear", {"workspace_bytes": 1e9}, "workspace_bytes must be a whole number .* got 1000000000.0"),
        ("linear", {"tp_group": "world"}, "tp_group must be a torch.distributed.ProcessGroup or None; got str"),
        ("linear", {"hidden_TD": torch.ones(T, D).long()}, "hidden_TD must hold .*; got torch.int64: convert it"),
        ("linear", {"weight_VD": torch.ones(V, D).bfloat16()}, "must share a dtype; .* under torch.autocast"),
        ("grpo", {"objective": {"kl_coef": 0.0}}, "objective must be an Objective; got dict"),
        ("grpo", {"ref_logprob_T": None}, "kl_coef is .*: give ref_logprob_T, or set kl_coef to 0"),
        ("advantage", {"group_cu": offsets([3], CPU)}, "group_cu must start at 0, never decrease and end at 4"),
        ("token_kl", {"estimator": "k4"}, "estimator must be one of k1, k2, k3, k1[+], k3[+]; got 'k4'"),
    ],
)
def test_a_bad_argument_is_one_clear_error(ops: str, change: dict[str, Any], message: str) -> None:
    for call in (call for name, call in CALLS.items() if ops in name):
        with pytest.raises(ValueError, match=message):
            call.op(**(call.arguments | change))


@pytest.mark.parametrize("name", ["linear_logprob", "linear_grpo_loss", "linear_kl"])
def test_under_autocast_operands_are_converted_as_those_of_a_matmul(name: str) -> None:
    call = CALLS[name]
    operands = [argument for argument in call.wants if "bias" not in argument]

    def run(convert: Callable[[str, Tensor], Tensor], autocast: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        leaves = dict(zip(call.wants, call.leaves(), strict=True))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = call.outputs(**{argument: convert(argument, x) for argument, x in leaves.items()})
        return outputs, torch.autograd.grad(torch.stack([x.sum() for x in outputs]).sum(), list(leaves.values()))

    by_hand = run(lambda argument, x: x.bfloat16() if argument in operands else x, autocast=False)
    # Hidden states come out of the last layer in bf16, or of a norm in fp32; the head's weight is fp32.
    for hidden in (torch.bfloat16, torch.float32):
        outputs, grads = run(lambda argument, x, to=hidden: x.to(to) if "hidden" in argument else x, autocast=True)
        for x, y in zip((*outputs, *grads), (*by_hand[0], *by_hand[1]), strict=True):
            assert x.dtype == y.dtype == torch.float32 and torch.equal(x, y)
    doubles = {argument: call.arguments[argument].double() for argument in call.wants}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(x.dtype == torch.float64 for x in call.outputs(**doubles))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": 1.5}, "clip_low must be a finite number at least 0 and at most 1; got 1.5"),
        ({"clip_low": float("nan")}, "clip_low must be .*; got nan"),
        ({"clip_high": float("inf")}, "clip_high must be a finite number at least 0; got inf"),
        ({"kl_coef": float("inf")}, "kl_coef must be .*; got inf"),
        ({"kl_coef": "0.04"}, "kl_coef must be .*; got '0.04'"),
        ({"entropy_coef": float("nan")}, "entropy_coef must be a finite number; got nan"),
        ({"dual_clip": 1.0}, "dual_clip must be a finite number above 1, or None for off; got 1.0"),
        ({"delta": float("inf")}, "delta must be .*; got inf"),
        ({"tis_clip": 0.0}, "tis_clip must be a finite number above 0, or None for off; got 0.0"),
        ({"delta": 1.2}, "delta must be above 1 [+] clip_high = 1.2; got 1.2"),
        ({"dual_clip": 2.0, "delta": 3.0}, "give one of them"),
        ({"surrogate": "cispo", "delta": 3.0}, "cispo has no dual_clip and no delta"),
        ({"kl": "k4"}, "kl must be one of k1, k2, k3, k1[+], k3[+]; got 'k4'"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Objective(), **change)


def test_clip_low_of_1_is_no_lower_bound() -> None:
    assert Objective(clip_low=1.0, surrogate="cispo").clip_low == 1.0
