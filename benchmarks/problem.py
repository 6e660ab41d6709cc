"""The problem that every contender solves, and its solution in fp64.

Hidden states, a head and G responses per prompt of ragged lengths, with log-probabilities before the update and of a
reference model. The loss is the paper's, clip 0.2 and 0.04 k3, as a mean over tokens: of the ways to average, the one
that all contenders can express, packed or padded.

T loss rows, S responses, P prompts, G responses per prompt, L the longest response, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CLIP, KL_COEF = 0.2, 0.04
_EDGE_MARGIN = 0.03
"""No log ratio lies nearer to an edge of the clip band: logits rounded to bf16 would put some rows on its other side,
and then the error would be that of the edge, not of the arithmetic."""
_CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem."""

    T: int
    D: int
    V: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Parse "TxDxV". Raises `ValueError` for anything else."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"a shape is TxDxV, rows x hidden x vocabulary, such as 1024x512x50257; got {text!r}")
        return cls(*map(int, parts))

    @property
    def gemm_flops(self) -> float:
        """FLOPs of one product of this shape."""
        return 2.0 * self.T * self.D * self.V

    def __str__(self) -> str:
        return f"{self.T}x{self.D}x{self.V}"


@dataclass(frozen=True)
class Padded:
    """Rows as [S, L], for ops that know no packed sequences. mask_SL is 1 for a row, 0 for padding."""

    hidden_SLD: Tensor
    target_SL: Tensor
    old_logprob_SL: Tensor
    ref_logprob_SL: Tensor
    mask_SL: Tensor


@dataclass(frozen=True)
class Problem:
    """hidden_TD and weight_VD in the dtype that is measured; log-probabilities and advantages in fp32."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor
    old_logprob_T: Tensor
    ref_logprob_T: Tensor
    advantage_S: Tensor
    lengths: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        return Shape(len(self.hidden_TD), self.hidden_TD.shape[1], len(self.weight_VD))

    @property
    def device(self) -> torch.device:
        return self.hidden_TD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden_TD.dtype

    @property
    def num_rows(self) -> int:
        return len(self.hidden_TD)

    @property
    def response_cu(self) -> Tensor:
        """Offsets [S + 1] of the responses, int32."""
        ends = torch.tensor((0, *self.lengths), device=self.device).cumsum(0)
        return ends.to(torch.int32)

    @property
    def advantage_T(self) -> Tensor:
        """A response's advantage for each of its rows."""
        return self.advantage_S.repeat_interleave(torch.tensor(self.lengths, device=self.device))

    @property
    def weight_T(self) -> Tensor:
        """The mean over tokens."""
        return torch.full_like(self.old_logprob_T, 1 / len(self.old_logprob_T))

    def head(self, rows: int) -> Problem:
        """Problem of the first responses alone, as many as have `rows` rows."""
        count = next((s for s in range(1, len(self.lengths)) if sum(self.lengths[:s]) >= rows), len(self.lengths))
        T = sum(self.lengths[:count])
        return replace(
            self,
            hidden_TD=self.hidden_TD[:T].clone(),
            target_T=self.target_T[:T].clone(),
            old_logprob_T=self.old_logprob_T[:T].clone(),
            ref_logprob_T=self.ref_logprob_T[:T].clone(),
            advantage_S=self.advantage_S[:count].clone(),
            lengths=self.lengths[:count],
        )

    def padded(self) -> Padded:
        """Every response filled up with zeros to the longest one."""
        rows = (self.hidden_TD, self.target_T, self.old_logprob_T, self.ref_logprob_T, torch.ones_like(self.weight_T))
        return Padded(*(torch.nn.utils.rnn.pad_sequence(list(x.split(self.lengths)), batch_first=True) for x in rows))

    def packed(self, x_SLD: Tensor) -> Tensor:
        """The rows of a padded tensor, without the padding."""
        return torch.cat([x_LD[:length] for x_LD, length in zip(x_SLD, self.lengths, strict=True)])


