"""From a command line to a typed configuration: a YAML recipe, key=value over it, and one clear line when wrong.

    config = load_config(GrpoConfig, ["--config", "recipes/quickstart.yaml", "algorithm.group_size=16"], ...)

A configuration is a frozen dataclass whose fields are values or further frozen dataclasses; `algorithm.group_size` is
the dotted name of a value, the same in a recipe and on the command line. YAML only gives the structure: the text of
each value goes to tyro, so `1e-6` is a number and `no` a word wherever it is written.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

ConfigT = TypeVar("ConfigT")
Text = str | None | tuple["Text", ...]
"""What a recipe or a command line holds before it has a type; None is YAML's null."""

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", Path: "a path"}


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A value of the configuration: its type, and whether it has no default."""

    type: Any
    required: bool


_ELSEWHERE = _Leaf(str, required=False)
"""A value that another stage of the same recipe has."""

_SPEAKER_SECONDS = 10.0
"""How long the other ranks of a machine leave it to its first to say what is wrong."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """A value as it was written, and where ("recipes/x.yaml:7: ", or nothing for the command line)."""

    text: Text
    where: str = ""


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Turn a ValueError of the block into the line `prog: message` on stderr and exit status 2.

    Wrap the preparation of a run in it (configuration, data, layout, output folder) and never the training, whose
    crashes keep their traceback. With DSM_TRACEBACK=1 the preparation keeps it as well. Of a machine's ranks the first
    speaks for all; torchrun then ends the others, and one that is not ended has an error of its own to tell.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("DSM_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_SPEAKER_SECONDS)
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def load_config(
    cls: type[ConfigT], argv: Sequence[str], *, prog: str, description: str, others: Sequence[type] = ()
) -> ConfigT:
    """Build `cls` from `--config recipe.yaml`, then `key=value`, `--key value` or `--key=value`, where later wins.

    A recipe serves several stages: keys that only the configurations in `others` have are passed over in it.
    Raises ValueError with the place, the value and the remedy for an unknown key, a value of the wrong type, a
    missing or malformed recipe, and what `__post_init__` of the dataclasses refuses. `--help` prints and exits.
    """
    if "--help" in argv or "-h" in argv:
        _print_help(cls, prog, description)
    leaves = _leaves(cls)
    elsewhere = {key for other in others for key in _leaves(other)} - leaves.keys()
    recipes, overrides = _read_arguments(argv, leaves)
    settings: dict[str, _Setting] = {}
    for recipe in recipes:
        settings |= _read_recipe(recipe, leaves, elsewhere)
    settings |= overrides
    missing = [key for key, leaf in leaves.items() if leaf.required and key not in settings]
    if missing:
        raise ValueError(f"{missing[0]} has no default: add {missing[0]}=VALUE or set it in the recipe")
    return _build(cls, {key: _parse(key, leaves[key].type, setting) for key, setting in settings.items()})


def parse_section(cls: type[ConfigT], text: str, name: str) -> ConfigT:
    """Build one component from `key=value,key=value`: the value called `name` of another. Errors as `load_config`."""
    leaves, where = _leaves(cls), f"{name}: "
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = item.strip().partition("=")
        if not equals:
            raise ValueError(f"{where}{item!r} is not key=value; keys are {', '.join(leaves)}")
        _check_key(key, leaves, where)
        values[key] = _parse(key, leaves[key].type, _Setting(value, where))
    try:
        return _build(cls, values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def to_yaml(config: Any) -> str:
    """Write a configuration as the YAML recipe that loads back to it."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
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
        config=(tyro.conf.FlagConversionOff,),
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
    for field in fields(cls):
        if not field.init:
            continue
        key, kind = prefix + field.name, types[field.name]
        has_default = parent_has_default or field.default is not MISSING or field.default_factory is not MISSING
        if isinstance(kind, type) and is_dataclass(kind):
            leaves |= _leaves(kind, key + ".", has_default)
        else:
            leaves[key] = _Leaf(kind, required=not has_default)
    return leaves


def _check_key(key: str, leaves: dict[str, _Leaf], where: str = "") -> None:
    if key in leaves:
        return
    inside = [leaf for leaf in leaves if leaf.startswith(key + ".")]
    if inside:
        raise ValueError(f"{where}{key} is a section, not a value; it holds {', '.join(inside)}")
    near = _nearest(key, leaves)
    hint = f"; did you mean {near!r}?" if near else "; --help lists them all"
    raise ValueError(f"{where}unknown key {key!r}{hint}")


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known key most like this one, by all of it or by its last component, or None."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, last), whole

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def _read_arguments(argv: Sequence[str], leaves: dict[str, _Leaf]) -> tuple[list[Path], dict[str, _Setting]]:
    """Split the arguments into recipes and settings, both in the order given."""
    recipes: list[Path] = []
    settings: dict[str, _Setting] = {}
    following = list(argv)
    while following:
        argument = following.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals and not argument.startswith("--") and key not in leaves:
            raise ValueError(f"{argument!r} is not key=value; --help lists the keys")
        if key != "config":
            _check_key(key, leaves)
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
            settings[key] = _Setting(text)
    return recipes, settings


