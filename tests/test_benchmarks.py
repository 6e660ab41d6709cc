"""The benchmarks: a run from the command line to its rows, what is refused, and the meters.

T loss rows or packed tokens, S responses, L the longest, D hidden, V vocabulary, H heads, K their size.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from benchmarks import attention_contenders, contenders, ops, report
from benchmarks.attention import AttentionProblem, Heads, Packing, exact_attention, make_attention
from benchmarks.compare import Contender, Op, Row, Run, benchmark
from benchmarks.contenders import CONTRACT
from benchmarks.measure import Progress, interleaved, named_peak, peak_bytes, ratio, relative
from benchmarks.problem import Problem, Shape, exact_logprobs, exact_loss, make_problem, ragged
from triton_kernels.policy.grpo_loss import objective_arguments, policy_loss

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
        monkeypatch.setitem(sys.modules, name, None)
    yield


def measured(op: Op[Any], problem: Any, repetitions: int = 1, check_rows: int | None = None) -> list[Row]:
    return benchmark([op], "a shape", problem, repetitions, check_rows, lambda *_: None)


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By op and contender."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["op"], row["contender"]): row for row in rows}


def test_from_the_command_line_to_rows_and_plot(
    cheap: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--shapes", str(SHAPE), "--device", "cpu", "--repetitions", "2", "--workspaces", "1"]
    path = ops.main([*arguments, "--op", *ops.HEAD_OPS, "--out", str(tmp_path)])
    by_name = rows_of(path)
    assert path.with_suffix(".png").stat().st_size > 0
    for row in by_name.values():
        assert row["op"] in ops.HEAD_OPS and row["shape"] == "40x8x65" and row["dtype"] == "float32"
        assert row["device"] and row["date"] and row["threads"] == torch.get_num_threads()
        assert row["versions"]["torch"] == torch.__version__ and "liger-kernel" in row["versions"]
        assert row["served_by"]["grpo_loss"] and row["memory_meter"] and row["clock"]
    for name in ("ours", "ours, 1 MiB", "PyTorch, eager", "PyTorch, compiled"):
        row = by_name["linear_grpo_loss", name]
        assert row["status"] == "measured" and row["reason"] is None
        assert len(row["repetitions"]) == 2 and min(row["seconds"], row["floor_share"], row["ratio_to_ours"]) > 0
        assert row["tflops"] == pytest.approx(3 * 2 * 40 * 8 * 65 / row["seconds"] / 1e12)
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


def test_quick_says_that_its_times_mean_nothing_and_leaves_the_results_alone(
    cheap: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--device", "cpu", "--op", "linear_logprob", "--contenders", "ours", "--deviation", "4"]
    path = ops.main(arguments)
    assert report.RESULTS not in path.parents and "nothing about speed" in capsys.readouterr().out
    assert rows_of(path)["linear_logprob", "ours"]["deviation"] == 4


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
    op = contenders.loss_op(SHAPE, "cpu", [])
    op.contenders[:] = [op.contenders[0], Contender("other", prepare, CONTRACT)]
    ours, other, floor = measured(op, problem)
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


@pytest.mark.parametrize("name", ops.HEAD_OPS)
def test_our_memory_is_what_is_promised(name: str) -> None:
    """The workspace, the saved gradients and numbers per row; never T x V."""
    T, D, V, workspace = 2048, 8, 4099, 2**21
    shape = Shape(T, D, V)
    is_loss = name == "linear_grpo_loss"
    op = contenders.loss_op(shape, "cpu", [workspace]) if is_loss else contenders.scoring_op(shape, "cpu")
    op.contenders[:] = [[c for c in op.contenders if c.name.startswith("ours")][-1]]
    ours, _ = measured(op, make_problem(shape, CPU, torch.float32), check_rows=64)
    assert ours.status == "measured" and ours.reason is None
    assert ours.checked_rows is not None and 64 <= ours.checked_rows < T
    assert ours.peak_extra_bytes is not None and ours.promised_extra_bytes is not None
    assert 0 < ours.peak_extra_bytes <= ours.promised_extra_bytes
    if is_loss:
        assert ours.promised_extra_bytes == workspace + 256 * T < 4 * T * V / 4


def test_a_broken_promise_is_told(problem: Problem) -> None:
    op = contenders.loss_op(SHAPE, "cpu", [])
    op.contenders[:] = [replace(op.contenders[0], promise=lambda _: 1)]
    assert "takes more memory than" in (measured(op, problem)[0].reason or "")


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


SHARED = Packing("two groups and a sequence", ((5, (3, 7)), (4, ()), (2, (1, 1))))
HEADS = Heads(4, 2, 8, 6)


@pytest.fixture(scope="module")
def shared() -> AttentionProblem:
    return make_attention(HEADS, SHARED, CPU, torch.float32)


def dense(q_THK: Tensor, k: Tensor, v: Tensor, visible_TT: Tensor) -> Tensor:
    """By a mask of T x T."""
    k, v = (x.repeat_interleave(q_THK.shape[1] // k.shape[1], 1) for x in (k, v))
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k) / math.sqrt(q_THK.shape[2])
    return torch.einsum("hts,shv->thv", scores_HTT.masked_fill(~visible_TT, -torch.inf).softmax(-1), v)


def test_the_solution_of_attention_is_that_of_a_dense_mask(
    shared: AttentionProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is written out pair by pair; the solution is made of chunks of one and of two queries."""
    monkeypatch.setattr("benchmarks.attention._CHUNK_BYTES", 8 * HEADS.H * 6 * 2)
    owner = "aaaaabbbcccccccddddeefg"  # prompt a with b and c, d alone, prompt e with f and g
    sees = {"b": "ab", "c": "ac", "f": "ef", "g": "eg"}
    T = range(len(owner))
    visible_TT = torch.tensor([[s <= t and owner[s] in sees.get(owner[t], owner[t]) for s in T] for t in T])
    q_THK, k, v, upstream = (x.double().requires_grad_() for x in shared.tensors)
    out = dense(q_THK, k, v, visible_TT)
    right = (out.detach(), *torch.autograd.grad(out, (q_THK, k, v), upstream))
    for mine, x in zip(exact_attention(shared), right, strict=True):
        torch.testing.assert_close(mine, x)
    assert SHARED.pairs == int(visible_TT.sum()) and SHARED.num_tokens == len(T)


