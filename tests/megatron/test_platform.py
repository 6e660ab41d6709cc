"""megatron-core without CUDA, and what serves each op."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from dsm_train.config import ParallelConfig
from dsm_train.megatron import parallel, platform
from dsm_train.megatron.parallel import Parallel
from triton_kernels import implementations

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA present: nothing is adapted")


@without_cuda
def test_torch_itself_is_unchanged_but_for_tensor_cuda() -> None:
    # With the adaptation undone in between, enable() runs over a namespace whose imports are all done.
    script = """
import importlib, sys, torch
for name in ("parallel_state", "models.gpt.gpt_model", "models.gpt.gpt_layer_specs", "pipeline_parallel.schedules",
             "distributed", "optimizer", "dist_checkpointing.strategies.torch",
             "dist_checkpointing.strategies.fully_parallel"):
    importlib.import_module("megatron.core." + name)

def snapshot():
    owners = {"torch": torch, "cuda": torch.cuda, "Tensor": torch.Tensor}
    return {f"{space}.{name}": id(value) for space, owner in owners.items() for name, value in vars(owner).items()}

before = snapshot()
from dsm_train.megatron import platform
assert platform.enable() is True
with platform._cuda_type_names():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
assert torch.zeros(1).type() == "torch.FloatTensor"
after = snapshot()
print(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert result.stdout.strip().splitlines()[-1:] == ["['Tensor.cuda']"], result.stderr


@without_cuda
def test_the_compiler_of_torch_is_not_imported() -> None:
    script = """
import sys, torch
compile = torch.compile
import dsm_train.megatron
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.core.jit import jit_fuser
print("torch._inductor" in sys.modules, torch.compile is compile, jit_fuser(swiglu) is swiglu)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "True", "True"], result.stderr


@without_cuda
def test_the_current_device_is_the_cpu() -> None:
    from megatron.core import parallel_state
    from megatron.core.optimizer import optimizer

    assert platform.enable() is True
    assert platform.device() == torch.device("cpu")
    for module in (parallel_state, optimizer):
        assert module.torch is not torch
        assert module.torch.zeros(2, device="cuda").device.type == "cpu"
        assert module.torch.empty(2, device=module.torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
        assert module.torch.tensor([1, 2]).tolist() == [1, 2]
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")  # outside of Megatron, CUDA is still absent


@pytest.mark.gpu
def test_nothing_is_adapted_with_cuda() -> None:
    from megatron.core import parallel_state

    assert platform.enable() is False
    assert parallel_state.torch is torch
    assert platform.device().type == "cuda"


def test_a_process_can_start_twice() -> None:
    for _ in range(2):
        layout = parallel.start(ParallelConfig(), seed=0)
        assert (layout.rank, layout.world_size, layout.dp_rank, layout.dp_size) == (0, 1, 0, 1)
        assert layout.is_main and layout.has_embedding and layout.has_head and layout.is_replica_main
        assert layout.gather_over_data("x") == ["x"]
        assert layout.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]
        assert layout.exchange_over_data(["x"]) == ["x"] and layout.from_main("x") == "x" and layout.is_replica_main
        parallel.stop(layout)
    assert not torch.distributed.is_initialized()


def test_starting_alone_leaves_no_trace_for_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    import os

    before = dict(os.environ)
    parallel.stop(parallel.start(ParallelConfig(), seed=0))
    assert dict(os.environ) == before


def test_threads_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        assert parallel.set_threads(1) == torch.get_num_threads() == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
        assert parallel.set_threads(0) == torch.get_num_threads() == 1  # never none
    finally:
        torch.set_num_threads(threads)


def test_every_op_says_what_serves_it() -> None:
    table = implementations()
    composed = {"library GEMM and logit ops", "library GEMM and KL ops", "logit ops and grpo_loss"}
    known = {"C++", "Triton", "Triton (interpreter)", "PyTorch reference"} | composed
    assert {by for row in table.values() for by in row.values()} <= known
    ops = {name.removesuffix("_fwd").removesuffix("_bwd") for name in table}
    assert ops == {
        "group_advantage",
        "process_advantage",
        "token_kl",
        "grpo_loss",
        "group_grpo_loss",
        "linear_grpo_loss",
        "linear_logprob",
        "logit_stats",
        "logit_gradient",
        "policy_logits",
        "linear_kl",
        "kl_stats",
        "kl_gradient",
        "packed_attention",
    }


@pytest.mark.no_interpret
def test_the_four_complete_ops_are_cpp_on_the_cpu() -> None:
    table = implementations()
    for name in ("group_advantage", "token_kl", "grpo_loss", "group_grpo_loss"):
        assert table[name]["cpu"] == "C++"


def test_collectives_of_all_groups_give_up_after_the_watchdog(layout: Parallel) -> None:
    groups = (layout.groups.tp, layout.groups.pp, layout.groups.dp, layout.groups.embd)
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    assert timeouts == [timedelta(minutes=16)] * 4  # 1.5 x parallel.timeout_minutes + 1; the watchdog's are 10
