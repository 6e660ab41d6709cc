"""The embedded generator: the policy's own weights, in this process.

A prompt is prefilled once for its group; its responses are decoded together, and finished ones leave the batch.
B rows (responses) in the batch, L cache length, H key/value heads, K head size, N packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsm_train.megatron import platform
from dsm_train.megatron.layers import PackedAttend
from dsm_train.megatron.step import Model
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.sampling import counter_uniform, sample, sample_counter
from dsm_train.types import Prompt, Rollouts, Sequences, offsets
from triton_kernels import PackedLayout


class KVCache:
    """Keys and values of every layer, a row per response: [B, H, L, K], filled from the left."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def fill(self, layer: int, k_NHK: Tensor, v_NHK: Tensor, index_PL: Tensor, row_B: Tensor) -> None:
        """Store prefilled prompts: token index_PL[p, l] is position l of prompt p; row b belongs to prompt row_B[b]."""
        for store, x in ((self.keys, k_NHK), (self.values, v_NHK)):
            prompts = x[index_PL].transpose(1, 2)  # [P, H, Lp, K]
            cache = prompts.new_zeros(row_B.numel(), prompts.shape[1], self.length, prompts.shape[3])
            cache[:, :, : prompts.shape[2]] = prompts[row_B]
            store[layer] = cache

    def keep(self, rows: Tensor) -> None:
        """Retire all rows but these."""
        for store in (self.keys, self.values):
            for layer, cache in store.items():
                store[layer] = cache[rows]


@dataclass(frozen=True)
class PrefillAttend:
    """Causal attention over packed prompts, which also fills the cache."""

    packed: PackedAttend
    cache: KVCache
    index_PL: Tensor
    row_B: Tensor

    def __call__(self, layer: int, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, scale: float) -> Tensor:
        self.cache.fill(layer, k_NHK, v_NHK, self.index_PL, self.row_B)
        return self.packed(layer, q_NHK, k_NHK, v_NHK, scale)


@dataclass(frozen=True)
class DecodeAttend:
    """Attention of one new token per row to the cache, which takes it in."""

    cache: KVCache
    position_B: Tensor
    visible_B11L: Tensor

    def __call__(self, layer: int, q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor, scale: float) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        index = self.position_B[:, None, None, None].expand(-1, keys.shape[1], 1, keys.shape[3])
        keys.scatter_(2, index, k_BHK.unsqueeze(2))
        values.scatter_(2, index, v_BHK.unsqueeze(2))
        used = self.visible_B11L.shape[-1]
        out = F.scaled_dot_product_attention(
            q_BHK.unsqueeze(2),
            keys[:, :, :used],
            values[:, :, :used],
            attn_mask=self.visible_B11L,
            scale=scale,
            enable_gqa=q_BHK.shape[1] != keys.shape[1],
        )
        return out.squeeze(2)


