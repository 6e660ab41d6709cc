"""Stage `verify-step` as a user starts it, and records of rollouts on their way through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import GRPO, WARMUP, refused, run, run_on_ranks, torchrun, write_sevens
from mutations import MUTATIONS

from dsm_train.config import RunConfig
from dsm_train.configs import VerifyStepConfig
from dsm_train.megatron.parallel import Parallel
from dsm_train.rollout.record import SupervisedBatch, read_rollouts, write_rollouts, write_supervised
from dsm_train.stages.verify_step import make_plan
from dsm_train.types import Sequences
from dsm_train.verify import comparison
from dsm_train.verify.comparison import TOLERANCES, Tolerance
from dsm_train.verify.replay import shuffled
from dsm_train.verify.synthetic import synthetic_rollouts

BATCH = (
    *(argument for argument in GRPO if not argument.startswith(("steps", "algorithm.p", "algorithm.g"))),
    "model.num_kv_heads=2",
)
"""The configuration of a run, for a stage that does not sample."""


def lines(output: str) -> list[str]:
    """The quantities of a table, in order."""
    return [row.split("  ")[0] for row in output.splitlines() if row.count("  ") >= 4 and not row.startswith(" ")]


def test_a_synthetic_step_on_two_ranks(tmp_path: Path) -> None:
    choices = ("qkv_bias", "output_bias", "qk_norm")  # of Qwen3
    result = torchrun(2, "-m", "dsm_train", "verify-step", *BATCH, "--synthetic", "parallel.tp=2", "--parallel.sp",
                      *(f"--model.{choice}" for choice in choices), "layers=1", f"run.out={tmp_path}")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:3] == ["tp2-sp", "one", "rank"]
    shown = lines(result.stdout)
    assert shown[:5] == [
        "old log-probability", "reference log-probability",
        "loss", "gradient norm", "gradient embedding.word_embeddings",
    ]  # fmt: skip
    assert {"gradient self_attention.q_layernorm", "gradient self_attention.linear_proj.bias"} <= set(shown)
    assert shown[-3:] == ["learning rate", "updated weights", "copies on several ranks"]
    assert "layers.0." in result.stdout and "layers.1." not in result.stdout  # the first layer alone
    assert "32 responses, 1" in result.stdout and "clipped 0.0%" not in result.stdout
    assert result.stdout.splitlines()[-1] == "PASS: the same step as one rank"


def test_a_recorded_step_on_two_ranks(tmp_path: Path) -> None:
    out, record = tmp_path / "run", tmp_path / "step.parquet"
    data = (f"data.path={write_sevens(tmp_path / 'data.jsonl')}", "data.prompt_template={question}=")
    run_on_ranks(2, tmp_path, "grpo", *GRPO, *WARMUP, *data, "warmup.steps=10", "model.num_kv_heads=2",
                 "rewards.unfinished=keep", f"run.out={out}", "algorithm.epochs=2", f"record={record}",
                 "record_step=2")  # fmt: skip
    rollouts = read_rollouts(record)
    assert rollouts.sequences.num_prompts == 4 and rollouts.sequences.num_responses == 16  # of both replicas
    assert rollouts.old_logprob_T is not None and rollouts.ref_logprob_T is not None
    assert len(set(rollouts.reward_S.tolist())) > 1
    table = pq.read_table(record)  # and a response without a verdict, which is left out in both layouts
    rewards = pa.array([float("nan"), *rollouts.reward_S[1:].tolist()], pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("reward"), "reward", rewards), record)
    assert read_rollouts(record).reward_S.isnan().sum() == 1

    printed = run_on_ranks(2, tmp_path, "verify-step", *BATCH, *data, f"batch={record}", "--shuffle",
                           "reference_layout=tp=2,sp=true", f"run.init={out}/weights", f"run.out={out}")  # fmt: skip
    assert printed.split()[:2] == ["dp2", "tp2-sp"] and "16 responses" in printed
    assert printed.splitlines()[-1] == "PASS: the same step as tp2-sp" and "nan" not in printed


def supervised_batch(path: Path) -> Path:
    """Examples of unequal length, some of whose tokens are not learnt."""
    generator = torch.Generator().manual_seed(0)
    lengths = ((3, 20), (1, 1), (12, 7), (5, 33), (2, 2), (9, 14))
    prompts, responses = (
        [torch.randint(258, (pair[side],), generator=generator).tolist() for pair in lengths] for side in (0, 1)
    )
    learnt_T = torch.rand(sum(length for _, length in lengths), generator=generator) < 0.7
    write_supervised(path, SupervisedBatch(Sequences.from_lists(prompts, responses), learnt_T))
    return path


def test_a_supervised_step_on_two_ranks(tmp_path: Path) -> None:
    batch = supervised_batch(tmp_path / "step.parquet")
    printed = run_on_ranks(2, tmp_path, "verify-step", *BATCH, f"batch={batch}", "--shuffle",
                           "verify.steps=2", "algorithm.minibatches=2", "reference_layout=tp=2,sp=true",
                           f"run.out={tmp_path}")  # fmt: skip
    assert printed.split()[:2] == ["dp2", "tp2-sp"] and lines(printed)[:2] == ["step 1: loss", "step 1: gradient norm"]
    assert printed.splitlines()[-2].startswith("6 responses, 77 tokens; sum of the loss's absolute terms 5.5")
    assert printed.splitlines()[-1] == "PASS: the same steps as tp2-sp"


def test_a_mistake_in_a_supervised_step_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = supervised_batch(tmp_path / "step.parquet")
    MUTATIONS["a mean over micro-batches"].inject(monkeypatch)
    with pytest.raises(SystemExit) as end:
        run("verify-step", *BATCH, f"batch={batch}", f"run.out={tmp_path}")
    assert end.value.code == 1 and "FAIL: loss, gradient norm, " in capsys.readouterr().out


def test_several_optimizer_steps_on_two_ranks(tmp_path: Path) -> None:
    """Minibatches, epochs and stages: each of the eight optimizer steps, and the log-probabilities of both stages."""
    llama = ("--model.qkv_bias", "--model.output_bias", "--model.mlp_bias")
    printed = run_on_ranks(2, tmp_path, "verify-step", *BATCH, *llama, "--synthetic", "verify.steps=2",
                           f"run.out={tmp_path}", "algorithm.minibatches=2", "algorithm.epochs=2",
                           "optim.warmup_steps=3")  # fmt: skip
    shown = lines(printed)
    assert [name for name in shown if name.endswith(": updated weights")] == [
        f"step {number}: updated weights" for number in range(1, 9)
    ]
    assert "step 8: gradient mlp.linear_fc1.bias" in shown
    assert [name for name in shown if name.startswith("old")] == [f"old log-probability of stage {n}" for n in (1, 2)]
    assert printed.splitlines()[-1] == "PASS: the same steps as one rank"


def test_one_rank_and_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # more tokens than the model takes, were any sampled
    arguments = (*BATCH, "--synthetic", f"run.out={tmp_path}", "algorithm.preset=gspo", "sampling.max_new_tokens=512")
    run("verify-step", *arguments)
    assert "PASS" in capsys.readouterr().out
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(0.0, 1e-3, 1e-4))
    with pytest.raises(SystemExit) as end:
        run("verify-step", *arguments)
    table = capsys.readouterr().out
    assert end.value.code == 1 and "DIFFERS decoder.layers." in table
    assert table.splitlines()[-1].startswith("FAIL: ") and "updated weights" not in table.splitlines()[-1]
    assert comparison.TOLERANCES is TOLERANCES


def test_what_cannot_be_verified_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Parallel
) -> None:
    whole = synthetic_rollouts(258, 30, seed=0)
    batches = {
        "foreign": synthetic_rollouts(5000, 30, seed=0),
        "long": synthetic_rollouts(258, 90, seed=0),
        "bare": replace(whole, ref_logprob_T=None),
        "equal": replace(whole, reward_S=torch.full((whole.sequences.num_responses,), 0.3)),
        # one verdict in each group
        "unjudged": replace(whole, reward_S=torch.tensor([0.3, *[torch.nan] * 3]).repeat(8)),
        "unscored": replace(whole, reward_S=None),
    }
    paths = {name: tmp_path / f"{name}.parquet" for name in batches}
    for name, batch in batches.items():
        write_rollouts(paths[name], batch, layout)
    for arguments, message in (
        ([], "give one of batch=FILE, which dsm-train grpo record=FILE writes, and --synthetic"),
        (["--synthetic", "batch=x"], "give one of batch=FILE"),
        (["batch=nowhere"], "batch nowhere does not exist: record one with"),
        (
            [f"batch={paths['foreign']}", "algorithm.kl_coef=0"],
            "and the model rows for 258: give the configuration and run",
        ),
        ([f"batch={paths['long']}", "algorithm.kl_coef=0"], "has a sequence of 65 tokens: raise model.max_length = 64"),
        ([f"batch={paths['bare']}"], "was recorded without a reference model: set algorithm.kl_coef=0"),
        ([f"batch={paths['unscored']}"], "holds no rewards: record it"),
        ([f"batch={paths['equal']}"], "teaches nothing, as the rewards of each group are all equal"),
        ([f"batch={paths['unjudged']}"], "teaches nothing, as the rewards of each group are all equal"),
        (["--synthetic", "layers=3"], "layers = 3 is more than the model's 2"),
        (["--synthetic", "layers=0"], "layers must be at least 1; got 0"),
        (["--synthetic", "--shuffle", "algorithm.minibatches=2"], "set algorithm.minibatches=1 beside it"),
        (
            ["--synthetic", "reference_layout=tp=2"],
            "reference_layout: parallel.tp x parallel.pp = 2 x 1 = 2 must divide",
        ),
        (
            ["--synthetic", "reference_layout=overlp=true"],
            "reference_layout: unknown key 'overlp'; did you mean 'overlap'?",
        ),
        (["--synthetic", "sampling.temperature=0"], "sampling.temperature must be above 0"),
    ):
        line = refused(capsys, "verify-step", *BATCH, f"run.out={tmp_path}", *arguments)
        assert line.startswith("dsm-train verify-step: ") and message in line


@pytest.mark.parametrize("recorded", [True, False])
def test_prompts_are_shared_in_what_is_verified_and_repeated_in_the_reference(
    recorded: bool, tmp_path: Path, layout: Parallel
) -> None:
    batch = None
    if recorded:
        batch = tmp_path / "step.parquet"
        write_rollouts(batch, synthetic_rollouts(258, 40, seed=0), layout)
    run_config = RunConfig(max_tokens=100, out=tmp_path)
    for shuffle in (False, True):
        config = VerifyStepConfig(run=run_config, batch=batch, synthetic=not recorded, shuffle=shuffle)
        plan = make_plan(config)
        (rollouts,) = plan.replay.batches
        sequences = rollouts.sequences
        if shuffle:
            sequences = sequences.take(shuffled(sequences, 0))
            assert sequences.num_prompts == rollouts.sequences.num_prompts
            assert not torch.equal(sequences.response_token_T, rollouts.sequences.response_token_T)
        packed = [packer.pack(sequences) for packer in (plan.packer(layout), plan.reference_packer(layout))]
        here, there = ([batch.layout.shares_prompts for batch in batches] for batches in packed)
        assert any(here) and not any(there) and len(there) > len(here)
