"""The command line: what a user writes arrives as typed values, and what is wrong is said in one line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Optional, get_args

import pytest

from dsm_train.__main__ import main
from dsm_train.cli import (
    check_alike,
    digest,
    errors,
    fingerprint,
    hints,
    keys,
    load_config,
    parse_section,
    to_yaml,
    user_errors,
)
from dsm_train.configs import EvaluateConfig, GrpoConfig, SftConfig, StageConfig, VerifyStepConfig
from dsm_train.stages import table


@dataclass(frozen=True)
class Rollout:
    """How responses are sampled."""

    group_size: int = 8
    """Responses sampled per prompt."""
    temperature: float = 1.0
    """Softmax temperature."""
    stop: tuple[str, ...] = ("</answer>", "\n\n")
    """Strings that end a response."""
    top_k: Optional[int] = None  # noqa: UP045 (both spellings of an optional field must work)
    """Sample among the k likeliest tokens."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {self.group_size}")


@dataclass(frozen=True)
class Data:
    """Where the tasks come from."""

    path: str | None = None
    """JSONL of questions and answers."""
    kind: Literal["sums", "words"] = "sums"
    """Family of generated tasks."""
    shuffle: bool = True
    """Whether the order changes between epochs."""


@dataclass(frozen=True)
class Config:
    """A stage."""

    name: str
    """Name of the run."""
    seed: int = 0
    """Seed of the run."""
    output: Path = Path("runs/x")
    """Folder the run writes to."""
    lr: float = 1e-6
    """Learning rate."""
    rollout: Rollout = field(default_factory=lambda: Rollout(group_size=4))
    data: Data = field(default_factory=Data)


@dataclass(frozen=True)
class Part:
    """An item of a list."""

    name: str
    weight: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0; got {self.weight}")


@dataclass(frozen=True)
class Sum:
    """A list of components."""

    parts: tuple[Part, ...] = (Part("a", 2.0),)
    """Parts of the sum."""


@dataclass(frozen=True)
class Listed:
    """A stage with a list of components."""

    sum: Sum = field(default_factory=Sum)


@dataclass(frozen=True)
class Deep:
    """A default two levels down that is not that of its class."""

    stage: Config = field(default_factory=lambda: Config("deep", rollout=Rollout(group_size=16)))


def build(*argv: str) -> Config:
    return load_config(Config, argv, prog="dsm-train grpo", description="Train.")


def recipe(folder: Path, text: str) -> str:
    path = folder / "x.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_come_from_the_parent():
    # group_size 4 is the default of Config, not of Rollout: setting a sibling must not lose it
    assert build("name=a", "rollout.temperature=0.5").rollout == Rollout(group_size=4, temperature=0.5)


def test_defaults_come_from_the_grandparent():
    config = load_config(Deep, ["stage.rollout.top_k=3"], prog="p", description="d")
    assert config == Deep(Config("deep", rollout=Rollout(group_size=16, top_k=3)))


def test_recipe_then_overrides_later_wins(tmp_path: Path):
    path = recipe(tmp_path, "name: a\nseed: 1\nlr: 1e-4\nrollout:\n  group_size: 16\n  stop: [a, 'b,c']\ndata:\n")
    config = build("seed=2", "--config", path, "--rollout.group-size", "32", "--lr=1e-5", "seed=3")
    assert config == Config("a", seed=3, lr=1e-5, rollout=Rollout(group_size=32, stop=("a", "b,c")))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("lr: 1e-6", Config("n", lr=1e-6)),  # a string to YAML 1.1
        ("lr: 3", Config("n", lr=3.0)),
        ("rollout: {top_k: 5}", Config("n", rollout=Rollout(group_size=4, top_k=5))),
        ("rollout: {top_k: null}", Config("n")),
        ("rollout: {stop: []}", Config("n", rollout=Rollout(group_size=4, stop=()))),
        ("data: {shuffle: false}", Config("n", data=Data(shuffle=False))),
        ("data: {path: no}", Config("n", data=Data(path="no"))),  # a boolean to YAML 1.1
        ("data: {path: 007}", Config("n", data=Data(path="007"))),  # a number to YAML
        ("data: {path: --help}", Config("n", data=Data(path="--help"))),
        ("output: a b/é", Config("n", output=Path("a b/é"))),
        ("", Config("n")),
    ],
)
def test_recipe_values(tmp_path: Path, written: str, expected: Config):
    assert build("--config", recipe(tmp_path, written), "name=n") == expected


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("data.path=", Data(path="")),
        ("data.path=a=b", Data(path="a=b")),
        ("data.path=null", Data(path=None)),
        ("data.path=-1", Data(path="-1")),
        ("data.shuffle=false", Data(shuffle=False)),
        ("--data.shuffle=false", Data(shuffle=False)),
        ("data.kind=words", Data(kind="words")),
    ],
)
def test_argument_values(argument: str, expected: Data):
    assert build("name=n", "data.path=x", "data.path=None", argument).data == expected


