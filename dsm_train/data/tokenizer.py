"""Text to token ids and back: a small tokenizer trained here, or one from a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsm_train.data.special import Escape, SpecialTokens
from dsm_train.data.tasks import Message

PAD, EOS = "<pad>", "<eos>"
_CONFIG = "tokenizer_config.json"
FILES = (
    *("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json"),
)
"""Patterns of the files of a tokenizer in a Hugging Face folder."""
# The trainer takes quadratic time in a piece (a run of letters, of blanks, of other characters): longer runs are cut.
_LONGEST_PIECE = 256
_LONG_RUN = re.compile(rf"[^\W\d_]{{{_LONGEST_PIECE}}}|(?:[^\w\s]|_){{{_LONGEST_PIECE}}}|\s{{{_LONGEST_PIECE}}}")


class Tokenizer:
    """A `tokenizers` tokenizer with the ids that training needs.

    No text turns into a special token: for a tokenizer trained here `decode(encode(text)) == text` for every text,
    "<eos>" spelled out included. Templates are written with special tokens, and `escape` tells these from the texts
    that they wrap. Nothing is added, neither at the start (`bos_ids`) nor at the end (`eos_id`).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_id: int,
        pad_id: int,
        stop_ids: Collection[int] = (),
        bos_ids: Sequence[int] = (),
        files: Mapping[str, bytes] | None = None,
        pretrained: Any = None,
    ) -> None:
        """Wrap `backend`.

        stop_ids: tokens that end a response, beside `eos_id`. bos_ids: tokens that the model expects in front of a
        text. files: those it was read from, which saving writes again. pretrained: the transformers tokenizer it came
        from, which renders chat templates.
        """
        self._backend, self._pretrained = backend, pretrained
        self._files = dict(files or {})
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.stop_ids = tuple(sorted({eos_id, *stop_ids}))
        """Tokens that end a response."""
        self.bos_ids = list(bos_ids)
        """Tokens that the model expects in front of a text."""
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """Rows that the embedding needs: one above the largest id, since ids may have gaps."""
        self._added = added = backend.get_added_tokens_decoder()
        self._special_ids = {eos_id, pad_id, *(id_ for id_, token in added.items() if token.special)}
        self._special_ids.update(id_ for id_ in stop_ids if id_ in added)

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self._backend, {self.token(id_) for id_ in self._special_ids})

    def fingerprint(self) -> str:
        """Hash what each id means (every token with its id, and the one that ends a text), to be kept with the weights.

        Saving and loading keep it, in our format and in Hugging Face's. The pad token is no part: weights never see it.
        """
        vocabulary = sorted(self._backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps([vocabulary, self.eos_id]).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids; what spells a special token is text like any other."""
        return self._special.encode(text).ids

    def escape(self, texts: Iterable[str]) -> Escape:
        """Prepare to hide texts from the special tokens of the template that wraps them."""
        return self._special.escape(texts)

    def encode_pair(self, before: str, after: str, escape: Escape) -> tuple[list[int], list[int]]:
        """Encode the two parts of a rendered template, the first as `escape.encode` does, and the second behind it.

        Training then sees the ids that a rollout, which continues the first part's own ids, could produce. They are
        those of the whole, unless one of its tokens lies across the boundary.
        """
        # Next to other characters `after` still gets no blank before it, as some tokenizers begin a text.
        named = escape.named(after)
        ids: list[int] | None = None
        for context in (escape.named(before), "\n", ":"):
            head = escape.encode_named(context).ids
            ids = head if ids is None else ids
            whole = escape.encode_named(context + named)
            if whole.ids[: len(head)] == head and _ends_by(whole, len(head), len(context)):
                return ids, whole.ids[len(head) :]
        return ids, escape.encode_named(named).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([id_ for id_ in ids if id_ not in self._special_ids], skip_special_tokens=True)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Turn token ids into text with the special tokens in it, for people."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token(self, id_: int) -> str:
        """Spell one token; an added one as it was added, where `id_to_token` gives its normalized spelling."""
        added = self._added.get(id_)
        token = self._backend.id_to_token(id_) if added is None else added.content
        assert token is not None, id_
        return token

    @property
    def has_chat_template(self) -> bool:
        """Say whether conversations can be rendered."""
        return self._pretrained is not None and self._pretrained.chat_template is not None

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        """Render a conversation through the model's own chat template.

        ask: end where the assistant's next turn begins. Raises `ValueError` with the template's own words where it
        refuses the conversation.
        """
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._pretrained.apply_chat_template(conversation, add_generation_prompt=ask, tokenize=False)
        except Exception as error:  # a template is a program, and may fail in any way
            reason = " ".join(str(error).split()).rstrip(".")
            remedy = "it may know no system message: leave data.system out, or " if messages[0].role == "system" else ""
            raise ValueError(f"the chat template fails: {reason}: {remedy}correct it") from error

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` and `transformers.AutoTokenizer` both read: the files it came from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        if not self._files:
            self._backend.save(str(folder / "tokenizer.json"))
        if _CONFIG not in self._files and self._pretrained is None:
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": self.token(self.eos_id),
                "pad_token": self.token(self.pad_id),
            }
            (folder / _CONFIG).write_text(json.dumps(config, indent=2))


def _ends_by(encoding: tokenizers.Encoding, count: int, length: int) -> bool:
    """Tell whether the first `count` tokens end within the first `length` characters."""
    span = encoding.token_to_chars(count - 1) if count else None
    return span is None or span[1] <= length


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
    Without a pad token the end token pads. A response also ends at the eos_token_id of generation_config.json beside
    the tokenizer, or else of config.json. Nothing is downloaded. Raises ValueError where there is no tokenizer, or no
    end token, and for end tokens that it does not have.
    """
    path = Path(path)
    if path.is_file():
        return _from_json(path, eos_token or EOS, PAD, {"tokenizer.json": path.read_bytes()})
    if not path.is_dir():
        raise ValueError(f"no tokenizer at {str(path)!r}: give a folder with tokenizer files, or a tokenizer.json")
    found = sorted(file for pattern in FILES for file in path.glob(pattern) if file.is_file())
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in found}
    names = _json(path / _CONFIG)
    if eos_token is not None:
        names["eos_token"] = eos_token
        files[_CONFIG] = json.dumps(names, indent=2).encode()
    # With nothing but these keys tokenizer.json is the whole truth, as in our own folders: spare transformers' import.
    bare = names.keys() == {"tokenizer_class", "eos_token", "pad_token"} and all(type(v) is str for v in names.values())
    if bare and not any("chat_template" in name for name in files):
        return _from_json(path / "tokenizer.json", names["eos_token"], names["pad_token"], files)
    return _from_pretrained(path, eos_token, files)


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object: restore it")
    return content


