"""Configuration of rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dsm_train.config import above, require

BuiltIn = Literal["numeric", "format"]
"""Names of the table in built_in.py: the configuration loads without it."""
RESERVED = ("std",)
"""Names of functions whose metrics would be others'."""


@dataclass(frozen=True)
class RewardFunction:
    """Part of a response's reward: a built-in reward, or a function of the user's, and its weight."""

    name: BuiltIn | None = None
    """Built-in reward: numeric (the response states the gold answer, exactly) or format (it ends in one line
    "#### number" that states the answer for the only time)."""
    call: str | None = None
    """Function of the user's, module:function, that takes a list of completions and the list of their tasks, and
    returns a list of numbers, or None for no verdict."""
    weight: float = 1.0
    """Weight of its values in the reward."""

    def __post_init__(self) -> None:
        both = f"name = {self.name}, call = {self.call}"
        require((self.name is None) != (self.call is None), "name", "given or call, one of the two", both)
        if self.call is not None:
            module, colon, function = self.call.partition(":")
            written = f"module:function: write {module.removesuffix('.py')}:{function}"
            require(not module.endswith(".py"), "call", written, self.call)
            named = colon and all(part.isidentifier() for part in (*module.split("."), *function.split(".")))
            require(bool(named), "call", "module:function, such as my_rewards:length_penalty", self.call)
        require(math.isfinite(self.weight), "weight", "finite", self.weight)
        require(self.weight >= 0 or self.call is not None, "weight", "at least 0 for a built-in reward", self.weight)

    @property
    def label(self) -> str:
        """Name in metrics and samples."""
        return self.name or (self.call or "").partition(":")[2]


@dataclass(frozen=True)
class RewardConfig:
    """Functions whose weighted sum is a response's reward, and what becomes of responses that cannot be judged."""

    functions: tuple[RewardFunction, ...] = (RewardFunction("numeric"),)
    """Parts of the reward; evaluation counts a response as correct when the first gives at least 1."""
    unfinished: Literal["zero", "mask", "keep"] = "zero"
    """Responses that the length limit cut off: zero (no reward), mask (left out of advantages and loss) or keep (graded
    as they are). Evaluation counts them as wrong, unless they are kept."""
    no_verdict: Literal["mask", "zero"] = "mask"
    """Responses about which a function returned None, raised or ran out of time: mask (left out of advantages and loss)
    or zero (no reward). Evaluation counts them as wrong, where it was the first."""
    timeout_seconds: float = 60.0
    """Time limit of a call of a user's function, on a batch of responses: all of an exploration stage on a
    replica, at most 256 in evaluation. It is stopped for certain."""

    def __post_init__(self) -> None:
        require(bool(self.functions), "functions", "a list of at least one function", [])
        labels = [function.label for function in self.functions]
        for label in labels:
            rule = "functions of different names: they name the metrics"
            require(labels.count(label) == 1 and label not in RESERVED, "functions", rule, label)
        weights = [function.weight for function in self.functions]
        require(any(weights), "functions", "weighted other than 0, one at least, or nothing can be learned", weights)
        above(0, self, "timeout_seconds")

    @property
    def calls(self) -> tuple[str, ...]:
        """Functions of the user's."""
        return tuple(function.call for function in self.functions if function.call is not None)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the functions in metrics and samples."""
        return tuple(function.label for function in self.functions)
