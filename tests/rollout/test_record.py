"""Recorded rollouts: what is read is what was written, bit for bit; what cannot be read is said in one line."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from dsm_train.megatron.parallel import Parallel
from dsm_train.prepare import check_record
from dsm_train.rollout.record import SupervisedBatch, read_batch, read_rollouts, write_rollouts, write_supervised
from dsm_train.types import Rollouts, Sequences, offsets


def rollouts() -> Rollouts:
    """Two groups of unequal size, a response without tokens, and values that do not survive rounding."""
    sequences = Sequences(
        torch.tensor([5, 6, 7, 2**40]),
        offsets([1, 3]),
        torch.arange(6),
        offsets([3, 0, 1, 2]),
        offsets([1, 3]),
    )
    value_T = torch.tensor([-0.0, 1e-45, -3.4e38, 0.1, float("inf"), -1 / 3])
    return Rollouts(
        sequences,
        prompt_id_P=torch.tensor([31, -4]),
        rollout_logprob_T=value_T,
        margin_T=value_T.flip(0),
        finished_S=torch.tensor([True, False, True, True]),
        weight_version=17,
        reward_S=torch.tensor([0.1, torch.nan, -0.0, 1e-45]),
        reward_SF=torch.tensor([[0.1, 1.0], [torch.nan, 1.0], [-0.0, 0.5], [1e-45, -1.0]]),
        ref_logprob_T=value_T * 0.3,
        old_logprob_T=value_T * 0.7,
    )


def assert_same(one: object, other: object) -> None:
    """Every field equal, tensors bit for bit and in type."""
    for field in fields(one):  # type: ignore[arg-type]
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, field.name
            assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)), field.name
        elif isinstance(a, Sequences):
            assert_same(a, b)
        else:
            assert a == b, field.name


def test_round_trip_is_bitwise(tmp_path: Path, layout: Parallel) -> None:
    write_rollouts(tmp_path / "new" / "step.parquet", rollouts(), layout)
    assert_same(read_rollouts(tmp_path / "new" / "step.parquet"), rollouts())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step.parquet"]  # nothing unfinished is left


def test_a_supervised_batch_is_read_as_it_was_written(tmp_path: Path) -> None:
    learnt_T = torch.tensor([True, False, True, True, False, True])
    batch = SupervisedBatch(Sequences.from_lists([[5], [6, 7], [2**40]], [[1, 2, 3], [4], [5, 6]]), learnt_T)
    path = tmp_path / "new" / "step.parquet"
    write_supervised(path, batch)
    read = read_batch(path)
    assert isinstance(read, SupervisedBatch)
    assert_same(read, batch)
    assert pq.read_table(path).to_pylist()[2] == {
        "group": 2, "prompt_token": [2**40], "response_token": [5, 6], "learnt": [False, True],
    }  # fmt: skip
    assert batch.take(torch.tensor([2, 0])).learnt_T.equal(learnt_T[[4, 5, 0, 1, 2]])
    with pytest.raises(ValueError, match="holds a supervised batch, no rollouts: record some with"):
        read_rollouts(path)


def test_what_was_never_computed_stays_so(tmp_path: Path, layout: Parallel) -> None:
    bare = replace(rollouts(), reward_S=None, reward_SF=None, ref_logprob_T=None, old_logprob_T=None)
    write_rollouts(tmp_path / "step.parquet", bare, layout)
    assert_same(read_rollouts(tmp_path / "step.parquet"), bare)


def test_other_tools_read_it(tmp_path: Path, layout: Parallel) -> None:
    write_rollouts(tmp_path / "step.parquet", rollouts(), layout)
    rows = pq.read_table(tmp_path / "step.parquet").to_pylist()
    assert [row["group"] for row in rows] == [0, 1, 1, 1]
    assert rows[3]["prompt_token"] == [6, 7, 2**40] and rows[3]["response_token"] == [4, 5]
    assert [row["finish"] for row in rows] == ["stop", "length", "stop", "stop"]


def test_a_prompt_without_responses_is_refused(tmp_path: Path, layout: Parallel) -> None:
    sequences = replace(rollouts().sequences, group_cu=offsets([0, 4]))
    with pytest.raises(ValueError, match="a prompt without responses"):
        write_rollouts(tmp_path / "step.parquet", replace(rollouts(), sequences=sequences), layout)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read(tmp_path: Path, layout: Parallel) -> None:
    path = tmp_path / "step.parquet"
    with pytest.raises(ValueError, match=r"^batch .*step.parquet does not exist: record one with"):
        read_rollouts(path)
    write_rollouts(path, rollouts(), layout)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[200] ^= 1  # a bit within the data: only the page's checksum tells
    for content in (whole[: len(whole) // 2], b"", b"{}", whole[:4] + whole[60:], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or no Parquet file") as error:
            read_rollouts(path)
        assert len(str(error.value).splitlines()) == 1
    table = pa.table({"x": [1, 2]})
    pq.write_table(table, path)
    with pytest.raises(ValueError, match="holds no rollouts of this trainer: record it anew"):
        read_rollouts(path)
    pq.write_table(table.replace_schema_metadata({"dsm_rollouts_version": "9"}), path)
    with pytest.raises(ValueError, match="holds rollouts in format 9, not 1"):
        read_rollouts(path)


def test_a_place_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_record(tmp_path / "new" / "step.parquet")
    with pytest.raises(ValueError, match=r"is a folder: name a file, such as"):
        check_record(tmp_path)
    with pytest.raises(ValueError, match="cannot write"):
        check_record(tmp_path / "file" / "step.parquet")
