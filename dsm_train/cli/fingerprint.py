"""Fingerprint of a run, alike on all ranks, and the rank and key that differ where it is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsm_train.cli.load import plain


def digest(texts: Iterable[str]) -> str:
    """Hash texts in their order; where one ends and the next begins counts."""
    state = hashlib.blake2b(digest_size=8)
    for text in texts:
        encoded = text.encode()
        state.update(len(encoded).to_bytes(8, "little") + encoded)
    return state.hexdigest()


def fingerprint(config: Any, tasks: str, tokenizer: str, version: str) -> dict[str, str]:
    """Write down every value of the configuration by its key, digests of tasks and tokenizer, and the version."""
    return {
        "the version": version,
        **_values(plain(config), ""),
        "the digest of the tasks": tasks,
        "the digest of the tokenizer": tokenizer,
    }


def check_alike(ranks: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError for the first rank whose fingerprint is not that of rank 0, with the keys that differ."""
    first = ranks[0]
    for rank, other in enumerate(ranks):
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if keys:
            shown = [f"{key} = {other.get(key, 'nothing')} and rank 0 {first.get(key, 'nothing')}" for key in keys[:3]]
            more = f"; {len(keys) - 3} more keys differ" if len(keys) > 3 else ""
            raise ValueError(
                f"rank {rank} has {'; '.join(shown)}{more}: start every rank with the same command, code and data"
            )


def _values(section: Mapping[str, Any], prefix: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            values |= _values(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = str(value)
    return values
