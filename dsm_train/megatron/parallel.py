"""Ranks and process groups: torch.distributed, Megatron's parallel state, and the few collectives the trainer uses."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dsm_train.config import ModelConfig, ParallelConfig
from dsm_train.watchdog import Watchdog

_STARTS = itertools.count()
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Parallel:
    """This process's place in the layout."""

    groups: ProcessGroupCollection
    config: ParallelConfig
    rank: int
    world_size: int
    watchdog: Watchdog

    @property
    def dp_rank(self) -> int:
        """Rank among data-parallel replicas."""
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.groups.dp.size()

    @property
    def has_embedding(self) -> bool:
        """True on the first rank of the pipeline."""
        return self.groups.pp.rank() == 0

    @property
    def has_head(self) -> bool:
        """True on the last rank of the pipeline, which computes the losses."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and talks to the user."""
        return self.rank == 0

    @property
    def is_replica_main(self) -> bool:
        """True on one rank per replica, which counts its losses and samples its tokens.

        It is the first tensor-parallel rank of those that have the head.
        """
        return self.has_head and self.groups.tp.rank() == 0

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `values` (on the CPU) over all ranks, in place, on every one of them."""
        if self.world_size > 1:
            dist.all_reduce(values, op=op)
        return values

    def average(self, values: Mapping[str, float]) -> dict[str, float]:
        """Average numbers over all ranks."""
        total = self.all_reduce(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, (total / self.world_size).tolist(), strict=True))

    def share(self, items: Sequence[ValueT]) -> list[ValueT]:
        """Deal items out to data-parallel replicas in turn: this replica's."""
        return list(items[self.dp_rank :: self.dp_size])

    def gather_over_data(self, value: ValueT) -> list[ValueT]:
        """Gather `value` of every data-parallel replica, in rank order."""
        if self.dp_size == 1:
            return [value]
        values = [value] * self.dp_size
        dist.all_gather_object(values, value, group=self.groups.dp)
        return values

    def gather_over_ranks(self, value: ValueT) -> list[ValueT]:
        """Gather `value` of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def exchange_over_data(self, parts: Sequence[ValueT]) -> list[ValueT]:
        """Give `parts[r]` to data-parallel replica r; returns what each replica gave this one, in rank order."""
        if self.dp_size == 1:
            return list(parts)
        sent = [torch.frombuffer(bytearray(pickle.dumps(part)), dtype=torch.uint8) for part in parts]
        sent_sizes = [len(part) for part in sent]
        sizes = torch.empty(self.dp_size, dtype=torch.int64)
        dist.all_to_all_single(sizes, torch.tensor(sent_sizes), group=self.groups.dp)
        received = torch.empty(int(sizes.sum()), dtype=torch.uint8)
        dist.all_to_all_single(received, torch.cat(sent), sizes.tolist(), sent_sizes, group=self.groups.dp)
        return [pickle.loads(part.numpy().tobytes()) for part in received.split(sizes.tolist())]

    def from_main(self, value: ValueT) -> ValueT:
        """Broadcast the main rank's `value` to every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def from_head(self, values: Tensor) -> Tensor:
        """Broadcast `values` of the pipeline's last rank to the others, in place."""
        if self.groups.pp.size() > 1:
            dist.broadcast(values, group=self.groups.pp, group_src=self.groups.pp.size() - 1)
        return values

    def from_replica_main(self, values: Tensor) -> Tensor:
        """Broadcast `values` of the rank that samples (`is_replica_main`) to its replica, in place.

        Ranks that hold the same replica must agree on every token, and arithmetic done twice need not agree.
        """
        if self.groups.mp.size() > 1:
            # Megatron counts tensor-parallel ranks first, then pipeline ranks: those with the head close the group.
            dist.broadcast(values, group=self.groups.mp, group_src=self.groups.mp.size() - self.groups.tp.size())
        return values

    def object_from_replica_main(self, value: ValueT) -> ValueT:
        """Broadcast the `value` of the rank that samples to its replica, likewise."""
        values = [value]
        if self.groups.mp.size() > 1:
            source = self.groups.mp.size() - self.groups.tp.size()
            dist.broadcast_object_list(values, group=self.groups.mp, group_src=source)
        return values[0]

    def gather_vocabulary(self, shard_BV: Tensor) -> Tensor:
        """Gather the tensor-parallel shards [B, V / tp] side by side: [B, V], the same on each rank."""
        if self.groups.tp.size() == 1:
            return shard_BV
        shards = [torch.empty_like(shard_BV) for _ in range(self.groups.tp.size())]
        dist.all_gather(shards, shard_BV.contiguous(), group=self.groups.tp)
        return torch.cat(shards, dim=-1)


