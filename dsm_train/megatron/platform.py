"""megatron-core on a machine without CUDA.

megatron-core writes `device="cuda"`, `torch.cuda.current_device()` and `tensor.cuda()` in many places. On a machine
without CUDA, `enable()` gives its modules a copy of the `torch` namespace in which the current device is the CPU, and
imports them with `torch.compile` as the identity: decorating alone imports torch's compiler, which takes longer than
the rest of megatron-core. torch itself stays as it is, but for `Tensor.cuda`, which can only raise in such a process.
With CUDA, `enable()` changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_PATCHED_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like")


def device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@functools.cache
def enable() -> bool:
    """Adapt megatron-core to the CPU; True if that was needed."""
    # Upstream logs and warns about each package it would like to have; the start-up table says what serves what.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cuda = torch.cuda.is_available()
    with warnings.catch_warnings(), contextlib.nullcontext() if cuda else _without_compilation():
        warnings.simplefilter("ignore")
        for name in _PATCHED_MODULES:
            importlib.import_module(name)
    # It calls collectives by names that torch has deprecated since, and asks the optimizer's shards for gradients.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated", category=FutureWarning)  # checkpoints
    # megatron-core 0.19 warns of a model that is not used here.
    warnings.filterwarnings(
        "ignore", message=".*is experimental and still under active development", module=r"megatron\."
    )
    if cuda:
        return False
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", module=r"megatron\.")
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import random as megatron_random

    namespace = _torch_on_cpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = namespace
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for owner in (distrib_optimizer.DistributedOptimizer, optimizer.Float16OptimizerWithFloat16Params):
        owner.__init__ = _with_cuda_type_names(owner.__init__)
    optimizer.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    return True


@contextlib.contextmanager
def _without_compilation() -> Iterator[None]:
    """`torch.compile` as the identity, with and without options, while megatron-core's modules decorate with it."""
    original = torch.compile
    torch.compile = lambda model=None, **options: model or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


def _torch_on_cpu() -> types.ModuleType:
    """A copy of the `torch` namespace whose current device is the CPU."""
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    stream = types.SimpleNamespace(wait_stream=lambda s: None, synchronize=lambda: None, wait_event=lambda e: None)
    stream.record_event = lambda: stream
    cuda.__dict__.update(
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *args, **kwargs: None,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        Stream=lambda *args, **kwargs: stream,
        current_stream=lambda *args, **kwargs: stream,
        default_stream=lambda *args, **kwargs: stream,
        stream=lambda s: contextlib.nullcontext(),
    )
    namespace = types.ModuleType("torch")
    namespace.__dict__.update(torch.__dict__)
    namespace.__dict__.update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}, cuda=cuda)
    namespace.__dict__["autocast"] = lambda _device="cpu", **kwargs: torch.autocast("cpu", **kwargs)
    return namespace


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` with a CUDA device replaced by the CPU, and without pinned memory."""

    @functools.wraps(factory)
    def create(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        if device is not None and torch.device(device).type == "cuda":
            device = torch.device("cpu")
        return factory(*args, device=device, **kwargs)

    return create


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Megatron's optimizers know parameters by the type string "torch.cuda.FloatTensor"."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    torch.Tensor.type = type_name  # type: ignore[method-assign]
    try:
        yield
    finally:
        del torch.Tensor.type  # it is inherited: nothing of ours stays behind


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call
