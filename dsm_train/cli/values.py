"""Typed values from the text of a recipe or a command line."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tyro
import yaml

Text = str | None | tuple["Text", ...]
"""Value as a recipe or a command line holds it, without a type yet; None is YAML's null."""

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


def _words(kind: Any) -> str:
    """Say in words which values a type takes."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("null" if option is NoneType else _words(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list [A, B, ...], each {_words(get_args(kind)[0])}"
    return _WORDS.get(kind, str(kind))


def text_of(node: yaml.Node, where: str) -> Text:
    """Return the text of a YAML value, or of each item of a list; ValueError at `where` for a section."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return tuple(text_of(item, where) for item in node.value)
    raise ValueError(f"{where}expected a value, got a section")
