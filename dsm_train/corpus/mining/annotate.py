"""Decisions on which URL prefixes are mathematics: a person's annotations, or rules (DeepSeekMath, section 2.1).

An annotation file is YAML that a person edits, or that the page beside it (annotate_page.py) exports:

    done: true
    math:
    - mathoverflow.net/questions
    - example.edu
    not_math:
    - example.edu/press

The longest prefix that a URL begins with decides, step by step of its path: example.edu/press/1 is not mathematics,
example.edu/pressure is. A rule file does without a person; of the rules that match a prefix the last one decides, and
a prefix that none matches goes with the one above it:

    rules:
    - {prefix: "*", min_share: 0.5}                # at least half of the pages were collected
    - {prefix: "*/shop", math: false}
    - {prefix: "example.edu/press*", math: false}
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dsm_train.corpus.engine.page import replacing
from dsm_train.corpus.mining.domains import Count, base_url, url_prefixes

_PLAIN = re.compile(r"[\w][\w./~%+@=:-]*")
"""A prefix that YAML reads as a string without quotes (`: ` and ` #` cannot occur in it)."""


@dataclass(frozen=True)
class Annotations:
    """URL prefixes that are mathematics, and longer ones below them that are not."""

    math: tuple[str, ...] = ()
    not_math: tuple[str, ...] = ()
    done: bool = True
    """True once the person who edits the file is done with it."""

    def is_math(self, url: str) -> bool:
        """True if the longest annotated prefix of the URL is mathematics."""
        known, found = self.decisions, False
        for prefix in url_prefixes(url):
            found = known.get(prefix, found)
        return found

    @cached_property
    def decisions(self) -> Mapping[str, bool]:
        """Every annotated prefix, and whether it is mathematics."""
        return dict.fromkeys(self.math, True) | dict.fromkeys(self.not_math, False)

    @staticmethod
    def load(path: Path) -> Annotations:
        """Read an annotation file; ValueError with what is wrong in it."""
        record = _read_yaml(path, {"done", "math", "not_math"})
        done = record.get("done") or "true"
        if done not in ("true", "false"):
            raise ValueError(f"{path}: done must be true or false, got {done!r}")
        lists = {name: _prefixes(path, name, record.get(name)) for name in ("math", "not_math")}
        both = set(lists["math"]) & set(lists["not_math"])
        if both:
            raise ValueError(f"{path}: {min(both)!r} is under math and under not_math: keep one of them")
        return Annotations(**lists, done=done == "true")


@dataclass(frozen=True)
class Rule:
    """Rule that decides the prefixes it matches."""

    prefix: str
    """Pattern of the whole prefix, as of file names: * is any text, slashes included."""
    math: bool = True
    """Decision for the prefixes it matches."""
    min_share: float = 0.0
    """Least share of the pages that was collected."""
    max_share: float = 1.0
    """Largest share of the pages that was collected."""
    min_pages: int = 1
    """Least number of pages under the prefix."""

    def matches(self, count: Count) -> bool:
        """True if the rule decides this prefix."""
        return (
            self.min_share <= count.share <= self.max_share
            and count.pages >= self.min_pages
            and fnmatch.fnmatchcase(count.prefix, self.prefix)
        )


def load_rules(path: Path) -> tuple[Rule, ...]:
    """Read a rule file; ValueError with the rule and what is wrong in it."""
    rules = _read_yaml(path, {"rules"}).get("rules")
    if not isinstance(rules, list) or not rules:
        raise ValueError(f"{path}: write a list of rules, such as \"rules: [{{prefix: '*', min_share: 0.5}}]\"")
    return tuple(_rule(f"{path}: rule {number}", rule) for number, rule in enumerate(rules, start=1))


def apply_rules(rules: Sequence[Rule], prefixes: Iterable[Count], base: Annotations) -> Annotations:
    """Decide prefixes by rules; a decision of `base` stays unless a rule decides the prefix."""
    decided = dict(base.decisions)
    for count in prefixes:
        for rule in rules:
            if rule.matches(count):
                decided[count.prefix] = rule.math
    return from_decisions(decided)


def from_decisions(decided: Mapping[str, bool]) -> Annotations:
    """Annotations from decisions, without prefixes that repeat the decision of the one above them."""
    math, not_math = [], []
    for prefix in sorted(decided):
        steps = prefix.split("/")
        above = ("/".join(steps[:end]) for end in range(len(steps) - 1, 0, -1))
        inherited = next((decided[longer] for longer in above if longer in decided), False)
        if decided[prefix] != inherited:
            (math if decided[prefix] else not_math).append(prefix)
    return Annotations(tuple(math), tuple(not_math))


def write_annotations(
    path: Path, annotations: Annotations, heading: str, suggestions: Iterable[Sequence[Count]] = ()
) -> None:
    """Write an annotation file: a heading, the annotations, and below them suggestions as comments to uncomment.

    A suggestion is a domain and prefixes in it.
    """
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    lines += [f"done: {str(annotations.done).lower()}", "math:"]
    lines += [f"- {_scalar(prefix)}" for prefix in annotations.math]
    for domain in suggestions:
        suggested = [_suggestion(count) for count in domain if count.prefix not in annotations.decisions]
        lines += ["#", *suggested] if suggested else []
    lines += ["not_math:", *(f"- {_scalar(prefix)}" for prefix in annotations.not_math)]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _suggestion(count: Count) -> str:
    pages = f"{count.pages} pages, {count.share:.0%} collected, {count.missing} to gain"
    return f"# - {_scalar(count.prefix):<50} # {pages}"


def _scalar(prefix: str) -> str:
    return prefix if _PLAIN.fullmatch(prefix) else json.dumps(prefix, ensure_ascii=False)


def _read_yaml(path: Path, names: set[str]) -> dict[str, Any]:
    try:
        # The base loader leaves every value the text it is: a host like 1.5 is no number.
        record = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())}): correct that line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: must hold {', '.join(sorted(names))}, got {str(record)[:60]!r}")
    unknown = sorted(map(str, record.keys() - names))
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}: keys are {', '.join(sorted(names))}")
    return record


def _prefixes(path: Path, name: str, value: Any) -> tuple[str, ...]:
    """Prefixes of a list, as `url_prefixes` writes them; URLs copied from an address bar are accepted."""
    if not value:
        return ()  # everything in it is commented out
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path}: {name} must be a list of URL prefixes, one per line after '- ', got {value!r:.60}")
    prefixes = [list(url_prefixes(item.strip().rstrip("*")))[-1] for item in value]
    for item, prefix in zip(value, prefixes, strict=True):
        if not base_url(prefix):
            raise ValueError(f"{path}: {item!r} under {name} has no host: write it like mathoverflow.net/questions")
    return tuple(dict.fromkeys(prefixes))


def _rule(where: str, record: Any) -> Rule:
    names = [field.name for field in fields(Rule)]
    if not isinstance(record, dict) or not record.get("prefix"):
        raise ValueError(f"{where} must have a prefix, such as {{prefix: 'mathoverflow.net/*'}}, got {record!r}")
    unknown = [name for name in record if name not in names]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}: keys are {', '.join(names)}")
    if record.get("math", "true") not in ("true", "false"):
        raise ValueError(f"{where}: math must be true or false, got {record['math']!r}")
    values: dict[str, Any] = {"prefix": record["prefix"], "math": record.get("math", "true") == "true"}
    for name, kind in (("min_share", float), ("max_share", float), ("min_pages", int)):
        if name in record:
            try:
                values[name] = kind(record[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {name} must be a number, got {record[name]!r}") from error
            if kind is float and not 0 <= values[name] <= 1:
                raise ValueError(f"{where}: {name} is a share and must be in 0..1, got {record[name]!r}")
    return Rule(**values)
