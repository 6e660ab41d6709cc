"""The place of a run comes back as it was written, and nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from dsm_train.checkpoint.place import STATE_FILE, NewerFormat, Place

PLACE = Place(
    loop="grpo",
    step=7,
    steps=20,
    total=107,
    models=("policy", "reference"),
    identity={"steps": "20"},
    metrics_bytes=10,
    samples_bytes=0,
    seconds=1.5,
    results={"before": {"accuracy": 0.25}},
    counts={"flat": 1, "trouble": None},
    last={"reward": 0.1, "kl": None},
    best=0.1 + 0.2,
    best_folder="00000104-grpo-4",
)


def write(folder: Path, **change: object) -> None:
    values = {name: value for name, value in (asdict(PLACE) | change).items() if value is not ...}
    (folder / STATE_FILE).write_text(json.dumps(values))


def test_a_place_comes_back_as_it_was_written(tmp_path: Path) -> None:
    PLACE.write(tmp_path)
    assert Place.read(tmp_path) == PLACE and PLACE.name == "00000107-grpo-7"


def test_keys_of_later_versions_of_this_format_are_no_matter(tmp_path: Path) -> None:
    write(tmp_path, mood="good", seconds=2)
    assert Place.read(tmp_path).seconds == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": ...}, "has no step"),
        ({"step": "7"}, "has step = '7'"),
        ({"step": True}, "has step = True"),
        ({"step": 7.5}, "has step = 7.5"),
        ({"models": "policy"}, "has models = 'policy'"),
        ({"identity": None}, "has identity = None"),
        ({"best": "high"}, "has best = 'high'"),
        ({"format": None}, "is not the state of a run in JSON"),
        ({"format": ...}, "is not the state of a run in JSON"),
    ],
)
def test_a_value_that_lacks_or_is_of_another_type_is_named(change: dict, words: str, tmp_path: Path) -> None:
    write(tmp_path, **change)
    with pytest.raises(ValueError, match=f"^state.json {words}"):
        Place.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00\x00"])
def test_what_is_no_json_object_is_no_place(text: str, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match="^state.json is not the state of a run in JSON"):
        Place.read(tmp_path)


def test_a_missing_file_and_a_newer_format_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^state.json is missing"):
        Place.read(tmp_path)
    write(tmp_path, format=2, version="9.9", step=...)
    with pytest.raises(NewerFormat, match="by dsm 9.9, in format 2, .* reads format 1: continue with that version"):
        Place.read(tmp_path)
