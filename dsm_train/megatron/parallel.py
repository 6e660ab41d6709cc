"""Ranks and process groups: torch.distributed, Megatron's parallel state, and the few collectives the trainer uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dsm_train.config import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class Parallel:
    """This process's place in the layout."""

    groups: ProcessGroupCollection
    config: ParallelConfig
    rank: int
    world_size: int

    @property
    def dp_rank(self) -> int:
        """Rank among data-parallel replicas."""
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.groups.dp.size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head and computes losses."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def counts_losses(self) -> bool:
        """Whether this rank's loss values count: one rank of each tensor-parallel group of the last stage."""
        return self.is_last_stage and self.groups.tp.rank() == 0

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """`values` (on the CPU) reduced over all ranks, on every one of them."""
        if self.world_size > 1:
            dist.all_reduce(values, op=op)
        return values

    def gather_over_data(self, value: object) -> list[object]:
        """`value` of every data-parallel replica, in rank order."""
        if self.dp_size == 1:
            return [value]
        values: list[object] = [None] * self.dp_size
        dist.all_gather_object(values, value, group=self.groups.dp)
        return values


def world_size() -> int:
    """Ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_layout(parallel: ParallelConfig, model: ModelConfig, vocab_size: int) -> None:
    """Raise `ValueError` unless the layout fits the number of ranks and divides the model."""
    world, cells = world_size(), parallel.tp * parallel.pp
    rules = (
        (
            world % cells == 0,
            f"parallel.tp x parallel.pp = {parallel.tp} x {parallel.pp} = {cells} must divide the "
            f"{world} rank(s) that were started; start a multiple of {cells} with torchrun --nproc-per-node",
        ),
        (
            model.num_heads % parallel.tp == 0,
            f"parallel.tp = {parallel.tp} must divide model.num_heads = {model.num_heads}",
        ),
        (
            model.num_kv_heads % parallel.tp == 0,
            f"parallel.tp = {parallel.tp} must divide model.num_kv_heads = {model.num_kv_heads}",
        ),
        (
            model.ffn_size % parallel.tp == 0,
            f"parallel.tp = {parallel.tp} must divide model.ffn_size = {model.ffn_size}",
        ),
        (
            model.num_layers % (parallel.pp * parallel.vpp) == 0,
            f"parallel.pp x parallel.vpp = {parallel.pp * parallel.vpp} must divide "
            f"model.num_layers = {model.num_layers}",
        ),
        (
            vocab_size % parallel.tp == 0,
            f"parallel.tp = {parallel.tp} must divide the vocabulary of {vocab_size} tokens; set model.vocab_multiple",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def start(config: ParallelConfig, seed: int) -> Parallel:
    """Join the ranks that torchrun started (or be the only one) and build the process groups."""
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        cuda = torch.cuda.is_available()
        if cuda:
            local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= devices:
                raise ValueError(
                    f"rank {local} of this machine has no GPU of its own: it has {devices}; start at most "
                    f"{devices} ranks on it, or train on the CPU with CUDA_VISIBLE_DEVICES="
                )
            torch.cuda.set_device(local)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=config.timeout_minutes), **alone
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
    return Parallel(ProcessGroupCollection.use_mpu_process_groups(), config, dist.get_rank(), dist.get_world_size())


def stop() -> None:
    """Leave the process groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def set_threads(threads: int) -> int:
    """Give this rank its CPU threads (0: its share of the machine's cores); returns their number."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or max(1, available // local_ranks)
    torch.set_num_threads(threads)
    return threads
