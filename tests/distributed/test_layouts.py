"""Layouts of two ranks over gloo: the same model in each, and the same step under data parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import layout_worker
import pytest
import torch
from layout_worker import CASES, TRAINED

HERE = Path(__file__).parent
LAYOUTS = [name for name in CASES if not name.startswith("one")]
Ranks = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What the ranks of every layout wrote; all layouts in one pair of processes, as importing takes seconds."""
    out = tmp_path_factory.mktemp("layouts")
    results: Ranks = {}
    for world, names in ((1, ["one", "one_tied"]), (2, LAYOUTS)):
        run_workers(world, names, out)
        for name in names:
            results[name] = [torch.load(out / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]
    return results


def run_workers(world: int, names: list[str], out: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["CUDA_VISIBLE_DEVICES"] = ""  # two ranks on gloo, whatever the machine has
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])}
    command = [sys.executable, "-W", "ignore", str(HERE / "layout_worker.py")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(out / f"store{world}"), str(out), *names],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    deadline = time.monotonic() + 180
    try:
        while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
            assert time.monotonic() < deadline, "the ranks hang"
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(errors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_know_their_place(name: str, ranks: Ranks) -> None:
    config, _ = CASES[name]
    dp = 2 // (config.tp * config.pp)
    first, second = ranks[name]
    assert first["sizes"] == second["sizes"] == (config.tp, config.pp, dp)
    assert first["place"] == (0, 0, 0)
    assert second["place"] == (int(config.tp == 2), int(config.pp == 2), int(dp == 2))
    # losses are counted once per replica: on the last stage, by the first rank of a tensor-parallel group
    assert [first["losses"], second["losses"]] == [config.pp == 1, config.tp == 1]
    assert [rank["gathered"] for rank in ranks[name]] == ([[0, 1]] * 2 if dp == 2 else [[0], [1]])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("dp2")])
def test_replicas_start_from_the_same_weights(name: str, ranks: Ranks) -> None:
    for rank in ranks[name]:
        assert_equal(rank["initial"], ranks["one"][0]["initial"])


@pytest.mark.parametrize("name", ["tp2", "tp2_sp"])
def test_tensor_parallel_shards_are_slices_of_the_whole(name: str, ranks: Ranks) -> None:
    whole, shards = ranks["one"][0]["initial"], [rank["initial"] for rank in ranks[name]]
    assert shards[0].keys() == shards[1].keys() == whole.keys()
    split = 0
    for key, full in whole.items():
        if "vocab" in key or "word_embeddings" in key or "output_layer" in key:
            # the vocabulary is padded to 64 per rank: the first 64 rows are on rank 0
            assert shards[0][key].shape == shards[1][key].shape == full.shape
            assert torch.equal(shards[0][key], full) and not torch.equal(shards[1][key], full)
        elif shards[0][key].shape == full.shape:
            assert "norm" in key
            assert all(torch.equal(shard[key], full) for shard in shards)
        elif "linear_fc1" in key:
            gate, up = (half.chunk(2) for half in full.chunk(2))
            assert all(torch.equal(shards[r][key], torch.cat([gate[r], up[r]])) for r in range(2))
            split += 1
        else:
            dim = 0 if "qkv" in key else 1
            assert torch.equal(torch.cat([shard[key] for shard in shards], dim), full)
            split += 1
    assert split == 4 * layout_worker.MODEL.num_layers


@pytest.mark.parametrize(("name", "whole"), [("pp2", "one"), ("pp2_vpp2", "one"), ("pp2_tied", "one_tied")])
def test_stages_hold_the_whole_model_once(name: str, whole: str, ranks: Ranks) -> None:
    first, last = (rank["initial"] for rank in ranks[name])
    together = first | last
    if name == "pp2_tied":  # the last stage's head is a copy of the first stage's embedding
        assert torch.equal(together.pop("output_layer.weight"), first["embedding.word_embeddings.weight"])
    assert not first.keys() & last.keys()
    assert_equal(together, ranks[whole][0]["initial"])
    layers = {int(key.split(".")[2]) for key in first if key.startswith("decoder.layers")}
    assert layers == ({0, 2} if "vpp" in name else {0, 1})


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "one"])
def test_data_parallelism_trains_the_same_step(name: str, ranks: Ranks) -> None:
    one = ranks["one"][0]
    for rank in ranks[name]:
        for step, expected in zip(rank["steps"], one["steps"], strict=True):
            for key in ("loss", "grad_norm", "lr"):
                assert step[key] == pytest.approx(expected[key], rel=1e-5)
            torch.testing.assert_close(step["sums"], expected["sums"], rtol=1e-5, atol=1e-5)
        # AdamW's first steps divide a gradient by its own size, so that rounding counts where the gradient is tiny
        for key, value in one["trained"].items():
            torch.testing.assert_close(rank["trained"][key], value, rtol=1e-4, atol=1e-4)
    assert_equal(ranks[name][0]["trained"], ranks[name][1]["trained"])


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "one"])
def test_rollouts_and_log_probabilities_use_the_updated_weights(name: str, ranks: Ranks) -> None:
    one = ranks["one"][0]
    for rank in ranks[name]:
        torch.testing.assert_close(rank["logprob"], one["logprob"], rtol=1e-3, atol=1e-3)
        assert torch.equal(rank["response"], one["response"])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in TRAINED])
def test_what_is_not_built_for_a_split_model_says_so(name: str, ranks: Ranks) -> None:
    for rank in ranks[name]:
        generator, saving = rank["refused"]
        assert "embedded generator" in generator and "parallel.tp=1 parallel.pp=1" in generator
        assert "saving" in saving and "parallel.tp=1 parallel.pp=1" in saving


def test_torchrun_refuses_a_split_before_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               "-m", "dsm_train", "grpo", "parallel.tp=2", f"run.out={tmp_path / 'run'}"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    # torchrun adds a report of its own below what the ranks say
    ours, _, report = result.stderr.partition("torch/distributed")
    lines = [line for line in ours.splitlines() if "dsm-train" in line]
    assert result.returncode != 0 and report and 1 <= len(lines) <= 2, result.stderr
    assert all(line.startswith("dsm-train grpo: parallel.tp = 2") and "parallel.tp=1" in line for line in lines)
    assert "Traceback" not in ours and not (tmp_path / "run").exists()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
