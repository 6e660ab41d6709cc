"""Attention over packed sequences and over groups that share a prompt: the problem and its solution in fp64.

A contender that cannot share prompts gets every response with a prompt of its own. Only the first copy of a prompt's
row has an upstream gradient: the loss is the same for all, and so are the gradients, summed over the copies.

T packed tokens, H query heads, J key heads, K head size, V head size of the values, S sequences, L the longest one,
M rows of a contender's form.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.compare import Check
from benchmarks.measure import relative
from triton_kernels import PackedLayout

_CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class Heads:
    """Numbers and sizes of heads."""

    H: int
    J: int
    K: int
    V: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """Parse "H/JxK" or "H/JxK/V". Raises `ValueError` for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)x(\d+)(?:/(\d+))?", text)
        heads = cls(*(int(match[i] or match[3]) for i in range(1, 5))) if match else None
        if heads is None or min(heads.H, heads.J, heads.K, heads.V) == 0 or heads.H % heads.J:
            raise ValueError(
                "heads are query heads / key heads x size, such as 32/8x128, where the second number divides the "
                f"first; or with a size of the values, such as 16/16x192/128; got {text!r}"
            )
        return heads

    def __str__(self) -> str:
        return f"{self.H}/{self.J}x{self.K}" + f"/{self.V}" * (self.V != self.K)


@dataclass(frozen=True)
class Packing:
    """Groups of one prompt and its responses, lengths in tokens; a plain sequence is a prompt without responses."""

    text: str
    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> Packing:
        """Parse "SxL", "mixed:low-high:total" or "groups:PxGxR" with or without "xN". Raises `ValueError` otherwise."""
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        if min(numbers, default=0) > 0:
            if re.fullmatch(r"\d+x\d+", text):
                return cls(text, ((numbers[1], ()),) * numbers[0])
            if re.fullmatch(r"mixed:\d+-\d+:\d+", text) and numbers[0] <= numbers[1] <= numbers[2]:
                return cls(text, tuple((length, ()) for length in _mixed(*numbers)))
            if re.fullmatch(r"groups:\d+x\d+x\d+(x\d+)?", text):
                prompt, responses, length, *count = numbers
                return cls(text, ((prompt, (length,) * responses),) * (count[0] if count else 1))
        raise ValueError(
            "a layout is sequences x length, such as 8x1024; mixed:shortest-longest:total, such as "
            "mixed:256-8192:65536; or groups:prompt x responses x length, such as groups:512x64x512, with x groups at "
            f"its end where they are several; got {text!r}"
        )

    @classmethod
    def plain(cls, text: str, lengths: list[int]) -> Packing:
        return cls(text, tuple((length, ()) for length in lengths))

    @property
    def shares_prompts(self) -> bool:
        return any(responses for _, responses in self.groups)

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(prompt + sum(responses) for prompt, responses in self.groups)

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key that it sees, per head."""
        return sum(len(rows) * (len(rows) + 1) // 2 + len(rows) * len(prompt) for rows, prompt in self.segments())

    def segments(self) -> Iterator[tuple[range, range]]:
        """Rows of every prompt and response, and of the prompt that they see besides."""
        row = 0
        for prompt, responses in self.groups:
            prompt_rows = range(row, row + prompt)
            yield prompt_rows, range(0)
            row += prompt
            for length in responses:
                yield range(row, row + length), prompt_rows
                row += length

    def sequences(self) -> Iterator[list[int]]:
        """Rows of every sequence, those of a prompt in each of its responses'."""
        row = 0
        for prompt, responses in self.groups:
            prompt_rows = [*range(row, row + prompt)]
            row += prompt
            for length in responses or (0,):
                yield [*prompt_rows, *range(row, row + length)]
                row += length

    def layout(self, device: torch.device) -> Callable[[], PackedLayout]:
        """Function that makes our layout from lengths on the device."""
        prompt_len_P = torch.tensor([prompt for prompt, _ in self.groups], device=device)
        if not self.shares_prompts:
            cu_seqlens = F.pad(prompt_len_P.cumsum(0), (1, 0)).int()
            return lambda: PackedLayout.from_cu_seqlens(cu_seqlens)
        counts = torch.tensor([0, *(len(responses) for _, responses in self.groups)], device=device)
        length_S = torch.tensor([length for _, responses in self.groups for length in responses], device=device)
        group_cu = counts.cumsum(0).int()
        return lambda: PackedLayout.from_groups(prompt_len_P, length_S, group_cu)


def _mixed(shortest: int, longest: int, total: int) -> Iterator[int]:
    """Lengths whose logarithms are spread evenly, up to the total, for which the last one is cut."""
    generator = torch.Generator().manual_seed(0)
    while total > 0:
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        length = min(round(shortest * (longest / shortest) ** share), total)
        yield length
        total -= length


@dataclass(frozen=True)
class Form:
    """The problem as a contender takes it: rows [M, heads, size], or [S, L, heads, size] where padded."""

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    packing: Packing
    """Packing of the M rows; without the padding for the padded form."""

    @property
    def lengths(self) -> list[int]:
        """Lengths of the sequences."""
        return [prompt for prompt, _ in self.packing.groups]

    def cu(self) -> Tensor:
        """Offsets [S + 1] of the sequences, int32."""
        return torch.tensor([0, *self.lengths], device=self.q.device).cumsum(0).int()


