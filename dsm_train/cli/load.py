"""Typed configuration from a command line: a YAML recipe, key=value over it, and one clear line when wrong.

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
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dsm_train.cli.keys import Keys, leaves_of
from dsm_train.cli.values import Setting, list_form, parse, text_of
from dsm_train.config import Given
from dsm_train.stages.table import Stage

ConfigT = TypeVar("ConfigT")


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
    keys = Keys.of(cls, prog.removeprefix("dsm-train "), others)
    recipes, overrides = _read_arguments(argv, keys)
    _check_heeded(cls, overrides, keys.stage)
    settings: dict[str, Setting] = {}
    for recipe in recipes:
        settings |= _read_recipe(recipe, keys)
    settings |= overrides
    passed = {key: settings.pop(key) for key in list(settings) if key not in keys.leaves}
    note = keys.not_used(passed, settings)
    missing = [key for key, leaf in keys.leaves.items() if leaf.required and key not in settings]
    if missing:
        raise ValueError(f"{missing[0]} has no default: add {missing[0]}=VALUE or set it in the recipe")
    given = Given({key: setting.where for key, setting in settings.items()})
    values = {key: parse(key, keys.leaves[key].type, setting) for key, setting in settings.items()}
    config = _build(cls, values, given)
    if note and os.environ.get("RANK", "0") == "0":
        print(f"{prog}: {note}", file=sys.stderr, flush=True)
    return config


def parse_section(cls: type[ConfigT], text: str, name: str) -> ConfigT:
    """Build one component from `key=value,key=value`: the value called `name` of another. Errors as `load_config`."""
    keys, where = Keys.of(cls, name), f"{name}: "
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = item.strip().partition("=")
        if not equals:
            raise ValueError(f"{where}{item!r} is not key=value; keys are {', '.join(keys.leaves)}")
        keys.check(key, where)
        values[key] = parse(key, keys.leaves[key].type, Setting(value, where))
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
            metavar=list_form(info.type),
            instance_from_str=tuple,
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [_in_help(item) for item in value],
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


def _in_help(item: Any) -> str:
    """Write an item of a list as the page of all fields shows it."""
    if is_dataclass(item):
        given = {name: value for name, value in plain(item).items() if value is not None}
        return yaml.safe_dump(given, default_flow_style=True, sort_keys=False).strip()
    return str(item).encode("unicode_escape").decode()


def _example(cls: type) -> str:
    """Return the key to show in an example: a nested one where there is one."""
    keys = list(leaves_of(cls))
    return next((key for key in keys if "." in key), keys[0])


def _check_heeded(cls: type, overrides: Mapping[str, Setting], stage: str) -> None:
    """Refuse a value on the command line that the stage has (a recipe may hold it) and does not heed."""
    unheeded: Mapping[str, str] = getattr(cls, "unheeded", {})
    for key in overrides:
        for name in (key, key.partition(".")[0]):
            if name in unheeded:
                raise ValueError(f"{key} is not used by {stage}: {unheeded[name]}")


def _read_arguments(argv: Sequence[str], keys: Keys) -> tuple[list[Path], dict[str, Setting]]:
    """Split the arguments into recipes and settings, both in the order given."""
    recipes: list[Path] = []
    settings: dict[str, Setting] = {}
    following = list(argv)
    while following:
        argument = following.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals and not argument.startswith("--") and key not in keys.leaves:
            raise ValueError(f"{argument!r} is not key=value; --help lists the keys")
        if key != "config":
            keys.check(key)
        if not equals:
            follows = following[0] if following else "--"
            leaf = keys.leaves.get(key)
            if leaf and leaf.type is bool and argument.startswith("--"):  # a switch, or --key false
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


def _read_recipe(path: Path, keys: Keys) -> dict[str, Setting]:
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
        _flatten(root, "", path, keys, settings)
    return settings


def _flatten(node: yaml.Node, key: str, path: Path, keys: Keys, settings: dict[str, Setting]) -> None:
    """Add what is under `key` to the settings: a mapping is a section, all else is a value."""
    where = f"{path}:{node.start_mark.line + 1}: "
    known = {**keys.others, **keys.leaves}
    if isinstance(node, yaml.MappingNode) and key not in known:
        for name, child in node.value:
            _flatten(child, f"{key}.{name.value}" if key else str(name.value), path, keys, settings)
        return
    if not key:
        raise ValueError(f"{where}expected lines of `key: value`")
    text = text_of(node, f"{where}{key}: ")
    if text is None and any(leaf.startswith(key + ".") for leaf in known):
        return  # a section with nothing in it
    keys.check_recipe(key, where)
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
