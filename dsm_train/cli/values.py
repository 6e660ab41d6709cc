"""Typed values from the text of a recipe or a command line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from dsm_train.cli.hints import unknown_key

Text = str | None | tuple["Text", ...] | Mapping[str, "Text"]
"""Value as a recipe or a command line holds it, without a type yet: None is YAML's null, a mapping a list's item."""

_LARGEST = 3.4e38
"""Bound of fp32, in which the trainer computes."""
_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", Path: "a path"}


@dataclass(frozen=True, slots=True)
class Setting:
    """Value as it was written, and its place ("recipes/x.yaml:7: "; empty: the command line)."""

    text: Text
    where: str = ""


def parse(key: str, kind: Any, setting: Setting) -> Any:
    """Give a setting its type; ValueError with the place, the key and the values that the type takes."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in options and setting.text in (None, "null", "None"):
        return None
    bare = Union[tuple(option for option in options if option is not NoneType)]  # noqa: UP007 (built at run time)
    try:
        if get_origin(bare) is not tuple:
            return _parse_value(bare, setting.text)
        item, items = get_args(bare)[0], _items(setting.text)
        if not is_dataclass(item):
            return tuple(_parse_value(item, text) for text in items)
        mappings = [text for text in items if isinstance(text, Mapping)]
        if len(mappings) < len(items):
            raise ValueError(f"not {_words(bare)}")
    except ValueError:
        got = "null" if setting.text is None else repr(setting.text)
        got = f"the list {list(setting.text)}" if isinstance(setting.text, tuple) else got
        raise ValueError(f"{setting.where}{key}: expected {_words(kind)}, got {got}{_quotes(bare, setting)}") from None
    places = (f"{setting.where}item {number} of {key}: " for number in range(1, len(items) + 1))
    return tuple(_parse_item(item, *pair) for pair in zip(mappings, places, strict=True))


def _parse_item(kind: Any, texts: Mapping[str, Text], where: str) -> Any:
    """Make a dataclass of an item {field: value, ...}; ValueError with the item and the field."""
    types = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    for name in texts:
        if name not in known:
            raise ValueError(where + unknown_key(name, known))
    for item in fields(kind):
        if item.name not in texts and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{where}{item.name} has no default: add it")
    values = {name: parse(name, types[name], Setting(text, where)) for name, text in texts.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _items(text: Text) -> tuple[Text, ...]:
    """Split a list written on the command line: [a, b] as in YAML, or a single item without a comma."""
    if isinstance(text, tuple):
        return text
    assert not isinstance(text, Mapping), "a mapping is an item of a list"
    if not text:
        return ()
    if not text.startswith("["):
        if "," in text:
            raise ValueError(f"a list needs brackets, got {text!r}")
        return (text,)
    try:
        items = text_of(yaml.compose(text, Loader=yaml.SafeLoader), "")
    except yaml.YAMLError as error:
        raise ValueError(f"not a list: {text!r}") from error
    return items if isinstance(items, tuple) else (items,)


def _parse_value(kind: Any, text: Text) -> Any:
    """Parse one value with tyro, or raise ValueError."""
    if not isinstance(text, str):
        raise ValueError(f"not a value: {text!r}")
    if kind is bool:
        text = text.capitalize()  # YAML's true is Python's True
    value_type = make_dataclass("Value", [("value", kind)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            value = tyro.cli(value_type, args=[f"--value={text}"], config=(tyro.conf.FlagConversionOff,)).value
    except SystemExit:
        raise ValueError(f"not a {kind}: {text!r}") from None
    if isinstance(value, float) and not abs(value) < _LARGEST:
        raise ValueError(f"not finite in 32 bits: {text!r}")
    if kind is Path and not text:
        raise ValueError("an empty path")  # such as run.out=$UNSET
    return value


def _quotes(kind: Any, setting: Setting) -> str:
    """Give the remedy for a list of texts that YAML reads otherwise; empty for all else."""
    written_as_list = isinstance(setting.text, tuple) or str(setting.text).startswith("[")
    if get_origin(kind) is not tuple or get_args(kind)[0] not in (str, Path) or not written_as_list:
        return ""
    return ': put each text in double quotes, ["A", "B", ...]'


def _words(kind: Any) -> str:
    """Say in words which values a type takes."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("null" if option is NoneType else _words(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return f"a list {list_form(kind)}" + ("" if is_dataclass(item) else f", each {_words(item)}")
    return _WORDS.get(kind, str(kind))


def list_form(kind: Any) -> str:
    """Show how a list of this type is written."""
    item = get_args(kind)[0]
    if not is_dataclass(item):
        return "[A, B, ...]"
    return f"[{{{', '.join(f'{part.name}: {part.name.upper()}' for part in fields(item))}}}, ...]"


def text_of(node: yaml.Node, where: str) -> Text:
    """Return the text of a YAML value, or of each item of a list; ValueError at `where` for a section."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return tuple(_item_text(item, where) for item in node.value)
    raise ValueError(f"{where}expected a value, got a section")


def _item_text(node: yaml.Node, where: str) -> Text:
    """Return the text of an item of a list, or of each of its fields."""
    if not isinstance(node, yaml.MappingNode):
        return text_of(node, where)
    names = [str(name.value) for name, _ in node.value]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}an item gives {name} twice")
    return {name: text_of(value, f"{where}{name}: ") for name, (_, value) in zip(names, node.value, strict=True)}