@pytest.mark.parametrize(
    ("argv", "shuffle", "seed"),
    [
        (["--data.shuffle"], True, 0),
        (["--data.shuffle", "seed=3"], True, 3),
        (["--data.shuffle", "--seed", "3"], True, 3),
        (["--data.shuffle", "True"], True, 0),
        (["--data.shuffle", "false", "seed=3"], False, 3),
        (["--data.shuffle", "data.shuffle=false"], False, 0),
    ],
)
def test_switches(tmp_path: Path, argv: list[str], shuffle: bool, seed: int):
    off = recipe(tmp_path, f"name: n\ndata: {{path: x, shuffle: {not shuffle}}}")
    config = build("--config", off, *argv)
    assert config.data.shuffle is shuffle and config.seed == seed


def test_a_section_in_one_value():
    assert parse_section(Data, "path=a b, kind=words", "reference") == Data(path="a b", kind="words")
    for text, message in (
        ("pth=a", "reference: unknown key 'pth'; did you mean 'path'?"),
        ("kind=sum", "reference: kind: expected one of sums, words, got 'sum'"),
        ("kind", "reference: 'kind' is not key=value; keys are path, kind, shuffle"),
        ("", "reference: '' is not key=value; keys are path, kind, shuffle"),
    ):
        with pytest.raises(ValueError) as error:
            parse_section(Data, text, "reference")
        assert str(error.value) == message
    with pytest.raises(ValueError, match=r"^reference: group_size must be at least 2, got 1$"):
        parse_section(Rollout, "group_size=1", "reference")


@pytest.mark.parametrize(("text", "expected"), [("[a, 'b,c']", ("a", "b,c")), ("a", ("a",)), ("", ()), ("[]", ())])
def test_lists_on_the_command_line(text: str, expected: tuple[str, ...]):
    assert build("name=n", f"rollout.stop={text}").rollout.stop == expected


