"""Time, memory and error of contenders.

T loss rows, V vocabulary, D hidden.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.problem import Problem

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines for every use
METERS = {
    "cpu": "high-water mark of the bytes that PyTorch's CPU allocator has given out, by its profiler",
    "cuda": "torch.cuda.max_memory_allocated",
}
_PEAKS = {"A100": 312e12, "H100": 989.5e12, "H200": 989.5e12}
"""FLOP/s of dense products in bf16 and fp16; Hopper's are those of its SXM form."""

Name = TypeVar("Name", bound=Hashable)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device could do at most, where it is one of `_PEAKS` and the type one of theirs."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """Peak of a device as CUDA names it; None for a MIG slice and for variants of less power."""
    match = re.search(r"\b(A100|H100|H200)\b", name)
    if match is None or "MIG" in name or (match[1] != "A100" and re.search("PCIe|NVL", name)):
        return None
    return _PEAKS[match[1]]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at once that `run` allocated, its result included. See METERS."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
    del result  # alive until here: it belongs to the peak
    kineto = record.profiler.kineto_results if record.profiler is not None else None
    if kineto is None:
        raise RuntimeError("PyTorch's profiler gave no record of the memory")
    changes = [event for event in kineto.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, alive)
    return peak


def tensor_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def clock(device: torch.device) -> str:
    """Name of the clock that `seconds` reads. CPU time does not advance while other processes hold the core."""
    if device.type == "cuda":
        return "CUDA events"
    return "CPU time of the process" if torch.get_num_threads() == 1 else "wall clock"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by `clock`."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    run()
    return now() - start


def interleaved(
    runs: Mapping[Name, Callable[[], object]], repetitions: int, device: torch.device, tick: Callable[[str], None]
) -> dict[Name, list[float]]:
    """Seconds of every repetition. In each, all run, one after the other; every second one in reverse order."""
    order = list(runs)
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions):
        tick(f"repetition {repetition + 1} of {repetitions}")
        for name in order[:: -1 if repetition % 2 else 1]:
            times[name].append(seconds(runs[name], device))
    return times


def ratio(times: list[float], of: list[float]) -> float:
    """Median over the repetitions of times / of: both of a pair have met the same load of the machine."""
    return statistics.median(a / b for a, b in zip(times, of, strict=True))


def gemms(problem: Problem, count: int) -> Callable[[], None]:
    """The first `count` of the GEMMs that nobody can avoid, into memory that is there: logits, dhidden, dweight."""
    hidden_TD, weight_VD = problem.hidden_TD, problem.weight_VD
    logits_TV = hidden_TD.new_zeros(problem.shape.T, problem.shape.V)
    steps = [(hidden_TD, weight_VD.T, logits_TV)]
    if count > 1:
        dlogits_TV = (hidden_TD[:, :1] * weight_VD[:, 0]).contiguous()  # zeros would draw less power
        steps += [(dlogits_TV, weight_VD, torch.empty_like(hidden_TD))]
        steps += [(dlogits_TV.T, hidden_TD, torch.empty_like(weight_VD))]

    def run() -> None:
        with torch.no_grad():
            for a, b, out in steps[:count]:
                torch.mm(a, b, out=out)

    return run


def relative(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|, Frobenius; in parts, so that no fp64 copy of x is made."""
    pairs = list(zip(x.split(4096), exact.split(4096), strict=True))
    error = sum(float((a.double() - b).square().sum()) for a, b in pairs)
    return (error / max(sum(float(b.square().sum()) for _, b in pairs), 1e-300)) ** 0.5


@dataclass
class Progress:
    """Progress on stderr: a line per step, with the time left extrapolated from the work done."""

    total: float
    quiet: bool = False
    done: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def tick(self, work: float, text: str) -> None:
        """Show a line; `work` is that of the step that begins."""
        elapsed = time.monotonic() - self.started
        left = (
            f"about {elapsed * (self.total - self.done) / self.done:.0f} s left" if self.done else "time left unknown"
        )
        if not self.quiet:
            print(f"[{100 * self.done / self.total:3.0f} %, {left}] {text}", file=sys.stderr, flush=True)
        self.done = min(self.done + work, self.total)


def on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
