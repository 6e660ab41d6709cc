"""A checkpoint counts only when every file is what was written."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path

import pytest
from damage import Damage, cut, flip
from test_place import PLACE

from dsm_train.checkpoint.find import Found, check, copy, named, newest, remove, unfinished
from dsm_train.checkpoint.place import FOLDER, STATE_FILE, SUMS, NewerFormat, checkpoints
from dsm_train.megatron.parallel import Parallel

FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "metadata.json", STATE_FILE)


def write(run: Path, step: int) -> Path:
    """Files as those of a checkpoint, and their checksums."""
    folder = run / FOLDER / f"{step:08}-grpo-{step}"
    folder.mkdir(parents=True)
    for name in FILES[:-1]:
        (folder / name).write_bytes(name.encode() * 100)
    PLACE.write(folder)
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut_last_line(folder: Path) -> None:
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if "__1_0" not in line))


def test_a_whole_checkpoint_is_found(tmp_path: Path, layout: Parallel) -> None:
    folder = write(tmp_path, 3)
    assert check(folder, layout) == PLACE
    (folder / ".nfs0001").touch()
    found = newest(tmp_path, layout)
    assert found is not None and (found.folder, found.place, found.skipped) == (folder, PLACE, ())
    assert named(folder, layout) == named(tmp_path, layout) == named(tmp_path / FOLDER, layout) == found


@pytest.mark.parametrize("name", FILES)
def test_one_bit_is_noticed_in_every_file(name: str, tmp_path: Path, layout: Parallel) -> None:
    for at in (0.0, 0.5, 1.0):
        folder = write(tmp_path / str(at), 1)
        flip(name, at)(folder)
        with pytest.raises(ValueError, match=f"^{name} is damaged or cut off: its checksum in SHA256SUMS is another$"):
            check(folder, layout)


@pytest.mark.parametrize("at", [0.0, 0.1, 0.16, 0.2, 0.9, 1.0])
def test_one_bit_of_the_checksums_is_noticed(at: float, tmp_path: Path, layout: Parallel) -> None:
    folder = write(tmp_path, 1)
    flip(SUMS, at)(folder)
    with pytest.raises(ValueError, match=r"^\S+ is (damaged|missing|cut off)"):
        check(folder, layout)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        *[(cut(name), f"{name} is damaged or cut off") for name in FILES],
        *[(cut(name, 0), f"{name} is damaged or cut off") for name in FILES],
        *[(gone(name), f"{name} is missing") for name in (*FILES, SUMS)],
        (cut(SUMS, 100), "SHA256SUMS is cut off"),
        (cut(SUMS, 0), "SHA256SUMS does not name __0_0.distcp"),
        (cut_last_line, "SHA256SUMS does not name __1_0.distcp"),
        (lambda folder: (folder / SUMS).write_bytes(b"\xff" * 90), "SHA256SUMS is damaged"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "SHA256SUMS is missing"),
    ],
)
def test_what_is_cut_off_or_missing_is_named(damage: Damage, reason: str, tmp_path: Path, layout: Parallel) -> None:
    folder = write(tmp_path, 1)
    damage(folder)
    with pytest.raises(ValueError, match=f"^({reason})"):
        check(folder, layout)
    with pytest.raises(ValueError, match=f"^no checkpoint of {tmp_path} is whole .*run.resume=never"):
        newest(tmp_path, layout)


def test_the_newest_that_is_whole_is_taken_and_the_others_are_named(tmp_path: Path, layout: Parallel) -> None:
    first, second, third = (write(tmp_path, step) for step in (9, 10, 11))
    writing = tmp_path / FOLDER / ".00000012-grpo-12.writing"
    writing.mkdir()
    gone(SUMS)(third)
    cut("common.pt")(second)
    found = newest(tmp_path, layout)
    assert found is not None and found.folder == first
    names = (f"skipped {writing}: it was being written", f"skipped {third}: SHA256SUMS", f"skipped {second}: common.pt")
    assert len(found.skipped) == 3
    assert all(line.startswith(name) for line, name in zip(found.skipped, names, strict=True))
    assert checkpoints(tmp_path) == [first, second, third] and unfinished(tmp_path) == [writing]


def test_a_newer_format_is_never_passed_over(tmp_path: Path, layout: Parallel) -> None:
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    (folder / STATE_FILE).write_text((folder / STATE_FILE).read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="damaged"):  # one bit could say so
        check(folder, layout)
    seal(folder)
    for find in (lambda: newest(tmp_path, layout), lambda: named(folder, layout)):
        with pytest.raises(NewerFormat, match="in format 2, and this dsm .* reads format 1"):
            find()


def test_there_may_be_none(tmp_path: Path, layout: Parallel) -> None:
    assert newest(tmp_path, layout) is None and checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="is neither a checkpoint nor a run with checkpoints/: name one of them"):
        named(tmp_path, layout)
    with pytest.raises(ValueError, match="is no folder: name a checkpoint, a run's folder, auto or never"):
        named(tmp_path / "gone", layout)
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(ValueError, match="is a run without checkpoints"):
        named(tmp_path, layout)


def test_a_checkpoint_that_is_half_removed_is_none(tmp_path: Path, layout: Parallel) -> None:
    folder = write(tmp_path, 1)
    remove(folder)
    remove(folder)  # there is nothing left to remove
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_copied_checkpoint_is_whole_without_the_one_that_it_is_of(
    links: bool, tmp_path: Path, layout: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "old", 3).rename(tmp_path / "old" / "mine")  # the user may have renamed it
    if not links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EXDEV, "another disk")

        monkeypatch.setattr("os.link", refuse)
    copy(Found(source, PLACE), tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    (copied,) = checkpoints(tmp_path / "new")
    assert copied.name == PLACE.name and check(copied, layout) == PLACE and not unfinished(tmp_path / "new")
