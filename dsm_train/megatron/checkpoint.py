"""Models with their optimizers through Megatron's distributed checkpointing: written in the background, read anywhere.

A checkpoint does not depend on the layout that wrote it: weights, master weights and Adam's moments are whole tensors
by name, of which each rank writes and reads its parts.
"""

from __future__ import annotations

import hashlib
import inspect
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding, extract_sharded_tensors_and_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from dsm_train.cli.errors import disk_error
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model, TrainableModel

Bucket = tuple[str, str, tuple[list[tuple[Any, Any]], list[tuple[Any, Tensor]]]]
"""File to write: its path, its name, and items with bytes and with tensors; as Megatron has it."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Saver:
    """Writes checkpoints of a job, one at a time."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._checked: set[tuple[str, ...]] = set()
        """Names of models whose shards were found to cover each tensor exactly once."""

    def start(self, folder: Path, models: Mapping[str, Model]) -> Writing:
        """Copy the models' state to the CPU, and begin to write it to a folder that is there and empty. Collective."""
        names = tuple(models)
        of_0_19: dict[str, Any] = {"async_strategy": "mcore"} if "async_strategy" in _PARAMETERS else {}
        request = dist_checkpointing.save(
            {name: _sharded(name, model, self._parallel, loading=False) for name, model in models.items()},
            str(folder),
            sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            validate_access_integrity=names not in self._checked,
            async_sharded_save=True,
            **of_0_19,
        )
        self._checked.add(names)
        return Writing(request, folder, self._parallel)


_PARAMETERS = inspect.signature(dist_checkpointing.save).parameters


class Writing:
    """A checkpoint while this rank's files are written, by a thread."""

    def __init__(self, request: Any, folder: Path, parallel: Parallel) -> None:
        self._request, self._folder, self._parallel = request, folder, parallel
        self._buckets = _snapshot(request)
        self._results: dict[int, Any] = {}
        self._sums: dict[str, str] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def going_on(self) -> bool:
        """True while this rank writes."""
        return self._thread.is_alive()

    def finish(self) -> dict[str, str]:
        """Wait for all ranks' files, and write the index. Collective.

        Returns the SHA-256 of every file by its name, on the main rank. Raises `OSError` on all ranks where one could
        not write, with its reason.
        """
        watchdog, size = self._parallel.watchdog, -1
        while self._thread.is_alive():
            self._thread.join(0.5)
            written = sum(Path(path).stat().st_size for path, *_ in self._buckets if Path(path).exists())
            if written != size:  # a file system that hangs is not alive
                watchdog.beat()
            size = written
        ranks = self._parallel.gather_over_ranks((self._error, self._sums))
        for rank, (reason, _) in enumerate(ranks):
            if reason is not None:
                raise OSError(reason.errno, f"{reason.strerror or reason} (rank {rank})")
        if self._buckets:
            self._request.async_fn_args[2].put(self._results)
        for function in self._request.finalize_fns:
            function()
        if not self._parallel.is_main:
            return {}
        sums = {name: digest for _, part in ranks for name, digest in part.items()}
        missing = [name for name in sums if not (self._folder / name).is_file()]
        if missing:
            raise OSError(None, f"{missing[0]} is on another node: run.out has to be on a disk that all nodes share")
        rest = (path for path in self._folder.iterdir() if path.name not in sums)
        return sums | {path.name: sha256(path) for path in rest}

    def _write(self) -> None:
        """Write this rank's files, each followed by its checksum."""
        try:
            write: Any = FileSystemWriterAsync.write_preloaded_data
            transforms = self._request.async_fn.args[0] if self._buckets else []
            for number, bucket in enumerate(self._buckets):
                results, left = queue.Queue(), queue.Queue()
                left.put(number)
                write(transforms, number, bucket, results, left, use_fsync=True)
                _, outcome = results.get()
                if isinstance(outcome, Exception):
                    raise outcome
                self._results[number] = outcome
                self._sums[Path(bucket[0]).name] = sha256(Path(bucket[0]))
        except Exception as error:
            self._error = disk_error(error, self._folder) or OSError(None, f"{type(error).__name__}: {error}")


