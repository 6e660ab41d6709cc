"""Stage `convert`: weights are read in this layout and written again, in other files or another type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dsm_train.cli import user_errors
from dsm_train.config import ModelConfig
from dsm_train.configs import ConvertConfig
from dsm_train.hf.dtypes import BY_NAME
from dsm_train.hf.files import stored_dtypes
from dsm_train.hf.folder import Pretrained
from dsm_train.hf.writer import appearing
from dsm_train.megatron import parallel, weights
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import padded_vocab
from dsm_train.megatron.weights import ModelSpec
from dsm_train.reporting.metrics import prepare_output


def convert(config: ConvertConfig) -> None:
    """Read a folder of weights, with either head, and write it anew with all that lies beside them."""
    init, out = config.run.init, config.run.out
    assert init is not None and out is not None, "the configuration insists on both"
    with user_errors("dsm-train convert"):
        source, stored, model = check(config, init, out)
        parallel.set_threads(config.run.threads)
        ranks = parallel.start(config.parallel, config.run.seed)
    wanted = config.run.weights_dtype
    dtype = stored if wanted is None else BY_NAME[wanted].torch
    kind = source.description.kind
    with ranks.watchdog.failures(), appearing(out, ranks.is_main) as folder:
        chunks = ModelSpec(model, HeadSpec.of(model, kind), init).chunks(ranks)
        weights.save_weights(folder, chunks, model, ranks, dtype, kind, round(config.shard_gb * 10**9))
        if ranks.is_main:
            source.write(folder, source.description.model, kind, wanted)
    if ranks.is_main:
        files = sorted(out.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 10**9
        print(f"{source.description.architecture.class_name(kind)}: {len(files)} file(s), {size:.3g} GB: {out}")
    parallel.stop(ranks)


def check(config: ConvertConfig, init: Path, out: Path) -> tuple[Pretrained, dict[str, torch.dtype], ModelConfig]:
    """Read what the folder holds: its description, the types of its tensors, and a model that holds these exactly.

    Raises `ValueError` for weights that cannot be read, a layout that does not fit, and an `out` that holds anything.
    """
    source = Pretrained.of(init)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "not empty" if out.is_dir() else "a file"
        raise ValueError(f"run.out: {out} is {what}: choose a folder that is not there yet")
    prepare_output(out.absolute().parent)
    source.check_weights(source.description.kind)
    stored = stored_dtypes(init)
    exact = "bf16" if set(stored.values()) == {torch.bfloat16} else "fp32"
    model = replace(source.description.model, dtype=exact, layers="local", vocab_multiple=1)
    padded = padded_vocab(HeadSpec.of(model).vocab_size, model.vocab_multiple, config.parallel.tp)
    parallel.check_layout(config.parallel, model, padded)
    return source, stored, model
