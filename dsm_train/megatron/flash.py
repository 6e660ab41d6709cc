"""flash-attn's kernels as the core attention: `model.attention=flash`.

They know sequences, and no prompt that several share. So a response attends in two parts, to itself (causal) and to its
group's prompt (all of it), which their log-sum-exps join. Backwards each part is given the joint output and
log-sum-exp, and its gradients are its share of the sum (as in ring attention: Liu et al., arXiv 2310.01889).

N packed tokens, M rows that see a prompt, L prompt rows that are seen, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsm_train.config import ModelConfig
from dsm_train.types import offsets, spans
from triton_kernels import PackedLayout

INSTALL = "pip install --no-build-isolation '.[flash]'"


def core_attention(model: ModelConfig) -> str:
    """Name the core attention of training; raises `ValueError` when flash-attn is asked for and cannot serve."""
    if model.attention == "dsm":
        return "dsm packed_attention"
    obstacle = ""
    if not torch.cuda.is_available():
        obstacle = "a CUDA GPU, and there is none"
    elif model.dtype != "bf16":
        obstacle = f"model.dtype=bf16; got {model.dtype}"
    elif model.kv_channels % 8 or model.kv_channels > 256:
        obstacle = f"heads of a multiple of 8 up to 256; got {model.kv_channels}"
    elif not flash_version():
        obstacle = f"flash-attn 2.8 or later, and it is not installed: {INSTALL}"
    elif tuple(int(part) for part in flash_version().split(".")[:2]) < (2, 8):
        obstacle = f"flash-attn 2.8 or later; got {flash_version()}: {INSTALL}"
    if obstacle:
        raise ValueError(f"model.attention=flash needs {obstacle}; or set model.attention=dsm")
    return f"flash-attn {flash_version()}"


def flash_version() -> str:
    """Read the version of flash-attn; empty where it is not installed."""
    try:
        return metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return ""


class Kernels(NamedTuple):
    """flash-attn's functions over sequences of any length, with its signatures."""

    forward: Any
    backward: Any

    @staticmethod
    def installed() -> Kernels:
        """Import the functions of the package."""
        from flash_attn import flash_attn_interface as flash  # pyright: ignore[reportMissingImports]

        return Kernels(flash._flash_attn_varlen_forward, flash._flash_attn_varlen_backward)


@dataclass(frozen=True)
class Part:
    """One call of a kernel: sequences of queries, each with one of keys."""

    query_cu: Tensor
    """Offsets of the queries, int32."""
    key_cu: Tensor
    """Offsets of the keys, int32."""
    longest_query: int
    longest_key: int
    causal: bool
    query_M: Tensor | None = None
    """Rows of the buffer with queries; None: all."""
    key_L: Tensor | None = None
    """Rows of the buffer with keys; None: all."""

    def take(self, q_NHK: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select the rows of q, k and v that take part."""
        if self.query_M is None or self.key_L is None:
            return q_NHK.contiguous(), k.contiguous(), v.contiguous()
        return q_NHK[self.query_M], k[self.key_L], v[self.key_L]

    def arguments(self, scale: float) -> dict[str, Any]:
        """Arguments that forward and backward kernel share."""
        return {
            "cu_seqlens_q": self.query_cu,
            "cu_seqlens_k": self.key_cu,
            "max_seqlen_q": self.longest_query,
            "max_seqlen_k": self.longest_key,
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": self.causal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }


def parts_of(layout: PackedLayout) -> list[Part]:
    """List the calls of a layout: each segment by itself, and the responses of a group with their shared prompt."""
    device = layout.segments_N5.device
    start, end, prompt_start, prompt_end, _ = layout.segments_N5.cpu().long().unbind(1)
    own = _part((start, end), (start, end), device, own=True)
    sees = prompt_end > prompt_start
    if not bool(sees.any()):
        return [own]
    # The responses of a group are one range: from the start of the first to the end of the last.
    key_start, count = torch.unique_consecutive(prompt_start[sees], return_counts=True)
    last = count.cumsum(0) - 1
    first = last - count + 1
    queries = (start[sees][first], end[sees][last])
    return [own, _part(queries, (key_start, prompt_end[sees][first]), device, own=False)]


def _part(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], device: torch.device, *, own: bool) -> Part:
    """Build from (start, end) of the ranges; `own`: they are all of the buffer."""
    query_length, key_length = (end - start for start, end in (query, key))
    return Part(
        query_cu=offsets(query_length.tolist()).to(device),
        key_cu=offsets(key_length.tolist()).to(device),
        longest_query=int(query_length.max()),
        longest_key=int(key_length.max()),
        causal=own,
        query_M=None if own else spans(query[0], query_length).to(device),
        key_L=None if own else spans(key[0], key_length).to(device),
    )


@dataclass(frozen=True)
class FlashAttend:
    """Causal attention within each sequence of a packed buffer, by flash-attn."""

    layout: PackedLayout
    kernels: Kernels = field(default_factory=Kernels.installed)

    @cached_property
    def parts(self) -> list[Part]:
        """Kernel calls that the layout takes."""
        return parts_of(self.layout)

    def __call__(self, layer: int, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, scale: float) -> Tensor:
        return _Flash.apply(q_NHK, k_NHK, v_NHK, self, scale)


class _Flash(torch.autograd.Function):
    """Join the parts: o = sum_i o_i exp(lse_i - lse), with exp(lse) = sum_i exp(lse_i)."""

    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k: Tensor, v: Tensor, attend: FlashAttend, scale: float) -> Tensor:
        (own, *shared), kernel = attend.parts, attend.kernels.forward
        out, lse_HN, *_ = kernel(*own.take(q_NHK, k, v), **own.arguments(scale))
        for part in shared:
            part_out, part_lse_HM, *_ = kernel(*part.take(q_NHK, k, v), **part.arguments(scale))
            own_lse_HM = lse_HN[:, part.query_M]
            joint_HM = torch.logaddexp(own_lse_HM, part_lse_HM)
            lse_HN[:, part.query_M] = joint_HM
            own_share, part_share = ((x - joint_HM).exp().T[..., None] for x in (own_lse_HM, part_lse_HM))
            out[part.query_M] = (out[part.query_M] * own_share + part_out * part_share).to(out.dtype)
        ctx.save_for_backward(q_NHK, k, v, out, lse_HN)
        ctx.attend, ctx.scale = attend, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q_NHK, k, v, out, lse_HN = ctx.saved_tensors
        (own, *shared), kernel, scale = ctx.attend.parts, ctx.attend.kernels.backward, ctx.scale

        def gradients(part: Part, grad_out: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
            inputs = part.take(q_NHK, k, v)
            grads = [torch.empty_like(x) for x in inputs]
            names = dict(zip(("dq", "dk", "dv"), grads, strict=True))
            kernel(grad_out, *inputs, out, lse, **names, **part.arguments(scale), deterministic=True)
            return grads

        totals = gradients(own, grad_out.contiguous(), out, lse_HN)
        for part in shared:
            rows = part.query_M
            grads = gradients(part, grad_out[rows], out[rows], lse_HN[:, rows].contiguous())
            for total, grad, index in zip(totals, grads, (rows, part.key_L, part.key_L), strict=True):
                total[index] += grad  # no row is there twice
        return *totals, None, None
