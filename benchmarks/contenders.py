"""Contenders for the head: ours, plain PyTorch, and the peers, each in the form its authors recommend.

`prepare` brings the problem into the contender's form, untimed, and returns the function that is timed. It gives
(loss, dhidden, dweight) for the loss and (logprob_T,) for scoring. A padded dhidden is [S, L, D], one of single tokens
[T, 1, D].

T loss rows, S responses, L the longest response, V vocabulary, D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import Check, Contender, Op, Run
from benchmarks.measure import gemms, relative
from benchmarks.problem import CLIP, KL_COEF, Problem, Shape, exact_logprobs, exact_loss, token_losses
from triton_kernels import Objective, linear_grpo_loss, linear_logprob

OBJECTIVE = Objective(clip_low=CLIP, clip_high=CLIP, kl_coef=KL_COEF)
CONTRACT = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Largest error allowed to ours."""


def loss_op(shape: Shape, device: str, workspaces: list[int]) -> Op[Problem]:
    """Loss, dhidden and dweight, forward and backward."""

    def check(problem: Problem) -> Check:
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

    return Op(
        "linear_grpo_loss",
        loss_contenders(device, workspaces),
        flops=3 * shape.gemm_flops,
        check=check,
        rows_computed=lambda problem, result: result[1].numel() // problem.shape.D,
        floor=functools.partial(gemms, count=3),
    )


def scoring_op(shape: Shape, device: str) -> Op[Problem]:
    """Log-probabilities of the targets without gradients, as for the old and the reference model."""

    def check(problem: Problem) -> Check:
        exact_T = exact_logprobs(problem)
        return lambda result: {"logprob": float(((result[0].double() - exact_T).abs() / (1 + exact_T.abs())).max())}

    return Op(
        "linear_logprob",
        scoring_contenders(device),
        flops=shape.gemm_flops,
        check=check,
        rows_computed=lambda problem, _: problem.num_rows,
        floor=functools.partial(gemms, count=1),
    )


def promised_bytes(problem: Problem, workspace_bytes: int | None, gradients: bool) -> int:
    """Most bytes that ours may take beside inputs and results.

    The workspace and some numbers per row; for the loss also the gradients that the forward pass saved (the weight's in
    fp32), whose product with the upstream gradient are the results.
    """
    T, D, V = problem.shape.T, problem.shape.D, problem.shape.V
    if workspace_bytes is None:
        workspace_bytes = 2**26 if problem.device.type == "cpu" else 2**31
    size = problem.hidden_TD.element_size()
    saved, results = 4 * V * D + size * T * D, size * (V + T) * D
    return 256 * T + (max(workspace_bytes + saved - results, saved) if gradients else workspace_bytes)


def ours_name(workspace_bytes: int | None = None) -> str:
    return "ours" if workspace_bytes is None else f"ours, {workspace_bytes / 2**20:g} MiB"


def loss_contenders(device: str, workspaces: list[int]) -> list[Contender]:
    """Ours with the default workspace and with each of `workspaces`, then the others."""
    only_gpu = None if device == "cuda" else "its Triton kernels need a GPU"
    contenders = [
        Contender(
            ours_name(size),
            functools.partial(_ours_loss, workspace_bytes=size),
            CONTRACT,
            size,
            promise=functools.partial(promised_bytes, workspace_bytes=size, gradients=True),
        )
        for size in (None, *workspaces)
    ]
    contenders += [
        Contender("PyTorch, eager", functools.partial(_on_logprobs, logprobs=dense_logprobs)),
        Contender("PyTorch, compiled", _compiled_loss),
    ]
    for layout in ("padded", "unpadded"):
        for precision in ("highest", "high") if device == "cuda" else ("highest",):
            name = f"Liger fused linear GRPO, {layout}" + (", TF32" if precision == "high" else "")
            prepare = functools.partial(_liger_fused, layout=layout)
            contenders.append(Contender(name, with_precision(prepare, precision)))
    contenders.append(Contender("Liger Triton GRPO on logits", _liger_triton, absent=only_gpu))
    for name, options, reason in cce_forms(device):
        prepare = functools.partial(_on_logprobs, logprobs=functools.partial(_cce_logprobs, **options))
        contenders.append(Contender(name, prepare, absent=reason))
    return contenders


