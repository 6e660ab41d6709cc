"""fastText classifier of mathematical pages: trained on positives and random pages, folded, used to rank.

Source: DeepSeekMath, section 2.1. Features are the model's own BPE tokens, since Chinese has no spaces
(DeepSeek-Coder-V2, section 2). This is the only file that imports fastText.

fastText scores a page by logits = W mean_f(input_f), f running over its words and their n-grams. With two labels all
that ranks pages is (W_math - W_other) mean_f(input_f) = mean_f(w_f) with w_f = (W_math - W_other) input_f: one number
per feature, not a vector. So the trained model is folded into one of dimension 1: 8 MB instead of 2 GB, ten times as
fast, the same score. It is the log-odds, since probabilities saturate at 1, where the ranking would end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from dsm_train.config import require
from dsm_train.corpus.config import ClassifierConfig, TokenizerConfig
from dsm_train.corpus.engine.page import replacing
from dsm_train.data.tokenizer import Tokenizer, load_tokenizer

_MATH, _OTHER = "__label__math", "__label__other"
_OUTPUT = np.array([0.5, -0.5], np.float32)
"""Output matrix of a folded model, one factor per label; its sign is that of the first label."""
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]|_")
"""A word; a Chinese character; a mark. No underscore in a word: none can then be read as one of fastText's labels."""
_PIECE_END = re.compile(r"(?<=\S)(?= \S)|(?<=\n)(?=\S)")
"""Before a single space, and behind the end of a line: no tokenizer that splits at words has a token across these."""
_PROBE = "The cat sat, then: x = 2.5 (or so).\nWhat?  Yes - 12 34\n\n- we'll see\n    $a_1$ 证明 定理。\n"
_SHORT = 24
"""Characters of the longest piece that is remembered."""
_BLOCK = 1 << 16
"""Characters encoded at once: the tokenizer takes a hundred bytes per token."""
_PARTS = 64
"""Files that training pages are dealt to, each shuffled in memory: a 64th of them at a time."""
_M_PERTURB = -6
"""Option of glibc's mallopt(3)."""
_HELD_OUT_EVERY, _HELD_OUT_MOST, _FEWEST = 10, 1000, 20
_LEAST_AUC = 0.6


class Features:
    """Cuts a text into the features that the classifier sees: BPE tokens, or lower-case words."""

    def __init__(self, config: ClassifierConfig, tokenizer: TokenizerConfig) -> None:
        """Raises ValueError if the features are BPE tokens and there is no tokenizer."""
        require(
            config.features == "words" or tokenizer.path is not None,
            "tokenizer.path",
            "given with classifier.features=bpe (or set classifier.features=words)",
            tokenizer.path,
        )
        self._are_words = config.features == "words"
        # With words as features, the tokenizer still counts tokens for the budget.
        self._tokens = tokenizer.path and _Tokens(load_tokenizer(tokenizer.path, eos_token=tokenizer.eos_token))

    def line(self, text: str) -> str:
        """Features of a text as fastText reads them: separated by spaces, on one line."""
        if self._are_words:
            return " ".join(_WORD.findall(text.lower()))
        assert self._tokens
        return self._tokens.line(text)

    def tokens(self, text: str, line: str) -> int:
        """Tokens of a text whose features are `line`: the tokenizer's; words if there is none."""
        if self._are_words and self._tokens:
            line = self._tokens.line(text)
        return line.count(" ") + 1 if line else 0