class EmbeddedEngine:
    """Generator on `model`'s live weights, in any layout; all ranks of a replica call `generate` alike.

    Each rank keeps the keys and values of its own layers and heads. One rank samples, and tells the others.
    """

    def __init__(self, model: Model, stop_ids: Sequence[int], seed: int) -> None:
        self.model, self.seed = model, seed
        self.stop_ids = torch.tensor(sorted(stop_ids))

    def sync(self, model: Model) -> None:
        """Do nothing: the engine samples with the model's live weights."""
        assert model is self.model

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], num_samples: int, sampling: SamplingConfig, *, step: int) -> Rollouts:
        """Sample as `RolloutEngine.generate` says. Raises `ValueError` for a prompt without tokens."""
        for prompt in prompts:
            if not prompt.token:
                raise ValueError(f"prompt {prompt.id} has no token: there is nothing to continue")
        groups = max(1, sampling.batch // num_samples)
        parts = []
        for first in range(0, max(1, len(prompts)), groups):
            batch = _Decoding(self, prompts[first : first + groups], num_samples, sampling, step)
            batch.prefill()
            while batch.active.numel():
                batch.decode()
            parts.append(batch.rollouts())
        return Rollouts.concatenate(parts)


class _Decoding:
    """The state of one call of `generate`. Row b of the output arrays is response b; `active` are still decoding."""

    def __init__(
        self, engine: EmbeddedEngine, prompts: Sequence[Prompt], num_samples: int, sampling: SamplingConfig, step: int
    ) -> None:
        self.engine, self.prompts, self.sampling, self.step = engine, prompts, sampling, step
        self.model = engine.model
        device = self.device = platform.device()
        rows = len(prompts) * num_samples
        self.prompt_length_P = torch.tensor([len(p.token) for p in prompts], device=device)
        self.prompt_of_B = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
        self.prompt_id_B = torch.tensor([p.id for p in prompts], device=device)[self.prompt_of_B]
        occurrence_P = torch.tensor([p.occurrence for p in prompts], dtype=torch.int64, device=device)
        self.sample_B = sample_counter(torch.arange(num_samples, device=device), occurrence_P)
        self.stop_ids = engine.stop_ids.to(device)
        self.token_BR = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.int64, device=device)
        self.logprob_BR = torch.zeros(rows, sampling.max_new_tokens, device=device)
        self.margin_BR = torch.zeros(rows, sampling.max_new_tokens, device=device)
        self.length_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finished_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.active = torch.arange(rows, device=device)
        self.emitted = 0
        longest = int(self.prompt_length_P.max()) if len(prompts) else 0
        self.cache = KVCache(longest + sampling.max_new_tokens)

    def prefill(self) -> None:
        """Run every prompt once, and choose the first token of all its responses."""
        if not len(self.prompts):
            return
        tokens = torch.tensor([t for p in self.prompts for t in p.token], device=self.device)
        layout = PackedLayout.from_cu_seqlens(offsets([len(p.token) for p in self.prompts]), device=self.device)
        end_P = self.prompt_length_P.cumsum(0)
        start_P = end_P - self.prompt_length_P
        column_L = torch.arange(int(self.prompt_length_P.max()), device=self.device)
        index_PL = (start_P[:, None] + column_L).clamp(max=tokens.numel() - 1)
        attend = PrefillAttend(PackedAttend(layout), self.cache, index_PL, self.prompt_of_B)
        hidden_ND = self.model.hidden(tokens, layout.positions_T, attend)
        self._choose(None if hidden_ND is None else hidden_ND[end_P - 1][self.prompt_of_B])

    def decode(self) -> None:
        """Run the last token of every active response, and choose the next."""
        position_B = self.prompt_length_P[self.prompt_of_B[self.active]] + (self.emitted - 1)
        used = int(self.prompt_length_P.max()) + self.emitted
        visible = (torch.arange(used, device=self.device) <= position_B[:, None])[:, None, None]
        attend = DecodeAttend(self.cache, position_B, visible)
        token_B = self.token_BR[self.active, self.emitted - 1]
        self._choose(self.model.hidden(token_B, position_B, attend))

    def _choose(self, hidden_BD: Tensor | None) -> None:
        """Sample the next token of the active rows, and retire those that end; the states are where the head is."""
        rows, parallel = self.active, self.model.parallel
        parallel.watchdog.beat()
        logits_BV = None if hidden_BD is None else self.model.logits(hidden_BD)
        # fp64 holds tokens and fp32 numbers exactly.
        chosen = torch.empty(3, rows.numel(), dtype=torch.float64, device=self.device)
        if logits_BV is not None and parallel.is_replica_main:
            chosen = self._sample(logits_BV)
        token_B, logprob_B, margin_B = parallel.from_replica_main(chosen)
        token_B = token_B.long()
        self.token_BR[rows, self.emitted] = token_B
        self.logprob_BR[rows, self.emitted] = logprob_B.float()
        self.margin_BR[rows, self.emitted] = margin_B.float()
        self.emitted += 1
        stopped = torch.isin(token_B, self.stop_ids)
        self.finished_B[rows] = stopped
        self.length_B[rows] = self.emitted
        going = ~stopped if self.emitted < self.sampling.max_new_tokens else torch.zeros_like(stopped)
        if not bool(going.all()):
            self.active = rows[going]
            self.cache.keep(going.nonzero().squeeze(1))

    def _sample(self, logits_BV: Tensor) -> Tensor:
        """Sample [token | log-probability | margin] of the active rows, fp64 [3, B]."""
        rows = self.active
        uniform = None
        if self.sampling.temperature > 0:
            position = torch.full_like(rows, self.emitted)
            uniform = counter_uniform(
                self.engine.seed, self.step, self.prompt_id_B[rows], self.sample_B[rows], position
            )
        chosen = sample(logits_BV, uniform, self.sampling)
        return torch.stack([chosen.token_B.double(), chosen.logprob_B.double(), chosen.margin_B.double()])

    def rollouts(self) -> Rollouts:
        """Pack the responses, on the CPU."""
        length_B = self.length_B.cpu()
        taken = torch.arange(self.sampling.max_new_tokens) < length_B[:, None]
        groups = len(self.prompts)
        num_samples = length_B.numel() // max(groups, 1)
        return Rollouts(
            sequences=Sequences(
                prompt_token=torch.tensor([t for p in self.prompts for t in p.token], dtype=torch.int64),
                prompt_cu=offsets([len(p.token) for p in self.prompts]),
                response_token_T=self.token_BR.cpu()[taken],
                response_cu=offsets(length_B.tolist()),
                group_cu=offsets([num_samples] * groups),
            ),
            prompt_id_P=torch.tensor([p.id for p in self.prompts], dtype=torch.int64),
            rollout_logprob_T=self.logprob_BR.cpu()[taken],
            margin_T=self.margin_BR.cpu()[taken],
            finished_S=self.finished_B.cpu(),
            weight_version=self.model.steps,
        )
