"""Megatron's indexed dataset, `PREFIX.bin` and `PREFIX.idx`: documents of token ids, written and merged."""

from __future__ import annotations

import array
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder


def token_dtype(vocab_size: int) -> str:
    """The type that Megatron stores ids below `vocab_size` in: "uint16", or "int32" for larger vocabularies."""
    return DType.optimal_dtype(vocab_size).__name__


@dataclass(frozen=True)
class DatasetWriter:
    """What `writing` gives: adds documents."""

    _builder: IndexedDatasetBuilder

    def add(self, ids: Sequence[int]) -> None:
        """Add one document of token ids."""
        self._builder.add_document(ids, [len(ids)])  # type: ignore[arg-type]

    def append(self, prefix: Path) -> None:
        """Add all documents of another dataset, which has the same type."""
        self._builder.add_index(str(prefix))


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
    """The documents of a dataset, in order: ids [T]."""
    dataset = IndexedDataset(str(prefix))
    for index in range(len(dataset)):
        yield np.array(dataset[index])  # a copy: the dataset's own array is gone with the dataset
