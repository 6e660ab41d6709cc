"""The begin of a run: anew, or where a checkpoint stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsm_train.checkpoint.find import Found, copy, named, newest, remove, unfinished
from dsm_train.checkpoint.identity import differing, rounding, to_tell, told
from dsm_train.checkpoint.place import checkpoints
from dsm_train.config import RunConfig
from dsm_train.megatron.parallel import Parallel
from dsm_train.reporting.folder import ROLLOUTS, STATE, RunFolder


@dataclass(frozen=True)
class Origin:
    """Begin of a run."""

    identity: Mapping[str, str]
    """Identity of the run, on all ranks the same."""
    found: Found | None = None
    """Checkpoint to continue from; None: the run begins at its first step."""
    same: bool = False
    """True when the run that the folder holds is continued or begun again: its recorded rollouts are this run's."""
    notes: tuple[str, ...] = ()
    named: str | None = None
    """Folder that run.resume named, where the run began."""


@dataclass(frozen=True)
class _Holds:
    """Run that the folder holds."""

    path: Path
    unfinished: bool
    identity: Mapping[str, str]
    named: str | None
    """Folder that it was continued from."""


def choose(
    run: RunConfig, folder: RunFolder | None, identity: Mapping[str, str], parallel: Parallel, *, shared: bool = True
) -> Origin:
    """Choose where the run begins, as run.resume says; folder: the main rank's. Collective.

    shared: all ranks will write to the folder, and have to see it.
    Raises `ValueError` on all ranks for a run of another configuration, and for checkpoints of which none is whole.
    """
    holds = None if folder is None else _Holds(folder.path, folder.unfinished, folder.identity, folder.named)
    holds, restarted = parallel.from_main((holds, folder is not None and folder.is_restarted))
    assert holds is not None
    if shared:
        _check_shared(holds.path, parallel)
    if run.resume == "never" and not restarted:
        aside = (f"the unfinished run in {holds.path} is moved aside",) if holds.unfinished else ()
        return Origin(identity, notes=aside)
    if run.resume in ("auto", "never"):
        return _newest(holds, identity, parallel, run.overwrite)
    named_as = parallel.from_main(str(Path(run.resume).resolve()))
    if holds.unfinished and holds.named == named_as:  # the same command again: it has begun there already
        origin = _newest(holds, identity, parallel, overwrite=False)
        if origin.found is not None:
            return origin
    return _named(Path(run.resume), named_as, holds, identity, parallel)


def _newest(holds: _Holds, identity: Mapping[str, str], parallel: Parallel, overwrite: bool) -> Origin:
    """Continue the run that the folder holds from its newest checkpoint; without one it begins again."""
    path, then, found = holds.path, holds.identity, None
    if not holds.unfinished:
        return Origin(identity)
    if not then:  # run.json is damaged, or was not copied along
        found = newest(path, parallel)
        if found is None:
            note = f"the unfinished run in {path} does not say how it was configured, and is moved aside"
            return Origin(identity, notes=(note,))
        then = found.place.identity
    if overwrite and differing(then, identity):
        return Origin(identity, notes=(f"the unfinished run in {path} had another configuration, and is moved aside",))
    remedy = "set them back, choose another run.out, or begin anew with run.resume=never, which moves that run aside"
    _check_same(f"run.out: {path} holds an unfinished run of", then, identity, remedy)
    found = found or newest(path, parallel)
    if found is None:
        note = f"the unfinished run in {path} has no checkpoint yet: it begins again, and its records are moved aside"
        return Origin(identity, same=True, notes=(note,))
    return Origin(identity, found, True, _notes(found, identity), holds.named)


def _named(path: Path, named_as: str, holds: _Holds, identity: Mapping[str, str], parallel: Parallel) -> Origin:
    """Continue from where the user says, in the folder of that run or in another."""
    found = named(path, parallel)
    source = found.folder.parent.parent
    weights, same = parallel.from_main(((source / "weights").is_dir(), source.resolve() == holds.path.resolve()))
    remedy = f"set them back, or begin a run from its weights with run.init={source / 'weights'}"
    remedy = remedy if weights else "set them back, or choose another checkpoint"
    _check_same(f"run.resume = {path} is of", found.place.identity, identity, remedy)
    if holds.unfinished and not same and holds.named != named_as:
        raise ValueError(
            f"run.out: {holds.path} holds an unfinished run, and run.resume = {path} is of another: choose another "
            "run.out"
        )
    return Origin(identity, found, same, _notes(found, identity), named_as)


def begin(folder: RunFolder, origin: Origin, **state: Any) -> list[str]:
    """Prepare the folder for the run that begins; for the main rank. Returns lines for the user."""
    state |= {"identity": dict(origin.identity), "named": origin.named}
    for path in unfinished(folder.path):  # the disk may have become full of it
        remove(path)
    if origin.found is None:
        folder.begin(keep=(ROLLOUTS,) if origin.same else (), **state)
        return list(origin.notes)
    place, source = origin.found.place, origin.found.folder.parent.parent
    if origin.same:
        for path in origin.found.damaged:  # they are none to keep
            aside = path.with_name(f"damaged-{path.name}")
            remove(aside)
            path.rename(aside)
        for path in checkpoints(folder.path):  # where the user went back; before the records that they count on
            if path.name > place.name:
                remove(path)
        return [*origin.notes, *folder.resume(place.metrics_bytes, place.samples_bytes, **state)]
    notes = folder.resume(place.metrics_bytes, place.samples_bytes, source, **state)
    copy(origin.found, folder.path)  # the new run needs the old one no more
    return [*origin.notes, *notes]


def _notes(found: Found, now: Mapping[str, str]) -> tuple[str, ...]:
    then = found.place.identity
    keys = rounding(then, now)
    lines = [*found.skipped, f"continued from {found.folder}: {found.place}"]
    if keys:
        lines.append(f"equal to rounding to a run that was not interrupted, not bit for bit: {told(keys, then, now)}")
    if keys := to_tell(then, now):
        lines.append(f"changed since the checkpoint, and valid from here on: {told(keys, then, now)}")
    return tuple(lines)


def _check_same(whose: str, then: Mapping[str, str], now: Mapping[str, str], remedy: str) -> None:
    keys = differing(then, now)
    if keys:
        raise ValueError(f"{whose} another configuration ({told(keys, then, now)}): {remedy}")


def _check_shared(path: Path, parallel: Parallel) -> None:
    """Raise `ValueError` unless all ranks see the run's folder, as each writes its part of a checkpoint."""
    sees = parallel.gather_over_ranks((path / STATE).exists())
    if not all(sees):
        raise ValueError(
            f"run.out: rank {sees.index(False)} does not see {path.absolute()}, where every rank writes its part of a "
            "checkpoint: choose a folder on a disk that all nodes share, or turn checkpoints off with "
            "checkpoint.every_minutes=null"
        )
