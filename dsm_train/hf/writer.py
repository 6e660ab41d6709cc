"""Weights written tensor by tensor, to one safetensors file or several with an index; folders that appear whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dsm_train.hf.dtypes import BY_TORCH
from dsm_train.hf.files import INDEX, WEIGHTS

SHARD_BYTES = 5 * 10**9
"""Largest file, unless one tensor is larger: the size that most published folders have."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file to write, with its tensors in their order."""

    file: str
    entries: tuple[Entry, ...]


def split_files(entries: Sequence[Entry], most_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Share tensors out to files, in their order; in a file those of wide types come first, so that all are aligned."""
    parts: list[list[Entry]] = [[]]
    for entry in entries:
        if parts[-1] and sum(other.num_bytes for other in parts[-1]) + entry.num_bytes > most_bytes:
            parts.append([])
        parts[-1].append(entry)
    for part in parts:
        part.sort(key=lambda entry: -entry.dtype.itemsize)
    names = [WEIGHTS]
    if len(parts) > 1:
        names = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    return [Shard(name, tuple(part)) for name, part in zip(names, parts, strict=True)]


def write_shard(folder: Path, shard: Shard, value: Callable[[Entry], Tensor | None]) -> None:
    """Write a file's header, then its tensors one by one as `value` gives them, on the CPU; none is kept."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard.entries:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": BY_TORCH[entry.dtype].file, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / shard.file).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in shard.entries:
            _append(file, entry, value(entry))


def _append(file: BinaryIO, entry: Entry, value: Tensor | None) -> None:
    assert value is not None and (tuple(value.shape), value.dtype) == (entry.shape, entry.dtype), entry.name
    file.write(value.contiguous().view(torch.uint8).numpy().data)  # numpy's tofile hides the reason of an error


def write_index(folder: Path, written: Sequence[Shard]) -> None:
    """Write the index of several files; one file needs none."""
    if len(written) == 1:
        return
    total = sum(entry.num_bytes for shard in written for entry in shard.entries)
    placed = {entry.name: shard.file for shard in written for entry in shard.entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def appearing(folder: Path, writes: bool = True) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which becomes it at the end: nobody ever sees a part of it.

    What was there before is replaced, and stays where the writing fails.

    writes: this rank is the one that writes; the others only get the name.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old"))
    if not writes:
        yield temporary
        return
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for rest in (temporary, old):  # of one that was killed
        shutil.rmtree(rest, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
