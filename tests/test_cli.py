"""The command line: what a user writes arrives as typed values, and what is wrong is said in one line."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

from dsm_train import cli
from dsm_train.cli import load_config, parse_section, to_yaml, user_errors


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
class Deep:
    """A default two levels down that is not that of its class."""

    stage: Config = field(default_factory=lambda: Config("deep", rollout=Rollout(group_size=16)))


def load(*argv: str) -> Config:
    return load_config(Config, argv, prog="dsm-train grpo", description="Train.")


def recipe(folder: Path, text: str) -> str:
    path = folder / "x.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_come_from_the_parent():
    # group_size 4 is the default of Config, not of Rollout: setting a sibling must not lose it
    assert load("name=a", "rollout.temperature=0.5").rollout == Rollout(group_size=4, temperature=0.5)


def test_defaults_come_from_the_grandparent():
    config = load_config(Deep, ["stage.rollout.top_k=3"], prog="p", description="d")
    assert config == Deep(Config("deep", rollout=Rollout(group_size=16, top_k=3)))


def test_recipe_then_overrides_later_wins(tmp_path: Path):
    path = recipe(tmp_path, "name: a\nseed: 1\nlr: 1e-4\nrollout:\n  group_size: 16\n  stop: [a, 'b,c']\ndata:\n")
    config = load("seed=2", "--config", path, "--rollout.group-size", "32", "--lr=1e-5", "seed=3")
    assert config == Config("a", seed=3, lr=1e-5, rollout=Rollout(group_size=32, stop=("a", "b,c")))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("lr: 1e-6", Config("n", lr=1e-6)),  # a string to YAML 1.1
        ("lr: 3", Config("n", lr=3.0)),
        ("lr: .inf", Config("n", lr=math.inf)),
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
    assert load("--config", recipe(tmp_path, written), "name=n") == expected


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
    assert load("name=n", "data.path=x", "data.path=None", argument).data == expected


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
    config = load("--config", off, *argv)
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
    assert load("name=n", f"rollout.stop={text}").rollout.stop == expected


def test_effective_config_loads_back(tmp_path: Path):
    config = Config(
        "null hypothesis: 1e-6 # no",
        lr=1e-7,
        rollout=Rollout(stop=("\n\n", "", "'", "--x", "é"), top_k=3, temperature=math.inf),
        data=Data(path="yes", shuffle=False),
    )
    assert load("--config", recipe(tmp_path, to_yaml(config))) == config


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
        (["lr=fast"], "lr: expected a number, got 'fast'"),
        (["data.shuffle=maybe"], "data.shuffle: expected true or false, got 'maybe'"),
        (["data.kind=sum"], "data.kind: expected one of sums, words, got 'sum'"),
        (["rollout.top_k=x"], "rollout.top_k: expected an integer or null, got 'x'"),
        (["rollout.stop=a,b"], "rollout.stop: expected a list [A, B, ...], each a string, got 'a,b'"),
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
        load("name=n", *argv)
    assert str(error.value) == message


def test_required_value():
    with pytest.raises(ValueError, match=r"^name has no default: add name=VALUE or set it in the recipe$"):
        load("seed=1")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("name: n\nrollout:\n  grup_size: 4", "x.yaml:3: unknown key 'rollout.grup_size'; did you mean"),
        ("name: n\nseed: [1, 2]", "x.yaml:2: seed: expected an integer, got the list ['1', '2']"),
        ("name: n\nseed: null", "x.yaml:2: seed: expected an integer, got null"),
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
        load("--config", recipe(tmp_path, written))
    assert message in str(error.value)


def test_missing_recipe_names_the_nearest(tmp_path: Path):
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ValueError, match=r"quikstart.yaml' does not exist; did you mean '.*quickstart.yaml'\?$"):
        load("--config", str(tmp_path / "quikstart.yaml"))


def test_user_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop, user_errors("dsm-train grpo"):
        raise ValueError("first\n  second")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "dsm-train grpo: first second\n"


def test_the_first_rank_of_a_machine_speaks_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    said = []
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: said.append(capsys.readouterr().err))
    for rank, waits in (("0", []), ("1", [""])):  # the second has said nothing until it has waited to be ended
        said.clear()
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stop, user_errors("dsm-train grpo"):
            raise ValueError("wrong")
        assert stop.value.code == 2 and said == waits
        assert capsys.readouterr().err == "dsm-train grpo: wrong\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError), user_errors("dsm-train grpo"):
        raise RuntimeError("a crash")


def test_help_teaches_every_field_at_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        load("--help")
    page = capsys.readouterr().out
    assert stop.value.code == 0
    assert "dsm-train grpo --config recipes/x.yaml rollout.group_size=VALUE" in page
    for part in ("--name STR", "(required)", "--data.kind {sums,words}", "--rollout.stop [A, B, ...]", r"'\n\n'"):
        assert part in page
    assert "Responses sampled per prompt. (default: 4)" in page
    assert max(map(len, page.splitlines())) <= 80 and "\x1b" not in page


def test_import_is_light():
    # --help and a misspelt key must answer at once, not after torch is loaded
    code = "import sys, dsm_train.cli, dsm_train.reporting.metrics; "
    code += "sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_serves_several_stages(tmp_path: Path) -> None:
    # GRPO's recipe starts an evaluation: what only GRPO has is passed over, and a slip is still a slip
    from dsm_train.configs import EvaluateConfig, GrpoConfig

    recipe = tmp_path / "grpo.yaml"
    recipe.write_text("steps: 3\nwarmup: {steps: 1, optim: {lr: 1e-3}}\nsampling: {max_new_tokens: 7}\n")
    known = {"prog": "x", "description": "", "others": [GrpoConfig, EvaluateConfig]}
    config = load_config(EvaluateConfig, ["--config", str(recipe)], **known)
    assert config.sampling.max_new_tokens == 7
    with pytest.raises(ValueError, match="unknown key 'steps'"):
        load_config(EvaluateConfig, ["steps=3"], **known)
    recipe.write_text("warmup: {stepz: 1}\n")
    with pytest.raises(ValueError, match="warmup.stepz"):
        load_config(EvaluateConfig, ["--config", str(recipe)], **known)


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_in_every_stage(recipe: Path) -> None:
    from dsm_train.__main__ import stage_configs

    for stage in stage_configs():
        load_config(stage, ["--config", str(recipe)], prog="x", description="", others=stage_configs())
