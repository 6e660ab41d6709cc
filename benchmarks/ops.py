"""Benchmark of the ops: time, memory and error beside plain PyTorch and other libraries.

Every contender solves the same problem in the same process, is first held against fp64, and then takes turns with the
others. One that is not installed, does not run here, or computes something else has a row that says so.

T loss rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from benchmarks import report
from benchmarks.attention import Heads, Packing, make_attention
from benchmarks.attention_contenders import attention_ops, layout_op
from benchmarks.compare import AnyProblem, Op, benchmark, total_work
from benchmarks.contenders import loss_op, scoring_op
from benchmarks.measure import METERS, Progress, clock, on
from benchmarks.problem import Shape, make_problem

HEAD_OPS = ("linear_grpo_loss", "linear_logprob")
ATTENTION_OPS = ("packed_attention", "layout")
SHAPES = {
    "cpu": ["512x256x8192", "1024x512x50257"],
    "cuda": ["8192x4096x151936", "4096x4096x131072", "16384x2048x151936"],
}
SWEEP = {"cpu": [4, 16, 256], "cuda": [256, 512, 1024, 4096, 8192]}
HEADS = {"cpu": "8/2x64", "cuda": "32/8x128"}
LAYOUTS = {
    "cpu": ["groups:12x8x20x16", "groups:128x8x128", "8x512"],
    "cuda": ["8x1024", "mixed:256-8192:65536", "groups:512x64x512", "groups:1024x16x1024", "groups:4096x8x1024"],
}
QUICKSTART = ("4/4x32", "groups:12x8x20x16")
"""Heads and lengths of the quickstart; on a CPU measured by default with these heads."""


_COLUMNS = """columns:
  ms         median of the repetitions; on a machine that others use, compare "x ours" alone
  x ours     median over the repetitions of the time over that of ours in the same repetition: above 1 is slower
  of floor   the time of the GEMMs that nobody can avoid, at the same shapes and in the same types, over the time: three
             for loss and gradients, one for log-probabilities
  TFLOP/s    arithmetic that nobody can avoid, over the time: those GEMMs; for attention the pairs that see each other,
             a shared prompt once, whatever else is computed (4 H K per pair, 2.5 times that backward)
  of peak    the same over what the device can do at most, where that is known
  extra MiB  most memory alive at once beside inputs and results
  errors     from fp64: the loss relative to the sum of its terms' absolute values, log-probabilities by the largest
             |error| / (1 + |logp|), all else relative by Frobenius norm

examples:
  python -m benchmarks.ops --quick                                  does everything run?
  python -m benchmarks.ops --op linear_logprob linear_grpo_loss --shapes 4096x512x50257 --contenders ours
  python -m benchmarks.ops --op packed_attention --heads 32/8x128 --layouts 8x1024 groups:512x64x512