def build_listed(*argv: str) -> Listed:
    return load_config(Listed, argv, prog="dsm-train grpo", description="Train.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[{name: b}, {name: 'c, d', weight: 1e-3, stop: [x, y]}]", (Part("b"), Part("c, d", 1e-3, ("x", "y")))),
        ("[{name: no, weight: 3}]", (Part("no", 3.0),)),
        ("[]", ()),
    ],
)
def test_lists_of_components(text: str, expected: tuple[Part, ...], tmp_path: Path):
    given = build_listed(f"sum.parts={text}")
    assert given == Listed(Sum(expected))
    for written in (f"sum: {{parts: {text}}}", to_yaml(given)):
        assert build_listed("--config", recipe(tmp_path, written)) == given
    in_lines = "sum:\n  parts:\n  - name: b\n    weight: 4\n  - {name: c}\n"
    assert build_listed("--config", recipe(tmp_path, in_lines)).sum.parts == (Part("b", 4.0), Part("c"))
    assert build_listed().sum.parts == (Part("a", 2.0),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{name: a, weight: x}]", "item 1 of sum.parts: weight: expected a finite number, got 'x'"),
        ("[{name: a}, {nam: b}]", "item 2 of sum.parts: unknown key 'nam'; did you mean 'name'?"),
        ("[{weight: 1}]", "item 1 of sum.parts: name has no default: add it"),
        ("[{name: a, weight: -1}]", "item 1 of sum.parts: weight must be at least 0; got -1.0"),
        ("[{name: [a]}]", "item 1 of sum.parts: name: expected a string, got the list ['a']"),
        ("[{name: a}, b]", "sum.parts: expected a list [{name: NAME, weight: WEIGHT, stop: STOP}, ...], got "),
        ("{name: a}", "sum.parts: expected a "),
        ("a", "sum.parts: expected a list [{name: NAME"),
        ("[{name: a, name: b}]", "sum.parts: "),
        ("[{name: {a: 1}}]", "sum.parts: "),
    ],
)
def test_wrong_lists_of_components(text: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        build_listed(f"sum.parts={text}")
    assert str(error.value).startswith(message), error.value
    with pytest.raises(ValueError) as error:
        build_listed("--config", recipe(tmp_path, f"sum:\n  parts: {text}"))
    assert str(error.value).startswith(f"{tmp_path}/x.yaml:2: {message}"), error.value


def test_help_shows_the_form_of_a_list_of_components(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        build_listed("--help")
    page = capsys.readouterr().out
    assert "--sum.parts [{name: NAME, weight: WEIGHT, stop: STOP}, ...]" in page
    assert "(default: '{name: a, weight: 2.0" in page


def test_effective_config_loads_back(tmp_path: Path):
    config = Config(
        "null hypothesis: 1e-6 # no",
        lr=1e-7,
        rollout=Rollout(stop=("\n\n", "", "'", "--x", "é"), top_k=3, temperature=1e9),
        data=Data(path="yes", shuffle=False),
    )
    assert build("--config", recipe(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rollout.grup_size=4"], "unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?"),
        (["temprature=1"], "unknown key 'temprature'; did you mean 'rollout.temperature'?"),
        (["data.top_k=1"], "unknown key 'data.top_k'; did you mean 'rollout.top_k'?"),  # the last component decides
        (["--zzz"], "unknown key 'zzz'; --help lists them all"),
        (["rollout.group_size=x"], "rollout.group_size: expected an integer, got 'x'"),
        (["seed=1.5"], "seed: expected an integer, got '1.5'"),
        (["seed="], "seed: expected an integer, got ''"),
        (["lr=fast"], "lr: expected a finite number, got 'fast'"),
        (["lr=nan"], "lr: expected a finite number, got 'nan'"),  # no value of a run is NaN or infinite
        (["lr=-inf"], "lr: expected a finite number, got '-inf'"),
        (["data.shuffle=maybe"], "data.shuffle: expected true or false, got 'maybe'"),
        (["data.kind=sum"], "data.kind: expected one of sums, words, got 'sum'"),
        (["rollout.top_k=x"], "rollout.top_k: expected an integer or null, got 'x'"),
        (["rollout.stop=a,b"], "rollout.stop: expected a list [A, B, ...], each a string, got 'a,b'"),
        *(
            (
                [f"rollout.stop=[{text}]"],  # YAML reads more into it than a text
                f"rollout.stop: expected a list [A, B, ...], each a string, got '[{text}]': "
                'put each text in double quotes, ["A", "B", ...]',
            )
            for text in ("How many?", "a: b", "a]", "null")
        ),
        (["seed"], "seed has no value: write seed=VALUE"),
        (["--seed", "--lr", "3"], "seed has no value: write --seed=VALUE"),
        (["data.shuffle"], "data.shuffle has no value: write data.shuffle=VALUE"),  # without --, more likely a slip
        (["--data.shuffle", "maybe"], "'maybe' is not key=value; --help lists the keys"),
        (["--config"], "config has no value: write --config=VALUE"),
        (["train"], "'train' is not key=value; --help lists the keys"),
        (["data=x"], "data is a section, not a value; it holds data.path, data.kind, data.shuffle"),
        (["rollout.group_size=1"], "rollout.group_size must be at least 2, got 1"),  # from __post_init__
    ],
)
def test_wrong_arguments(argv: list[str], message: str):
    with pytest.raises(ValueError) as error:
        build("name=n", *argv)
    assert str(error.value) == message


def test_required_value():
    with pytest.raises(ValueError, match=r"^name has no default: add name=VALUE or set it in the recipe$"):
        build("seed=1")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("name: n\nrollout:\n  grup_size: 4", "x.yaml:3: unknown key 'rollout.grup_size'; did you mean"),
        ("name: n\nseed: [1, 2]", "x.yaml:2: seed: expected an integer, got the list ['1', '2']"),
        ("name: n\nseed: null", "x.yaml:2: seed: expected an integer, got null"),
        ("name: n\nlr: .inf", "x.yaml:2: lr: expected a finite number, got '.inf'"),
        ("seed: {a: 1}", "x.yaml:1: seed: expected a value, got a section"),
        ("rollout: 4", "x.yaml:1: rollout is a section, not a value"),
        ("seed: 1\nseed: 2", "x.yaml:2: seed is given twice; the first is at"),
        ("- seed", "x.yaml:1: expected lines of `key: value`"),
        ("name: n\nlr: {a: 3\nseed: 1", "x.yaml:3: not valid YAML: expected ',' or '}', but got ':'"),
        ("name: a\n\tseed: 1", "x.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
    ],
)
def test_wrong_recipes(tmp_path: Path, written: str, message: str):
    with pytest.raises(ValueError) as error:
        build("--config", recipe(tmp_path, written))
    assert message in str(error.value)


def test_missing_recipe_names_the_nearest(tmp_path: Path):
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ValueError, match=r"quikstart.yaml' does not exist; did you mean '.*quickstart.yaml'\?$"):
        build("--config", str(tmp_path / "quikstart.yaml"))