def scoring_contenders(device: str) -> list[Contender]:
    """Log-probabilities alone, without gradients; ours gives the entropies as well."""
    only_gpu = None if device == "cuda" else "its Triton kernels need a GPU"

    def scoring(logprobs: Callable[..., Tensor], compiled: bool = False) -> Callable[[Problem], Run]:
        return lambda problem: _scoring(problem, torch.compile(logprobs, dynamic=False) if compiled else logprobs)

    contenders = [
        Contender(
            "ours",
            scoring(lambda *args: linear_logprob(*args).logprob_T),
            {**CONTRACT, torch.bfloat16: 1e-5},
            promise=functools.partial(promised_bytes, workspace_bytes=None, gradients=False),
        ),
        Contender("PyTorch, eager", scoring(dense_logprobs)),
        Contender("PyTorch, compiled", scoring(dense_logprobs, compiled=True)),
        Contender("Liger chunked log-probabilities", scoring(_liger_logprobs)),
        Contender("Liger Triton on logits", _liger_triton_scoring, absent=only_gpu),
        Contender("TRL chunked log-probabilities", scoring(_trl_logprobs)),
    ]
    for name, options, reason in cce_forms(device, exact=False):
        contenders.append(Contender(name, scoring(functools.partial(_cce_logprobs, **options)), absent=reason))
    return contenders


