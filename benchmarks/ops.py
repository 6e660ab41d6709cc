"""`python -m benchmarks.ops`: time, memory and error of the ops beside plain PyTorch and other libraries.

Every contender solves the same problem in the same process, is first held against fp64, and then takes turns with the
others. One that is not installed, does not run here, or computes something else has a row that says so.

T loss rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.contenders import Contender, Run, loss_contenders, scoring_contenders
from benchmarks.measure import (
    METERS,
    Progress,
    clock,
    gemms,
    interleaved,
    on,
    peak_bytes,
    ratio,
    relative,
    tensor_bytes,
)
from benchmarks.problem import Problem, Shape, exact_logprobs, exact_loss, make_problem

SHAPES = {
    "cpu": ["512x256x8192", "1024x512x50257"],
    "cuda": ["8192x4096x151936", "4096x4096x131072", "16384x2048x151936"],
}
SWEEP = {"cpu": [4, 16, 256], "cuda": [256, 512, 1024, 4096, 8192]}
_CHECK_FLOPS = {"cpu": 3e11, "cuda": 2e14}
"""Beyond so much arithmetic in fp64 the check is of a part of the rows."""
_PREPARATION = 2
"""Runs that a contender needs before it is timed, for the progress."""


_COLUMNS = """columns:
  ms         median of the repetitions; on a machine that others use, compare "x ours" alone
  x ours     median over the repetitions of the time over that of ours in the same repetition: above 1 is slower
  of floor   the time of the GEMMs that nobody can avoid, at the same shapes and in the same types, over the time: three
             for loss and gradients, one for log-probabilities
  extra MiB  most memory alive at once beside inputs and results
  errors     from fp64: of the loss relative to the sum of its terms' absolute values, of gradients relative by
             Frobenius norm, of log-probabilities the largest |error| / (1 + |logp|)

examples:
  python -m benchmarks.ops --quick                                  does everything run?
  python -m benchmarks.ops --shapes 4096x512x50257 --contenders ours --check-rows 256
  python -m benchmarks.ops --op linear_logprob --repetitions 50