def test_user_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop, user_errors("dsm-train grpo"):
        raise ValueError("first\n  second")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "dsm-train grpo: first second\n"


def test_rank_0_speaks_for_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    # rank 0 at once; then the first rank of each other node, then all others, if nobody has ended them by then
    for rank, local_rank, seconds in (("0", "0", 0), ("8", "0", 10), ("1", "1", 20), ("9", "1", 20)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as stop, user_errors("dsm-train grpo"):
            raise ValueError("wrong")
        assert stop.value.code == 2 and waited.pop() == seconds
        assert capsys.readouterr().err == "dsm-train grpo: wrong\n"
    words = json.loads((tmp_path / "error.json").read_text())["message"]
    assert words["message"] == "dsm-train grpo: wrong" and int(words["extraInfo"]["timestamp"]) > 1e9


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError), user_errors("dsm-train grpo"):
        raise RuntimeError("a crash")


def test_help_teaches_every_field_at_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        build("--help")
    page = capsys.readouterr().out
    assert stop.value.code == 0
    assert "dsm-train grpo --config recipes/x.yaml rollout.group_size=VALUE" in page
    for part in ("--name STR", "(required)", "--data.kind {sums,words}", "--rollout.stop [A, B, ...]", r"'\n\n'"):
        assert part in page
    assert "Responses sampled per prompt. (default: 4)" in page
    assert max(map(len, page.splitlines())) <= 80 and "\x1b" not in page


