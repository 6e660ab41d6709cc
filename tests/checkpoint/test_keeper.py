"""Which checkpoints stay: the newest, and the best."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
import tiny

from dsm_train.checkpoint.config import CheckpointConfig
from dsm_train.checkpoint.find import newest
from dsm_train.checkpoint.keeper import Keeper, State
from dsm_train.checkpoint.place import Place, checkpoints
from dsm_train.checkpoint.resume import Origin
from dsm_train.checkpoint.stop import Stop
from dsm_train.cli.errors import Ended
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import TrainableModel
from dsm_train.reporting.metrics import Metrics, Samples

BEST = CheckpointConfig(every=None, every_minutes=None, keep=1, best="reward")


@pytest.fixture(scope="module")
def model(layout: Parallel) -> TrainableModel:
    return tiny.trainable(layout)


def keep(
    run: Path, config: CheckpointConfig, layout: Parallel, model: TrainableModel, rewards: list[float], total: int = 9
) -> list[str]:
    """Names of the checkpoints that stay after steps with these rewards; continues where there are some."""
    found = newest(run, layout)
    identity = {"checkpoint.best": str(config.best), "checkpoint.best_is": config.best_is}
    keeper = Keeper(config, run, layout, Origin(identity, found), Metrics(None), Samples(None), Stop(tells=False))
    done, _ = keeper.enter("grpo", total, State({"policy": model}))
    for step, reward in enumerate(rewards, start=done + 1):
        keeper.after(step, {} if reward is None else {"reward": reward})
    keeper.close()
    return [path.name[9:] for path in checkpoints(run)]


@pytest.mark.parametrize(
    ("rewards", "best"),
    [
        ([0.1, 0.3, 0.2], 2),
        ([0.1, 0.3, 0.3], 2),  # the first of equals
        ([math.nan, -0.2, math.nan], 2),
        ([0.3, math.nan, 0.2], 1),
        ([0.3, math.inf, math.inf], 2),
    ],
)
def test_the_best_stays(
    rewards: list[float], best: int, tmp_path: Path, layout: Parallel, model: TrainableModel
) -> None:
    assert keep(tmp_path, BEST, layout, model, rewards) == [f"grpo-{best}"]


def test_the_newest_stay_beside_the_best(tmp_path: Path, layout: Parallel, model: TrainableModel) -> None:
    config = CheckpointConfig(every=2, every_minutes=None, keep=2, best="reward", best_is="lowest")
    assert keep(tmp_path, config, layout, model, [0.2, 0.3, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]) == [
        "grpo-3",
        "grpo-8",
        "grpo-9",
    ]


def test_the_best_is_known_after_a_resume_and_forgotten_with_its_metric(
    tmp_path: Path, layout: Parallel, model: TrainableModel
) -> None:
    config = CheckpointConfig(every=1, every_minutes=None, keep=1, best="reward")
    assert keep(tmp_path, config, layout, model, [0.3, 0.1]) == ["grpo-1", "grpo-2"]
    assert keep(tmp_path, config, layout, model, [0.2]) == ["grpo-1", "grpo-3"]
    lowest = CheckpointConfig(every=1, every_minutes=None, keep=1, best="reward", best_is="lowest")
    assert keep(tmp_path, lowest, layout, model, [0.4, 0.5]) == ["grpo-4", "grpo-5"]


def test_without_occasions_none_is_written(tmp_path: Path, layout: Parallel, model: TrainableModel) -> None:
    config = CheckpointConfig(every=None, every_minutes=None)
    assert not config.wanted
    assert keep(tmp_path, config, layout, model, [0.1, 0.2], total=2) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("minutes", "left"), [(1e-9, ["grpo-1", "grpo-2"]), (60.0, [])])
def test_one_is_written_when_the_last_is_old(
    minutes: float, left: list[str], tmp_path: Path, layout: Parallel, model: TrainableModel
) -> None:
    assert keep(tmp_path, CheckpointConfig(every_minutes=minutes), layout, model, [0.1, 0.2]) == left


@pytest.mark.parametrize(
    ("best", "step", "values", "told"),
    [
        ("rewrad", 1, {"reward": 0.1, "loss": 1.0}, True),
        ("rewrad", 2, {"reward": 0.1}, False),  # once
        ("reward", 1, {"reward": math.nan}, False),
        ("heldout_accuracy", 1, {"reward": 0.1}, False),  # it may come
        ("heldout_accuracy", 9, {"reward": 0.1}, True),
        (None, 9, {"reward": 0.1}, False),
    ],
)
def test_a_metric_that_never_occurs_is_told(
    best: str | None, step: int, values: dict[str, float], told: bool, tmp_path: Path, layout: Parallel
) -> None:
    config = CheckpointConfig(best=best)
    keeper = Keeper(config, tmp_path, layout, Origin({}), Metrics(None), Samples(None), Stop(tells=False))
    keeper.enter("grpo", 9, State({}))
    line = keeper.misses(step, values)
    assert (line is not None) == told
    if line is not None:
        assert line.startswith(f"checkpoint.best = {best}: no step of grpo has had it") and "reward" in line


def test_a_signal_writes_no_step_again_that_is_being_written(
    tmp_path: Path, layout: Parallel, model: TrainableModel
) -> None:
    stop = Stop(tells=False)
    config = CheckpointConfig(every=1, every_minutes=None, keep=1)
    keeper = Keeper(config, tmp_path, layout, Origin({}), Metrics(None), Samples(None), stop)
    keeper.enter("grpo", 9, State({"policy": model}))
    keeper.after(1, {"reward": 0.5})
    stop.asked = signal.SIGTERM
    with pytest.raises(Ended, match="after step 1 of 9 of grpo"):
        keeper.between(1)
    assert keeper.kept.saved == 1, "to write it again would remove it first"
    (folder,) = checkpoints(tmp_path)
    assert Place.read(folder).last == {"reward": 0.5}


def test_results_that_come_while_a_checkpoint_is_written_are_not_its(
    tmp_path: Path, layout: Parallel, model: TrainableModel
) -> None:
    config = CheckpointConfig(every=1, every_minutes=None)
    keeper = Keeper(config, tmp_path, layout, Origin({}), Metrics(None), Samples(None), Stop(tells=False))
    keeper.enter("grpo", 9, State({"policy": model}))
    keeper.after(1, {})
    keeper.results["before"] = {"accuracy": 0.5}  # a row of metrics.jsonl that the checkpoint does not count goes along
    keeper.close()
    (folder,) = checkpoints(tmp_path)
    assert Place.read(folder).results == {}
