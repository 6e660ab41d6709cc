"""Messages from the process that runs functions of the user's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Returned:
    """Values that a function returned, in the order of its completions; None where it gave no verdict."""

    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """Reason why there are none: one line."""

    reason: str