@pytest.mark.parametrize("stage", [stage.name for stage in table.STAGES if not stage.has_steps])
def test_help_loads_nothing_heavy(stage: str):
    # --help and a misspelt key must answer at once (0.4 s), not after torch is loaded; modules count, not seconds
    heavy = {"torch", "megatron", "transformers", "pyarrow", "numpy"}
    code = f"""
import sys
from dsm_train.__main__ import main
try:
    main([{stage!r}, "--help"])
except SystemExit as end:
    print(end.code, sorted({heavy!r} & set(sys.modules)))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    assert printed.splitlines()[-1] == "0 []"


def test_usage_and_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    page = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, page.splitlines())) <= 100
    assert all(stage.name in page and stage.sentence in page for stage in table.STAGES)
    main(["--version"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["dsm-train", "python", "torch", "megatron-core"]


@pytest.mark.parametrize("stage", table.STAGES, ids=lambda stage: stage.name)
def test_rows_of_the_table_name_what_is_there(stage: table.Stage):
    module, _, function = stage.function.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    assert f"\ndef {function}(" in Path(spec.origin).read_text()
    assert stage.configuration().__name__ == stage.config.partition(":")[2]


def test_no_stage_is_both_built_and_coming():
    names = [stage.name for stage in table.STAGES] + list(table.COMING)
    assert len(names) == len(set(names))


CONFIGS = {"grpo": GrpoConfig, "sft": SftConfig, "eval": EvaluateConfig, "verify-step": VerifyStepConfig}


def load_stage(name: str, folder: Path, text: str, *arguments: str) -> StageConfig:
    path, init = recipe(folder, text), ("run.init=w",) if name == "eval" else ()
    argv = ["--config", path, *init, *arguments]
    return load_config(CONFIGS[name], argv, prog=f"dsm-train {name}", description="", others=table.others(name))


GRPO = """
warmup: {steps: 3, optim: {lr: 1e-3}}
algorithm: {group_size: 4}
sampling: {max_new_tokens: 7}
steps: 3
"""


@pytest.mark.parametrize(
    ("stage", "text", "note"),
    [
        ("grpo", GRPO, ""),
        ("eval", GRPO, "not used by eval: warmup, algorithm, steps"),
        ("verify-step", GRPO, "not used by verify-step: warmup, steps; verify-step reads verify.steps"),
        ("sft", GRPO + "sft: {steps: 5}", "not used by sft: warmup, algorithm, steps; sft reads sft.optim.lr"),
        ("sft", GRPO + "sft: {steps: 5, optim: {lr: 1e-4}}", "not used by sft: warmup, algorithm, steps"),
        ("sft", "steps: 3", "not used by sft: steps; sft reads sft.steps"),
        ("grpo", GRPO + "sft: {optim: {lr: 1}}", "not used by grpo: sft"),
        ("grpo", "tokenizer: {path: x}\nsft: {steps: 3}", "not used by grpo: tokenizer, sft; grpo reads warmup.steps"),
    ],
)
def test_a_recipe_serves_several_stages(
    stage: str,
    text: str,
    note: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    load_stage(stage, tmp_path, text)
    assert capsys.readouterr().err == (f"dsm-train {stage}: {note}\n" if note else "")
    monkeypatch.setenv("RANK", "1")
    load_stage(stage, tmp_path, text)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        # an optimizer under another stage's name alone, and nothing of the stage's own: nothing would be heeded
        ("sft", "optim: {lr: 1e-2}", "x.yaml:1: not used by sft: optim; sft reads sft.optim.lr: set that"),
        ("sft", GRPO, "not used by sft: warmup, algorithm, steps; sft reads sft.optim.lr: set that"),
        ("grpo", "sft: {optim: {lr: 1}}", "not used by grpo: sft; grpo reads warmup.optim.lr and optim.lr: set that"),
        # values at the top of stages for which no recipes are written
        ("grpo", "steps: 3\nlayers: 3", "x.yaml:2: layers is a key of verify-step alone; did you mean 'model.layers'?"),
        ("grpo", "num_samples: 3", "x.yaml:1: num_samples is a key of generate alone"),
        ("grpo", "batch: x", "x.yaml:1: batch is a key of verify-step alone; did you mean 'warmup.batch'?"),
        # slips, in sections of this stage and of others
        ("eval", "warmup: {stepz: 1}", "x.yaml:1: unknown key 'warmup.stepz'"),
        ("grpo", "run: {stepz: 1}", "x.yaml:1: unknown key 'run.stepz'"),
        ("grpo", "stepz: 1", "x.yaml:1: unknown key 'stepz'; did you mean 'steps'?"),
    ],
)
def test_a_recipe_that_would_be_swallowed(stage: str, text: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        load_stage(stage, tmp_path, text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("stage", "argument", "message"),
    [
        ("sft", "optim.lr=1", "optim.lr is a key of grpo, verify-step alone; did you mean 'sft.optim.lr'?"),
        ("eval", "steps=3", "steps is a key of grpo alone"),
        ("eval", "eval.tasks=3", "eval.tasks is not used by eval: it counts for evaluation while training; data.held"),
    ],
)
def test_a_key_of_another_stage_on_the_command_line(stage: str, argument: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        load_stage(stage, tmp_path, "", argument)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("stage", "key", "meant"),
    [
        ("grpo", "learning_rate", "'optim.lr'"),
        ("grpo", "optim.learning_rate", "'optim.lr'"),
        ("grpo", "warmup.optim.learning_rate", "'warmup.optim.lr'"),
        ("sft", "learning_rate", "'sft.optim.lr'"),
        ("grpo", "beta", "'algorithm.kl_coef'"),
        ("grpo", "actor_rollout_ref.actor.kl_loss_coef", "'algorithm.kl_coef'"),
        ("grpo", "epsilon", "'algorithm.clip_low' and 'algorithm.clip_high'"),
        ("grpo", "num_generations", "'algorithm.group_size'"),
        ("grpo", "per_device_train_batch_size", "'algorithm.prompts_per_step'"),
        ("sft", "per_device_train_batch_size", "'sft.batch'"),
        ("grpo", "max_completion_length", "'sampling.max_new_tokens'"),
        ("grpo", "max_new_tokens", "'sampling.max_new_tokens'"),
        ("grpo", "tensor_model_parallel_size", "'parallel.tp'"),
        ("grpo", "micro_batch_size", "'run.max_tokens'"),
        ("grpo", "model_name_or_path", "'run.init'"),
        ("grpo", "model.path", "'run.init'"),
        ("grpo", "output_dir", "'run.out'"),
        ("sft", "max_steps", "'sft.steps'"),
        ("grpo", "rewards.numeric", "'rewards.functions'"),
        ("eval", "rewards.format", "'rewards.functions'"),
        ("grpo", "reward_funcs", "'rewards.functions'"),
    ],
)
def test_names_from_elsewhere(stage: str, key: str, meant: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        load_stage(stage, tmp_path, "", f"{key}=1")
    assert str(error.value) == f"unknown key {key!r}; did you mean {meant}?"


def test_every_name_from_elsewhere_means_a_key():
    known = set().union(*(keys.leaves_of(config) for config in CONFIGS.values()))
    for names in hints.ELSEWHERE.values():
        for name in " and ".join(names).split(" and "):
            assert name in known, name


@pytest.mark.parametrize(
    ("stage", "argument", "message"),
    [
        ("grpo", "optim.beta1=1", "optim.beta1 must be at least 0 and below 1; got 1.0"),
        ("grpo", "warmup.optim.beta2=-1", "warmup.optim.beta2 must be at least 0 and below 1; got -1.0"),
        ("grpo", "optim.eps=0", "optim.eps must be above 0; got 0.0"),
        ("sft", "sft.optim.weight_decay=-1", "sft.optim.weight_decay must be at least 0; got -1.0"),
        ("grpo", "run.threads=-3", "run.threads must be at least 0; got -3"),
        ("grpo", f"run.seed={2**70}", f"run.seed must be at least 0 and below 2^32; got {2**70}"),
        ("grpo", "algorithm.clip_low=1.5", "algorithm.clip_low must be at most 1; got 1.5"),
        ("grpo", "algorithm.kl_coef=-1", "algorithm.kl_coef must be at least 0; got -1.0"),
        ("grpo", "model.norm_eps=0", "model.norm_eps must be above 0; got 0.0"),
        ("grpo", "optim.warmup_steps=200", "optim.warmup_steps must be below steps x minibatches x epochs = 200, the"),
        ("sft", "sft.steps=0", "sft.steps must be at least 1; got 0"),
        ("sft", "sft.epochs=0", "sft.epochs must be above 0; got 0.0"),
        ("grpo", "rewards.timeout_seconds=0", "rewards.timeout_seconds must be above 0; got 0.0"),
        # values that would not be heeded
        ("grpo", "optim.min_lr=1e-7", "optim.min_lr must be 0 with schedule = constant; got 1e-07"),
        ("grpo", "record_step=2", "record_step must be given with record; got 2"),
        ("grpo", "warmup.batch=8", "warmup.batch is given, and warmup.steps = 0 skips the warm-up"),
        ("eval", "data.vocab_size=300", "data.vocab_size trains a tokenizer at start, and run.init brings one"),
    ],
)
def test_values_that_cannot_be(stage: str, argument: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        load_stage(stage, tmp_path, "", argument)
    assert str(error.value).startswith(message)


def test_a_tokenizer_s_size_beside_weights_that_bring_a_tokenizer(tmp_path: Path):
    load_stage("eval", tmp_path, "data: {vocab_size: 300}")  # run.init comes from this recipe, perhaps
    with pytest.raises(ValueError, match="data.vocab_size trains a tokenizer at start, and run.init brings"):
        load_stage("grpo", tmp_path, "", "run.init=w", "data.vocab_size=300")
    with pytest.raises(ValueError, match="data.vocab_size must be left out beside tokenizer = t"):
        load_stage("grpo", tmp_path, "", "data.tokenizer=t", "data.vocab_size=300")


@pytest.mark.parametrize("stage", ["eval", "generate"])
def test_random_weights_are_not_evaluated(stage: str):
    row = table.find(stage)
    with pytest.raises(ValueError, match=rf"^run.init must be given: {stage} works on trained weights"):
        load_config(row.configuration(), [], prog=f"dsm-train {stage}", description="")


def test_a_configuration_knows_what_was_given_and_where(tmp_path: Path):
    config = load_stage("grpo", tmp_path, "steps: 3\noptim: {lr: 1}", "optim.lr=2")
    assert config.given == {"steps": f"{tmp_path}/x.yaml:1: ", "optim.lr": ""}
    assert replace(config, run=config.run).given == config.given
    assert "given" not in to_yaml(config) and config == load_stage("grpo", tmp_path, to_yaml(config))


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_a_training_serves_what_does_not_train(path: Path, tmp_path: Path):
    if path.stem != "corpus":
        for stage in ("sft", "eval") if "sft" in path.stem else ("grpo", "eval", "verify-step"):
            load_stage(stage, tmp_path, path.read_text())


def fingerprint_of(tmp_path: Path, *arguments: str, tasks: str = "t") -> dict[str, str]:
    return fingerprint(load_stage("grpo", tmp_path, GRPO, *arguments), tasks, tokenizer="k", version="1")


def test_ranks_that_are_alike(tmp_path: Path):
    (tmp_path / "other").mkdir()
    # where a value was written does not count
    written = fingerprint(load_stage("grpo", tmp_path / "other", GRPO + "optim: {lr: 1}"), "t", "k", "1")
    check_alike([written, fingerprint_of(tmp_path, "optim.lr=1")])


@pytest.mark.parametrize(
    ("arguments", "tasks", "message"),
    [
        (["optim.lr=1e-5"], "t", "rank 1 has optim.lr = 1e-05 and rank 0 2e-05: start every rank with the same comma"),
        (["optim.lr=2e-5", "run.seed=3"], "t", "rank 1 has run.seed = 3 and rank 0 0: start"),
        (["optim.lr=2e-5"], "u", "rank 1 has the digest of the tasks = u and rank 0 t: start"),
        (["run.seed=1", "data.seed=1", "steps=4"], "u", "; 2 more keys differ: start"),
    ],
)
def test_ranks_that_differ(arguments: list[str], tasks: str, message: str, tmp_path: Path):
    first = fingerprint_of(tmp_path, "optim.lr=2e-5")
    with pytest.raises(ValueError) as error:
        check_alike([first, fingerprint_of(tmp_path, *arguments, tasks=tasks), first])
    assert message in str(error.value)


def test_a_digest_knows_order_and_boundaries():
    texts = [["a", "b"], ["b", "a"], ["ab"], ["ab", ""], []]
    assert len({digest(text) for text in texts}) == len(texts) and digest(["a", "b"]) == digest(iter("ab"))


def test_closed_lists_are_those_of_the_ops_and_presets():
    # the configuration repeats the ops' lists, since it must load without torch
    from dsm_train import config
    from dsm_train.grpo import PRESETS
    from triton_kernels.policy import group_advantage, objective

    assert get_args(config.KL) == get_args(objective.KL)
    assert get_args(config.Scale) == get_args(group_advantage.Scale)
    assert get_args(config.Preset) == tuple(PRESETS)


def test_a_stage_is_a_row_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The file holds configuration and function; what is heavy is imported in the function."""
    (tmp_path / "echo_stage.py").write_text(
        "from dataclasses import dataclass\n\n"
        "from dsm_train.configs import StageConfig\n\n\n"
        "@dataclass(frozen=True)\n"
        "class EchoConfig(StageConfig):\n"
        "    word: str = 'nothing'\n"
        '    """Word to say."""\n\n\n'
        "def echo(config: EchoConfig) -> None:\n"
        "    print(config.word, config.run.seed)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row = table.Stage("echo", "Say a word.", "echo_stage:EchoConfig", "echo_stage:echo")
    monkeypatch.setattr(table, "STAGES", (*table.STAGES, row))
    main(["echo", "word=hello", "run.seed=3"])
    assert capsys.readouterr().out == "hello 3\n"
    with pytest.raises(SystemExit):
        main(["echo", "--help"])
    assert "Word to say." in capsys.readouterr().out and "echo  " in table.usage()