def _snapshot(request: Any) -> list[Bucket]:
    """Copy the tensors to the CPU, those on it as well: training changes them while they are written.

    Originals go one by one, as some are copies themselves: of views, and what the distributed optimizer gathered.
    """
    if request.preload_fn is None:
        return []  # other ranks write all of it
    buckets: list[Bucket] = request.preload_fn()
    for (_, _, (_, tensors)), (_, _, (_, originals)) in zip(buckets, request.async_fn_args[1], strict=True):
        for place, (item, tensor) in enumerate(tensors):
            if tensor is originals[place][1]:
                tensors[place] = item, tensor.clone()
            originals[place] = item, None
    return buckets


def load(folder: Path, models: Mapping[str, Model], parallel: Parallel) -> None:
    """Read the state of these models, in any layout, into what they have. Collective.

    Raises `CheckpointingException` for models that are not those of the checkpoint.
    """
    state = {name: _sharded(name, model, parallel, loading=True) for name, model in models.items()}
    loaded: Any = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
    for name, model in models.items():
        _take(model, loaded[name], parallel)


def load_weights(folder: Path, name: str, model: Model, parallel: Parallel) -> None:
    """Read the weights alone of one of a checkpoint's models, in any layout and by any layers. Collective.

    Raises `CheckpointingException` for a weight that the checkpoint lacks, or has in another shape.
    """
    # Beside weights, layers list a state of their own, empty here, which differs between implementations.
    tensors, _ = extract_sharded_tensors_and_factories(_sharded_weights(model, parallel))
    add_prefix_for_sharding(tensors, f"{name}.")
    state: Any = {name: tensors}
    loaded: Any = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    for i, chunk in enumerate(model.chunks):
        result = chunk.load_state_dict(loaded[name][f"chunk{i}"], strict=False)
        assert not result.unexpected_keys and all(key.endswith("_extra_state") for key in result.missing_keys)


def _sharded(name: str, model: Model, parallel: Parallel, *, loading: bool) -> dict[str, Any]:
    """Describe the state of a model on this rank: tensors, and the parts of them that it holds."""
    chunks = _sharded_weights(model, parallel)
    state: dict[str, Any] = {**chunks, "steps": model.steps}
    if isinstance(model, TrainableModel):
        fill_adam(model)
        adam = [_sharded_moments(part, chunks, parallel, loading=loading) for part in _optimizers(model)]
        state |= {"adam": adam, "adam_step": _adam_step(model), "schedule_step": model.schedule.num_steps}
        state["skipped"] = model.skipped
    add_prefix_for_sharding(state, f"{name}.")
    return state