docs/benchmarks.md tells more. Peers come with: pip install --no-build-isolation '.[bench]'
"""


@dataclass(frozen=True)
class Case:
    """A problem, made when its turn comes, and the ops measured on it; those of one list take turns with each other."""

    shape: str
    make: Callable[[], AnyProblem]
    rounds: list[list[Op[Any]]]
    facts: dict[str, Any]
    """Written into every row."""


def cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """Cases that the command line asks for."""
    made = []
    workspaces = [mib * 2**20 for mib in options.workspaces]
    for shape in options.shapes:
        ops = {"linear_grpo_loss": partial(loss_op, workspaces=workspaces), "linear_logprob": scoring_op}
        rounds = [[ops[name](shape, device.type)] for name in HEAD_OPS if name in options.op]
        facts = {"groups": options.groups, "responses": options.responses, "deviation": options.deviation}
        make = partial(make_problem, shape, device, options.dtype, **facts)
        made.append(Case(str(shape), make, rounds, facts))
    for heads, packing in options.attention:
        rounds = []
        if "packed_attention" in options.op:
            rounds.append(attention_ops(heads, packing, device.type))
        if "layout" in options.op:
            rounds.append([layout_op(packing, device.type)])
        make = partial(make_attention, heads, packing, device, options.dtype)
        facts = {"tokens": packing.num_tokens, "pairs": packing.pairs}
        made.append(Case(f"{heads} {packing.text}", make, rounds, facts))
    if options.contenders:
        for op in (op for case in made for ops in case.rounds for op in ops):
            op.contenders[:] = [c for c in op.contenders if c.name.startswith(tuple(options.contenders))]
    for case in made:
        case.rounds[:] = [ops for ops in case.rounds if any(op.contenders for op in ops)]
    return [case for case in made if case.rounds]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops",
        description=__doc__,
        epilog=_COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names, device = HEAD_OPS + ATTENTION_OPS, "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--op", nargs="+", choices=names, default=names, help="what to measure; all")
    defaults = "; ".join(f"{name}: {' '.join(texts)}" for name, texts in SHAPES.items())
    parser.add_argument("--shapes", nargs="+", metavar="TxDxV", help=f"rows x hidden x vocabulary; {defaults}")
    defaults = "; ".join(f"{name}: {' '.join(texts)}" for name, texts in LAYOUTS.items())
    layouts = "lengths for attention: SxL (sequences x length), mixed:shortest-longest:total, groups:PxGxR or PxGxRxN"
    parser.add_argument("--layouts", nargs="+", metavar="TEXT", help=f"{layouts} (N groups); {defaults}")
    defaults = "; ".join(f"{name}: {text}" for name, text in HEADS.items())
    parser.add_argument(
        "--heads", nargs="+", metavar="H/JxK", help=f"query / key heads x size, of values /size; {defaults}"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device, help=f"here: {device}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="cpu: float32; cuda: bfloat16")
    parser.add_argument("--contenders", nargs="+", metavar="TEXT", help="those whose name begins so, such as ours")
    parser.add_argument("--workspaces", nargs="*", type=int, metavar="MIB", help="of our loss, beside its default")
    parser.add_argument("--repetitions", type=int, help="of each contender; cpu: 5, cuda: 20")
    parser.add_argument("--check-rows", type=int, help="how many rows to hold against fp64; as many as it can")
    parser.add_argument("--groups", type=int, default=2, help="prompts of the loss; 2")
    parser.add_argument("--responses", type=int, default=8, help="responses per prompt of the loss; 8")
    parser.add_argument("--deviation", type=float, default=2.0, help="standard deviation of the logits; 2")
    parser.add_argument("--out", type=Path, help="folder or .jsonl; benchmarks/results. A .png goes beside it")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny shape, to see that everything runs; times mean nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine, or this build of PyTorch, has no CUDA device; use --device cpu")
    _set_problems(parser, options)
    options.repetitions = options.repetitions or (2 if options.quick else {"cpu": 5, "cuda": 20}[options.device])
    if options.workspaces is None:
        options.workspaces = [1] if options.quick else SWEEP[options.device]
    options.dtype = getattr(torch, options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[options.device])
    return options


def _set_problems(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`shapes` for the head's ops and `attention`, pairs of heads and lengths; empty where they are not asked for."""
    shapes = options.shapes or (["128x64x1024"] if options.quick else SHAPES[options.device])
    layouts = options.layouts or (["groups:24x3x20x2"] if options.quick else LAYOUTS[options.device])
    pairs = [(heads, layout) for heads in options.heads or [HEADS[options.device]] for layout in layouts]
    if options.device == "cpu" and not options.heads:
        pairs = [QUICKSTART if layout == QUICKSTART[1] else (heads, layout) for heads, layout in pairs]

    def parsed(option: str, parse: Callable[[str], Any], texts: list[str]) -> list[Any]:
        try:
            return [parse(text) for text in texts]
        except ValueError as error:
            parser.error(f"{option}: {error}")

    options.shapes = parsed("--shapes", Shape.parse, shapes if {*HEAD_OPS} & {*options.op} else [])
    pairs = pairs if {*ATTENTION_OPS} & {*options.op} else []
    heads = parsed("--heads", Heads.parse, [heads for heads, _ in pairs])
    layouts = parsed("--layouts", Packing.parse, [layout for _, layout in pairs])
    options.attention = list(zip(heads, layouts, strict=True))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, print a table, write the rows and the plot; returns the path of the rows."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    asked = cases(options, device)
    total = sum(total_work(ops, options.repetitions) for case in asked for ops in case.rounds)
    progress = Progress(total, options.quiet)
    common = report.environment(device) | {
        "dtype": str(options.dtype).removeprefix("torch."),
        "clock": clock(device),
        "memory_meter": METERS[options.device],
    }
    everything = len(options.op) == len(HEAD_OPS + ATTENTION_OPS)
    out = Path(mkdtemp(prefix="dsm-benchmarks-")) if options.quick and options.out is None else options.out
    path, written = report.path(out, common, "ops" if everything else "-".join(options.op)), []
    with on(device):
        for case in asked:
            problem = case.make()
            for ops in case.rounds:
                rows = benchmark(ops, case.shape, problem, options.repetitions, options.check_rows, progress.tick)
                for op in ops:
                    print(report.table([asdict(row) for row in rows if row.op == op.name]), flush=True)
                written += [common | case.facts | asdict(row) for row in rows]
                report.write(written, path)  # whatever stops a long run
    report.draw(written, path.with_suffix(".png"))
    if options.quick:
        print("quick: everything ran; at a shape this small the times and ratios say nothing about speed")
    return path


if __name__ == "__main__":
    main()
