"""Softmax statistics of a chunk's logits, as they come out of the GEMM, and the gradient by these logits.

z = logits + bias;  z = softcap tanh(z / softcap);  s = z / temperature

C rows of a chunk, V vocabulary or this rank's shard of it, R ranks that split it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels._register import REFERENCE, Variant, custom_op, implementation, register_triton
from triton_kernels.head.logit_kernels import (
    BLOCK_V,
    LOG_ZERO,
    LOGIT_OPTIONS,
    logit_gradient_kernel,
    logit_stats_kernel,
)


def logit_stats_reference(
    logits_CV: Tensor, target_C: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """[4, C]: max of s, sum exp(s - max), s[target], sum exp(s - max) (s - max).

    s[target] is -inf where the target is not in 0..V - 1: it is another shard's. A row without tokens (V is 0, or a
    bias of -inf removed all) has the maximum -inf and sums of 0.
    """
    C, V = logits_CV.shape
    stats_4C = logits_CV.new_empty(4, C)
    if V == 0:
        stats_4C[0::2], stats_4C[1::2] = -torch.inf, 0
        return stats_4C
    s_CV = scaled(logits_CV, bias_V, temperature, softcap)
    max_C = s_CV.amax(-1)
    id_C, here_C = in_shard(target_C, V)
    target_C = s_CV.gather(1, id_C[:, None]).squeeze(1).masked_fill(~here_C, -torch.inf)
    # A bias can remove the whole shard: -inf - (-inf) would be NaN.
    s_CV.sub_(max_C.masked_fill(max_C == -torch.inf, 0)[:, None])
    p_CV = s_CV.exp()
    sum_C = p_CV.sum(-1)
    weighted_C = p_CV.mul_(s_CV.clamp_(min=LOG_ZERO)).sum(-1)
    return torch.stack([max_C, sum_C, target_C, weighted_C], out=stats_4C)


def logit_gradient_reference(
    out_CV: Tensor,
    logits_CV: Tensor,
    target_C: Tensor,
    bias_V: Tensor | None,
    g_C: Tensor,
    h_C: Tensor | None,
    entropy_C: Tensor,
    max_C: Tensor,
    log_sum_C: Tensor,
    temperature: float,
    softcap: float | None,
) -> None:
    """out = the gradient, by `logits_CV`, of sum_c g_c log p_c(target) + h_c entropy_c.

    ds_v = g (1[v = target] - p_v) - h p_v (log p_v + entropy). `out_CV` may be the memory of the logits, in a narrower
    type: see `reinterpreted`. Entropy, max and log_sum are of the whole vocabulary.
    """
    C, V = logits_CV.shape
    if V == 0:
        return
    s_CV = scaled(logits_CV, bias_V, temperature, softcap)
    slope_CV = None if softcap is None else 1 - (s_CV * (temperature / softcap)) ** 2
    log_p_CV = s_CV.sub_(max_C[:, None]).sub_(log_sum_C[:, None]).clamp_(min=LOG_ZERO)
    p_CV = log_p_CV.exp()
    if h_C is None:
        ds_CV = p_CV.mul_(-g_C[:, None])
    else:
        ds_CV = log_p_CV.add_(entropy_C[:, None]).mul_(h_C[:, None]).add_(g_C[:, None]).mul_(p_CV).neg_()
    id_C, here_C = in_shard(target_C, V)
    ds_CV.scatter_add_(1, id_C[:, None], g_C.masked_fill(~here_C, 0)[:, None])
    if slope_CV is not None:
        ds_CV.mul_(slope_CV)
    out_CV.copy_(ds_CV.div_(temperature))


def scaled(logits_CV: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """The scaled logits s, as a new tensor."""
    z_CV = logits_CV if bias_V is None else logits_CV + bias_V
    if softcap is not None:
        z_CV = (z_CV / softcap).tanh_().mul_(softcap)
    return z_CV / temperature


def in_shard(local_target_T: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Map targets to (an id of this shard for every row, True where it is the row's target)."""
    id_T = local_target_T.long().clamp(0, V - 1)
    return id_T, id_T == local_target_T


