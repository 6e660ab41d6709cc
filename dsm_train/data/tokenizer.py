"""Text to token ids and back: a small tokenizer trained here, or one from a Hugging Face folder.

Prompt and solution are always encoded apart and their ids joined. Encoding the joined text could merge across the
boundary, and training would then see ids that no rollout, which continues the prompt's own ids, ever produces.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, EOS = "<pad>", "<eos>"
_CONFIG = "tokenizer_config.json"
# The trainer takes quadratic time in a piece (a run of letters, of blanks, of other characters): longer runs are cut.
_LONGEST_PIECE = 256
_LONG_RUN = re.compile(rf"[^\W\d_]{{{_LONGEST_PIECE}}}|(?:[^\w\s]|_){{{_LONGEST_PIECE}}}|\s{{{_LONGEST_PIECE}}}")


class Tokenizer:
    """A `tokenizers` tokenizer with the ids that training needs.

    `encode` adds no token of its own, neither at the start nor at the end. `decode` leaves special tokens out.
    For a tokenizer trained here `decode(encode(text)) == text` for every text, "<eos>" spelled out included: text
    never turns into a special token. One from Hugging Face does recognise its special tokens in text, since prompt
    templates are written with them.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_id: int, pad_id: int, pretrained: Any = None) -> None:
        """Wrap `backend`; `pretrained` is the transformers tokenizer it came from, which knows how to save itself."""
        self._backend = backend
        self._pretrained = pretrained
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """Rows that the embedding needs: one above the largest id, since ids may have gaps."""
        backend.encode_special_tokens = pretrained is None

    def fingerprint(self) -> str:
        """Hash what each id means (every token with its id, and the one that ends a text), to be kept with the weights.

        Saving and loading keep it, in our format and in Hugging Face's. The pad token is no part: weights never see it.
        """
        vocabulary = sorted(self._backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps([vocabulary, self.eos_id]).encode()).hexdigest()[:16]

    def all_text(self) -> Tokenizer:
        """Copy the tokenizer for texts of unknown origin: what spells a special token is text like any other."""
        backend = copy.deepcopy(self._backend)
        tokenizer = Tokenizer(backend, self.eos_id, self.pad_id, self._pretrained)
        backend.encode_special_tokens = True
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` and `transformers.AutoTokenizer` both read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._pretrained is not None:
            self._pretrained.save_pretrained(folder)
            return
        self._backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._backend.id_to_token(self.eos_id),
            "pad_token": self._backend.id_to_token(self.pad_id),
        }
        (folder / _CONFIG).write_text(json.dumps(config, indent=2))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE in which every digit is a token of its own; the same texts give the same tokenizer.

    `vocab_size` is an upper bound: few texts have few merges. Raises ValueError below 258, the 256 bytes and the two
    special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"vocab_size must be at least {len(alphabet) + 2} (256 bytes, {PAD}, {EOS}), got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((part for text in texts for part in _bounded(text)), trainer)
    return Tokenizer(backend, eos_id=1, pad_id=0)  # the trainer numbers special tokens first, as listed


def _bounded(text: str) -> Iterator[str]:
    """Cut a text wherever a run of one kind of character reaches the longest piece that is trained on."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def load_tokenizer(path: str | Path, *, eos_token: str | None = None) -> Tokenizer:
    """Load a folder that `Tokenizer.save` wrote, a Hugging Face folder, or a bare tokenizer.json.

    A bare tokenizer.json does not say which token ends a text: it must hold "<eos>", or `eos_token` must name it.
    Without a pad token the end token pads. Nothing is downloaded. Raises ValueError where there is no tokenizer, or
    no end token.
    """
    path = Path(path)
    if path.is_file():
        return _from_json(path, eos_token or EOS, PAD)
    if not path.is_dir():
        raise ValueError(f"no tokenizer at {str(path)!r}: give a folder with tokenizer files, or a tokenizer.json")
    config = path / _CONFIG
    try:
        names = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{config} is not JSON ({error}): restore it") from error
    # With nothing but these keys tokenizer.json is the whole truth, as in our own folders: spare transformers' import.
    if names.keys() == {"tokenizer_class", "eos_token", "pad_token"} and isinstance(names["eos_token"], str):
        return _from_json(path / "tokenizer.json", eos_token or names["eos_token"], names["pad_token"])
    return _from_pretrained(path, eos_token)


def _from_json(path: Path, eos_token: str, pad_token: str) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} cannot be read as a tokenizer.json ({error})") from error
    eos_id = backend.token_to_id(eos_token)
    if eos_id is None:
        raise ValueError(f"{path} has no end token {eos_token!r}: name it (eos_token), or load its Hugging Face folder")
    pad_id = backend.token_to_id(pad_token)
    return Tokenizer(backend, eos_id, eos_id if pad_id is None else pad_id)


def _from_pretrained(path: Path, eos_token: str | None) -> Tokenizer:
    from transformers import AutoTokenizer

    options = {} if eos_token is None else {"eos_token": eos_token}
    try:
        pretrained = AutoTokenizer.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"no tokenizer could be loaded from {str(path)!r} ({reason}): check its files") from error
    if not pretrained.is_fast:
        raise ValueError(f"{str(path)!r} holds a tokenizer without a tokenizer.json: convert it to a fast tokenizer")
    eos_id, pad_id = pretrained.eos_token_id, pretrained.pad_token_id
    if eos_id is None:
        raise ValueError(f"the tokenizer in {str(path)!r} has no eos token: set eos_token in its {_CONFIG}")
    return Tokenizer(pretrained.backend_tokenizer, eos_id, eos_id if pad_id is None else pad_id, pretrained)
