"""Identity of a run: what has to stay the same for it to be continued, and what may change."""

from __future__ import annotations

from collections.abc import Mapping

FREE = (
    "run.out",
    "run.overwrite",
    "run.resume",
    "run.weights_dtype",
    "run.threads",
    "parallel.timeout_minutes",
    "checkpoint.",
    "eval.samples",
    "record",
    "record_step",
)
"""Keys, and sections with a dot behind them, that change nothing before the end, nor what training leads to."""
TOLD = (
    "rewards.timeout_seconds",
    "optim.not_finite",
    "warmup.optim.not_finite",
    "sft.optim.not_finite",
    "the digest of the reward functions",
    "the version",
)
"""Keys that may change results from here on, and that a person changes to get past what ended a run."""
ROUNDING = (
    "parallel.",
    "run.max_tokens",
    "run.share_prompts",
    "model.layers",
    "model.attention",
    "model.recompute",
    "model.logits_mib",
    "model.vocab_multiple",
    "sampling.batch",
    "the number of ranks",
    "the threads of a rank",
    "the device",
    "the version of torch",
)
"""Keys that change results by rounding: the layout, and what computes them."""
NAMES = {
    "run.init": "the digest of the weights",
    "data.path": "the digest of the tasks",
    "data.heldout_path": "the digest of the tasks",
    "data.tokenizer": "the digest of the tokenizer",
}
"""Keys that name files, by the digest of their contents: a file may lie elsewhere."""


def differing(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the keys that differ between two runs and may not: they make another run of it."""
    return [key for key in _changed(then, now) if not _under(key, (*FREE, *TOLD, *ROUNDING))]


def rounding(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the keys that differ and change results by rounding."""
    return [key for key in _changed(then, now) if _under(key, ROUNDING) and not _under(key, FREE)]


def to_tell(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the keys that differ, may, and may change what follows."""
    return [key for key in _changed(then, now) if _under(key, TOLD)]


def told(keys: list[str], then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Write out some keys that differ, with both values."""
    shown = [f"{key} was {then.get(key, 'not there')}, and is {now.get(key, 'not there')}" for key in keys[:4]]
    return "; ".join(shown) + (f"; {len(keys) - 4} more" if len(keys) > 4 else "")


def _changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return [key for key in changed if key not in NAMES or NAMES[key] in changed]


def _under(key: str, names: tuple[str, ...]) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in names)
