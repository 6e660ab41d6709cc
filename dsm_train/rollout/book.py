"""Record of the rollouts since the last checkpoint: a step that was interrupted does not sample them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dsm_train.data.tasks import Task
from dsm_train.megatron.parallel import Parallel
from dsm_train.rollout.record import read_rollouts, write_rollouts
from dsm_train.types import Rollouts


class Book:
    """Rollouts of each step in a file of its own, in a folder that all ranks see; all methods are collective."""

    def __init__(self, folder: Path, parallel: Parallel, saved: Callable[[], int]) -> None:
        """saved: steps whose outcome a checkpoint holds."""
        self._folder, self._parallel, self._saved = folder, parallel, saved
        files = [path for path in folder.glob("*.parquet") if path.stem.isdigit()]
        self._steps: set[int] = set(parallel.from_main({int(path.stem) for path in files}))

    def keep(self, step: int, rollouts: Rollouts) -> None:
        """Record the rollouts of step `step`, in place of what was recorded of it; those of saved steps go."""
        write_rollouts(self._file(step), rollouts, self._parallel)
        self._steps.add(step)
        self._remove({step for step in self._steps if step < self._saved()})

    def find(self, step: int, tasks: Sequence[Task], weight_version: int) -> Rollouts | None:
        """Return this replica's rollouts of step `step`; None where none of these tasks and weights were recorded.

        Those of later steps go then: they follow from other rollouts of this one.
        """
        found = self._read(step, tasks, weight_version) if step in self._steps else None
        if found is None:
            self._remove({later for later in self._steps if later > step})
        return found

    def _remove(self, steps: set[int]) -> None:
        self._steps -= steps
        if self._parallel.is_main:
            for step in steps:
                self._file(step).unlink(missing_ok=True)

    def _read(self, step: int, tasks: Sequence[Task], weight_version: int) -> Rollouts | None:
        try:
            whole, reason = read_rollouts(self._file(step)), None
        except ValueError as error:
            whole, reason = None, str(error)
        if any(self._parallel.gather_over_ranks(reason)) or whole is None or whole.weight_version != weight_version:
            return None
        mine = torch.tensor(self._parallel.share(range(whole.sequences.num_prompts)), dtype=torch.int64)
        rollouts = whole.take(whole.sequences.responses_of(mine))
        alike = rollouts.prompt_id_P.tolist() == [task.id for task in tasks]
        return rollouts if all(self._parallel.gather_over_data(alike)) else None

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}.parquet"