def reinterpreted(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of fp32 logits as a matrix of `dtype`: [C, V], each row at the start of its logits' row."""
    return logits_CV if dtype == logits_CV.dtype else logits_CV.view(dtype)[:, : logits_CV.shape[1]]


def logits_held(hidden: Tensor) -> int:
    """Number of tensors of the logits' size that their ops hold at once, the logits included."""
    kernels = all(implementation(op, hidden.device.type) != REFERENCE for op in ("logit_stats", "logit_gradient"))
    return 1 if kernels and hidden.dtype != torch.float64 else 4


def merge(stats_R4T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob_T, entropy_T, max_T, log_sum_T) of the whole vocabulary, with lse = max + log_sum, from its shards'.

    max and log_sum stay apart: with logits of 1e4 their fp32 sum would lose the digits of log_sum.
    """
    max_RT, sum_RT, target_RT, weighted_RT = stats_R4T.unbind(1)
    max_T = max_RT.amax(0)
    shift_RT = (max_RT - max_T).clamp(min=LOG_ZERO)  # a shard without tokens has the maximum -inf
    scale_RT = shift_RT.exp()
    sum_T = (scale_RT * sum_RT).sum(0)
    log_sum_T = sum_T.log()
    # On all ranks but the target's owner its logit is -inf.
    logprob_T = target_RT.amax(0) - max_T - log_sum_T
    entropy_T = log_sum_T - (scale_RT * (weighted_RT + shift_RT * sum_RT)).sum(0) / sum_T
    return logprob_T, entropy_T, max_T, log_sum_T


def _logit_stats_triton(
    logits_CV: Tensor, target_C: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    if logits_CV.dtype == torch.float64:
        return logit_stats_reference(logits_CV, target_C, bias_V, temperature, softcap)
    C, V = logits_CV.shape
    stats_4C = logits_CV.new_empty(4, C)
    if C:
        logit_stats_kernel[(C,)](
            logits_CV, target_C.contiguous(), None if bias_V is None else bias_V.contiguous(), stats_4C,
            V, logits_CV.stride(0), C, softcap or 0.0, 1.0 / temperature,
            HAS_SOFTCAP=softcap is not None, BLOCK_V=BLOCK_V, **LOGIT_OPTIONS,
        )  # fmt: skip
    return stats_4C


def _logit_gradient_triton(
    out_CV: Tensor,
    logits_CV: Tensor,
    target_C: Tensor,
    bias_V: Tensor | None,
    g_C: Tensor,
    h_C: Tensor | None,
    entropy_C: Tensor,
    max_C: Tensor,
    log_sum_C: Tensor,
    temperature: float,
    softcap: float | None,
) -> None:
    rows = (g_C, h_C, entropy_C, max_C, log_sum_C)
    if logits_CV.dtype == torch.float64:
        return logit_gradient_reference(out_CV, logits_CV, target_C, bias_V, *rows, temperature, softcap)
    C, V = logits_CV.shape
    if C and V:
        contiguous = (None if x is None else x.contiguous() for x in (target_C, bias_V, *rows))
        logit_gradient_kernel[(C,)](
            out_CV, logits_CV, *contiguous, V, out_CV.stride(0), logits_CV.stride(0), softcap or 0.0,
            1.0 / temperature, HAS_SOFTCAP=softcap is not None, BLOCK_V=BLOCK_V, **LOGIT_OPTIONS,
        )  # fmt: skip
    return None


logit_stats = custom_op("logit_stats", logit_stats_reference)
logit_stats.register_fake(lambda logits_CV, *_: logits_CV.new_empty(4, logits_CV.shape[0]))
register_triton(logit_stats, _logit_stats_triton)

logit_gradient = custom_op("logit_gradient", logit_gradient_reference, mutates=("out_CV",))
register_triton(logit_gradient, _logit_gradient_triton)


def variants() -> list[Variant]:
    """The kernels these ops launch."""
    rows = ("g_ptr", "h_ptr", "entropy_ptr", "max_ptr", "log_sum_ptr")
    common = {"logits_ptr": "*fp32", "target_ptr": "*i64", "bias_ptr": "*fp32", "V": "i32", "stride": "i32"}
    common |= {"softcap": "fp32", "inverse_temperature": "fp32"}
    stats = common | {"stats_ptr": "*fp32", "stats_stride": "i32"}
    gradient = common | dict.fromkeys(rows, "*fp32") | {"out_stride": "i32"}
    plain = {"HAS_SOFTCAP": False, "BLOCK_V": BLOCK_V, "bias_ptr": None}
    everything = {"HAS_SOFTCAP": True, "BLOCK_V": BLOCK_V}
    return [
        Variant(logit_stats_kernel, stats, plain, LOGIT_OPTIONS, ("stride",)),
        Variant(logit_stats_kernel, stats, everything, LOGIT_OPTIONS, ("stride",)),
        *(
            Variant(logit_gradient_kernel, gradient | {"out_ptr": out}, branch, LOGIT_OPTIONS, ("stride", "out_stride"))
            for out, branch in (("*bf16", plain | {"h_ptr": None}), ("*bf16", everything), ("*fp32", everything))
        ),
    ]
