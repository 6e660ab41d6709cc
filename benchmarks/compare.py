"""Contenders at one problem: checked against fp64, then timed in turns; a row for each."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.measure import interleaved, peak_bytes, peak_flops, ratio, tensor_bytes

Run = Callable[[], tuple[Tensor, ...]]
Check = Callable[[tuple[Tensor, ...]], dict[str, float]]
Tick = Callable[[float, str], None]

FLOOR = "GEMMs alone"
"""The row of the GEMMs that nobody can avoid."""
SAME_PROBLEM = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest error with which a peer still counts as solving the same problem."""
_CHECK_FLOPS = {"cpu": 3e11, "cuda": 2e14}
"""Arithmetic in fp64 beyond which only a part of the rows is checked."""
_PREPARATION = 2
"""Runs that a contender needs before it is timed, for the progress."""
_REMEDIES = {
    "trl": "pip install trl",
    "flash_attn": "pip install --no-build-isolation '.[flash]'",
    "flash_attn_interface": "build it from the folder hopper of the flash-attention repository",
}


class AnyProblem(Protocol):
    """Problem as the measurement sees it."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_rows(self) -> int: ...
    def head(self, rows: int) -> Any:
        """The problem of the first rows alone, at least as many."""
        ...


P = TypeVar("P", bound=AnyProblem)


@dataclass(frozen=True)
class Contender(Generic[P]):
    """Contender for an op.

    prepare: brings a problem into the contender's form, untimed, and returns the function that is timed; it may raise
    ModuleNotFoundError. absent: why it does not run on this device. promise: most bytes beside inputs and results.
    """

    name: str
    prepare: Callable[[P], Run]
    allowed_error: dict[torch.dtype, float] = field(default_factory=lambda: SAME_PROBLEM)
    workspace_bytes: int | None = None
    absent: str | None = None
    promise: Callable[[P], int] | None = None


@dataclass(frozen=True)
class Op(Generic[P]):
    """Op to measure.

    flops: arithmetic that nobody can avoid, or 0. check(problem): solves it in fp64 and returns a function from a
    result to its errors, possibly none. rows_computed: rows of a result. floor: that arithmetic alone. difference:
    names of two ops measured beside this one, whose time is the first's less the second's.
    """

    name: str
    contenders: list[Contender[P]]
    flops: float
    check: Callable[[P], Check]
    rows_computed: Callable[[P, tuple[Tensor, ...]], int]
    floor: Callable[[P], Callable[[], None]] | None = None
    difference: tuple[str, str] | None = None

    @property
    def work(self) -> float:
        """Work of one run, for the progress."""
        return max(self.flops, 1.0)


@dataclass
class Row:
    """Result of one contender at one shape. Seconds are medians; bytes are beside inputs and results."""

    op: str
    shape: str
    contender: str
    status: str = "measured"
    reason: str | None = None
    seconds: float | None = None
    ratio_to_ours: float | None = None
    floor_share: float | None = None
    tflops: float | None = None
    peak_share: float | None = None
    peak_extra_bytes: int | None = None
    promised_extra_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    checked_rows: int | None = None
    rows_computed: int | None = None
    workspace_bytes: int | None = None
    repetitions: list[float] = field(default_factory=list)


def total_work(ops: list[Op[Any]], repetitions: int) -> float:
    """Work of `benchmark`, for the progress."""
    return sum(op.work * len(op.contenders) * (_PREPARATION + repetitions) for op in ops)


def benchmark(
    ops: list[Op[P]], shape: str, problem: P, repetitions: int, check_rows: int | None, tick: Tick
) -> list[Row]:
    """Measure all contenders of the ops in turns; a row for each.

    check_rows: hold against fp64 about so many rows; None: all, unless that takes too long.
    """
    if check_rows is None:
        flops = max(op.flops for op in ops)
        share = min(1.0, _CHECK_FLOPS[problem.device.type] / flops) if flops else 1.0
        check_rows = int(problem.num_rows * share)
    part = problem.head(check_rows) if check_rows < problem.num_rows else problem
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # shapes of an earlier problem would make compiled code general, and slower
    checks = {check: check(part) for check in {op.check for op in ops}}
    rows: list[Row] = []
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for op in ops:
        for contender in op.contenders:
            tick(_PREPARATION * op.work, f"{op.name} {shape}: {contender.name}")
            row = Row(op.name, shape, contender.name, workspace_bytes=contender.workspace_bytes)
            rows.append(row)
            run = _prepared(op, contender, problem, part, checks[op.check], row)
            if run is not None:
                runs[op.name, contender.name] = run
            elif problem.device.type == "cuda":
                torch.cuda.empty_cache()  # what one that ran out of memory has left
        if op.floor is not None:
            rows.append(Row(op.name, shape, FLOOR))
            runs[op.name, FLOOR] = op.floor(problem)
    checks.clear()
    each = sum(op.work * len(op.contenders) for op in ops)
    prefix = f"{ops[0].name} {shape}: "
    times = interleaved(runs, repetitions, problem.device, lambda text: tick(each, prefix + text))
    for op in ops:
        if op.difference is not None:
            rows += _differences(op, rows, times)
        for row in rows:
            if row.op == op.name and (op.name, row.contender) in times:
                _finish(row, op, times, peak_flops(problem.device, problem.dtype))
    return rows


def _prepared(op: Op[P], contender: Contender[P], problem: P, part: P, check: Check, row: Row) -> Run | None:
    """Function to time, checked and warm; or None, with the reason in the row."""

    def without(status: str, reason: str) -> None:
        row.status, row.reason = status, reason

    if contender.absent is not None:
        return without("absent", contender.absent)
    try:
        run = contender.prepare(part)
        result = run()
        row.errors = check(result)
        row.checked_rows = part.num_rows if row.errors else None
        allowed = contender.allowed_error[problem.dtype]
        if not all(error <= allowed for error in row.errors.values()):  # NaN is no error that is allowed
            return without("refused", f"wrong result: an error is above {allowed:g}")
        if part is not problem:
            run = contender.prepare(problem)
            result = run()  # compiles for this shape
        row.rows_computed = op.rows_computed(problem, result)
        kept = tensor_bytes(result)
        del result
        row.peak_extra_bytes = peak_bytes(run, problem.device) - kept
        if contender.promise is not None:
            row.promised_extra_bytes = contender.promise(problem)
            if row.peak_extra_bytes > row.promised_extra_bytes:
                row.reason = f"takes more memory than the {row.promised_extra_bytes / 2**20:.1f} MiB it promises"
        return run
    except ModuleNotFoundError as error:
        remedy = _REMEDIES.get(error.name or "", "pip install '.[bench]'")
        return without("absent", f"{error.name} is not installed: {remedy}")
    except Exception as error:  # whatever a library raises is a row, and the others go on
        text = str(error).strip().splitlines() or [""]
        return without("failed", f"{type(error).__name__}: {text[0][:200]}")


def _differences(op: Op[Any], rows: list[Row], times: dict[tuple[str, str], list[float]]) -> list[Row]:
    """Rows of an op whose time is a difference, with its times put beside the others."""
    assert op.difference is not None
    whole, less = op.difference
    made = []
    for row in rows:
        if row.op != whole:
            continue
        mine = Row(op.name, row.shape, row.contender, row.status, row.reason)
        made.append(mine)
        pair = [times.get((name, row.contender)) for name in (whole, less)]
        if pair[0] is not None and pair[1] is not None:
            times[op.name, row.contender] = [a - b for a, b in zip(pair[0], pair[1], strict=True)]
            if min(times[op.name, row.contender]) <= 0:
                del times[op.name, row.contender]
                mine.status, mine.reason = "failed", f"lost in the noise: {less} alone took as long as {whole}"
    return made


def _finish(row: Row, op: Op[Any], times: dict[tuple[str, str], list[float]], peak: float | None) -> None:
    mine = row.repetitions = times[op.name, row.contender]
    row.seconds = statistics.median(mine)
    ours, floor = (times.get((op.name, name)) for name in ("ours", FLOOR))
    row.ratio_to_ours = ratio(mine, ours) if ours is not None else None
    row.floor_share = ratio(floor, mine) if floor is not None else None
    if op.flops:
        row.tflops = op.flops / row.seconds / 1e12
        row.peak_share = None if peak is None else 1e12 * row.tflops / peak
