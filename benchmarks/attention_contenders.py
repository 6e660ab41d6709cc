"""Contenders for attention: ours, PyTorch's own, flash-attn; each in the form its authors recommend.

T packed tokens, H query heads, J key heads, K head size, V head size of the values, S sequences, L the longest one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import AttentionProblem, Form, Heads, Packing, check
from benchmarks.compare import SAME_PROBLEM, Contender, Op, Run
from triton_kernels import packed_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

CONTRACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest error allowed to ours."""
_TILES = (128, 64)
"""Tile of queries and keys whose work tables are timed: that of head size 128 on a Hopper GPU."""


def attention_ops(heads: Heads, packing: Packing, device: str) -> list[Op[AttentionProblem]]:
    """Ops of attention: forward without gradients, forward and backward, their difference.

    FLOPs count pairs that see each other, with a prompt stored once."""
    per_width = 2.0 * packing.pairs * heads.H
    forward, backward = per_width * (heads.K + heads.V), per_width * (3 * heads.K + 2 * heads.V)

    def op(name: str, flops: float, contenders: list[Contender[AttentionProblem]], **rest: Any) -> Op[AttentionProblem]:
        return Op(name, contenders, flops, check, lambda _, result: result[0].numel() // (heads.H * heads.V), **rest)

    both = _contenders(device, packing.shares_prompts, is_training=True)
    return [
        op("packed_attention_forward", forward, _contenders(device, packing.shares_prompts, is_training=False)),
        op("packed_attention", forward + backward, both),
        op("packed_attention_backward", backward, [], difference=("packed_attention", "packed_attention_forward")),
    ]


def layout_op(packing: Packing, device: str) -> Op[AttentionProblem]:
    """Op that makes, from the lengths, the structure needed once per batch: a layout or a block mask."""

    def ours(problem: AttentionProblem) -> Run:
        make = problem.packing.layout(problem.device)

        def run() -> tuple[Tensor, ...]:
            layout = make()
            queries, keys = _TILES
            forward, dq = layout.query_tiles(queries, None), layout.query_tiles(keys, None)
            backward = layout.key_tiles(queries, keys, problem.k.shape[1], None)
            return layout.positions_T, forward, dq, backward.items_I5, backward.sums_M4

        return run

    def mask(form: Callable[[AttentionProblem], Form]) -> Callable[[AttentionProblem], Run]:
        def prepare(problem: AttentionProblem) -> Run:
            build = _flex_mask(form(problem))
            return lambda: tuple(x for x in build().as_tuple() if isinstance(x, Tensor))

        return prepare

    contenders = [Contender("ours", ours), Contender("flex, document mask", mask(operator.attrgetter("repeated")))]
    if packing.shares_prompts:
        contenders.append(Contender("flex, tree mask", mask(operator.attrgetter("packed"))))
    return Op("layout", contenders, 0.0, lambda _: lambda _: {}, lambda problem, _: problem.num_rows)


def _contenders(device: str, shares_prompts: bool, is_training: bool) -> list[Contender[AttentionProblem]]:
    """Contenders for one pass; with shared prompts, those that cannot share them have "repeated" in their names."""
    packed, repeated, padded = (operator.attrgetter(name) for name in ("packed", "repeated", "padded"))
    no_gpu = None if device == "cuda" else "its kernels need a GPU"
    no_backward = "flex_attention has no backward pass on a CPU" if is_training and device == "cpu" else None
    contenders: list[Contender[AttentionProblem]] = []

    def add(
        name: str,
        form: Callable[[AttentionProblem], Form],
        attend: Callable[[Form], Attend],
        absent: str | None = None,
        allowed: dict[torch.dtype, float] = SAME_PROBLEM,
    ) -> None:
        if shares_prompts and form is not packed:
            name += ", repeated"
        prepare = functools.partial(_prepare, form=form, attend=attend, is_training=is_training)
        contenders.append(Contender(name, prepare, allowed, absent=absent))

    add("ours", packed, _ours, allowed=CONTRACT)
    if shares_prompts:
        add("ours", repeated, _ours, allowed=CONTRACT)
        add("SDPA per segment", packed, _sdpa_segments)
    add("SDPA per sequence", repeated, _sdpa_sequences)
    add("SDPA, padded", padded, lambda _: _sdpa)
    add("varlen_attn of PyTorch", repeated, _varlen, no_gpu)
    masks = [("document", repeated)] + [("tree", packed)] * shares_prompts
    for name, form in masks:
        add(f"flex, {name} mask", form, _flex, no_backward)
        add(f"flex, new {name} mask", form, functools.partial(_flex, is_made_anew=True), no_backward)
    for version, module in ((2, "flash_attn"), (3, "flash_attn_interface")):
        for deterministic in (False, True):
            name = f"flash-attn {version}" + ", deterministic" * deterministic
            add(name, repeated, functools.partial(_flash, module=module, deterministic=deterministic), no_gpu)
    return contenders


def _prepare(
    problem: AttentionProblem,
    form: Callable[[AttentionProblem], Form],
    attend: Callable[[Form], Attend],
    is_training: bool,
) -> Run:
    """(out,) or, with the gradients, (out, dq, dk, dv)."""
    own = form(problem)
    op, inputs = attend(own), [own.q, own.k, own.v]
    if not is_training:

        @torch.no_grad()
        def forward() -> tuple[Tensor, ...]:
            return (op(*inputs),)

        return forward
    inputs = [x.detach().requires_grad_() for x in inputs]

    def run() -> tuple[Tensor, ...]:
        out = op(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, own.upstream)

    return run


def _ours(form: Form) -> Attend:
    return functools.partial(packed_attention, layout=form.packing.layout(form.q.device)())


def _sdpa(q_SLHK: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Causal, unless there is a mask."""
    q, k, v = (x.transpose(1, 2) for x in (q_SLHK, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
    ).transpose(1, 2)


def _sdpa_sequences(form: Form) -> Attend:
    """Attention by one call per sequence."""

    def attend(*inputs: Tensor) -> Tensor:
        sequences = zip(*(x.split(form.lengths) for x in inputs), strict=True)
        return torch.cat([_sdpa(*(x[None] for x in sequence))[0] for sequence in sequences])

    return attend


def _sdpa_segments(form: Form) -> Attend:
    """Attention by one call per prompt and one per response, whose keys and values follow a copy of the prompt's."""
    from torch.nn.attention.bias import causal_lower_right

    segments = []
    for rows, prompt in form.packing.segments():
        sizes, mask = (len(rows), len(prompt) + len(rows)), None
        if prompt and form.q.is_cuda:
            mask = causal_lower_right(*sizes)
        elif prompt:
            mask = torch.ones(*sizes, dtype=torch.bool).tril_(len(prompt))
        segments.append((slice(rows.start, rows.stop), slice(prompt.start, prompt.stop), mask))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for rows, prompt, mask in segments:
            keys, values = (torch.cat([x[prompt], x[rows]]) if mask is not None else x[rows] for x in (k, v))
            outs.append(_sdpa(q[rows][None], keys[None], values[None], mask)[0])
        return torch.cat(outs)

    return attend


def _varlen(form: Form) -> Attend:
    """FlashAttention 2, as PyTorch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = form.cu(), max(form.lengths)
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # PyTorch 2.11 needs no word for it
        options["enable_gqa"] = form.q.shape[1] != form.k.shape[1]
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest, **options)  # pyright: ignore[reportReturnType]


def _flash(form: Form, module: str, deterministic: bool) -> Attend:
    function = importlib.import_module(module).flash_attn_varlen_func
    cu, longest = form.cu(), max(form.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, cu, cu, longest, longest, causal=True, deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out  # early versions of 3 give the log-sum-exp as well

    return attend


def _flex(form: Form, is_made_anew: bool = False) -> Attend:
    """Compiled flex_attention with a document or tree mask, made anew in every call or once for all."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled, make = torch.compile(flex_attention, dynamic=False), _flex_mask(form)
    ready = None if is_made_anew else make()
    is_grouped = form.q.shape[1] != form.k.shape[1]

    def attend(*inputs: Tensor) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in inputs)
        mask = make() if ready is None else ready
        return compiled(q, k, v, block_mask=mask, enable_gqa=is_grouped).transpose(1, 2)[0]

    return attend


def _flex_mask(form: Form) -> Callable[[], Any]:
    """Function that makes the block mask; compiled on a GPU, which would otherwise need a mask of T x T."""
    from torch.nn.attention.flex_attention import create_block_mask

    segments, device, T = list(form.packing.segments()), form.q.device, len(form.q)
    number = {rows.start: n for n, (rows, _) in enumerate(segments)}
    length_N = torch.tensor([len(rows) for rows, _ in segments])
    prompt_N = torch.tensor([number[prompt.start if prompt else rows.start] for rows, prompt in segments])
    prompt_T = prompt_N.repeat_interleave(length_N).to(device)
    segment_T = torch.arange(len(segments)).repeat_interleave(length_N).to(device)

    def document(_b: Tensor, _h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & (segment_T[s] == segment_T[t])

    def tree(_b: Tensor, _h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & ((segment_T[s] == segment_T[t]) | (segment_T[s] == prompt_T[t]))

    visible = tree if form.packing.shares_prompts else document
    make = torch.compile(create_block_mask, dynamic=False) if device.type == "cuda" else create_block_mask
    return lambda: make(visible, None, None, T, T, device=device)
