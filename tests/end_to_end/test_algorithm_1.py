"""Whole runs of the command line are Algorithm 1 as algorithm_1.py has it: numbers of all steps, and the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from algorithm_1 import PAPERS
from oracle import OFF_POLICY, Start, Trained, differences, make_start, trained

CASES: dict[str, tuple[str, ...]] = {
    **{f"{paper}, on-policy": (f"algorithm.preset={paper}",) for paper in PAPERS},
    **{f"{paper}, off-policy": (f"algorithm.preset={paper}", *OFF_POLICY) for paper in PAPERS},
    "epochs": ("algorithm.epochs=3",),
    "minibatches": ("algorithm.minibatches=4",),
    "temperature 0.7": ("sampling.temperature=0.7", "algorithm.epochs=2", "algorithm.entropy_coef=0.01"),
    "temperature 1.25": ("sampling.temperature=1.25", "algorithm.epochs=2", "algorithm.entropy_coef=0.01"),
    "temperature 1.25, sequence ratio": ("sampling.temperature=1.25", "algorithm.preset=gspo", *OFF_POLICY),
    "warm-up, cosine": ("optim.warmup_steps=3", "optim.schedule=cosine", "optim.min_lr=1e-4", *OFF_POLICY),
    "warm-up, linear": ("optim.warmup_steps=2", "optim.schedule=linear", *OFF_POLICY),
    "weight decay": ("optim.weight_decay=0.5", "optim.lr=5e-3", *OFF_POLICY),
    "gradients clipped": ("optim.clip_grad=0.1", "optim.beta2=0.999", *OFF_POLICY),
    "gradients not clipped": ("optim.clip_grad=0", "optim.beta1=0.5", *OFF_POLICY),
    "reference renewed": ("algorithm.reference_every=1", "algorithm.kl_coef=0.2", *OFF_POLICY),
    "reference renewed every second stage": ("algorithm.reference_every=2", "algorithm.kl_coef=0.2"),
    **{f"KL {kl}": (f"algorithm.kl={kl}", "algorithm.kl_coef=0.3", *OFF_POLICY) for kl in ("k1", "k2", "k1+", "k3+")},
    "token average, leave-one-out": ("algorithm.average=token", "algorithm.scale=loo", *OFF_POLICY),
    "fixed average, the batch's deviation": ("algorithm.average=fixed", "algorithm.scale=batch", *OFF_POLICY),
    "entropy bonus without KL": ("algorithm.preset=dapo", "algorithm.entropy_coef=0.05"),
    "ratios far out": ("optim.lr=5e-3", "algorithm.clip_low=0.1", "algorithm.clip_high=0.4", *OFF_POLICY),
    "one micro-batch": ("run.max_tokens=1000", *OFF_POLICY),
    "prompts repeated": ("run.share_prompts=false", *OFF_POLICY),
    "layers recomputed": ("model.recompute=true", *OFF_POLICY),
}
EVERYTHING = (
    *OFF_POLICY,
    "sampling.temperature=1.25",
    "algorithm.entropy_coef=0.01",
    "algorithm.reference_every=2",
    "optim.weight_decay=0.1",
    "optim.warmup_steps=3",
    "optim.schedule=linear",
)
LAYOUTS = {
    "tp2-sp": (2, ("parallel.tp=2", "parallel.sp=true")),
    "pp2": (2, ("parallel.pp=2",)),
    "dp2": (2, ("parallel.distributed_optimizer=true", "parallel.overlap=true")),
    "tp2-pp2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.sp=true")),
    "tp2-dp2": (4, ("parallel.tp=2", "parallel.distributed_optimizer=true")),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """The model that runs begin from."""
    return make_start(tmp_path_factory.mktemp("start"))


def learns(result: Trained) -> None:
    """Assert that there was something to compute: gradients, and off-policy clipped tokens."""
    assert sum(row["grad_norm"] > 0.1 for row in result.metrics) >= 2
    algorithm = result.config["algorithm"]
    if algorithm["epochs"] * algorithm["minibatches"] > 1:
        assert any(row["clipped_low"] + row["clipped_high"] > 0 for row in result.metrics)
        assert all(row["ratio_max"] > 1.01 and row["ratio_min"] < 0.99 for row in result.metrics)


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_algorithm_1(name: str, start: Start, tmp_path: Path) -> None:
    result = trained(start, tmp_path / "run", *CASES[name])
    learns(result)
    assert differences(start, result) == {}


def test_a_tied_head(tmp_path: Path) -> None:
    start = make_start(tmp_path, "model.tied_head=true")
    result = trained(start, tmp_path / "run", *EVERYTHING)
    learns(result)
    assert "output_layer.weight" not in result.weights
    assert differences(start, result) == {}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if ranks > 2 else ()) for name, (ranks, _) in LAYOUTS.items()]
)
def test_a_split_run_is_algorithm_1(name: str, start: Start, tmp_path: Path) -> None:
    ranks, layout = LAYOUTS[name]
    result = trained(start, tmp_path / "run", *EVERYTHING, *layout, ranks=ranks, launched=name == "dp2")
    learns(result)
    assert differences(start, result) == {}
