"""The benchmarks: a run from the command line to its rows, what is refused, and the meters.

T loss rows, S responses, L the longest, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contenders, ops
from benchmarks.contenders import CONTRACT, Contender, Run
from benchmarks.measure import Progress, interleaved, peak_bytes, ratio, relative
from benchmarks.problem import Problem, Shape, exact_logprobs, exact_loss, make_problem, ragged
from triton_kernels.grpo_loss import objective_arguments, policy_loss

SHAPE = Shape(40, 8, 65)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(SHAPE, CPU, torch.float32, groups=2, responses=3)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without compilers, which take longer than everything else, and without peers, whether installed or not."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("liger_kernel", "cut_cross_entropy"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    yield


def test_from_the_command_line_to_rows_and_plot(
    cheap: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--shapes", str(SHAPE), "--device", "cpu", "--repetitions", "2", "--workspaces", "1"]
    path = ops.main([*arguments, "--out", str(tmp_path)])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert path.with_suffix(".png").stat().st_size > 0
    for row in rows:
        assert row["op"] in ops.OPS and row["shape"] == "40x8x65" and row["dtype"] == "float32"
        assert row["device"] and row["date"] and row["threads"] == torch.get_num_threads()
        assert row["versions"]["torch"] == torch.__version__ and "liger-kernel" in row["versions"]
        assert row["served_by"]["grpo_loss"] and row["memory_meter"] and row["clock"]
    by_name = {(row["op"], row["contender"]): row for row in rows}
    for name in ("ours", "ours, 1 MiB", "PyTorch, eager", "PyTorch, compiled"):
        row = by_name["linear_grpo_loss", name]
        assert row["status"] == "measured" and row["reason"] is None
        assert len(row["repetitions"]) == 2 and min(row["seconds"], row["floor_share"], row["ratio_to_ours"]) > 0
        assert row["peak_extra_bytes"] > 0 and row["checked_rows"] == row["rows_computed"] == SHAPE.T
        assert set(row["errors"]) == {"loss", "dhidden", "dweight"} and max(row["errors"].values()) < 1e-5
    assert by_name["linear_grpo_loss", "ours"]["ratio_to_ours"] == 1
    for key, reason in {
        ("linear_grpo_loss", "Liger fused linear GRPO, padded"): "pip install '.[bench]'",
        ("linear_grpo_loss", "cut-cross-entropy"): "need a GPU",
        ("linear_logprob", "cut-cross-entropy, torch_compile"): "pip install '.[bench]'",
    }.items():
        row = by_name[key]
        assert row["status"] == "absent" and reason in row["reason"] and row["seconds"] is None
    output = capsys.readouterr()
    assert "absent: " in output.out and "Liger Triton" in output.out and " s left]" in output.err


def wrong(problem: Problem) -> Run:
    """The objective with a slope that nobody asked for."""
    hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden_TD, problem.weight_VD))

    def run() -> tuple[Tensor, ...]:
        logprob_T = contenders.dense_logprobs(hidden, weight, problem.target_T)
        rows = (problem.old_logprob_T, problem.ref_logprob_T, problem.advantage_T)
        loss = contenders.token_losses(logprob_T, *rows).mean() + 1e-3 * logprob_T.mean()
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return run


def not_a_number(problem: Problem) -> Run:
    result = tuple(x * torch.nan for x in wrong(problem)())
    return lambda: result


def raising(problem: Problem) -> Run:
    raise RuntimeError("no kernel image\nsecond line")


@pytest.mark.parametrize(
    ("prepare", "status", "reason"),
    [
        (wrong, "refused", "wrong result: an error is above 1e-05"),
        (not_a_number, "refused", "wrong result: an error is above 1e-05"),
        (raising, "failed", "RuntimeError: no kernel image"),
    ],
)
def test_who_computes_something_else_is_not_timed(prepare: Any, status: str, reason: str, problem: Problem) -> None:
    op = ops.linear_grpo_loss("cpu", [])
    op.contenders[:] = [op.contenders[0], Contender("other", prepare, CONTRACT)]
    ours, other, floor = ops.benchmark(op, problem, 1, None, lambda _: None)
    assert ours.status == floor.status == "measured"
    assert (other.status, other.reason) == (status, reason)
    assert other.seconds is other.ratio_to_ours is other.peak_extra_bytes is None and other.repetitions == []
    assert (status == "refused") == bool(other.errors)


def test_the_solution_is_the_objective_of_the_op(problem: Problem) -> None:
    """What is checked against is derived apart from the ops: dense logits, and the objective written out again."""
    hidden, weight = (x.double().requires_grad_() for x in (problem.hidden_TD, problem.weight_VD))
    logprob_T = (hidden @ weight.T).log_softmax(-1).gather(1, problem.target_T[:, None]).squeeze(1)
    row_inputs = (problem.old_logprob_T, problem.ref_logprob_T, problem.advantage_T, problem.weight_T)
    rows = [x_T.double() for x_T in row_inputs]
    arguments = objective_arguments(contenders.OBJECTIVE)
    loss, _ = policy_loss(logprob_T, rows[0], rows[1], rows[2], rows[3], problem.response_cu, *arguments)
    exact = exact_loss(problem)
    torch.testing.assert_close(exact_logprobs(problem), logprob_T.detach())
    torch.testing.assert_close(exact.loss, loss.detach(), rtol=1e-6, atol=1e-6 * float(exact.magnitude))
    for gradient, mine in zip(
        torch.autograd.grad(loss, (hidden, weight)), (exact.dhidden_TD, exact.dweight_VD), strict=True
    ):
        assert relative(mine, gradient) < 1e-6  # weight_T is rounded to fp32
    ratio_T = (logprob_T.detach() - problem.old_logprob_T).exp()
    assert ((ratio_T < 0.8) | (ratio_T > 1.2)).any(), "the data must reach the clip"


def test_padding_and_parts(problem: Problem) -> None:
    assert sum(problem.lengths) == SHAPE.T and len(set(problem.lengths)) > 1
    padded = problem.padded()
    assert padded.mask_SL.sum() == SHAPE.T and padded.hidden_SLD.shape[1] == max(problem.lengths)
    assert torch.equal(problem.packed(padded.hidden_SLD), problem.hidden_TD)
    part = problem.head(problem.lengths[0] + 1)
    assert part.lengths == problem.lengths[:2] and len(part.advantage_T) == part.shape.T == sum(part.lengths)
    assert ragged(3, 8, 0) == (1, 1, 1)


@pytest.mark.parametrize("megabytes", [1, 16])
def test_the_meter_reads_a_known_allocation(megabytes: int) -> None:
    """Two tensors alive at once, one freed before them, and the memory before the call left out."""
    size = megabytes * 2**20
    before = torch.empty(4 * size, dtype=torch.uint8)

    def run() -> Tensor:
        torch.empty(size // 2, dtype=torch.uint8)
        first = torch.empty(size, dtype=torch.uint8)
        second = first + before[:size]
        del first
        torch.empty(size // 2, dtype=torch.uint8)
        return second

    assert 2 * size <= peak_bytes(run, CPU) <= 2 * size + 2**16


@pytest.mark.parametrize("name", list(ops.OPS))
def test_our_memory_is_what_is_promised(name: str) -> None:
    """The workspace, the saved gradients and numbers per row; never T x V."""
    T, D, V, workspace = 2048, 8, 4099, 2**21
    op = ops.OPS[name]("cpu", [workspace])
    op.contenders[:] = [[c for c in op.contenders if c.name.startswith("ours")][-1]]
    ours, _ = ops.benchmark(op, make_problem(Shape(T, D, V), CPU, torch.float32), 1, 64, lambda _: None)
    assert ours.status == "measured" and ours.reason is None
    assert ours.checked_rows is not None and 64 <= ours.checked_rows < T
    assert ours.peak_extra_bytes is not None and ours.promised_extra_bytes is not None
    assert 0 < ours.peak_extra_bytes <= ours.promised_extra_bytes
    if name == "linear_grpo_loss":
        assert ours.promised_extra_bytes == workspace + 256 * T < 4 * T * V / 4


def test_a_broken_promise_is_told(problem: Problem) -> None:
    op = ops.linear_grpo_loss("cpu", [])
    op.contenders[:] = [replace(op.contenders[0], promise=lambda _: 1)]
    assert "takes more memory than" in (ops.benchmark(op, problem, 1, None, lambda _: None)[0].reason or "")


def test_turns_are_taken_and_ratios_are_of_pairs() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleaved(runs, 2, CPU, lambda _: None)
    assert "".join(order) == "abccba" and all(len(x) == 2 for x in times.values())
    # the machine was ten times slower in the last repetition
    assert ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == 2


def test_progress_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=4.0)
    progress.started -= 30
    progress.tick(3.0, "first")
    progress.tick(1.0, "second")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "[  0 %, time left unknown] first" and second == "[ 75 %, about 10 s left] second"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "12x3"], "a shape is TxDxV"),
        (["--shapes", "0x3x4"], "a shape is TxDxV"),
        pytest.param(
            ["--device", "cuda"],
            "use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ops.parse_arguments(arguments)
    assert message in capsys.readouterr().err
