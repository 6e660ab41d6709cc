"""Documents that Megatron's own dataset classes draw from a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsm_train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class EndOfDocument:
    """A tokenizer as Megatron's datasets need it: the id that ends a document."""

    eod: int
    vocab_size: int
    unique_identifiers: dict[str, str]
    pad: int = -1


def drawn_documents(dataset: Path, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """The documents in an epoch of `GPTDataset`: all of them, in another order, cut into samples of `length` tokens.

    The last one may be cut short: the rest of the last sample is not drawn.
    """
    from dsm_train.megatron import platform

    platform.enable()  # before anything else of megatron-core is imported
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(dataset / "corpus")], None),
        split="100,0,0",
        tokenizer=EndOfDocument(tokenizer.eos_id, tokenizer.vocab_size, {"class": "test"}),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(dataset.parent / "cache"),
    )
    whole: Any = [None, 0, 0]  # an epoch for training, nothing held out
    drawn: Any = BlendedMegatronDatasetBuilder(GPTDataset, whole, lambda: True, config).build()[0]
    samples = {int(drawn.shuffle_index[i]): drawn[i] for i in range(len(drawn))}
    for sample in samples.values():
        assert sample["tokens"].shape == (length,) and sample["labels"][:-1].equal(sample["tokens"][1:])
    stream = [token for place in sorted(samples) for token in samples[place]["tokens"].tolist()]
    stream.append(int(samples[max(samples)]["labels"][-1]))
    documents: list[list[int]] = [[]]
    for token in stream:
        if token == tokenizer.eos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents
