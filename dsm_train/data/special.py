"""Special tokens, which templates can spell and texts cannot.

A template is written with special tokens, and the texts that it wraps may spell the same characters. Two steps keep
them apart, and leave every other token as it is in the whole text:

- While a template is rendered, an `Escape` hides what could be read as a special token in the texts.
- The tokenizer that encodes has its special tokens renamed. In a rendered template its own special tokens get these
  names, and the texts their characters back. Neither an added token nor a merge nor an entry of the vocabulary then
  turns a text into a special token, whatever the tokenizer's model.

A name is private-use characters: _LEAD, once more than the texts hold it, and one of _CODES. So no text holds a name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import tokenizers
from tokenizers import AddedToken

_LEAD = "\U0010fffd"
_CODES = [chr(code) for code in range(0x100000, 0x10FFFD)]


class SpecialTokens:
    """The special tokens of a tokenizer, and the same tokenizer with these renamed."""

    def __init__(self, backend: tokenizers.Tokenizer, names: Collection[str]) -> None:
        """Take the names of all tokens that a text may not produce, added to the vocabulary or part of it."""
        self._backend = backend
        self.codes = dict(zip(sorted(names), _CODES, strict=False))
        added = list(backend.get_added_tokens_decoder().values())
        special = [token for token in added if token.content in self.codes]
        self.spelled = re.compile(_any_of(special))
        self._added = _any_of(added)
        self._special = [token.content for token in special]
        self._longest = max(map(len, self._special), default=0)
        self._begins = {token[:k] for token in self._special for k in range(1, len(token))}
        self._ends = {token[k:] for token in self._special for k in range(1, len(token))}
        # A name is longer only for texts that hold _LEAD, which hardly any does.
        self.renamed = lru_cache(maxsize=2)(self._renamed)
        self.written = lru_cache(maxsize=2)(self._written)

    def encode(self, text: str) -> tokenizers.Encoding:
        """Encode a text in which nothing is a special token."""
        return self.renamed(_lead([text])).encode(text, add_special_tokens=False)

    def begins_at_the_end_of(self, text: str) -> bool:
        """Tell whether `text` ends with the beginning of a special token."""
        return any(text[-size:] in self._begins for size in range(1, min(len(text), self._longest) + 1))

    def ends_at_the_start_of(self, text: str) -> bool:
        """Tell whether `text` starts with the end of a special token, or is the middle of one."""
        if any(text[:size] in self._ends for size in range(1, self._longest)):
            return True
        return 0 < len(text) < self._longest and any(text in token for token in self._special)

    def escape(self, texts: Iterable[str]) -> Escape:
        """Prepare to hide these texts, all that one template wraps."""
        return Escape(self, _lead(texts))

    def _written(self, lead: str) -> re.Pattern[str]:
        """Match a hidden text, and an added token that a template has written."""
        return re.compile(f"{lead}[{_CODES[0]}-{_CODES[-1]}]|{self._added}")

    def _renamed(self, lead: str) -> tokenizers.Tokenizer:
        state = json.loads(self._backend.to_str())
        normalizer = self._backend.normalizer
        names = {name: lead + code for name, code in self.codes.items()}
        for token in state["added_tokens"]:
            if (name := names.get(token["content"])) is not None:
                # A normalizer that changes the name would hide it from the search in normalized text.
                kept = normalizer is None or name in normalizer.normalize_str(name)
                token.update(content=name, normalized=token["normalized"] and kept)
        _rename(state["model"], names)
        return tokenizers.Tokenizer.from_str(json.dumps(state | {"post_processor": None, "truncation": None}))


class Escape:
    """Characters that stand for what could be read as a special token in some texts, while a template wraps them."""

    def __init__(self, special: SpecialTokens, lead: str) -> None:
        self._special, self._lead = special, lead
        self._codes: dict[str, str] = {}
        self._hidden: dict[str, str] = {}

    def hide(self, text: str) -> str:
        """Replace what spells a special token, and what would spell one together with the template around it."""
        text = self._special.spelled.sub(lambda match: self._hide(match[0]), text)
        first, last = len(text) - len(text.lstrip()), len(text.rstrip()) - 1  # templates strip texts
        if self._special.begins_at_the_end_of(text[: last + 1]):
            text = text[:last] + self._hide(text[last]) + text[last + 1 :]
        if self._special.ends_at_the_start_of(text.strip()):
            text = text[:first] + self._hide(text[first]) + text[first + 1 :]
        return text

    def _hide(self, text: str) -> str:
        code = self._codes.setdefault(text, _CODES[len(self._codes)])
        self._hidden[self._lead + code] = text
        return self._lead + code

    def shown(self, rendered: str) -> str:
        """Put the texts' own characters back into a rendered template, for people."""
        return self._special.written(self._lead).sub(lambda match: self._hidden.get(match[0], match[0]), rendered)

    def encode(self, rendered: str) -> tokenizers.Encoding:
        """Encode a rendered template."""
        return self.encode_named(self.named(rendered))

    def encode_named(self, named: str) -> tokenizers.Encoding:
        """Encode what `named` returned."""
        return self._special.renamed(self._lead).encode(named, add_special_tokens=False)

    def named(self, rendered: str) -> str:
        """Name the special tokens of a rendered template, and put the texts' own characters back."""

        def replace(match: re.Match[str]) -> str:
            text, code = match[0], self._special.codes.get(match[0])
            return self._hidden.get(text, text) if code is None else self._lead + code

        return self._special.written(self._lead).sub(replace, rendered)

    def special(self, rendered: str, start: int, end: int) -> Iterator[re.Match[str]]:
        """Find the template's own special tokens in a part of what was rendered."""
        found = self._special.written(self._lead).finditer(rendered, start, end)
        return (match for match in found if match[0] in self._special.codes)


def _lead(texts: Iterable[str]) -> str:
    return _LEAD * (1 + sum(text.count(_LEAD) for text in texts))


def _any_of(tokens: Collection[AddedToken]) -> str:
    """Write the pattern of any of these tokens; of several that begin in one place the longest, as in tokenizers."""
    patterns = (
        rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
        for token in sorted(tokens, key=lambda token: -len(token.content))
        if token.content
    )
    return "|".join(patterns) or "(?!)"


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename entries of the vocabulary in the JSON of a tokenizer's model, and drop the merges that make them."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): id_ for piece, id_ in vocab.items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = len(model["continuing_subword_prefix"] or "")
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in merges if names.keys().isdisjoint((a, b, a + b, a + b[prefix:]))]
