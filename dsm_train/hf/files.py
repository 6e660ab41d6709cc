"""Weights in a folder: what its files hold, told from their headers alone, and slices of their tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dsm_train.hf.dtypes import BY_FILE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCKS, _BLOCK_BYTES = 64, 4096
"""Blocks of each file that tell weights apart: training changes them everywhere."""
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses longer ones too."""
_CONVERT = (
    'python -c "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "a, b = sys.argv[1:]; M.from_pretrained(a{extra}).save_pretrained(b); "
    'T.from_pretrained(a{extra}).save_pretrained(b)" {folder} NEW'
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: str
    """Type by its name in safetensors: F32, BF16, ..."""
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Read the headers of a folder's weights; raises `ValueError` for what is missing, cut off or damaged."""
    tensors: dict[str, Stored] = {}
    if (folder / WEIGHTS).is_file():
        return _read_header(folder / WEIGHTS)
    placed = _placed(folder)
    for name in sorted(set(placed.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no file {name}, which {INDEX} names: copy it again")
        tensors |= _read_header(folder / name)
    for name, file in placed.items():
        if name not in tensors:
            raise ValueError(f"{folder / file} has no weight {name}, which {INDEX} places there: copy both again")
    return tensors


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Read the types of a folder's tensors, of those that are read here."""
    return {
        name: BY_FILE[tensor.dtype].torch for name, tensor in stored_tensors(folder).items() if tensor.dtype in BY_FILE
    }


def weights_digest(folder: Path) -> str:
    """Hash the size of each file of a folder's weights, and blocks spread evenly over it: reading all takes minutes."""
    state = hashlib.blake2b(digest_size=8)
    for path in sorted({tensor.file for tensor in stored_tensors(folder).values()}):
        size = path.stat().st_size
        state.update(f"{path.name} {size} ".encode())
        with path.open("rb", buffering=0) as file:
            for number in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
                state.update(file.read(_BLOCK_BYTES))
    return state.hexdigest()


def _placed(folder: Path) -> dict[str, str]:
    """Read from the index which file holds each tensor."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(_no_weights(folder))
    try:
        placed = json.loads(path.read_text())["weight_map"]
        assert isinstance(placed, dict) and all(isinstance(file, str) for file in placed.values())
        return placed
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say which file holds which weight: copy it again") from error


def _no_weights(folder: Path) -> str:
    """Say what a folder holds instead of weights that can be read, and what to do."""
    if not folder.is_dir():
        return f"{folder} is no folder (nothing is downloaded): give a run's weights/ or a Hugging Face model"
    files = sorted(path.name for path in folder.iterdir())

    def with_end(*ends: str) -> str | None:
        return next((name for name in files if name.endswith(ends)), None)

    if name := with_end(".bin", ".pt", ".pth"):
        command = _CONVERT.format(folder=folder, extra="")
        return f"{folder} holds its weights as {name}, and safetensors are read here; convert it: {command}"
    if name := with_end(".gguf"):
        command = _CONVERT.format(folder=folder, extra=f", gguf_file='{name}'")
        return f"{folder} holds its weights as {name}, and safetensors are read here; convert it: {command}"
    if "adapter_config.json" in files:
        return f"{folder} holds an adapter, not a model: merge it into its model first"
    if name := with_end(".safetensors"):
        return f"{folder} holds {name} and no {INDEX}: copy the folder again"
    return f"{folder} holds no {WEIGHTS} (nor {INDEX}): give a run's weights/ or a Hugging Face model"


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= _LONGEST_HEADER:
            raise ValueError(f"{path} is no safetensors file: copy it again")
        header = file.read(length)
    if len(header) < length:
        raise ValueError(f"{path} is cut off: copy it again")
    try:
        described: dict[str, Any] = json.loads(header)
        described.pop("__metadata__", None)
        end = 8 + length + _num_bytes(described)
        tensors = {name: Stored(path, tensor["dtype"], tuple(tensor["shape"])) for name, tensor in described.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a damaged header: copy it again") from error
    if size != end:
        cut = "is cut off" if size < end else "is longer than its header says"
        raise ValueError(f"{path} {cut} ({size} bytes, and its header says {end}): copy it again")
    return tensors


def _num_bytes(described: Mapping[str, Any]) -> int:
    """Count the bytes that a header places; raises `ValueError` unless its tensors lie one behind the other, whole."""
    end = 0
    for name, tensor in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = tensor["data_offsets"]
        known = BY_FILE.get(tensor["dtype"])
        if begin != end or (known is not None and stop - begin != prod(tensor["shape"]) * known.torch.itemsize):
            raise ValueError(f"{name} lies elsewhere")
        end = stop
    return end


def check_tensor(name: str, stored: Stored, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` for a tensor of another shape than the model's, or of a type that is not read."""
    if stored.shape != shape:
        raise ValueError(f"weight {name} in {stored.file} has shape {list(stored.shape)}, the model {list(shape)}")
    if stored.dtype not in BY_FILE:
        raise ValueError(f"weight {name} in {stored.file} is {stored.dtype}, and {', '.join(BY_FILE)} are read here")


def check_tensors(
    folder: Path, stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], spare: Iterable[str] = ()
) -> None:
    """Raise `ValueError` unless the folder holds the tensors of the model, and no others.

    spare: names that may be there and are not read.
    """
    for name, shape in shapes.items():
        if name not in stored:
            raise ValueError(f"{folder} has no weight {name}; was it written for another config.json?")
        check_tensor(name, stored[name], shape)
    spare = set(spare)
    for name in stored:
        # Old files hold the rotary embedding's frequencies, which follow from config.json.
        if name not in shapes and name not in spare and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(
                f"{stored[name].file} has the weight {name}, which the model of its config.json does not have"
            )


class Reader:
    """Slices of a folder's tensors, mapped into memory: what is not asked for is not read.

    with Reader(folder) as reader:
        rows = reader.read("lm_head.weight", (151936, 896), 0, 0, 75968)
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors = folder, stored_tensors(folder)
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> Tensor:
        """Read the range of one dimension (None: all) of a tensor; raises `ValueError` where it is not this shape."""
        stored = self.tensors.get(name)
        if stored is None:
            raise ValueError(f"{self.folder} has no weight {name}; was it written for another config.json?")
        check_tensor(name, stored, shape)
        if stored.file not in self._files:
            self._files[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt"))
        part = self._files[stored.file].get_slice(name)
        return part[:] if dim is None else part[(*(slice(None),) * dim, slice(start, stop))]

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()