def _sharded_weights(model: Model, parallel: Parallel) -> dict[str, Any]:
    # A name per layer: pipelines need not divide the layers evenly.
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": parallel.groups.dp_cp}
    return {f"chunk{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(model.chunks)}


def _sharded_moments(optimizer: Any, chunks: dict[str, Any], parallel: Parallel, *, loading: bool) -> dict[int, Any]:
    """Describe Adam's moments, and a bf16 model's master weights, as whole tensors beside those of the weights.

    The distributed optimizer's are gathered at the first replica's CPU: those of its formats that need no gathering
    cannot be read in another layout.
    """
    if not isinstance(optimizer, DistributedOptimizer):
        return {
            number: {
                name: make_sharded_optimizer_tensor(weight, value, f"optimizer.state.{name}")
                for name, value in _kept(optimizer, weight.data).items()
            }
            for number, weight in enumerate(_parts(chunks))
        }
    optimizer.data_parallel_group_gloo = parallel.groups.dp_cp  # it has gloo for what is on the CPU
    gathered = {"distrib_optim_fully_reshardable_mem_efficient": True}
    moments = optimizer.sharded_param_state_fully_reshardable(chunks, loading, gathered) or {}
    for state in moments.values():
        if not optimizer.config.bf16:
            del state["param"]  # the weight itself
    return moments


def _parts(chunks: dict[str, Any]) -> list[Any]:
    """List the weights as they were described."""
    parts, _ = extract_sharded_tensors_and_factories(chunks)
    return list(nested_values(parts))


def _kept(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """List what an optimizer that is not distributed keeps of a weight, in its shape."""
    main = getattr(parameter, "main_param", parameter)
    master = {} if main is parameter else {"param": main.detach()}
    return {name: optimizer.optimizer.state[main][name] for name in _MOMENTS} | master


@torch.no_grad()
def _take(model: Model, loaded: Mapping[str, Any], parallel: Parallel) -> None:
    """Put what was read into the model."""
    for i, chunk in enumerate(model.chunks):
        chunk.load_state_dict(loaded[f"chunk{i}"])
    model.steps = loaded["steps"]
    if not isinstance(model, TrainableModel):
        return
    for optimizer, moments in zip(_optimizers(model), loaded["adam"], strict=True):
        if isinstance(optimizer, DistributedOptimizer):
            _take_shards(optimizer, moments)
            continue
        for number, weight in enumerate(_parts(_sharded_weights(model, parallel))):
            for name, value in _kept(optimizer, weight.data).items():
                value.copy_(moments[number][name])
    _set_adam_step(model, loaded["adam_step"])
    model.schedule.num_steps = loaded["schedule_step"]
    model.schedule.step(increment=0)
    model.skipped = loaded["skipped"]


def _take_shards(optimizer: DistributedOptimizer, moments: dict[int, Any]) -> None:
    """Cut this rank's shards out of whole tensors, which upstream numbers in the order of its buffers."""
    weights = (weight for buffer in optimizer.buffers for weight in buffer.param_index_map)
    whole = {number: {"param": weight.detach()} | moments[number] for number, weight in enumerate(weights)}
    states = [state for state in optimizer.optimizer.state.values() if "step" in state]
    for state in states:
        del state["step"]  # upstream looks for all that it finds here, and AdamW's step is no tensor of the weight's
    optimizer.load_parameter_state_from_fully_reshardable(whole)


@torch.no_grad()
def fill_adam(model: TrainableModel) -> None:
    """Make Adam's state where it is not there yet, as it would be made at the first step."""
    for inner in (part.optimizer for part in _optimizers(model)):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            state = inner.state[parameter]
            if isinstance(inner, torch.optim.Adam):
                state.setdefault("step", torch.tensor(0.0))
            for name in _MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)


def _adam_step(model: TrainableModel) -> int:
    """Read the number of Adam's steps, which torch keeps with every parameter, Transformer Engine and apex by group."""
    kept = [
        holder["step"]
        for inner in (part.optimizer for part in _optimizers(model))
        for holder in (*inner.state.values(), *_groups(inner))
        if "step" in holder
    ]
    steps = {int(step) for step in kept}
    assert len(steps) <= 1, f"parameters have seen different numbers of steps: {steps}"
    return steps.pop() if steps else 0


def _set_adam_step(model: TrainableModel, step: int) -> None:
    for inner in (part.optimizer for part in _optimizers(model)):
        if isinstance(inner, torch.optim.Adam):
            for state in inner.state.values():
                state["step"] = torch.tensor(float(step))  # one each: AdamW adds to it in place
        else:
            for group in _groups(inner):
                group["step"] = step


def _groups(inner: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """List the groups that have a step: of none of whose weights this rank has a shard, Adam passes over."""
    return [group for group in inner.param_groups if group["params"]]


def _optimizers(model: TrainableModel) -> list[Any]:
    """List the optimizers that Megatron's is made of."""
    return getattr(model.optimizer, "chained_optimizers", [model.optimizer])


def sha256(path: Path) -> str:
    """Compute a file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