def make_problem(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    groups: int = 2,
    responses: int = 8,
    deviation: float = 2.0,
    seed: int = 0,
) -> Problem:
    """Random data: logits of the given deviation, targets drawn from the policy, ratios of deviation 0.15 around 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden_TD = normal(shape.T, shape.D).to(dtype)
    weight_VD = normal(shape.V, shape.D).mul_(deviation / math.sqrt(shape.D)).to(dtype)
    target_T, logprob_T = _sample(hidden_TD, weight_VD, generator)
    log_ratio_T = normal(shape.T) * 0.15
    for edge in (math.log(1 - CLIP), math.log(1 + CLIP)):
        inside = edge - math.copysign(_EDGE_MARGIN, edge)
        log_ratio_T = torch.where((log_ratio_T - edge).abs() < _EDGE_MARGIN, inside, log_ratio_T)
    advantage_PG = normal(groups, responses)
    advantage_PG = advantage_PG - advantage_PG.mean(1, keepdim=True)
    return Problem(
        hidden_TD,
        weight_VD,
        target_T,
        logprob_T - log_ratio_T,
        logprob_T + 0.1 * normal(shape.T),
        advantage_PG.flatten(),
        ragged(shape.T, groups * responses, seed),
    )


def ragged(T: int, S: int, seed: int) -> tuple[int, ...]:
    """S lengths with the sum T, from about half to one and a half of their mean; fewer where T is below S."""
    S = min(S, T)
    share_S = torch.rand(S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    ends = ((share_S.cumsum(0) / share_S.sum()) * (T - S)).round().long() + torch.arange(1, S + 1)
    return tuple(torch.diff(ends, prepend=ends.new_zeros(1)).tolist())


def exact_logprobs(problem: Problem) -> Tensor:
    """The targets' log-probabilities, fp64."""
    weight_VD = problem.weight_VD.double()
    parts = [
        (problem.hidden_TD[rows].double() @ weight_VD.T).log_softmax(-1).gather(1, problem.target_T[rows, None])
        for rows in _chunks(problem.shape)
    ]
    return torch.cat(parts).squeeze(1)


@dataclass(frozen=True)
class Exact:
    """Loss, its gradients, and the sum of the absolute values of the loss' terms, which may cancel; fp64."""

    loss: Tensor
    dhidden_TD: Tensor
    dweight_VD: Tensor
    magnitude: Tensor


def exact_loss(problem: Problem) -> Exact:
    """The solution in fp64, from dense logits of some rows at a time and the gradient written out."""
    weight_VD = problem.weight_VD.double()
    dweight_VD, dhidden, terms = torch.zeros_like(weight_VD), [], []
    advantage_T = problem.advantage_T
    for rows in _chunks(problem.shape):
        hidden_CD, target_C1 = problem.hidden_TD[rows].double(), problem.target_T[rows, None]
        log_p_CV = (hidden_CD @ weight_VD.T).log_softmax(-1)
        logprob_C = log_p_CV.gather(1, target_C1).squeeze(1).requires_grad_()
        term_C = token_losses(
            logprob_C, problem.old_logprob_T[rows], problem.ref_logprob_T[rows], advantage_T[rows]
        ).div(problem.shape.T)
        (g_C,) = torch.autograd.grad(term_C.sum(), logprob_C)
        dlogits_CV = log_p_CV.exp_().mul_(-g_C[:, None]).scatter_add_(1, target_C1, g_C[:, None])
        dhidden.append(dlogits_CV @ weight_VD)
        dweight_VD.addmm_(dlogits_CV.T, hidden_CD)
        terms.append(term_C.detach())
    term_T = torch.cat(terms)
    return Exact(term_T.sum(), torch.cat(dhidden), dweight_VD, term_T.abs().sum())


def token_losses(logprob_T: Tensor, old_logprob_T: Tensor, ref_logprob_T: Tensor, advantage_T: Tensor) -> Tensor:
    """The objective of every token in plain PyTorch, to be minimised."""
    ratio_T = (logprob_T - old_logprob_T).exp()
    surrogate_T = torch.min(ratio_T * advantage_T, ratio_T.clamp(1 - CLIP, 1 + CLIP) * advantage_T)
    d_T = logprob_T - ref_logprob_T
    return KL_COEF * (torch.exp(-d_T) - 1 + d_T) - surrogate_T


def _sample(hidden_TD: Tensor, weight_VD: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A target of every row, drawn from the policy, and its log-probability in fp32."""
    weight_VD, targets, logprobs = weight_VD.float(), [], []
    for rows in _chunks(Shape(len(hidden_TD), hidden_TD.shape[1], len(weight_VD))):
        log_p_CV = (hidden_TD[rows].float() @ weight_VD.T).log_softmax(-1)
        noise_CV = torch.empty_like(log_p_CV).exponential_(generator=generator)
        targets.append((log_p_CV - noise_CV.log_()).argmax(1))
        logprobs.append(log_p_CV.gather(1, targets[-1][:, None]).squeeze(1))
    return torch.cat(targets), torch.cat(logprobs)


def _chunks(shape: Shape) -> Iterator[slice]:
    """Slices of rows whose logits in fp64 stay small."""
    count = max(1, _CHUNK_BYTES // (8 * shape.V))
    return (slice(start, start + count) for start in range(0, shape.T, count))
