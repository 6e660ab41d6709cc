"""The checkpoint to continue from: the newest that is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsm_train.checkpoint.place import FOLDER, STATE_FILE, SUMS, NewerFormat, Place, checkpoints
from dsm_train.megatron.checkpoint import sha256
from dsm_train.megatron.parallel import Parallel

MODEL = "model"
"""Folder beside them that describes their model: config.json, tokenizer and the like, all but weights."""
WRITING = ".writing"
"""End of the name of one that is not finished; its begin is a dot."""


@dataclass(frozen=True)
class Found:
    """Checkpoint that is whole."""

    folder: Path
    place: Place
    skipped: tuple[str, ...] = ()
    """Lines about newer ones that are not whole."""
    damaged: tuple[Path, ...] = ()
    """Folders of newer ones that were finished once, and are not whole."""


def unfinished(run: Path) -> list[Path]:
    """List what was being written when a run ended."""
    return sorted((run / FOLDER).glob(f".*{WRITING}"))


def newest(run: Path, parallel: Parallel) -> Found | None:
    """Find the newest checkpoint of a run that is whole; None where there is none at all. Collective.

    Raises `ValueError` when there are checkpoints and none is whole, or one is of a later version.
    """
    candidates, begun = parallel.from_main((checkpoints(run), unfinished(run)))
    skipped, damaged = [f"skipped {path}: it was being written when the run ended" for path in begun], []
    for folder in reversed(candidates):
        try:
            place = check(folder, parallel)
        except NewerFormat:
            raise
        except ValueError as error:
            skipped.append(f"skipped {folder}: {error}")
            damaged.append(folder)
            continue
        return Found(folder, place, tuple(skipped), tuple(damaged))
    if candidates:
        raise ValueError(
            f"no checkpoint of {run} is whole ({'; '.join(skipped)}): begin anew with run.resume=never, which moves "
            "that run aside"
        )
    return None


def named(path: Path, parallel: Parallel) -> Found:
    """Find the checkpoint that the user named: its folder, or that of a run, of which the newest is taken. Collective.

    Raises `ValueError` for a folder that is neither, or not whole.
    """
    if path.name == FOLDER and not (path / FOLDER).exists():
        path = path.parent
    exists, is_run, is_checkpoint = parallel.from_main(
        (path.is_dir(), (path / FOLDER).is_dir(), any((path / name).exists() for name in (STATE_FILE, SUMS)))
    )
    if not exists:
        raise ValueError(f"run.resume = {path} is no folder: name a checkpoint, a run's folder, auto or never")
    if is_run:
        found = newest(path, parallel)
        if found is None:
            raise ValueError(f"run.resume = {path} is a run without checkpoints: give it no run.resume to begin anew")
        return found
    if not is_checkpoint:
        raise ValueError(
            f"run.resume = {path} is neither a checkpoint nor a run with {FOLDER}/: name one of them, auto or never"
        )
    try:
        return Found(path, check(path, parallel))
    except NewerFormat:
        raise
    except ValueError as error:
        raise ValueError(f"run.resume = {path} is damaged ({error}): name another checkpoint, or the run") from error


def check(folder: Path, parallel: Parallel) -> Place:
    """Read a checkpoint's place, and compare every file with its checksum; ranks share them out. Collective.

    Raises `ValueError` on all ranks with what is wrong.
    """
    place, reason = None, None
    try:
        sums = _read_sums(folder)
        _compare(folder, STATE_FILE, sums)  # before it is believed
        place = Place.read(folder)
        for name in sorted(sums)[parallel.rank :: parallel.world_size]:
            parallel.watchdog.beat()
            _compare(folder, name, sums)
    except ValueError as error:
        reason = error
    reasons = [found for found in parallel.gather_over_ranks(reason) if found is not None]
    if reasons:
        raise reasons[0] if isinstance(reasons[0], NewerFormat) else ValueError(str(reasons[0]))
    assert place is not None
    return place


def _read_sums(folder: Path) -> dict[str, str]:
    """Read the checksum of every file by its name; `ValueError` where files and names are not the same."""
    try:
        *lines, rest = (folder / SUMS).read_text(encoding="utf-8").split("\n")
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        there = {path.name for path in folder.iterdir()} - {SUMS}
    except FileNotFoundError:
        raise ValueError(f"{SUMS} is missing") from None
    except OSError as error:
        raise ValueError(f"{SUMS} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{SUMS} is damaged") from None
    if rest:
        raise ValueError(f"{SUMS} is cut off")
    for name in (STATE_FILE, *sorted(sums)):
        if name not in there:
            raise ValueError(f"{name} is missing")
    for name in sorted(there - set(sums)):
        if not name.startswith("."):  # file systems leave files of their own
            raise ValueError(f"{SUMS} does not name {name}")
    return sums


def _compare(folder: Path, name: str, sums: Mapping[str, str]) -> None:
    try:
        digest = sha256(folder / name)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    if digest != sums[name]:
        raise ValueError(f"{name} is damaged or cut off: its checksum in {SUMS} is another")


def copy(found: Found, run: Path) -> None:
    """Copy a checkpoint to another run's folder, without its bytes where both are on one disk; whole or not at all."""
    target = run / FOLDER / found.place.name  # the user may have renamed it
    writing = target.with_name(f".{target.name}{WRITING}")
    remove(writing)
    try:
        shutil.copytree(found.folder, writing, copy_function=os.link)
    except OSError:  # another disk, or one without links
        remove(writing)
        shutil.copytree(found.folder, writing)
    writing.rename(target)


def remove(folder: Path) -> None:
    """Remove a checkpoint; half of it is none: the checksums go first."""
    (folder / SUMS).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