class _Tokens:
    """Ids of a text's tokens, as words of digits, with a cache.

    Texts repeat a few thousand words, and a tokenizer takes milliseconds for a page. Pieces that end where tokens end
    are encoded once each: 5 times as fast.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = functools.lru_cache(1 << 18)(self._encode)
        # Some tokenizers treat the beginning of a text apart; they get it whole.
        self._in_pieces = False
        whole = self.line(_PROBE)
        self._in_pieces = True
        self._in_pieces = self.line(_PROBE) == whole

    def line(self, text: str) -> str:
        pieces = _PIECE_END.split(text) if self._in_pieces else [text]
        encoded = (self._known(piece) if len(piece) <= _SHORT else self._encode(piece) for piece in pieces)
        return " ".join(filter(None, encoded))

    def _encode(self, piece: str) -> str:
        blocks = (piece[start : start + _BLOCK] for start in range(0, len(piece), _BLOCK))
        return " ".join(str(id_) for block in blocks for id_ in self._tokenizer.encode(block))


@dataclass(frozen=True)
class Quality:
    """Quality of a model on held-out pages."""

    auc: float
    """Share of pairs, a held-out positive and a held-out negative, in which the positive scores higher."""
    positives: int
    """Positives trained on."""
    negatives: int
    """Negatives trained on."""
    held_out: int
    """Pages held out, of both kinds."""


class Scorer:
    """A folded model: the log-odds that a page is mathematical."""

    def __init__(self, model: Path, features: Features) -> None:
        """Load a model that `train` wrote with the same features; raises ValueError for a file that is none."""
        import fasttext

        if not _is_whole(model):
            raise ValueError(f"{model} is no model of this program, or cut short: delete it and run the step again")
        self.features = features
        self._model = fasttext.load_model(str(model))

    @staticmethod
    def load(model: Path, config: ClassifierConfig, tokenizer: TokenizerConfig) -> Scorer:
        """Load a model with the features it was trained on."""
        return Scorer(model, Features(config, tokenizer))

    def score(self, texts: Iterable[str]) -> list[float]:
        """The score of every text, higher for mathematics; -inf for a text without features."""
        return [self.score_line(self.features.line(text)) for text in texts]

    def score_line(self, line: str) -> float:
        """The score of a text cut into features (`Features.line`)."""
        return float(self._model.get_sentence_vector(line)[0]) if line else -math.inf


def train(
    positives: Iterable[str],
    negatives: Iterable[str],
    config: ClassifierConfig,
    path: Path,
    seed: int,
    tokenizer: TokenizerConfig | None = None,
) -> Quality:
    """Train on texts, write the folded model to `path`, and return its quality on a held-out tenth of the texts.

    The texts are streamed to disk beside `path` and shuffled there with `seed`. One thread (the default) gives the same
    model for the same texts, configuration and seed. Raises ValueError with the setting to change when there are too
    few texts, when training diverges, and when the model does not rank; then nothing is written.
    """
    features = Features(config, tokenizer or TokenizerConfig())
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_temporary(path.with_name(f"{path.name}.train")))
        good, bad = _write_examples(file, positives, negatives, features, seed)
        model = _fit(file, config, seed)
        temporary = stack.enter_context(replacing(path))
        model.save_model(str(temporary))
        if not _is_whole(temporary):  # fastText does not say so
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        scorer = Scorer(temporary, features)
        scores = [np.array([scorer.score_line(line) for line in kind.held_out]) for kind in (good, bad)]
        auc = _check(scores[0], scores[1], good.count + bad.count, config)
    return Quality(auc, good.count, bad.count, len(good.held_out) + len(bad.held_out))


@dataclass
class _Kind:
    """Texts of one label: how many went to training, and those held out."""

    count: int = 0
    held_out: list[str] = field(default_factory=list)


def _write_examples(
    file: Path, positives: Iterable[str], negatives: Iterable[str], features: Features, seed: int
) -> tuple[_Kind, _Kind]:
    """Write the training file: both labels well mixed, for fastText takes its examples in this order."""
    deal = random.Random(seed)
    kinds = (_Kind(), _Kind())
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(_temporary(file.with_name(f"{file.name}.{part}"))) for part in range(_PARTS)]
        parts = [stack.enter_context(open(part, "w+", encoding="utf-8", errors="replace")) for part in paths]
        for kind, label, texts in zip(kinds, (_MATH, _OTHER), (positives, negatives), strict=True):
            for line in filter(None, map(features.line, texts)):
                seen = kind.count + len(kind.held_out)
                if seen % _HELD_OUT_EVERY == 0 and len(kind.held_out) < _HELD_OUT_MOST:
                    kind.held_out.append(line)
                else:
                    kind.count += 1
                    parts[deal.randrange(_PARTS)].write(f"{label} {line}\n")
        _require_enough(*kinds)
        with open(file, "w", encoding="utf-8") as whole:
            for part in parts:
                whole.writelines(_shuffled(part, deal))
    return kinds


def _shuffled(part: IO[str], deal: random.Random) -> Sequence[str]:
    part.seek(0)
    lines = part.readlines()
    deal.shuffle(lines)
    part.truncate(0)  # the whole is being written: do not keep both
    return lines


def _require_enough(good: _Kind, bad: _Kind) -> None:
    for kind, name, remedy in ((good, "positives", "rounds.seeds"), (bad, "negatives", "the folder of pages")):
        found = kind.count + len(kind.held_out)
        if found < _FEWEST:
            raise ValueError(f"{found} {name} are too few to train on (at least {_FEWEST}): add pages to {remedy}")


def _fit(file: Path, config: ClassifierConfig, seed: int) -> Any:
    """Train, and fold the model into dimension 1."""
    import fasttext

    try:
        with _zeroed_memory():
            model = fasttext.train_supervised(
                str(file),
                dim=config.dim,
                lr=config.lr,
                wordNgrams=config.word_ngrams,
                minCount=config.min_count,
                epoch=config.epochs,
                bucket=config.bucket,
                seed=seed,
                thread=config.threads,
                verbose=0,
            )
    except RuntimeError as error:
        if "NaN" not in str(error):
            raise
        raise ValueError(
            f"training diverged (fastText: {error}): lower classifier.lr (now {config.lr:g}), "
            f"or raise classifier.bucket (now {config.bucket}), so that fewer n-grams share a weight"
        ) from error
    except MemoryError as error:
        raise ValueError(
            f"no memory to train: lower classifier.bucket (now {config.bucket}) or classifier.dim (now {config.dim}); "
            f"it takes about {config.bucket * config.dim * 4 / 1e9:.1f} GB"
        ) from error
    sign = 1 if model.get_labels()[0] == _MATH else -1
    output_LD = np.asarray(model.f.getOutputMatrix())  # L labels, D dim; a view, where get_output_matrix copies
    weight_F = np.asarray(model.f.getInputMatrix()) @ (sign * (output_LD[0] - output_LD[1]))  # F features
    model.set_matrices(weight_F[:, None], sign * _OUTPUT[:, None])
    return model


def _is_whole(model: Path) -> bool:
    """True if a file ends as a folded model does, in its output matrix.

    Checked before fastText loads it: fastText accepts a truncated file, or takes all memory to read it.
    """
    with open(model, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _OUTPUT.nbytes))
        return file.read() in (_OUTPUT.tobytes(), (-_OUTPUT).tobytes())


@contextlib.contextmanager
def _zeroed_memory() -> Iterator[None]:
    """New memory of this process is zero while the block runs (glibc).

    With fewer than 10 threads fastText initialises a tenth of its matrix per thread (its issue 1061); this build leaves
    the rest, which is n-grams, as malloc gave it. In a process that has used its memory before, that trains another
    model every time, or ends in "Encountered NaN". Zero is how fastText's own program starts them. Other C libraries
    have no such switch; their large blocks come fresh from the system, which are zero.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(_M_PERTURB, 0xFF)  # new bytes are the complement of this
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def _check(good: np.ndarray, bad: np.ndarray, trained: int, config: ClassifierConfig) -> float:
    """The AUC of held-out scores; ValueError for a model that does not rank."""
    scores = np.concatenate([good, bad])
    now = f"now lr {config.lr:g}, dim {config.dim}, {config.epochs} epochs, {trained} pages"
    if not np.isfinite(scores).all():
        raise ValueError(f"the classifier gives scores that are no numbers: lower classifier.lr ({now})")
    if scores.min() == scores.max():
        raise ValueError(
            "the classifier gives every page the same score: raise classifier.lr or classifier.epochs, lower "
            f"classifier.min_count, or give more pages ({now})"
        )
    auc = _auc(good, bad)
    if auc < _LEAST_AUC:
        raise ValueError(
            f"the classifier does not tell held-out positives from negatives (AUC {auc:.3f}, chance is 0.5): raise "
            f"classifier.lr or classifier.epochs, lower classifier.dim, or give more and cleaner seeds ({now})"
        )
    return auc


def _auc(good: np.ndarray, bad: np.ndarray) -> float:
    """The area under the ROC curve, ties counting half."""
    bad = np.sort(bad)
    below, up_to = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return float((below + up_to).mean() / (2 * len(bad)))


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A path whose file is deleted when the block ends."""
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
