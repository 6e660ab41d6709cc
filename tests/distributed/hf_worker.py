"""One rank of `test_hf_folders.py`: loads every folder in this layout, computes its outputs, and writes it again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

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


def peak_of(call: Callable[[], object], folder: Path) -> int:
    """Trace what torch allocates on the CPU during a call, in bytes at once.

    The files of `folder` are mapped into memory, which the trace counts as well: these are left out.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    mapped = {file.stat().st_size for file in folder.glob("*.safetensors")}
    events: list[Any] = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    records = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    allocated = [num_bytes for _, num_bytes in records if abs(num_bytes) not in mapped]
    return max(itertools.accumulate(allocated), default=0)


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
