"""Keys that make another run, keys that change rounding, and keys that may change."""

from __future__ import annotations

import pytest

from dsm_train.checkpoint.identity import FREE, ROUNDING, TOLD, differing, rounding, to_tell, told
from dsm_train.cli import fingerprint
from dsm_train.configs import GrpoConfig, SftConfig

NOW = fingerprint(GrpoConfig(), "tasks", "tokenizer", "1.0") | {"the digest of the weights": "none"}


def classes(key: str) -> tuple[bool, bool, bool]:
    then = NOW | {key: "another"}
    return bool(differing(then, NOW)), bool(rounding(then, NOW)), bool(to_tell(then, NOW))


def test_each_key_is_of_one_class() -> None:
    assert all(sum(classes(key)) <= 1 for key in NOW)
    assert [key for key in NOW if sum(classes(key)) == 0] == [
        "run.out", "run.overwrite", "run.resume", "run.init", "run.weights_dtype", "run.threads",
        "parallel.timeout_minutes", "data.path", "data.heldout_path", "data.tokenizer", "eval.samples",
        "checkpoint.every", "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.best", "checkpoint.best_is",
        "record", "record_step",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "key",
    ["steps", "run.seed", "eval.every", "eval.tasks", "model.dtype", "optim.lr", "rewards.functions",
     "algorithm.reference_every", "data.weights", "the digest of the tasks", "the digest of the weights"],
)  # fmt: skip
def test_a_key_that_changes_metrics_or_weights_makes_another_run(key: str) -> None:
    assert key in NOW and classes(key) == (True, False, False)


@pytest.mark.parametrize("key", ["parallel.tp", "parallel.distributed_optimizer", "run.max_tokens", "sampling.batch"])
def test_a_key_of_the_layout_changes_rounding(key: str) -> None:
    assert key in NOW and classes(key) == (False, True, False)


def test_every_key_of_the_lists_is_one_of_a_stage() -> None:
    known = {*NOW, *fingerprint(SftConfig(), "", "", "")}
    for name in (*FREE, *TOLD, *ROUNDING):
        assert name.startswith("the ") or any(key.startswith(name) for key in known), name


def test_a_file_may_lie_elsewhere_as_long_as_its_contents_are_the_same() -> None:
    moved = NOW | {"run.init": "/moved", "data.path": "['moved.jsonl']"}
    assert differing(NOW, moved) == []
    assert differing(NOW, moved | {"the digest of the tasks": "other"}) == ["data.path", "the digest of the tasks"]


def test_both_values_are_told_of_a_few_keys() -> None:
    then, now = {f"key{n}": "1" for n in range(6)}, {f"key{n}": "2" for n in range(1, 7)}
    assert told(["key0", "key1", "key6"], then, now) == (
        "key0 was 1, and is not there; key1 was 1, and is 2; key6 was not there, and is 2"
    )
    assert told([f"key{n}" for n in range(6)], then, now).endswith("key3 was 1, and is 2; 2 more")
