"""Damage to a file of a folder, such as disks and copies do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], object]


def flip(name: str, at: float = 0.5) -> Damage:
    """Flip a bit of a file, so far into it."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        (folder / name).write_bytes(data)

    return damage


def cut(name: str, to: int = -1) -> Damage:
    """Cut a file off behind so many bytes; -1: all but the last."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:to])
