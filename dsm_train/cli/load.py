"""From a command line to a typed configuration: a YAML recipe, key=value over it, and one clear line when wrong.

    config = load_config(GrpoConfig, ["--config", "recipes/quickstart.yaml", "algorithm.group_size=16"], ...)

A configuration is a frozen dataclass whose fields are values or further frozen dataclasses; `algorithm.group_size` is
the dotted name of a value, the same in a recipe and on the command line. YAML only gives the structure: the text of
each value goes to tyro, so `1e-6` is a number and `no` a word wherever it is written.

A recipe serves several stages. Sections of other stages pass, and one line on stderr names them; so do top-level values
of stages that train, for which recipes are written. Anything else that the stage does not read is an error.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dsm_train.cli.hints import unknown_key
from dsm_train.cli.values import Setting, parse, text_of
from dsm_train.config import Given
from dsm_train.stages.table import Stage

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A value of the configuration."""

    type: Any
    required: bool
    """It has no default."""
    owner: type
    """Dataclass that declares it."""


@dataclass(frozen=True)
class _Siblings:
    """Values of the other stages, by key."""

    leaves: Mapping[str, _Leaf] = field(default_factory=dict)
    owners: Mapping[str, tuple[Stage, ...]] = field(default_factory=dict)
    """The stages that have the key."""

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of the stages that have the key."""
        return {key: [stage.name for stage in stages] for key, stages in self.owners.items()}

    def may_pass(self, key: str) -> bool:
        """Tell whether a recipe may hold the key: in a section, or at the top for a stage that trains."""
        return "." in key or any(stage.trains for stage in self.owners[key])


def load_config(
    cls: type[ConfigT], argv: Sequence[str], *, prog: str, description: str, others: Sequence[Stage] = ()
) -> ConfigT:
    """Build `cls` from `--config recipe.yaml`, then `key=value`, `--key value` or `--key=value`, where later wins.

    others: the stages that a recipe may serve as well.
    Raises ValueError with the place, the value and the remedy for an unknown key, a value of the wrong type, a
    missing or malformed recipe, and what `__post_init__` of the dataclasses refuses. `--help` prints and exits.
    """
    if "--help" in argv or "-h" in argv:
        _print_help(cls, prog, description)
    leaves, siblings = _leaves(cls), _siblings(others)
    recipes, overrides = _read_arguments(argv, leaves, siblings)
    _check_heeded(cls, overrides, prog)
    settings: dict[str, Setting] = {}
    for recipe in recipes:
        settings |= _read_recipe(recipe, leaves, siblings)
    settings |= overrides
    passed = {key: settings.pop(key) for key in list(settings) if key not in leaves}
    note = _not_used(passed, settings, leaves, siblings, prog)
    missing = [key for key, leaf in leaves.items() if leaf.required and key not in settings]
    if missing:
        raise ValueError(f"{missing[0]} has no default: add {missing[0]}=VALUE or set it in the recipe")
    given = Given({key: setting.where for key, setting in settings.items()})
    config = _build(cls, {key: parse(key, leaves[key].type, setting) for key, setting in settings.items()}, given)
    if note and os.environ.get("RANK", "0") == "0":
        print(f"{prog}: {note}", file=sys.stderr, flush=True)
    return config


def parse_section(cls: type[ConfigT], text: str, name: str) -> ConfigT:
    """Build one component from `key=value,key=value`: the value called `name` of another. Errors as `load_config`."""
    leaves, where = _leaves(cls), f"{name}: "
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = item.strip().partition("=")
        if not equals:
            raise ValueError(f"{where}{item!r} is not key=value; keys are {', '.join(leaves)}")
        _check_key(key, leaves, where=where)
        values[key] = parse(key, leaves[key].type, Setting(value, where))
    try:
        return _build(cls, values, Given(dict.fromkeys(values, where)))
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def to_yaml(config: Any) -> str:
    """Write a configuration as the YAML recipe that loads back to it."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Return a configuration as dictionaries, lists, text and numbers."""
    if is_dataclass(value):
        values = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return {name: plain(item) for name, item in values.items() if not isinstance(item, Given)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _print_help(cls: type, prog: str, description: str) -> NoReturn:
    """Print tyro's page of all fields, with lists shown the way they are written here, and exit."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def show_list(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if get_origin(info.type) is not tuple:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="[A, B, ...]",
            instance_from_str=tuple,
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [str(item).encode("unicode_escape").decode() for item in value],
        )

    description += (
        f"\n\nA recipe sets the values and key=value overrides it; the later one wins:"
        f"\n  {prog} --config recipes/x.yaml {_example(cls)}=VALUE"
        "\n--key value and --key=value do the same, --key says true, and null unsets."
    )
    tyro.cli(
        cls,
        prog=f"{prog} [--config FILE] [key=value ...]",
        description=description,
        args=["--help"],
        use_underscores=True,
        registry=registry,
        config=(tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed),  # `Given` is no value of the user's
    )
    raise AssertionError("tyro prints the help and exits")


def _example(cls: type) -> str:
    """Return the key to show in an example: a nested one where there is one."""
    keys = list(_leaves(cls))
    return next((key for key in keys if "." in key), keys[0])


def _leaves(cls: type, prefix: str = "", parent_has_default: bool = False) -> dict[str, _Leaf]:
    """List every value under its dotted name, in the order of the fields."""
    leaves: dict[str, _Leaf] = {}
    types = get_type_hints(cls)
    for item in fields(cls):
        key, kind = prefix + item.name, types[item.name]
        if not item.init or kind is Given:
            continue
        has_default = parent_has_default or item.default is not MISSING or item.default_factory is not MISSING
        if isinstance(kind, type) and is_dataclass(kind):
            leaves |= _leaves(kind, key + ".", has_default)
        else:
            leaves[key] = _Leaf(kind, required=not has_default, owner=cls)
    return leaves


def _siblings(stages: Sequence[Stage]) -> _Siblings:
    """Collect the values of other stages."""
    leaves: dict[str, _Leaf] = {}
    owners: dict[str, tuple[Stage, ...]] = {}
    for stage in stages:
        for key, leaf in _leaves(stage.configuration()).items():
            leaves.setdefault(key, leaf)
            owners[key] = (*owners.get(key, ()), stage)
    return _Siblings(leaves, owners)


def _check_key(key: str, leaves: Mapping[str, _Leaf], siblings: _Siblings | None = None, where: str = "") -> None:
    if key in leaves:
        return
    inside = [leaf for leaf in leaves if leaf.startswith(key + ".")]
    if inside:
        raise ValueError(f"{where}{key} is a section, not a value; it holds {', '.join(inside)}")
    raise ValueError(where + unknown_key(key, leaves, siblings.names if siblings else None))


def _check_heeded(cls: type, overrides: Mapping[str, Setting], prog: str) -> None:
    """Refuse a value on the command line that the stage has (a recipe may hold it) and does not heed."""
    unheeded: Mapping[str, str] = getattr(cls, "unheeded", {})
    for key in overrides:
        for name, remedy in unheeded.items():
            if key == name or key.startswith(name + "."):
                raise ValueError(f"{key} is not used by {_stage(prog)}: {remedy}")


def _stage(prog: str) -> str:
    """Return the stage's name: the second word of `dsm-train sft`."""
    return prog.partition(" ")[2] or prog


def _not_used(
    passed: Mapping[str, Setting],
    settings: Mapping[str, Setting],
    leaves: Mapping[str, _Leaf],
    siblings: _Siblings,
    prog: str,
) -> str:
    """Name what a recipe holds for other stages alone, and where this stage looks instead; an empty text for nothing.

    Raises ValueError where the stage would train with defaults unnoticed: the recipe has an optimizer, or another
    component that the stage has, under another stage's name alone, and nothing that the other stage would not read.
    """
    names = ", ".join(dict.fromkeys(key.partition(".")[0] for key in passed))
    text, name = f"not used by {_stage(prog)}: {names}", _stage(prog)
    instead: dict[str, None] = {}
    for key, setting in passed.items():
        owner, homes = siblings.leaves[key].owner, set(siblings.owners[key])
        same = [other for other, leaf in leaves.items() if leaf.owner is owner]
        if any(other in settings or homes & set(siblings.owners.get(other, ())) for other in same):
            continue
        candidates = same if "." in key else leaves
        reads = [other for other in candidates if other.rpartition(".")[2] == key.rpartition(".")[2]]
        instead |= dict.fromkeys(other for other in reads if other not in settings)
        smallest = not any(is_dataclass(kind) for kind in get_type_hints(owner).values())
        its_own = any(not homes & set(siblings.owners.get(other, ())) for other in settings)
        if reads and same and smallest and not its_own:
            raise ValueError(f"{setting.where}{text}; {name} reads {' and '.join(reads)}: set that")
    if not passed:
        return ""
    return f"{text}; {name} reads {', '.join(instead)}" if instead else text


def _read_arguments(
    argv: Sequence[str], leaves: dict[str, _Leaf], siblings: _Siblings
) -> tuple[list[Path], dict[str, Setting]]:
    """Split the arguments into recipes and settings, both in the order given."""
    recipes: list[Path] = []
    settings: dict[str, Setting] = {}
    following = list(argv)
    while following:
        argument = following.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals and not argument.startswith("--") and key not in leaves:
            raise ValueError(f"{argument!r} is not key=value; --help lists the keys")
        if key != "config":
            _check_key(key, leaves, siblings)
        if not equals:
            follows = following[0] if following else "--"
            if key in leaves and leaves[key].type is bool and argument.startswith("--"):  # a switch, or --key false
                text = following.pop(0) if follows.lower() in ("true", "false") else "true"
            elif argument.startswith("--") and not follows.startswith("--"):
                text = following.pop(0)
            else:
                raise ValueError(f"{key} has no value: write {argument}=VALUE")
        if key == "config":
            recipes.append(Path(text))
        else:
            settings[key] = Setting(text)
    return recipes, settings


def _read_recipe(path: Path, leaves: dict[str, _Leaf], siblings: _Siblings) -> dict[str, Setting]:
    """Read a YAML file into settings that know their line, those of other stages that may pass among them."""
    if not path.exists():
        near = difflib.get_close_matches(path.stem, [other.stem for other in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {str(path.with_name(near[0] + '.yaml'))!r}?" if near else ""
        raise ValueError(f"recipe {str(path)!r} does not exist{hint}")
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    settings: dict[str, Setting] = {}
    if root is not None:
        _flatten(root, "", path, {**siblings.leaves, **leaves}, settings)
    sections = {key.partition(".")[0] for key in leaves if "." in key}
    for key, setting in settings.items():
        if key not in leaves and (key.partition(".")[0] in sections or not siblings.may_pass(key)):
            _check_key(key, leaves, siblings, setting.where)
    return settings


def _flatten(node: yaml.Node, key: str, path: Path, leaves: dict[str, _Leaf], settings: dict[str, Setting]) -> None:
    """Add what is under `key` to the settings: a mapping is a section, all else is a value."""
    where = f"{path}:{node.start_mark.line + 1}: "
    if isinstance(node, yaml.MappingNode) and key not in leaves:
        for name, child in node.value:
            _flatten(child, f"{key}.{name.value}" if key else str(name.value), path, leaves, settings)
        return
    if not key:
        raise ValueError(f"{where}expected lines of `key: value`")
    text = text_of(node, f"{where}{key}: ")
    if text is None and any(leaf.startswith(key + ".") for leaf in leaves):
        return  # a section with nothing in it
    _check_key(key, leaves, where=where)
    if key in settings:
        raise ValueError(f"{where}{key} is given twice; the first is at {settings[key].where.removesuffix(': ')}")
    settings[key] = Setting(text, where)


def _build(
    cls: type[ConfigT], values: dict[str, Any], given: Given, default: Any = MISSING, prefix: str = ""
) -> ConfigT:
    """Make the dataclass, or change its default, from the values under `prefix`.

    A component's ValueError begins with the bare field: the prefix makes it the key that the user wrote.
    """
    types = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]
        key, kind = prefix + item.name, types[item.name]
        if kind is Given:
            arguments[item.name] = given
        elif item.init and is_dataclass(kind):
            inner = item.default if item.default_factory is MISSING else item.default_factory()
            inner = inner if default is MISSING else getattr(default, item.name)
            arguments[item.name] = _build(kind, values, given, inner, key + ".")  # type: ignore[arg-type]
        elif key in values:
            arguments[item.name] = values[key]
    try:
        return cls(**arguments) if default is MISSING else replace(default, **arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error