def _read_recipe(path: Path, leaves: dict[str, _Leaf], elsewhere: set[str]) -> dict[str, _Setting]:
    """Read a YAML file into settings that know their line, less what only other stages have."""
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
    settings: dict[str, _Setting] = {}
    if root is not None:
        _flatten(root, "", path, dict.fromkeys(elsewhere, _ELSEWHERE) | leaves, settings)
    return {key: setting for key, setting in settings.items() if key in leaves}


def _flatten(node: yaml.Node, key: str, path: Path, leaves: dict[str, _Leaf], settings: dict[str, _Setting]) -> None:
    """Add what is under `key` to the settings: a mapping is a section, all else is a value."""
    where = f"{path}:{node.start_mark.line + 1}: "
    if isinstance(node, yaml.MappingNode) and key not in leaves:
        for name, child in node.value:
            _flatten(child, f"{key}.{name.value}" if key else str(name.value), path, leaves, settings)
        return
    if not key:
        raise ValueError(f"{where}expected lines of `key: value`")
    text = _text(node, f"{where}{key}: ")
    if text is None and any(leaf.startswith(key + ".") for leaf in leaves):
        return  # a section with nothing in it
    _check_key(key, leaves, where)
    if key in settings:
        raise ValueError(f"{where}{key} is given twice; the first is at {settings[key].where.removesuffix(': ')}")
    settings[key] = _Setting(text, where)


def _text(node: yaml.Node, where: str) -> Text:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return tuple(_text(item, where) for item in node.value)
    raise ValueError(f"{where}expected a value, got a section")


def _parse(key: str, kind: Any, setting: _Setting) -> Any:
    """Give a setting its type."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in options and setting.text in (None, "null", "None"):
        return None
    bare = Union[tuple(option for option in options if option is not NoneType)]  # noqa: UP007 (built at run time)
    try:
        if get_origin(bare) is tuple:
            return tuple(_parse_value(get_args(bare)[0], item) for item in _items(setting.text))
        return _parse_value(bare, setting.text)
    except ValueError:
        got = "null" if setting.text is None else repr(setting.text)
        got = f"the list {list(setting.text)}" if isinstance(setting.text, tuple) else got
        raise ValueError(f"{setting.where}{key}: expected {_words(kind)}, got {got}") from None


def _items(text: Text) -> tuple[Text, ...]:
    """Split a list written on the command line: [a, b] as in YAML, or a single item without a comma."""
    if isinstance(text, tuple):
        return text
    if not text:
        return ()
    if not text.startswith("["):
        if "," in text:
            raise ValueError(f"a list needs brackets, got {text!r}")
        return (text,)
    try:
        items = _text(yaml.compose(text, Loader=yaml.SafeLoader), "")
    except yaml.YAMLError as error:
        raise ValueError(f"not a list: {text!r}") from error
    return items if isinstance(items, tuple) else (items,)


def _parse_value(kind: Any, text: Text) -> Any:
    """Parse one value with tyro, or raise ValueError."""
    if not isinstance(text, str):
        raise ValueError(f"not a value: {text!r}")
    if kind is bool:
        text = text.capitalize()  # YAML's true is Python's True
    if kind is float and text.lstrip("+-") in (".inf", ".nan"):
        text = text.replace(".", "")  # YAML's spelling
    value_type = make_dataclass("Value", [("value", kind)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(value_type, args=[f"--value={text}"], config=(tyro.conf.FlagConversionOff,)).value
    except SystemExit:
        raise ValueError(f"not a {kind}: {text!r}") from None


def _words(kind: Any) -> str:
    """Say in words which values a type takes."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("null" if option is NoneType else _words(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list [A, B, ...], each {_words(get_args(kind)[0])}"
    return _WORDS.get(kind, str(kind))


def _build(cls: type[ConfigT], values: dict[str, Any], default: Any = MISSING, prefix: str = "") -> ConfigT:
    """Make the dataclass, or change its default, from the values under `prefix`.

    A component's ValueError begins with the bare field: the prefix makes it the key that the user wrote.
    """
    types = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        key = prefix + field.name
        if field.init and is_dataclass(types[field.name]):
            inner = field.default if field.default_factory is MISSING else field.default_factory()
            inner = inner if default is MISSING else getattr(default, field.name)
            arguments[field.name] = _build(types[field.name], values, inner, key + ".")
        elif key in values:
            arguments[field.name] = values[key]
    try:
        return cls(**arguments) if default is MISSING else replace(default, **arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error
