"""One rank of `test_hf_folders.py`: loads every folder in this layout, computes its outputs, and writes it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsm_train.config import ParallelConfig
from dsm_train.hf.files import stored_dtypes
from dsm_train.hf.folder import Pretrained
from dsm_train.hf.writer import appearing
from dsm_train.megatron import parallel, weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.layers import PackedAttend
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model
from dsm_train.megatron.weights import ModelSpec
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.types import Prompt
from triton_kernels import PackedLayout

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "pp2": (2, ParallelConfig(pp=2)),
    "tp2_pp2": (4, ParallelConfig(tp=2, pp=2, sp=True)),
}
LENGTHS = (1, 23, 40)  # a single token; 40 is past every original length of the scaled rotary embeddings
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)
PROMPTS = [Prompt(0, [3, 4, 5]), Prompt(1, [11])]
SHARD_BYTES = 30_000


def tokens() -> list[torch.Tensor]:
    """Sequences that every model computes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(60, (length,), generator=generator) for length in LENGTHS]


def run(folder: Path, layout: Parallel, out: Path) -> dict[str, object]:
    """Load, compute and write; what the last pipeline rank's first tensor-parallel rank returns counts."""
    source = Pretrained.of(folder)
    kind = source.description.kind
    source.check_weights(kind)
    model = replace(source.description.model, dtype="fp32", vocab_multiple=8)
    spec = ModelSpec(model, HeadSpec.of(model, kind), folder)
    traced = folder.name == "wide"
    result: dict[str, object] = {"loading": peak_of(lambda: spec.chunks(layout), folder)} if traced else {}
    policy = Model.build(spec, layout)
    packed = PackedLayout.from_cu_seqlens(torch.tensor([0, *LENGTHS]).cumsum(0).int())
    hidden_ND = policy.hidden(torch.cat(tokens()), packed.positions_T, PackedAttend(packed))
    if hidden_ND is not None:
        value = kind == "value"
        result["outputs"] = hidden_ND @ policy.chunks[-1].head_weight().T if value else policy.logits(hidden_ND)
    if kind == "language":
        rollouts = EmbeddedEngine(policy, [1], seed=0).generate(PROMPTS, 1, GREEDY, step=0)
        result["greedy"] = [rollouts.sequences.response(s).tolist() for s in range(len(PROMPTS))]
    before = [parameter.detach().clone() for chunk in policy.chunks for parameter in chunk.parameters()]
    with appearing(out / folder.name, layout.is_main) as written:

        def save() -> None:
            weights.save_weights(written, policy.chunks, model, layout, stored_dtypes(folder), kind, SHARD_BYTES)

        if traced:
            result["saving"] = peak_of(save, folder)
            result["held"] = sum(p.numel() * p.element_size() for chunk in policy.chunks for p in chunk.parameters())
        else:
            save()
        if layout.is_main:
            source.write(written, model, kind, None)
    after = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    result["intact"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return result


class Peak(TorchDispatchMode):
    """Most bytes at once of the tensors that are made in its scope; files of `folder`, mapped into memory, are none.

    Not by torch.profiler, whose threads the ranks would be forked with.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._mapped = {file.stat().st_size for file in folder.glob("*.safetensors")}
        self._held: dict[int, int] = {}
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and count what it allocates until that is freed."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._held and size not in self._mapped:
                self._held[key] = size
                weakref.finalize(storage, self._held.pop, key)
        self.num_bytes = max(self.num_bytes, sum(self._held.values()))
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def peak_of(call: Callable[[], object], folder: Path) -> int:
    """Measure what torch allocates during a call, in bytes at once."""
    with Peak(folder) as peak:
        call()
    return peak.num_bytes


def main(rank: int, world: int, store: dist.Store, out: Path, *folders: str) -> None:
    """Run every folder in every layout of this number of ranks."""
    for name, (ranks, config) in LAYOUTS.items():
        if ranks != world:
            continue
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world)
        layout = parallel.start(config, seed=0)
        results = {Path(folder).name: run(Path(folder), layout, out / name) for folder in folders}
        torch.save(results, out / f"{name}-{rank}.pt")
        parallel.stop(layout)
