"""Batches as files: Parquet, one row per response, so that a step can be replayed and read by any data tool.

Rollouts of reinforcement learning (format 1):

| column | type | |
|---|---|---|
| group | int64 | the prompt's place in the step; its responses are consecutive rows |
| prompt_id | int64 | task number of the prompt |
| prompt_token, response_token | list of int64 | |
| finish | string | "stop" or "length" |
| reward | float | null until scored; NaN: no verdict |
| reward_parts | list of float, one per reward function | null until scored; NaN: no verdict |
| rollout_logprob, margin, ref_logprob, old_logprob | list of float, one per response token | null if not computed |

A supervised batch (format 2) has group, prompt_token, response_token, and learnt: list of bool, the loss mask of the
response tokens.

The schema's metadata hold the format's version and the weight version. P prompts, S responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dsm_train.megatron.parallel import Parallel
from dsm_train.types import Rollouts, Sequences, offsets

ROLLOUTS, SUPERVISED = "1", "2"
"""Versions of the format."""
_VERSION, _WEIGHTS = b"dsm_rollouts_version", b"dsm_weight_version"
_PER_TOKEN = ("rollout_logprob", "margin", "ref_logprob", "old_logprob")


@dataclass(frozen=True)
class SupervisedBatch:
    """Examples of one optimizer step of supervised training, of all data-parallel replicas."""

    sequences: Sequences
    learnt_T: Tensor
    """Loss mask of the response tokens, bool."""

    def take(self, index_S: Tensor) -> SupervisedBatch:
        """Select these examples, in this order."""
        return SupervisedBatch(self.sequences.take(index_S), self.learnt_T[self.sequences.rows_of(index_S)])


def write_rollouts(path: Path, rollouts: Rollouts, parallel: Parallel) -> None:
    """Write the rollouts of all data-parallel replicas, in the order of drawing, in one atomic rename. Collective."""
    replicas = parallel.gather_over_data(rollouts)
    if not parallel.is_main:
        return
    whole = Rollouts.concatenate(replicas)
    if not bool((whole.sequences.group_cu.diff() > 0).all()):
        raise ValueError("a prompt without responses cannot be written: every row is a response")
    # Questions were dealt out in turn: group g of replica r is number g * replicas + r.
    place = [g * len(replicas) + r for r, part in enumerate(replicas) for g in range(part.sequences.num_prompts)]
    whole = whole.take(whole.sequences.responses_of(torch.tensor(place, dtype=torch.int64).argsort()))
    _write(path, _to_table(whole), {_VERSION: ROLLOUTS, _WEIGHTS: str(whole.weight_version)})


def write_supervised(path: Path, batch: SupervisedBatch) -> None:
    """Write the batch in one atomic rename; on the main rank, as every rank holds it whole."""
    columns = _token_columns(batch.sequences) | {"learnt": _lists(batch.learnt_T, batch.sequences.response_cu)}
    _write(path, pa.table(columns), {_VERSION: SUPERVISED})


def _write(path: Path, table: pa.Table, metadata: Mapping[bytes, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, unfinished, compression="zstd", write_page_checksum=True)
    unfinished.replace(path)


def read_rollouts(path: Path) -> Rollouts:
    """Read what `write_rollouts` wrote, bit for bit.

    Raises `ValueError` for a file that is missing, damaged, or not written by it.
    """
    batch = read_batch(path)
    if isinstance(batch, SupervisedBatch):
        raise ValueError(f"batch {path} holds a supervised batch, no rollouts: record some with record={path}")
    return batch


def read_batch(path: Path) -> Rollouts | SupervisedBatch:
    """Read what `write_rollouts` or `write_supervised` wrote, bit for bit; raises as `read_rollouts`."""
    if not path.is_file():
        raise ValueError(f"batch {path} does not exist: record one with dsm-train grpo ... record={path}")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"batch {path} is damaged or no Parquet file ({reason}): record it anew") from error
    metadata = table.schema.metadata or {}
    version = metadata.get(_VERSION, b"").decode()
    if version not in (ROLLOUTS, SUPERVISED):
        known = f"{ROLLOUTS} or {SUPERVISED}"
        what = f"rollouts in format {version}, not {known}" if version else "no rollouts of this trainer"
        raise ValueError(f"batch {path} holds {what}: record it anew with dsm-train grpo ... record=FILE")
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    if version == SUPERVISED:
        return SupervisedBatch(_sequences(columns), _tensors(columns["learnt"])[0])
    return _to_rollouts(columns, int(metadata[_WEIGHTS]))


def _to_table(rollouts: Rollouts) -> pa.Table:
    sequences = rollouts.sequences
    columns = _token_columns(sequences)
    columns["prompt_id"] = pa.array(rollouts.prompt_id_P.long()[sequences.prompt_of_response_S].numpy())
    columns["finish"] = pa.array(np.where(rollouts.finished_S.numpy(), "stop", "length"), type=pa.string())
    reward_S = rollouts.reward_S
    columns["reward"] = (
        pa.nulls(sequences.num_responses, pa.float32()) if reward_S is None else pa.array(reward_S.numpy())
    )
    parts_SF = rollouts.reward_SF
    if parts_SF is None:
        columns["reward_parts"] = pa.nulls(sequences.num_responses, pa.list_(pa.float32()))
    else:
        columns["reward_parts"] = _lists(parts_SF.flatten(), offsets([parts_SF.shape[1]] * len(parts_SF)))
    for name in _PER_TOKEN:
        value_T: Tensor | None = getattr(rollouts, f"{name}_T")
        if value_T is not None and value_T.numel() == sequences.response_token_T.numel():
            columns[name] = _lists(value_T, sequences.response_cu)
        else:
            columns[name] = pa.nulls(sequences.num_responses, pa.list_(pa.float32()))
    return pa.table(columns)


def _token_columns(sequences: Sequences) -> dict[str, pa.Array]:
    prompt_S = pa.array(sequences.prompt_of_response_S.numpy())
    return {
        "group": prompt_S,
        "prompt_token": _lists(sequences.prompt_token, sequences.prompt_cu).take(prompt_S),
        "response_token": _lists(sequences.response_token_T, sequences.response_cu),
    }


def _sequences(columns: Mapping[str, pa.Array]) -> Sequences:
    group_cu = offsets(np.bincount(columns["group"].to_numpy()).tolist())
    prompt_token, prompt_cu = _tensors(columns["prompt_token"].take(_first_of_groups(group_cu)))
    response_token_T, response_cu = _tensors(columns["response_token"])
    return Sequences(prompt_token, prompt_cu, response_token_T, response_cu, group_cu)


def _first_of_groups(group_cu: Tensor) -> pa.Array:
    return pa.array(group_cu[:-1].numpy())


def _to_rollouts(columns: Mapping[str, pa.Array], weight_version: int) -> Rollouts:
    sequences = _sequences(columns)
    optional = (*_PER_TOKEN, "reward", "reward_parts")
    num_rows = sequences.num_responses
    present = [name for name in optional if name in columns and columns[name].null_count < num_rows]
    computed = {name: columns[name] for name in present}
    scored = {"reward_S": _tensor(computed.pop("reward"))} if "reward" in computed else {}
    if "reward_parts" in computed:
        parts, _ = _tensors(computed.pop("reward_parts"))
        scored["reward_SF"] = parts.view(num_rows, -1)
    return Rollouts(
        sequences=sequences,
        prompt_id_P=_tensor(columns["prompt_id"].take(_first_of_groups(sequences.group_cu))),
        finished_S=torch.from_numpy(columns["finish"].to_numpy(zero_copy_only=False) == "stop"),
        weight_version=weight_version,
        **scored,
        **{f"{name}_T": _tensors(column)[0] for name, column in computed.items()},
    )


def _lists(value_T: Tensor, cu: Tensor) -> pa.ListArray:
    """Split a packed tensor into a list per segment."""
    return pa.ListArray.from_arrays(pa.array(cu.numpy()), pa.array(value_T.numpy()))


def _tensor(column: pa.Array) -> Tensor:
    return torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())


def _tensors(column: pa.ListArray) -> tuple[Tensor, Tensor]:
    """Pack the values of a column of lists; returns their offsets as well."""
    return _tensor(column.flatten()), offsets(column.value_lengths().to_pylist())
