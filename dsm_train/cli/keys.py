"""Keys of a stage beside those of other stages: the ones that a recipe may hold, and errors for all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from dsm_train.cli.hints import unknown_key
from dsm_train.cli.values import Setting
from dsm_train.config import Given
from dsm_train.stages.table import Stage


@dataclass(frozen=True, slots=True)
class Leaf:
    """Value of a configuration."""

    type: Any
    required: bool
    """It has no default."""
    owner: type
    """Dataclass that declares it."""


def leaves_of(cls: type, prefix: str = "", parent_has_default: bool = False) -> dict[str, Leaf]:
    """List every value under its dotted name, in the order of the fields."""
    leaves: dict[str, Leaf] = {}
    types = get_type_hints(cls)
    for item in fields(cls):
        key, kind = prefix + item.name, types[item.name]
        if not item.init or kind is Given:
            continue
        has_default = parent_has_default or item.default is not MISSING or item.default_factory is not MISSING
        if isinstance(kind, type) and is_dataclass(kind):
            leaves |= leaves_of(kind, key + ".", has_default)
        else:
            leaves[key] = Leaf(kind, required=not has_default, owner=cls)
    return leaves


@dataclass(frozen=True)
class Keys:
    """Values of a stage, and of the stages that may share a recipe with it, by key."""

    stage: str
    leaves: dict[str, Leaf]
    """Values of this stage."""
    others: dict[str, Leaf]
    """Values of the other stages; many are this stage's as well."""
    homes: dict[str, frozenset[Stage]]
    """Other stages that have the key."""

    @classmethod
    def of(cls, config: type, stage: str, others: Sequence[Stage] = ()) -> Keys:
        """Collect the keys of a configuration and of the other stages'."""
        leaves: dict[str, Leaf] = {}
        homes: dict[str, frozenset[Stage]] = {}
        for other in others:
            for key, leaf in leaves_of(other.configuration()).items():
                leaves.setdefault(key, leaf)
                homes[key] = homes.get(key, frozenset()) | {other}
        return cls(stage, leaves_of(config), leaves, homes)

    def check(self, key: str, where: str = "") -> None:
        """Raise ValueError with a hint for what is not a key of this stage."""
        if key in self.leaves:
            return
        inside = [leaf for leaf in self.leaves if leaf.startswith(key + ".")]
        if inside:
            raise ValueError(f"{where}{key} is a section, not a value; it holds {', '.join(inside)}")
        names = sorted(stage.name for stage in self.homes.get(key, ()))
        raise ValueError(where + unknown_key(key, self.leaves, names))

    def check_recipe(self, key: str, where: str) -> None:
        """Raise ValueError for a key that this stage does not have, nor passes over as another stage's.

        Sections of other stages pass, and top-level values of stages that train.
        """
        section, dot, _ = key.partition(".")
        is_ours = any(leaf.startswith(section + ".") for leaf in self.leaves)
        passes = bool(dot) and not is_ours or any(stage.trains for stage in self.homes.get(key, ()))
        if not (passes and key in self.others):
            self.check(key, where)

    def not_used(self, passed: Mapping[str, Setting], settings: Mapping[str, Setting]) -> str:
        """Name what a recipe holds for other stages, and where this stage looks instead; an empty text for nothing.

        Raises ValueError where the stage would train with defaults unnoticed: the recipe has the values of an optimizer
        (a component without components) under another stage's name alone, and none that only this stage has.
        """
        if not passed:
            return ""
        text = f"not used by {self.stage}: {', '.join(dict.fromkeys(key.partition('.')[0] for key in passed))}"
        instead: dict[str, None] = {}
        for key, setting in passed.items():
            same = self._same_component(key)
            if any(other in settings or self._shared(key, other) for other in same):
                continue  # the recipe sets it under this stage's name, or the other stage has it under this name, too
            reads = [other for other in (same if "." in key else self.leaves) if _last(other) == _last(key)]
            instead |= dict.fromkeys(other for other in reads if other not in settings)
            if same and reads and self._is_innermost(key) and all(self._shared(key, other) for other in settings):
                raise ValueError(f"{setting.where}{text}; {self.stage} reads {' and '.join(reads)}: set that")
        return f"{text}; {self.stage} reads {', '.join(instead)}" if instead else text

    def _same_component(self, key: str) -> list[str]:
        """Return this stage's keys of the innermost component that the other stage's key belongs to."""
        owner = self.others[key].owner
        return [other for other, leaf in self.leaves.items() if leaf.owner is owner]

    def _is_innermost(self, key: str) -> bool:
        """Tell whether the component that the other stage's key belongs to holds values alone."""
        return not any(is_dataclass(kind) for kind in get_type_hints(self.others[key].owner).values())

    def _shared(self, key: str, other: str) -> bool:
        """Tell whether a stage has both keys."""
        return bool(self.homes[key] & self.homes.get(other, frozenset()))


def _last(key: str) -> str:
    return key.rpartition(".")[2]