def dense_logprobs(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Log-probabilities from all logits in the operands' type, softmax in fp32."""
    logits_TV = (hidden_TD @ weight_VD.T).float()
    return logits_TV.log_softmax(-1).gather(1, target_T[:, None]).squeeze(1)


def dense_loss(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *rows: Tensor) -> Tensor:
    return token_losses(dense_logprobs(hidden_TD, weight_VD, target_T), *rows).mean()


def with_precision(prepare: Callable[[Problem], Run], precision: str) -> Callable[[Problem], Run]:
    """Set the precision of a contender's fp32 GEMMs: "highest" (fp32) or "high" (TF32 if the GPU has it)."""

    def prepare_with(problem: Problem) -> Run:
        run = prepare(problem)

        def run_with() -> tuple[Tensor, ...]:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                return run()
            finally:
                torch.set_float32_matmul_precision(before)

        return run_with

    return prepare_with


def _leaves(*inputs: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs]


def _differentiated(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight_VD: Tensor) -> Run:
    inputs = _leaves(hidden, weight_VD)

    def run() -> tuple[Tensor, ...]:
        value = loss(inputs[0], inputs[1])
        return value.detach(), *torch.autograd.grad(value, inputs)

    return run


def _ours_loss(problem: Problem, workspace_bytes: int | None) -> Run:
    p = problem
    rows = (p.target_T, p.old_logprob_T, p.ref_logprob_T, p.advantage_T, p.weight_T, p.response_cu)
    return _differentiated(
        lambda hidden, weight: linear_grpo_loss(hidden, weight, *rows, OBJECTIVE, workspace_bytes=workspace_bytes).loss,
        p.hidden_TD,
        p.weight_VD,
    )


def _on_logprobs(problem: Problem, logprobs: Callable[..., Tensor]) -> Run:
    """An op for log-probabilities, then the plain objective."""
    p, advantage_T = problem, problem.advantage_T
    return _differentiated(
        lambda hidden, weight: token_losses(
            logprobs(hidden, weight, p.target_T), p.old_logprob_T, p.ref_logprob_T, advantage_T
        ).mean(),
        p.hidden_TD,
        p.weight_VD,
    )


def _compiled_loss(problem: Problem) -> Run:
    p = problem
    rows = (p.target_T, p.old_logprob_T, p.ref_logprob_T, p.advantage_T)
    compiled = torch.compile(dense_loss, dynamic=False)
    return _differentiated(lambda hidden, weight: compiled(hidden, weight, *rows), p.hidden_TD, p.weight_VD)


def _liger_fused(problem: Problem, layout: str) -> Run:
    """Padded is how it is meant. Unpadded: every token a response of its own, in chunks of the 2048 that it computes at
    once, which a mean over tokens allows: the form in which it does the least work."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

    x, advantage_S, chunk_size = problem.padded(), problem.advantage_S, 1
    rows = (x.target_SL, x.mask_SL, x.ref_logprob_SL, x.old_logprob_SL)
    hidden_SLD = x.hidden_SLD
    if layout == "unpadded":
        p = problem
        rows = tuple(x[:, None] for x in (p.target_T, torch.ones_like(p.weight_T), p.ref_logprob_T, p.old_logprob_T))
        hidden_SLD, advantage_S, chunk_size = p.hidden_TD[:, None], p.advantage_T, 2048
    target_SL, mask_SL, ref_SL, old_SL = rows
    op = LigerFusedLinearGRPOLoss(
        beta=KL_COEF, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo", temperature=1.0, chunk_size=chunk_size
    )
    return _differentiated(
        lambda hidden, weight: op(
            hidden, weight, target_SL, mask_SL, advantage_S, ref_per_token_logps=ref_SL, old_per_token_logps=old_SL
        )[0],
        hidden_SLD,
        problem.weight_VD,
    )


def _liger_triton(problem: Problem) -> Run:
    """Liger's loss on logits of L + 1 positions, as a model gives them; it leaves the last one out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss  # pyright: ignore[reportMissingImports]

    x = problem.padded()
    hidden_SLD = torch.nn.functional.pad(x.hidden_SLD, (0, 0, 0, 1))
    options: dict[str, Any] = {"temperature": 1.0, "beta": KL_COEF, "eps_low": CLIP, "eps_high": CLIP}
    return _differentiated(
        lambda hidden, weight: triton_grpo_loss(
            hidden @ weight.T,
            x.old_logprob_SL,
            x.ref_logprob_SL,
            x.target_SL,
            problem.advantage_S,
            x.mask_SL,
            loss_type="dapo",
            reduce=True,
            **options,
        )[0],
        hidden_SLD,
        problem.weight_VD,
    )


def cce_forms(device: str, exact: bool = True) -> list[tuple[str, dict[str, Any], str | None]]:
    """(name, options, why not) of cut-cross-entropy: its kernels, with and without leaving out small gradients, and
    the form it has where they do not run."""
    if device != "cuda":
        return [
            ("cut-cross-entropy", {}, "its Triton kernels need a GPU"),
            ("cut-cross-entropy, torch_compile", {"impl": "torch_compile"}, None),
        ]
    forms: list[tuple[str, dict[str, Any], str | None]] = [("cut-cross-entropy", {}, None)]
    return forms + [("cut-cross-entropy, no filter", {"filter_eps": None}, None)] * exact


def _cce_logprobs(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, **options: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return -linear_cross_entropy(hidden_TD, weight_VD, target_T, reduction="none", **options)


def _scoring(problem: Problem, logprobs: Callable[..., Tensor]) -> Run:
    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        return (logprobs(problem.hidden_TD, problem.weight_VD, problem.target_T),)

    return run


def _liger_logprobs(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase  # pyright: ignore[reportMissingImports]

    return LigerFusedLinearPPOBase.chunk_forward(hidden_TD[None], weight_VD, target_T[None])[0]


def _trl_logprobs(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]

    return ChunkedLogProbFunction.apply(hidden_TD, weight_VD, None, target_T, 1.0, 8192, None, 1.0, ())[0]


def _liger_triton_scoring(problem: Problem) -> Run:
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax  # pyright: ignore[reportMissingImports]

    # It reads L + 1 positions of one response and leaves the last out.
    hidden_TD = torch.nn.functional.pad(problem.hidden_TD, (0, 0, 0, 1))

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        logits_TV = hidden_TD @ problem.weight_VD.T
        return (fused_selective_log_softmax(logits_TV[None], problem.target_T[None], temperature=1.0)[0],)

    return run
