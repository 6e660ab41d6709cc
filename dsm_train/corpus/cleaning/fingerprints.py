"""Hashes of a page that duplicates share: of its URL, of its text, and of its MinHash signature."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import numpy as np
import xxhash
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

_COMPARED = 1_000_000
"""Characters of a text that near-duplicates are found by; memory per page grows with it."""
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TRACKING = re.compile(r"utm_|(?:gclid|fbclid|msclkid|sessionid|phpsessid|jsessionid)$", re.IGNORECASE)


@dataclass(frozen=True)
class Near:
    """MinHash: 14 hashes of a page, by default; pages that share any are near-duplicates."""

    buckets: int
    hashes_per_bucket: int
    ngram: int

    def hashes(self, text: str) -> list[int]:
        """Hash per bucket, of the bucket's number and its MinHashes; none for a text shorter than an n-gram."""
        # Part of datatrove's normalisation only matters for accents; other texts take half the time without it.
        self._signature.config.norm_config.norm_unicode_diacritics = not text.isascii()
        shingles = self._signature.get_shingles(text[:_COMPARED])
        if not len(shingles):
            return []
        parts = np.array_split(shingles, -(-len(shingles) // 4096))  # bounds memory, and stays in the cache
        signature = np.array([self._signature.get_signature(part) for part in parts], np.uint64).min(axis=0)
        return [xxhash.xxh64_intdigest(row.tobytes(), seed=bucket) for bucket, row in enumerate(signature)]

    @cached_property
    def _signature(self) -> MinhashDedupSignature:
        # Numbers count: exercises that differ in nothing else are different pages.
        norm = TextNormConfig(norm_numbers=False)
        minhash = MinhashConfig(self.ngram, self.buckets, self.hashes_per_bucket, norm_config=norm)
        signature = MinhashDedupSignature(".", minhash, language=_Words())  # type: ignore[arg-type]
        # Its own gives text to xxhash, which takes bytes alone since 4.0 (huggingface/datatrove#508); same values.
        signature._hash_func = hash64
        return signature


class _Words(WordTokenizer):
    """Words between spaces, and each Chinese or Japanese character by itself (datatrove's own words need spaCy)."""

    _WORD = re.compile(f"[{_CHARACTERS}]|[^\\s{_CHARACTERS}]+")

    def word_tokenize(self, text: str) -> list[str]:
        return self._WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


def normalise_url(url: str) -> str:
    """Canonical form of a URL, equal for all addresses of one page.

    Scheme, `www.`, default port, fragment, last slash and tracking parameters are dropped; the host is in lower case,
    escapes are decoded, parameters sorted.
    """
    try:
        parts = urlsplit(url.strip())
        port = "" if parts.port in (None, 80, 443) else f":{parts.port}"
        query = sorted(pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not _TRACKING.match(pair[0]))
    except ValueError:  # no address
        return url
    host = (parts.hostname or "").removeprefix("www.").rstrip(".")
    return f"{host}{port}{unquote(parts.path).rstrip('/')}" + (f"?{urlencode(query)}" if query else "")


def hash64(text: str) -> int:
    """Hash of a text in 64 bits, the same on every machine."""
    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass"))
