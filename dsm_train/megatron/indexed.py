"""Megatron's indexed dataset, `PREFIX.bin` and `PREFIX.idx`: documents of token ids."""

from __future__ import annotations

import array
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

_BLOCK = 1 << 22
"""Number of ids in memory at once."""


def token_dtype(vocab_size: int) -> str:
    """Name the type that Megatron stores ids below `vocab_size` in: "uint16", or "int32" for larger vocabularies."""
    return DType.optimal_dtype(vocab_size).__name__


@dataclass(frozen=True)
class DatasetWriter:
    """Writer of a dataset under way."""

    _builder: IndexedDatasetBuilder

    def add(self, ids_T: np.ndarray, lengths_N: np.ndarray) -> None:
        """Add N documents: their T ids one after the other, and how many ids each has. `ids_T` may be a memory map."""
        if len(ids_T) != lengths_N.sum():
            raise ValueError(f"{len(ids_T)} ids for documents of {lengths_N.sum()} in all: they do not belong together")
        builder = self._builder
        for start in range(0, len(ids_T), _BLOCK):
            builder.data_file.write(ids_T[start : start + _BLOCK].astype(builder.dtype).tobytes())
        first = len(builder.sequence_lengths)
        builder.sequence_lengths.extend(lengths_N.tolist())
        builder.document_indices.extend(range(first + 1, first + len(lengths_N) + 1))


@contextlib.contextmanager
def writing(prefix: Path, vocab_size: int) -> Iterator[DatasetWriter]:
    """Write `PREFIX.bin` and `PREFIX.idx`, both or none: they get their names when the block ends without an error."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    names = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
    temporary = [path.with_name(path.name + ".tmp") for path in names]
    builder = IndexedDatasetBuilder(str(temporary[0]), DType.optimal_dtype(vocab_size))
    # It keeps Python lists of numbers, 40 bytes each; these take 4 and 8.
    builder.sequence_lengths = array.array("i")  # type: ignore[assignment]
    builder.document_indices = array.array("q", [0])  # type: ignore[assignment]
    try:
        yield DatasetWriter(builder)
        builder.finalize(str(temporary[1]))
        for path, name in zip(temporary, names, strict=True):
            os.replace(path, name)
    finally:
        builder.data_file.close()
        for path in temporary:
            path.unlink(missing_ok=True)


def documents(prefix: Path) -> Iterator[np.ndarray]:
    """Yield the documents of a dataset, in order: ids [T]."""
    dataset = IndexedDataset(str(prefix))
    for index in range(len(dataset)):
        yield np.array(dataset[index])  # a copy: the dataset's own array is gone with the dataset