def test_layouts_are_read() -> None:
    assert Packing.parse("3x7").groups == ((7, ()),) * 3
    assert Packing.parse("groups:12x3x20x2").groups == ((12, (20, 20, 20)),) * 2
    assert Packing.parse("groups:12x3x20").groups == ((12, (20, 20, 20)),)
    mixed = Packing.parse("mixed:4-64:1000")
    *lengths, last = (length for length, _ in mixed.groups)
    assert sum(lengths) + last == mixed.num_tokens == 1000 and 4 <= min(lengths) and max(lengths) <= 64
    assert sum(length < 16 for length in lengths) > len(lengths) / 3  # of 4 and 64 16 is the geometric mean
    assert str(Heads.parse("32/8x128")) == "32/8x128" and str(Heads(16, 16, 192, 128)) == "16/16x192/128"
    assert Heads.parse("16/16x192/128") == Heads(16, 16, 192, 128)


def test_attention_from_the_command_line(cheap: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU all but flash-attn compute the same; what padding and repeated prompts add counts as time alone."""
    arguments = ["--layouts", "groups:5x3x4x2", "--heads", "4/2x16/32", "--device", "cpu", "--repetitions", "2"]
    path = ops.main([*arguments, "--op", "packed_attention", "layout", "--out", str(tmp_path)])
    by_name = rows_of(path)
    assert path.name.startswith("packed_attention-layout-") and {row["tokens"] for row in by_name.values()} == {34}
    pairs = 2 * (15 + 3 * (10 + 20))
    for op, names, flops in (
        ("packed_attention_forward", ["out"], 2 * pairs * 4 * (16 + 32)),
        ("packed_attention", ["out", "dq", "dk", "dv"], 2 * pairs * 4 * (4 * 16 + 3 * 32)),
    ):
        sharing = ["ours", "SDPA per segment", "flex, tree mask", "flex, new tree mask"]
        copying = ["ours", "SDPA per sequence", "SDPA, padded", "flex, document mask"]
        for name in sharing + [name + ", repeated" for name in copying]:
            row = by_name[op, name]
            if "flex" in name and op == "packed_attention":
                assert "no backward" in row["reason"]
                continue
            assert row["status"] == "measured" and row["rows_computed"] == (34 if name in sharing else 54), name
            assert list(row["errors"]) == names and max(row["errors"].values()) < 1e-5
            assert row["tflops"] == pytest.approx(flops / row["seconds"] / 1e12) and row["peak_share"] is None
        assert "need a GPU" in by_name[op, "varlen_attn of PyTorch, repeated"]["reason"]
    assert by_name["layout", "flex, tree mask"]["status"] == "measured" and "TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [(1, 1.01, 1, 1), (1, 1, 1, 0), (torch.nan, 1, 1, 1)])
def test_wrong_attention_is_refused(shared: AttentionProblem, factor: tuple[float, ...]) -> None:
    _, whole, _ = attention_contenders.attention_ops(HEADS, SHARED, "cpu")
    ours = whole.contenders[0]

    def prepare(problem: AttentionProblem) -> Run:
        run = ours.prepare(problem)
        return lambda: tuple(x * f for x, f in zip(run(), factor, strict=True))

    whole.contenders[:] = [ours, Contender("other", prepare)]
    rows = measured(whole, shared, check_rows=16)  # the first two groups have 15 and 4
    assert [(row.status, row.checked_rows) for row in rows] == [("measured", 19), ("refused", 19)]


def test_padding_and_copies_have_no_gradient(shared: AttentionProblem) -> None:
    """Each packed row has its upstream gradient once, in every form."""
    for form in (shared.repeated, shared.padded):
        assert form.upstream.sum() == pytest.approx(float(shared.upstream.sum()), rel=1e-4)
        assert (form.upstream.flatten(-2).abs().sum(-1) > 0).sum() == SHARED.num_tokens
    assert shared.repeated.lengths == [8, 12, 4, 3, 3] and shared.padded.q.shape == (5, 12, 4, 8)


def stand_in(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    """What flash-attn computes, where it does not run."""
    assert cu.dtype == torch.int32 and longest == int(cu.diff().max()) and int(cu[-1]) == len(q)
    rows = [slice(start, end) for start, end in itertools.pairwise(cu.tolist())]
    return torch.cat([dense(q[r], k[r], v[r], torch.ones(len(q[r]), len(q[r])).tril() > 0) for r in rows])


@pytest.mark.parametrize("name", ["varlen_attn of PyTorch", "flash-attn 2", "flash-attn 3, deterministic"])
def test_how_flash_attention_is_called(name: str, shared: AttentionProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU: here a function with its parameters, or with those that PyTorch's own has, stands in."""
    signature = inspect.signature(varlen.varlen_attn)

    @functools.wraps(varlen.varlen_attn)
    def varlen_attn(*args: Any, **options: Any) -> Tensor:
        bound = signature.bind(*args, **options).arguments
        assert bound["window_size"] == (-1, 0) and bound.get("enable_gqa", True)  # which PyTorch 2.11 does not know
        return stand_in(*(bound[x] for x in ("query", "key", "value", "cu_seq_q", "max_q")))

    def flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **o: Any) -> Any:
        assert o == {"causal": True, "deterministic": "deterministic" in name} and max_k == max_q and cu_q is cu_k
        out = stand_in(q, k, v, cu_q, max_q)
        return (out, None) if "3" in name else out

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    module = "flash_attn_interface" if "3" in name else "flash_attn"
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(flash_attn_varlen_func=flash))
    _, whole, _ = attention_contenders.attention_ops(HEADS, SHARED, "cuda")
    whole.contenders[:] = [c for c in whole.contenders if c.name == name + ", repeated"]
    (row,) = measured(whole, shared)
    assert row.status == "measured" and list(row.errors) == ["out", "dq", "dk", "dv"]


