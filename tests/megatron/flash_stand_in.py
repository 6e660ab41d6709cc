"""Plain PyTorch in place of flash-attn's two functions over sequences of any length, with their signatures (2.8).

Q and L queries and keys of a sequence, H query heads, J key heads, K head size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [queries, H, K], log-sum-exp [H, queries], and two that are of use with dropout alone."""
    check(q, cu_seqlens_q, max_seqlen_q)
    check(k, cu_seqlens_k, max_seqlen_k)
    assert dropout_p == softcap == 0 and window_size_left == window_size_right == -1
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for (q0, q1), (k0, k1) in sequences(cu_seqlens_q, cu_seqlens_k):
        scores_HQL = scores(q[q0:q1], k[k0:k1], softmax_scale, causal)
        lse[:, q0:q1] = scores_HQL.logsumexp(-1)
        out[q0:q1] = torch.einsum("hql,lhk->qhk", scores_HQL.softmax(-1), heads(v[k0:k1], q))
    return out, lse, q.new_empty(0), q.new_empty(2)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk and dv, from the output and the log-sum-exp that it is given; the rows' sums of dout * out."""
    check(q, cu_seqlens_q, max_seqlen_q)
    check(k, cu_seqlens_k, max_seqlen_k)
    assert dropout_p == softcap == 0 and window_size_left == window_size_right == -1 and deterministic
    assert all(x.is_contiguous() for x in (dout, q, k, v, out, softmax_lse, dq, dk, dv))
    delta_QH = (dout * out).sum(-1)
    for (q0, q1), (k0, k1) in sequences(cu_seqlens_q, cu_seqlens_k):
        key, value = heads(k[k0:k1], q), heads(v[k0:k1], q)
        p_HQL = (scores(q[q0:q1], k[k0:k1], softmax_scale, causal) - softmax_lse[:, q0:q1, None]).exp()
        ds_HQL = p_HQL * (torch.einsum("qhk,lhk->hql", dout[q0:q1], value) - delta_QH[q0:q1].T[..., None])
        dq[q0:q1] = softmax_scale * torch.einsum("hql,lhk->qhk", ds_HQL, key)
        for total, per_head in (
            (dk, softmax_scale * torch.einsum("hql,qhk->lhk", ds_HQL, q[q0:q1])),
            (dv, torch.einsum("hql,qhk->lhk", p_HQL, dout[q0:q1])),
        ):
            total[k0:k1] = per_head.unflatten(1, (k.shape[1], -1)).sum(2)
    return delta_QH


def check(x: Tensor, cu: Tensor, longest: int) -> None:
    """What the kernels take: int32 offsets of all rows, and no sequence that is empty or longer than was said."""
    assert cu.dtype == torch.int32 and int(cu[0]) == 0 and int(cu[-1]) == len(x)
    assert int(cu.diff().min()) > 0 and int(cu.diff().max()) == longest


def sequences(cu_q: Tensor, cu_k: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The rows of each sequence's queries and keys."""
    return list(zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True))


def heads(x_LJK: Tensor, q: Tensor) -> Tensor:
    """A key head for each query head [L, H, K]."""
    return x_LJK.repeat_interleave(q.shape[1] // x_LJK.shape[1], 1)


def scores(q_QHK: Tensor, k_LJK: Tensor, scale: float, causal: bool) -> Tensor:
    """[H, Q, L]; -inf where a key is not seen."""
    scores_HQL = scale * torch.einsum("qhk,lhk->hql", q_QHK, heads(k_LJK, q_QHK))
    ahead_QL = torch.ones(scores_HQL.shape[1:], dtype=torch.bool).triu(1 + len(k_LJK) - len(q_QHK))
    return scores_HQL.masked_fill(ahead_QL, -torch.inf) if causal else scores_HQL