def _stop_ids(folder: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """Read the tokens that end a response, from the files that transformers' `generate` reads them from."""
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for id_ in ids:
            if type(id_) is not int or id_ < 0 or backend.id_to_token(id_) is None:
                raise ValueError(f"{folder / name}: eos_token_id = {id_!r} is no token of the tokenizer: correct it")
        return ids
    return []


def _bos_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """Find the tokens that a tokenizer puts in front of a text; not those that it puts behind it."""
    encoding = backend.encode("a", add_special_tokens=True)
    return encoding.ids[: [*encoding.special_tokens_mask, 0].index(0)]


def _from_json(path: Path, eos_token: str, pad_token: str, files: Mapping[str, bytes]) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} cannot be read as a tokenizer.json ({error})") from error
    eos_id = backend.token_to_id(eos_token)
    if eos_id is None:
        raise ValueError(f"{path} has no end token {eos_token!r}: name it (eos_token), or load its Hugging Face folder")
    pad_id = backend.token_to_id(pad_token)
    stop_ids = _stop_ids(path.parent, backend)
    return Tokenizer(backend, eos_id, eos_id if pad_id is None else pad_id, stop_ids, _bos_ids(backend), files)


def _from_pretrained(path: Path, eos_token: str | None, files: Mapping[str, bytes]) -> Tokenizer:
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
    backend = pretrained.backend_tokenizer
    bos_ids = _bos_ids(backend)
    # DeepSeek's folders declare it here alone, which transformers 5 passes over beside a tokenizer.json.
    if not bos_ids and _json(path / _CONFIG).get("add_bos_token") is True and pretrained.bos_token_id is not None:
        bos_ids = [pretrained.bos_token_id]
    pad_id = eos_id if pad_id is None else pad_id
    return Tokenizer(backend, eos_id, pad_id, _stop_ids(path, backend), bos_ids, files, pretrained)