def world_size() -> int:
    """Count the ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's rank, joined or not; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's rank among those of its machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_layout(parallel: ParallelConfig, model: ModelConfig, vocab_size: int) -> None:
    """Raise `ValueError` unless the layout fits the number of ranks and divides the model."""
    world, cells = world_size(), parallel.model_ranks
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
            model.num_layers >= parallel.pp * parallel.vpp,
            f"parallel.pp x parallel.vpp = {parallel.pp * parallel.vpp} parts need a layer each, and "
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


def pipeline_layers(num_layers: int, parts: int) -> list[int]:
    """Share layers out to the parts of a pipeline; the remainder goes to the first, as the last one has the head."""
    return [num_layers // parts + (part < num_layers % parts) for part in range(parts)]


def start(config: ParallelConfig, seed: int, *, alone: bool = False) -> Parallel:
    """Join the ranks that torchrun started (or be the only one, which `alone` makes of each) and build the groups.

    Raises `ValueError` when this rank has no GPU where others have one, or when some rank does not join in time.
    """
    if not dist.is_initialized():
        _join(config, alone or "RANK" not in os.environ)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=_collectives_minutes(config),  # type: ignore[arg-type] (a timedelta takes a float)
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Parallel(groups, config, dist.get_rank(), dist.get_world_size(), _watchdog(config))


def _join(config: ParallelConfig, alone: bool) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise ValueError(
                f"rank {local} of this machine has no GPU of its own: it has {devices}; start at most "
                f"{devices} ranks on it, or train on the CPU with CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local)
    timeout = timedelta(minutes=_collectives_minutes(config))
    try:
        store, number, size = (dist.HashStore(), 0, 1) if alone else _store(timeout)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=number, world_size=size)
    except dist.DistStoreError as error:
        raise ValueError(
            f"not all of the {world_size()} ranks came to {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} in time: start the same command on every node"
        ) from error


def _store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Reach the store of the ranks; returns this rank and their number too.

    torchrun keeps its store when it starts ranks again, with the addresses of those that have ended: each start has
    keys of its own.
    """
    store, number, size = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(_name_of_start(store, number, size, timeout), store), number, size


def _name_of_start(store: dist.Store, number: int, size: int, timeout: timedelta) -> str:
    """Agree on a name that no earlier start of these ranks has had: the first rank draws it.

    Another asks for it in words of its own, as the answer to an earlier start is still there. Nothing that torchrun
    tells its ranks would do: nodes count their starts differently.
    """
    mine = uuid4().hex
    if number:
        store.set(f"question of {number}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.add(f"heard {name}", 1)
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    questions = [f"question of {other}" for other in range(1, size)]
    while store.add(f"heard {mine}", 0) < size - 1:
        for question in (question for question in questions if store.check([question])):
            store.set(f"answer to {store.get(question).decode()}", mine)
        if time.monotonic() > deadline:
            raise dist.DistStoreError("some rank has not asked")
        time.sleep(0.02)
    return mine


def _collectives_minutes(config: ParallelConfig) -> float:
    """Minutes after which collectives give up: more than the watchdog's, whose line says which rank is waited for."""
    return 1.5 * config.timeout_minutes + 1


def _watchdog(config: ParallelConfig) -> Watchdog:
    if dist.get_world_size() == 1:
        return Watchdog.off()
    # The keys of an earlier watchdog on the same store are not this one's.
    store = dist.PrefixStore(f"watchdog{next(_STARTS)}", dist.distributed_c10d._get_default_store())
    return Watchdog(store, dist.get_rank(), dist.get_world_size(), 60 * config.timeout_minutes)


def stop(layout: Parallel, *, keep_ranks: bool = False) -> None:
    """Leave the process groups; `keep_ranks` stays joined, for another layout of the same ranks."""
    layout.watchdog.close()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized() and not keep_ranks:
        dist.destroy_process_group()


def set_threads(threads: int) -> int:
    """Give this rank its CPU threads (0: its share of the machine's cores); returns their number."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or max(1, available // local_ranks)
    torch.set_num_threads(threads)
    return threads