@pytest.mark.gpu
def test_attention_on_a_gpu(tmp_path: Path) -> None:
    """Compiled flex and PyTorch's FlashAttention take part."""
    arguments = ["--quick", "--layouts", "mixed:20-300:1000", "groups:70x3x40x2", "--heads", "4/2x64"]
    by_name = rows_of(ops.main([*arguments, "--op", "packed_attention", "layout", "--out", str(tmp_path)]))
    for (op, name), row in by_name.items():
        if op != "packed_attention_backward" and not name.startswith("flash-attn"):
            assert row["status"] == "measured", (op, name, row["reason"])


def test_the_time_of_the_backward_pass_is_a_difference(
    shared: AttentionProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.measure.seconds", lambda run, _: float(run()[0]))
    made = attention_contenders.attention_ops(HEADS, SHARED, "cpu")
    for op, times in zip(made, ({"ours": 2.0, "other": 4.0}, {"ours": 5.0, "other": 4.0}, {}), strict=True):
        op.contenders[:] = [Contender(name, lambda _, x=x: lambda: (torch.tensor(x),)) for name, x in times.items()]
    *_, ours, other = benchmark([replace(op, check=lambda _: lambda _: {}) for op in made], "", shared, 2, None, print)
    assert (ours.op, ours.status, ours.seconds) == ("packed_attention_backward", "measured", 3.0)
    assert ours.tflops == pytest.approx(2 * SHARED.pairs * 4 * (3 * 8 + 2 * 6) / 3 / 1e12)
    assert other.seconds is None and "lost in the noise" in (other.reason or "")


@pytest.mark.parametrize(
    ("peak", "names"),
    [
        (989.5e12, ["NVIDIA H200", "NVIDIA H100 80GB HBM3"]),
        (312e12, ["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"]),
        (None, ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090"]),
    ],
)
def test_peaks_of_devices(peak: float | None, names: list[str]) -> None:
    """The H100 PCIe has fewer multiprocessors than the one of the table, MIG cuts one into parts."""
    assert {named_peak(name) for name in names} == {peak}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "12x3"], "a shape is TxDxV"),
        (["--shapes", "0x3x4"], "a shape is TxDxV"),
        (["--heads", "6/4x8"], "--heads: heads are query heads / key heads x size"),
        (["--heads", "4/0x8"], "got '4/0x8'"),
        (["--layouts", "8x0"], "--layouts: a layout is"),
        (["--layouts", "mixed:9-8:100"], "got 'mixed:9-8:100'"),
        (["--layouts", "groups:4x5"], "got 'groups:4x5'"),
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
