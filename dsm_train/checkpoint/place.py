"""Place of a run when a checkpoint was written: the file state.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dsm_train import __version__

STATE_FILE, SUMS, FORMAT = "state.json", "SHA256SUMS", 1
FOLDER = "checkpoints"
"""Folder of a run's checkpoints, within that of the run."""


def checkpoints(run: Path) -> list[Path]:
    """List a run's checkpoints that were finished, the oldest first; whole or not."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[:1].isdigit())


@dataclass(frozen=True)
class Place:
    """Place of a run between two steps, and what cannot be computed again from there."""

    loop: str
    """Label of the loop, such as grpo."""
    step: int
    """Steps of it that are done."""
    steps: int
    """Steps of it in all."""
    total: int
    """Steps done, those of earlier loops as well."""
    models: tuple[str, ...]
    """Names of the models in the checkpoint; one that is not there has its initial weights."""
    identity: Mapping[str, str]
    """Configuration, data, tokenizer, initial weights and versions, by key."""
    metrics_bytes: int
    """Size of metrics.jsonl."""
    samples_bytes: int
    """Size of samples.jsonl."""
    seconds: float
    """Time that the run had taken."""
    results: Mapping[str, Any]
    """Values that the stage computes once."""
    counts: Mapping[str, Any]
    """Counters of the loop."""
    last: Mapping[str, float | None]
    """Metrics of the step; None: not a number."""
    best: float | None = None
    """Best value so far of the metric that checkpoint.best names."""
    best_folder: str | None = None
    """Name of the checkpoint that has it."""
    time: str = ""
    version: str = __version__
    """Version of dsm that wrote it."""
    format: int = FORMAT

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder; in alphabetical order they are in that of writing."""
        return f"{self.total:08}-{self.loop}-{self.step}"

    def __str__(self) -> str:
        return f"step {self.step} of {self.steps} of {self.loop}"

    def write(self, folder: Path) -> None:
        """Write the file."""
        (folder / STATE_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Place:
        """Read what `write` wrote; raises `ValueError` with the reason for what it did not, or a later version did."""
        try:
            values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            number = int(values["format"])
        except FileNotFoundError as error:
            raise ValueError(f"{STATE_FILE} is missing") from error
        except OSError as error:
            raise ValueError(f"{STATE_FILE} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{STATE_FILE} is not the state of a run in JSON") from error
        if number > FORMAT:
            raise NewerFormat(
                f"checkpoint {folder} was written by dsm {values.get('version')}, in format {number}, and this dsm "
                f"{__version__} reads format {FORMAT}: continue with that version, or choose another run.out"
            )
        known: dict[str, Any] = {}
        for item in fields(cls):
            if item.name not in values:
                raise ValueError(f"{STATE_FILE} has no {item.name}")
            value = known[item.name] = values[item.name]
            if not isinstance(value, _JSON[str(item.type)]) or isinstance(value, bool):
                raise ValueError(f"{STATE_FILE} has {item.name} = {value!r}")
        known["models"] = tuple(known["models"])
        return cls(**known)


_JSON: dict[str, Any] = {
    "str": str,
    "str | None": str | None,
    "int": int,
    "float": int | float,
    "float | None": int | float | None,
    "tuple[str, ...]": list,
    "Mapping[str, str]": dict,
    "Mapping[str, Any]": dict,
    "Mapping[str, float | None]": dict,
}
"""Types of a value by that of the field, as it stands above."""


class NewerFormat(ValueError):
    """Checkpoint of a later version: whole, and not to be passed over."""
