"""Types that weights are read and written in: a new one is a row here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

WeightsType = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Dtype:
    """A type by its names."""

    name: WeightsType
    """In our configuration."""
    config: str
    """In config.json."""
    file: str
    """In a safetensors file."""
    torch: torch.dtype


DTYPES = (
    Dtype("fp32", "float32", "F32", torch.float32),
    Dtype("bf16", "bfloat16", "BF16", torch.bfloat16),
    Dtype("fp16", "float16", "F16", torch.float16),
)
BY_NAME = {row.name: row for row in DTYPES}
BY_CONFIG = {row.config: row for row in DTYPES}
BY_FILE = {row.file: row for row in DTYPES}
BY_TORCH = {row.torch: row for row in DTYPES}
