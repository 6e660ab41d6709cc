"""Mistakes of users: one line that names the value and the remedy, before any training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import GRPO, TINY, refused, run, run_apart, stage_of_odd_rank, torchrun, write_gsm8k
from ranks import run_ranks

Capsys = pytest.CaptureFixture[str]


def test_a_process_prints_one_line_and_fails(tmp_path: Path) -> None:
    result = run_apart("grpo", *GRPO, f"run.out={tmp_path / 'run'}", "optim.lrr=1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "dsm-train grpo: unknown key 'optim.lrr'; did you mean 'optim.lr'?\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["algoritm.group_size=4"], ["'algoritm.group_size'", "'algorithm.group_size'"]),
        (["algorithm.group_size=1"], ["algorithm.group_size", "at least 2", "got 1"]),
        (["algorithm.group_size=many"], ["algorithm.group_size", "an integer", "'many'"]),
        (["algorithm.preset=ppo"], ["algorithm.preset", "gspo", "'ppo'"]),
        (["algorithm.prompts_per_step=6", "algorithm.minibatches=4"], ["algorithm.prompts_per_step", "4", "got 6"]),
        (["algorithm.clip_low=-1"], ["clip_low", "-1"]),
        (["sampling.temperature=0"], ["sampling.temperature", "above 0", "got 0"]),
        (["data.kinds=[add, div]"], ["kinds", "word", "div"]),
        (["data.heldout_tasks=100000"], ["100000", "heldout"]),
        (["data.vocab_size=100"], ["vocab_size", "258", "100"]),
        (["model.num_heads=3"], ["model.hidden_size", "num_heads = 3", "got"]),
        (["model.hidden_size=33"], ["model.hidden_size", "got 33"]),
        (["model.max_length=8"], ["model.max_length = 8", "5"]),
        (["run.max_tokens=7"], ["run.max_tokens = 7", "5"]),
        (["model.layers=transformer_engine"], ["transformer_engine", "model.layers=auto"]),
        (["parallel.sp=true"], ["parallel.sp", "tp is 1"]),
        (["optim.lr=1e300"], ["optim.lr", "finite", "1e300"]),
        (["run.out="], ["run.out", "a path", "''"]),
        (["data.heldout_tasks=1000000"], ["data.heldout_tasks must be 1 to", "1000000"]),
        (["parallel.vpp=2"], ["parallel.vpp", "pp is 1"]),
        (["rewards.functions=[{name: numeric, weight: 0}]"], ["rewards.functions", "weighted other than 0"]),
        (["steps=0"], ["steps", "at least 1", "got 0"]),
        (["optim.lr=-1"], ["optim.lr", "above 0", "-1"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and "=" in value[-1] else "",
)
def test_a_wrong_value_is_named(arguments: list[str], words: list[str], tmp_path: Path, capsys: Capsys) -> None:
    line = refused(capsys, "grpo", *GRPO, f"run.out={tmp_path / 'run'}", *arguments)
    assert line.startswith("dsm-train grpo: ") and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ranks", "arguments", "words"),
    [
        (1, ["parallel.tp=2"], ["parallel.tp x parallel.pp = 2 x 1 = 2", "1 rank", "--nproc-per-node"]),
        (3, ["parallel.pp=2"], ["1 x 2 = 2", "3 rank"]),
        (4, ["parallel.tp=4", "model.num_heads=2"], ["parallel.tp = 4", "model.num_heads = 2"]),
        (2, ["parallel.tp=2", "model.num_kv_heads=1"], ["parallel.tp = 2", "model.num_kv_heads = 1"]),
        (2, ["parallel.tp=2", "model.num_kv_heads=2", "model.ffn_size=49"], ["parallel.tp = 2", "ffn_size = 49"]),
        (2, ["parallel.pp=2", "model.num_layers=1"], ["= 2 parts need a layer each", "model.num_layers = 1"]),
        (2, ["parallel.pp=2", "parallel.vpp=2"], ["= 4 parts need a layer each", "model.num_layers = 2"]),
        (3, [], ["algorithm.prompts_per_step", "3", "got 4"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_layouts_that_do_not_fit(
    ranks: int, arguments: list[str], words: list[str], tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    line = refused(capsys, "grpo", *GRPO, f"run.out={tmp_path / 'run'}", *arguments)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_divide() -> None:
    """Padding makes every vocabulary divide; the check stands for vocabularies that come from elsewhere."""
    from dsm_train.config import ModelConfig, ParallelConfig
    from dsm_train.megatron import parallel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="parallel.tp = 2 must divide the vocabulary of 65"):
            parallel.check_layout(ParallelConfig(tp=2), ModelConfig(), 65)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "q", "answer": "1"}\n{"question": "q"', [":2:", "JSON"]),
        ('{"question": "q", "answer": "1"}\n\n{"question": "q"}', [":3:", "'answer'"]),
        ('{"question": "q", "answer": "1"}\n{"question": "r", "answer": "no number"}', [":2:", "number"]),
        ("", ["no task"]),
    ],
    ids=["not JSON", "no answer", "no number", "empty"],
)
def test_malformed_data(text: str, words: list[str], tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    line = refused(capsys, "grpo", *GRPO, f"run.out={tmp_path / 'run'}", f"data.path={tmp_path / 'data.jsonl'}",
                   "data.heldout_tasks=1")  # fmt: skip
    assert "data.jsonl" in line and all(word in line for word in words), line


def test_missing_data(tmp_path: Path, capsys: Capsys) -> None:
    line = refused(capsys, "grpo", *GRPO, f"run.out={tmp_path / 'run'}", f"data.path={tmp_path / 'nowhere.jsonl'}")
    assert "nowhere.jsonl" in line and "check the path" in line


def test_a_prompt_longer_than_the_limit(tmp_path: Path, capsys: Capsys) -> None:
    data = write_gsm8k(tmp_path / "data.jsonl", 20)
    rows = data.read_text() + json.dumps({"question": "12345" * 40, "answer": "1"}) + "\n"
    data.write_text(rows)
    line = refused(capsys, "grpo", *GRPO, f"run.out={tmp_path / 'run'}", f"data.path={data}", "data.heldout_tasks=5",
                   "model.max_length=150", "run.max_tokens=1000")  # fmt: skip
    assert "data.jsonl:21 " in line and "model.max_length = 150" in line and "1234512345" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["warmup.steps=1"], []], ids=["warm-up", "no warm-up"])
def test_a_solution_longer_than_a_micro_batch(arguments: list[str], tmp_path: Path, capsys: Capsys) -> None:
    """Only supervised training reads solutions."""
    data = write_gsm8k(tmp_path / "data.jsonl", 20)
    heldout = write_gsm8k(tmp_path / "heldout.jsonl", 5)
    long = {"question": "How long?", "answer": "12345" * 30 + "\n#### 1"}
    data.write_text(data.read_text() + json.dumps(long) + "\n")
    common = [*GRPO, f"run.out={tmp_path / 'run'}", f"data.path={data}", f"data.heldout_path={heldout}", "steps=1",
              "data.heldout_tasks=5", "model.max_length=120", "run.max_tokens=120"]  # fmt: skip
    if arguments:
        line = refused(capsys, "grpo", *common, *arguments)
        assert "data.jsonl:21," in line and "model.max_length = 120" in line, line
        line = refused(capsys, "grpo", *common, *arguments, "model.max_length=1000")
        assert "data.jsonl:21," in line and "run.max_tokens = 120" in line, line
    else:
        run("grpo", *common)


def test_supervised_training_without_solutions(tmp_path: Path, capsys: Capsys) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}+1?", "answer": str(n + 1)}) + "\n" for n in range(20)))
    common = [f"run.out={tmp_path / 'run'}", f"data.path={data}", "data.heldout_tasks=5", "sampling.max_new_tokens=5"]
    for stage, extra in (("sft", [*TINY, *common]), ("grpo", [*GRPO, *common, "warmup.steps=1"])):
        line = refused(capsys, stage, *extra)
        assert "solution" in line and "data.jsonl" in line, line


def test_flash_attention_where_it_cannot_serve(tmp_path: Path, capsys: Capsys) -> None:
    """In fp32 it cannot anywhere."""
    line = refused(capsys, "grpo", *GRPO, f"run.out={tmp_path / 'run'}", "model.attention=flash")
    assert "model.attention=flash needs" in line and "set model.attention=dsm" in line
    assert not (tmp_path / "run").exists()


def test_a_read_only_output_folder(tmp_path: Path, capsys: Capsys) -> None:
    tmp_path.chmod(0o555)
    line = refused(capsys, "grpo", *GRPO, f"run.out={tmp_path / 'run'}")
    tmp_path.chmod(0o755)
    assert str(tmp_path / "run") in line and "read-only" in line and "choose a folder" in line


def test_weights_that_are_not_there(tmp_path: Path, capsys: Capsys) -> None:
    line = refused(capsys, "eval", f"run.out={tmp_path / 'run'}", f"run.init={tmp_path / 'nowhere'}")
    assert "run.init" in line and "nowhere is no folder" in line and "a Hugging Face model" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("model.safetensors", ["run.init", "model.safetensors"]),
        ("config.json", ["run.init", "config.json", "JSON"]),
        ("tokenizer.json", ["tokenizer"]),
    ],
)
def test_damaged_weights(damage: str, words: list[str], tmp_path: Path, capsys: Capsys) -> None:
    run("sft", *TINY, f"run.out={tmp_path / 'sft'}", "sft.steps=1", "sampling.max_new_tokens=5")
    weights = tmp_path / "sft" / "weights"
    (weights / damage).write_bytes(b"{")
    line = refused(capsys, "eval", f"run.init={weights}", f"run.out={tmp_path / 'run'}", "sampling.max_new_tokens=5")
    assert all(word in line for word in words), line


def test_a_tokenizer_that_the_weights_have_no_rows_for(tmp_path: Path, capsys: Capsys) -> None:
    words = ("data.kinds=[word]", "data.train_tasks=200", "data.heldout_tasks=12", "model.vocab_multiple=1")
    for size in (258, 300):
        run("sft", *TINY, f"run.out={tmp_path / str(size)}", "sft.steps=1", f"data.vocab_size={size}", *words,
            "run.max_tokens=1000", "model.max_length=200", "sampling.max_new_tokens=5")  # fmt: skip
    line = refused(capsys, "eval", f"run.init={tmp_path / '258' / 'weights'}", f"run.out={tmp_path / 'run'}",
                   f"data.tokenizer={tmp_path / '300' / 'weights'}", *words, "model.max_length=200",
                   "sampling.max_new_tokens=5")  # fmt: skip
    assert "258" in line and "300" in line, line


def test_a_prompt_to_generate_from_is_checked_too(tmp_path: Path, capsys: Capsys) -> None:
    run("sft", *TINY, f"run.out={tmp_path / 'sft'}", "sft.steps=1", "sampling.max_new_tokens=5")
    common = [*TINY, f"run.out={tmp_path / 'run'}", f"run.init={tmp_path / 'sft' / 'weights'}",
              "sampling.max_new_tokens=5"]  # fmt: skip
    assert "no token" in refused(capsys, "generate", *common, 'prompts=[""]')
    line = refused(capsys, "generate", *common, f"prompts=['{'1+' * 60}']")
    assert "model.max_length = 64" in line and "1+1+" in line


def test_ranks_say_it_once_and_torchrun_at_its_end(tmp_path: Path) -> None:
    result = torchrun(2, "-m", "dsm_train", "grpo", *GRPO, f"run.out={tmp_path / 'run'}", "algorithm.group_size=1")
    line = "dsm-train grpo: algorithm.group_size must be at least 2: GRPO's baseline is the group's mean; got 1"
    lines = result.stderr.splitlines()
    assert result.returncode != 0 and lines.count(line) == 1  # one rank, before torchrun's own report
    assert lines[-2].endswith(line) and set(lines[-1]) == {"="}  # and where that ends
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [("ppo", ["ppo", "not built yet", "grpo"]), ("pretrain", ["not built yet"]), ("trian", ["trian", "no stage"])],
)
def test_stages_that_do_not_run(argument: str, words: list[str], capsys: Capsys) -> None:
    line = refused(capsys, argument)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("optim.lr=2e-3", "rank 1 has optim.lr = 0.002 and rank 0 0.001"),
        ("data.seed=1", "rank 1 has data.seed = 1 and rank 0 0; the digest of the tasks = "),
    ],
    ids=["learning rate", "tasks"],
)
def test_ranks_that_were_started_otherwise_are_named(odd: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failed:
        run_ranks(stage_of_odd_rank, 2, tmp_path, "grpo", *GRPO, f"run.out={tmp_path / 'run'}", odd)
    assert said in str(failed.value) and "start every rank with the same command" in str(failed.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