@dataclass(frozen=True)
class AttentionProblem:
    """q [T, H, K], k [T, J, K], v [T, J, V] and the upstream gradient of the output [T, H, V]."""

    q_THK: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    packing: Packing

    @property
    def device(self) -> torch.device:
        return self.q_THK.device

    @property
    def dtype(self) -> torch.dtype:
        return self.q_THK.dtype

    @property
    def num_rows(self) -> int:
        return len(self.q_THK)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q_THK, self.k, self.v, self.upstream

    def head(self, rows: int) -> AttentionProblem:
        """The first sequences or groups alone, as many as have `rows` rows."""
        groups = self.packing.groups
        parts = (replace(self.packing, groups=groups[:count]) for count in range(1, len(groups) + 1))
        part = next((part for part in parts if part.num_tokens >= rows), self.packing)
        q_THK, k, v, upstream = (x[: part.num_tokens].clone() for x in self.tensors)
        return AttentionProblem(q_THK, k, v, upstream, part)

    @functools.cached_property
    def packed(self) -> Form:
        """Packed form, each prompt once."""
        return Form(*self.tensors, self.packing)

    @functools.cached_property
    def repeated(self) -> Form:
        """Sequences one after the other, with a prompt for every response."""
        return self._form(torch.cat(self._sequences())) if self.packing.shares_prompts else self.packed

    @functools.cached_property
    def padded(self) -> Form:
        """Sequences padded to the longest, with a prompt for every response."""
        return self._form(pad_sequence(self._sequences(), batch_first=True, padding_value=-1))

    def sources(self) -> dict[int, Tensor]:
        """Packed row of each row of a form, or -1, by the form's number of rows M, which identifies it."""
        sequences = self._sequences()
        forms = (pad_sequence(sequences, True, -1).flatten(), torch.cat(sequences), torch.arange(self.num_rows))
        return {len(source_M): source_M.to(self.device) for source_M in forms}

    def _sequences(self) -> list[Tensor]:
        return [torch.tensor(rows) for rows in self.packing.sequences()]

    def _form(self, source: Tensor) -> Form:
        """Form with the rows that `source` names, of any shape; only a row's first copy has an upstream gradient."""
        order = source.flatten().sort(stable=True)
        is_first = torch.empty_like(source.flatten(), dtype=torch.bool)
        is_first[order.indices] = order.values.diff(prepend=order.values.new_full((1,), -1)) > 0
        source, is_first = source.to(self.device), is_first.view_as(source).to(self.device)

        def rows(x: Tensor, here: Tensor) -> Tensor:
            return x[source.clamp(min=0)].masked_fill_(~here[..., None, None], 0)

        q, k, v = (rows(x, source >= 0) for x in self.tensors[:3])
        packing = Packing.plain(self.packing.text, [len(x) for x in self.packing.sequences()])
        return Form(q, k, v, rows(self.upstream, is_first), packing)


def make_attention(heads: Heads, packing: Packing, device: torch.device, dtype: torch.dtype) -> AttentionProblem:
    """Make the problem from normal random numbers: scores have deviation 1."""
    generator, T = torch.Generator(device).manual_seed(0), packing.num_tokens
    sizes = ((heads.H, heads.K), (heads.J, heads.K), (heads.J, heads.V), (heads.H, heads.V))
    q_THK, k, v, upstream = (torch.randn(T, *size, generator=generator, device=device).to(dtype) for size in sizes)
    return AttentionProblem(q_THK, k, v, upstream, packing)


def exact_attention(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dq_THK, dk, dv) in fp64, from dense scores of some queries of a segment at a time."""
    q, k, v, upstream = (x.double() for x in problem.tensors)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (upstream, q, k, v))
    (_, H, K), R = q.shape, q.shape[1] // k.shape[1]
    for rows, prompt in problem.packing.segments():
        columns = torch.tensor([*prompt, *rows], device=q.device)
        count = max(1, _CHUNK_BYTES // (8 * H * len(columns)))
        for chunk in (slice(t, min(t + count, rows.stop)) for t in range(rows.start, rows.stop, count)):
            seen = columns[: len(prompt) + chunk.stop - rows.start]
            distance = torch.arange(chunk.start, chunk.stop, device=q.device)[:, None] - columns[: len(seen)]
            inputs = [x.requires_grad_() for x in (q[chunk].clone(), k[seen], v[seen])]
            keys, values = (x.repeat_interleave(R, 1) for x in inputs[1:])
            scores = torch.einsum("thk,shk->hts", inputs[0], keys) / math.sqrt(K)
            p = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
            o = torch.einsum("hts,shv->thv", p, values)
            out[chunk] = o.detach()
            dq[chunk], dk_seen, dv_seen = torch.autograd.grad(o, inputs, upstream[chunk])
            dk[seen] += dk_seen
            dv[seen] += dv_seen
    return out, dq, dk, dv


def check(problem: AttentionProblem) -> Check:
    """Relative errors, Frobenius: of the output in all its copies, of gradients summed over theirs."""
    exact, sources = exact_attention(problem), problem.sources()

    def against(result: tuple[Tensor, ...]) -> dict[str, float]:
        errors = {}
        for name, x, right in zip(("out", "dq", "dk", "dv"), result, exact, strict=False):  # or the output alone
            rows = x.reshape(-1, *right.shape[1:])
            source_M = sources[len(rows)]
            rows, source_M = rows[source_M >= 0], source_M[source_M >= 0]
            if name == "out":
                errors[name] = relative(rows, right[source_M])
            else:
                errors[name] = relative(torch.zeros_like(right).index_add_(0, source_M, rows.double()), right)
        return errors

    return against