docs/benchmarks.md tells more. Peers come with: pip install --no-build-isolation '.[bench]'
"""


@dataclass(frozen=True)
class Op:
    """What is measured. errors(run, problem) holds a result against fp64; gemms are those that nobody can avoid."""

    name: str
    contenders: list[Contender]
    gemms: int
    errors: Callable[[Problem], Callable[[tuple[Tensor, ...]], dict[str, float]]]


@dataclass
class Row:
    """What is written of one contender at one shape. Seconds are medians; bytes are beside inputs and results."""

    op: str
    shape: str
    contender: str
    status: str = "measured"
    reason: str | None = None
    seconds: float | None = None
    ratio_to_ours: float | None = None
    floor_share: float | None = None
    peak_extra_bytes: int | None = None
    promised_extra_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    checked_rows: int | None = None
    rows_computed: int | None = None
    workspace_bytes: int | None = None
    repetitions: list[float] = field(default_factory=list)


def linear_grpo_loss(device: str, workspaces: list[int]) -> Op:
    """Loss, dhidden and dweight, forward and backward."""

    def errors(problem: Problem) -> Callable[[tuple[Tensor, ...]], dict[str, float]]:
        exact = exact_loss(problem)

        def against(result: tuple[Tensor, ...]) -> dict[str, float]:
            loss, dhidden, dweight_VD = result
            if dhidden.dim() == 3:
                dhidden = dhidden.squeeze(1) if dhidden.shape[1] == 1 else problem.packed(dhidden)
            return {
                "loss": float((loss.double() - exact.loss).abs() / exact.magnitude),
                "dhidden": relative(dhidden, exact.dhidden_TD),
                "dweight": relative(dweight_VD, exact.dweight_VD),
            }

        return against

    return Op("linear_grpo_loss", loss_contenders(device, workspaces), 3, errors)


def linear_logprob(device: str, workspaces: list[int]) -> Op:
    """Log-probabilities of the targets without gradients: what scoring by the old and the reference model needs."""

    def errors(problem: Problem) -> Callable[[tuple[Tensor, ...]], dict[str, float]]:
        exact_T = exact_logprobs(problem)
        return lambda result: {"logprob": float(((result[0].double() - exact_T).abs() / (1 + exact_T.abs())).max())}

    return Op("linear_logprob", scoring_contenders(device), 1, errors)


OPS: dict[str, Callable[[str, list[int]], Op]] = {
    "linear_grpo_loss": linear_grpo_loss,
    "linear_logprob": linear_logprob,
}


def benchmark(
    op: Op, problem: Problem, repetitions: int, check_rows: int | None, tick: Callable[[str], None]
) -> list[Row]:
    """A row per contender. check_rows: hold against fp64 about so many rows; None: all, unless that takes too long."""
    flops = 6.0 * problem.shape.T * problem.shape.D * problem.shape.V
    if check_rows is None:
        check_rows = int(problem.shape.T * min(1.0, _CHECK_FLOPS[problem.device.type] / flops))
    part = problem.head(check_rows) if check_rows < problem.shape.T else problem
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # shapes of an earlier problem would make compiled code general, and slower
    against = op.errors(part)
    rows, runs = [], {}
    for contender in op.contenders:
        tick(contender.name)
        row = Row(op.name, str(problem.shape), contender.name, workspace_bytes=contender.workspace_bytes)
        rows.append(row)
        run = _prepared(contender, problem, part, against, row)
        if run is not None:
            runs[contender.name] = run
        elif problem.device.type == "cuda":
            torch.cuda.empty_cache()  # what one that ran out of memory has left
    times = interleaved({report.FLOOR: gemms(problem, op.gemms), **runs}, repetitions, problem.device, tick)
    rows.append(Row(op.name, str(problem.shape), report.FLOOR))
    for row in rows:
        if row.contender in times:
            mine = row.repetitions = times[row.contender]
            row.seconds, row.floor_share = statistics.median(mine), ratio(times[report.FLOOR], mine)
            row.ratio_to_ours = ratio(mine, times["ours"]) if "ours" in times else None
    return rows


def _prepared(
    contender: Contender,
    problem: Problem,
    part: Problem,
    against: Callable[[tuple[Tensor, ...]], dict[str, float]],
    row: Row,
) -> Run | None:
    """What is to be timed, checked and warm; or None, with the reason in the row."""

    def without(status: str, reason: str) -> None:
        row.status, row.reason = status, reason

    if contender.absent is not None:
        return without("absent", contender.absent)
    dtype = problem.hidden_TD.dtype
    try:
        run = contender.prepare(part)
        result = run()
        row.errors, row.checked_rows = against(result), part.shape.T
        allowed = contender.allowed_error[dtype]
        if not all(error <= allowed for error in row.errors.values()):  # NaN is no error that is allowed
            return without("refused", f"wrong result: an error is above {allowed:g}")
        if part is not problem:
            run = contender.prepare(problem)
            result = run()  # compiles for this shape
        row.rows_computed = result[1].numel() // problem.shape.D if len(result) > 1 else problem.shape.T
        kept = tensor_bytes(result)
        del result
        row.peak_extra_bytes = peak_bytes(run, problem.device) - kept
        if contender.promise is not None:
            row.promised_extra_bytes = contender.promise(problem)
            if row.peak_extra_bytes > row.promised_extra_bytes:
                row.reason = f"takes more memory than the {row.promised_extra_bytes / 2**20:.1f} MiB it promises"
        return run
    except ModuleNotFoundError as error:
        return without("absent", f"{error.name} is not installed: pip install '.[bench]'")
    except Exception as error:  # whatever a library raises is a row, and the others go on
        text = str(error).strip().splitlines() or [""]
        return without("failed", f"{type(error).__name__}: {text[0][:200]}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops",
        description=__doc__,
        epilog=_COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS), help="what to measure; all")
    defaults = "; ".join(f"{name}: {' '.join(texts)}" for name, texts in SHAPES.items())
    parser.add_argument("--shapes", nargs="+", metavar="TxDxV", help=f"rows x hidden x vocabulary; {defaults}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device, help=f"here: {device}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="cpu: float32; cuda: bfloat16")
    parser.add_argument("--contenders", nargs="+", metavar="TEXT", help="those whose name begins so, such as ours")
    parser.add_argument("--workspaces", nargs="*", type=int, metavar="MIB", help="of ours, beside its default")
    parser.add_argument("--repetitions", type=int, help="of each contender; cpu: 5, cuda: 20")
    parser.add_argument("--check-rows", type=int, help="how many rows to hold against fp64; as many as it can")
    parser.add_argument("--groups", type=int, default=2, help="prompts; 2")
    parser.add_argument("--responses", type=int, default=8, help="responses per prompt; 8")
    parser.add_argument("--out", type=Path, help="folder or .jsonl; benchmarks/results. A .png goes beside it")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that everything runs")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine, or this build of PyTorch, has no CUDA device; use --device cpu")
    shapes = options.shapes or (["128x64x1024"] if options.quick else SHAPES[options.device])
    try:
        options.shapes = [Shape.parse(text) for text in shapes]
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    options.repetitions = options.repetitions or (2 if options.quick else {"cpu": 5, "cuda": 20}[options.device])
    if options.workspaces is None:
        options.workspaces = [1] if options.quick else SWEEP[options.device]
    options.dtype = getattr(torch, options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[options.device])
    return options


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, print a table, write the rows and the plot; returns the path of the rows."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    ops = [OPS[name](options.device, [mib * 2**20 for mib in options.workspaces]) for name in options.op]
    if options.contenders:
        for op in ops:
            op.contenders[:] = [c for c in op.contenders if c.name.startswith(tuple(options.contenders))]
        ops = [op for op in ops if op.contenders]
    work = {(op.name, shape): float(shape.T * shape.D * shape.V * op.gemms) for op in ops for shape in options.shapes}
    steps = {op.name: len(op.contenders) * (_PREPARATION + options.repetitions) for op in ops}
    total = sum(work[op.name, shape] * steps[op.name] for op in ops for shape in options.shapes)
    progress = Progress(total, options.quiet)
    common = report.environment(device) | {
        "dtype": str(options.dtype).removeprefix("torch."),
        "groups": options.groups,
        "responses": options.responses,
        "clock": clock(device),
        "memory_meter": METERS[options.device],
    }
    path, written = report.path(options.out, common), []
    with on(device):
        for shape in options.shapes:
            problem = make_problem(shape, device, options.dtype, options.groups, options.responses)
            for op in ops:
                each = work[op.name, shape]

                def tick(text: str, op: Op = op, shape: Shape = shape, each: float = each) -> None:
                    runs = len(op.contenders) if text.startswith("repetition") else _PREPARATION
                    progress.tick(each * runs, f"{op.name} {shape}: {text}")

                rows = benchmark(op, problem, options.repetitions, options.check_rows, tick)
                print(report.table([asdict(row) for row in rows]), flush=True)
                written += [common | asdict(row) for row in rows]
                report.write(written, path)  # whatever stops a long run
    report.draw(written, path.with_suffix(".png"))
    return path


if __name__ == "__main__":
    main()
