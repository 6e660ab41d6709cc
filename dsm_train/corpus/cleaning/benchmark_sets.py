"""Search of pages for the texts of benchmarks: n-grams that match exactly, and short texts as a whole.

A gram is a word, or a Chinese character; case, punctuation, white space, GSM8K's calculator annotations and LaTeX's
layout do not count. A page is compared in three steps. Its words are hashed, and all runs of n - 2 of them are looked
up at once: for most pages that is the end. After three runs in a row the n words are compared one by one; fewer are a
near miss. Hashes have 64 bits and are the same in every process, unlike Python's own.

C words of all benchmarks, W of all texts that are compared, N characters, U different runs, P texts.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

_CHINESE = ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
_APART = 3
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_LAYOUT = re.compile(
    r"\\(?:[dtc]?frac|left|right|[bB]igg?[lrm]?|(?:display|text|script)style|text(?:bf|it|rm|tt)?|math(?:rm|bf|it|sf|bb|cal)"
    r"|operatorname|mbox|hbox|boxed|limits|q?quad|cdot|times)(?![A-Za-z])"
)
_FIELDS = ("question", "answer", "problem", "solution")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SCRAMBLE = np.uint64(0xD6E8FEB86659FD93)
_BLOCK = 1 << 20
"""Characters hashed at once."""
_LEAST_NEAR = 4
"""Shortest run that is reported as a near miss."""


@dataclass(frozen=True)
class Words:
    """Grams of P texts: words in lower case and Chinese characters, without what does not count.

    A text and its lines one by one have the same grams. Characters are looked up in a table and words are hashed, all
    at once and for many texts at once: a regular expression and a dictionary take five times as long.
    """

    code_N: np.ndarray
    """Characters of all texts; 0 between words."""
    start_W: np.ndarray
    """The first character of each word. Between two texts there is a word that is in none."""
    first_P: np.ndarray
    """The first word of each text; one more entry, as if another text followed."""

    @staticmethod
    def of(*texts: str) -> Words:
        """The grams of texts.

        >>> Words.of(r"Tom's $1,200 is \\frac{1}{2} of 小明").list(0)
        ['tom', 's', '1200', 'is', '1', '2', 'of', '小', '明']
        """
        plain = [_plain(text) for text in texts]
        code_N = np.frombuffer("\n".join([*plain, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
        end_P = np.cumsum([len(text) + 1 for text in plain]) - 1
        kind_N = _kinds()[code_N]
        kind_N[end_P] = _APART
        inside_N = kind_N > 0
        starts_N = inside_N.copy()
        starts_N[1:] &= ~inside_N[:-1] | (kind_N[1:] | kind_N[:-1] == _APART)
        start_W = np.flatnonzero(starts_N)
        return Words(code_N * inside_N, start_W, np.concatenate([[0], np.searchsorted(start_W, end_P) + 1]))

    def list(self, text: int, first: int = 0, behind: int | None = None) -> list[str]:
        """The words of one text, or those from `first` until before `behind`."""
        own = self.start_W[self.first_P[text] : self.first_P[text + 1]]
        starts = own[first : len(own) if behind is None else behind + 1]
        characters = self.code_N[starts[0] : starts[-1]].tobytes().decode("utf-32-le")
        places = (starts - starts[0]).tolist()
        return [characters[start:end].rstrip("\0") for start, end in itertools.pairwise(places)]

    def lengths(self) -> np.ndarray:
        """Words of each text [P]."""
        return np.diff(self.first_P) - 1

    def hashes(self) -> np.ndarray:
        """A hash of each word [W], uint64: a polynomial modulo 2^64, the same on every machine."""
        ends, hash_W = np.append(self.start_W, len(self.code_N)), np.empty(len(self.start_W), np.uint64)
        first = 0
        while first < len(hash_W):  # in blocks, which bounds memory: 16 bytes per character
            behind = max(first + 1, int(np.searchsorted(self.start_W, self.start_W[first] + _BLOCK)))
            code_N, start_W = self.code_N[ends[first] : ends[behind]], self.start_W[first:behind] - ends[first]
            power_N, inverse_N = _powers(1 << len(code_N).bit_length())
            # sum of c_i M^-i over the word, times M^start, is that of the word alone, wherever it stands.
            sum_W = np.add.reduceat(code_N * inverse_N[: len(code_N)], start_W)
            hash_W[first:behind] = sum_W * power_N[start_W] * _SCRAMBLE
            first = behind
        return hash_W


def _plain(text: str) -> str:
    """The text in lower case, without calculator annotations, thousands' commas and LaTeX's layout."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = text.lower()
    if "<<" in text:
        text = _CALCULATOR.sub(" ", text)
    if "\\" in text:
        text = _LAYOUT.sub(" ", text.replace("\\,", ","))
    return _THOUSANDS.sub("", text.replace("{,}", ","))


@functools.cache
def _kinds() -> np.ndarray:
    """Class of every code point: 0: in no word; 1: a letter or a digit; _APART: a Chinese character, itself a word."""
    kind_U = np.fromiter((chr(code).isalnum() for code in range(sys.maxunicode + 1)), np.uint8, sys.maxunicode + 1)
    for first, last in _CHINESE:
        kind_U[first : last + 1] = _APART
    return kind_U


@functools.lru_cache(2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of the multiplier, from 0, and of its inverse, modulo 2^64."""
    bases = (int(_MULTIPLIER), pow(int(_MULTIPLIER), -1, 1 << 64))
    power, inverse = (np.full(count, base, np.uint64) for base in bases)
    power[0] = inverse[0] = 1
    return np.multiply.accumulate(power), np.multiply.accumulate(inverse)


@dataclass(frozen=True, slots=True)
class Item:
    """A text of a benchmark."""

    benchmark: str
    """Name of its file."""
    line: int
    """Its line there, from 1."""
    field: str
    """question or answer."""


@dataclass(frozen=True, slots=True)
class Match:
    """Words of a page that an item has too."""

    kind: Literal["ngram", "exact", "near"]
    """n words of the item or more; a short item as a whole; fewer words than n: nothing is removed."""
    item: Item
    start: int
    """First word of the page that matches."""
    end: int
    """Behind the last one."""


@dataclass(frozen=True)
class BenchmarkCounts:
    """Size of an index of benchmarks."""

    items: int
    """Lines."""
    texts: int
    """Questions and answers that are matched."""
    grams: int
    """Different n-grams."""
    exact: int
    """Texts shorter than n, matched as a whole."""
    skipped: int
    """Texts too short to match: fewer than min_ngram words."""


class Benchmarks:
    """The texts of benchmarks, indexed."""

    def __init__(self, items: Iterable[tuple[Item, str]], ngram: int = 10, min_ngram: int = 3) -> None:
        """Index texts: n-grams of n = `ngram` words; whole, those shorter, down to `min_ngram` words."""
        self._ngram, self._first = ngram, min_ngram
        self._near = ngram - 2 if ngram - 2 >= _LEAST_NEAR else ngram
        self._items: list[Item] = []
        long: list[np.ndarray] = []
        owner: list[int] = []  # place in _items of each long text
        self._short: dict[int, list[tuple[np.ndarray, int]]] = defaultdict(list)  # by the hash of their beginning
        skipped, seen = 0, set()
        for item, text in items:
            seen.add((item.benchmark, item.line))
            word_W = Words.of(text).hashes()[:-1]
            if len(word_W) < min_ngram:
                skipped += 1
                continue
            if len(word_W) >= ngram:
                long += [word_W, np.zeros(1, np.uint64)]
                owner += [len(self._items)] * (len(word_W) + 1)
            else:
                self._short[int(_runs(word_W, min_ngram)[0])].append((word_W, len(self._items)))
            self._items.append(item)
        # All long texts one after the other, 0 behind each; and for each place the item it is in.
        self._word_C = np.concatenate([np.zeros(0, np.uint64), *long])
        self._item_C = np.array(owner, np.int64)
        self._grams = _Places(self._word_C, ngram)
        self._nears = _Places(self._word_C, self._near) if self._near < ngram else self._grams
        self._beginnings = _Filter(np.array(sorted(self._short), np.uint64))
        exact = sum(map(len, self._short.values()))
        self.counts = BenchmarkCounts(len(seen), len(self._items), len(self._grams.hash_U), exact, skipped)

    @staticmethod
    def from_files(paths: Sequence[Path], ngram: int = 10, min_ngram: int = 3) -> Benchmarks:
        """Index JSONL files: the fields question and answer (or problem and solution) of every line.

        Raises ValueError, with path:line and what to do, for a file that cannot be read or holds anything else.
        """
        if not paths:
            raise ValueError("no benchmarks to compare with: give JSONL files (decontaminate.benchmarks)")
        return Benchmarks((found for path in paths for found in _read(path)), ngram, min_ngram)

    def check(self, words: Words) -> list[list[Match]]:
        """Matches of each text; near misses of a text only when nothing in it matches."""
        word_W = words.hashes()
        found: list[list[Match]] = [[] for _ in words.first_P[1:]]
        for match in itertools.chain(self._exact(word_W), self._long(word_W)):
            text = int(np.searchsorted(words.first_P, match.start, "right")) - 1
            first = int(words.first_P[text])
            found[text].append(replace(match, start=match.start - first, end=match.end - first))
        return [[match for match in all_ if match.kind != "near"] or all_ for all_ in found]

    def _exact(self, word_W: np.ndarray) -> Iterator[Match]:
        """Short items, which the page holds as a whole."""
        begin_W = _runs(word_W, self._first)
        for start in self._beginnings.places(begin_W).tolist():
            for whole, item in self._short[int(begin_W[start])]:
                if np.array_equal(word_W[start : start + len(whole)], whole):
                    yield Match("exact", self._items[item], start, start + len(whole))

    def _long(self, word_W: np.ndarray) -> Iterator[Match]:
        """Runs of words that a long item has too: of n words or more, or near misses."""
        near, ngram = self._near, self._ngram
        for start, end in _consecutive(self._nears.filter.places(_runs(word_W, near))):
            stretch = word_W[start : end + near - 1]  # every `near` words of it are in some item
            places = start + self._grams.filter.places(_runs(stretch, ngram))
            found = {
                i: place for i in places.tolist() if (place := self._place(self._grams, word_W[i : i + ngram])) >= 0
            }
            for first, last in _consecutive(list(found)):
                yield Match("ngram", self._items[self._item_C[found[first]]], first, last + ngram - 1)
            place = -1 if found else self._place(self._nears, word_W[start : start + near])
            if place >= 0:
                yield Match("near", self._items[self._item_C[place]], start, end + near - 1)

    def _place(self, places: _Places, word_n: np.ndarray) -> int:
        """Position of these words in the long texts; -1 if they are not there."""
        place = places.first(_runs(word_n, len(word_n))[0])
        return place if np.array_equal(self._word_C[place : place + len(word_n)], word_n) else -1


class _Filter:
    """A set of hashes that most others are kept out of by one look into a table."""

    def __init__(self, hash_U: np.ndarray) -> None:
        """`hash_U`: sorted, each once."""
        self._hash_U = hash_U
        bits = min(26, max(10, (16 * len(hash_U)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[hash_U >> self._shift] = True

    def places(self, hash_N: np.ndarray) -> np.ndarray:
        """Indices of the hashes that are in the set, ascending."""
        maybe = np.flatnonzero(self._table[hash_N >> self._shift])
        if not len(maybe):
            return maybe
        at = np.minimum(np.searchsorted(self._hash_U, hash_N[maybe]), len(self._hash_U) - 1)
        return maybe[self._hash_U[at] == hash_N[maybe]]


class _Places:
    """The runs of `length` words in the long texts, by hash."""

    def __init__(self, word_C: np.ndarray, length: int) -> None:
        hash_C = _runs(word_C, length)
        ends_C = np.concatenate([[0], np.cumsum(word_C == 0)])  # ends of texts before each place
        place_R = np.flatnonzero(ends_C[length : length + len(hash_C)] == ends_C[: len(hash_C)])
        self.hash_U, first_U = np.unique(hash_C[place_R], return_index=True)
        self._place_U = place_R[first_U]
        self.filter = _Filter(self.hash_U)

    def first(self, hash_: np.uint64) -> int:
        """First position of the run with this hash, which has to be one of them."""
        return int(self._place_U[np.searchsorted(self.hash_U, hash_)])


def _runs(word_W: np.ndarray, length: int) -> np.ndarray:
    """A hash of each run of `length` words, from the hashes of the words."""
    if length == 1:
        return word_W
    left = length // 2
    left_W, right_W = _runs(word_W, left), _runs(word_W, length - left)
    count = max(0, len(word_W) - length + 1)
    return left_W[:count] * np.uint64(pow(int(_MULTIPLIER), length - left, 1 << 64)) + right_W[left : left + count]


def _consecutive(places: Sequence[int] | np.ndarray) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges (first, behind the last)."""
    if not len(places):
        return
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    for part in np.split(np.asarray(places), breaks):
        yield int(part[0]), int(part[-1]) + 1


def _read(path: Path) -> Iterator[tuple[Item, str]]:
    """Every text of a JSONL file of items."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check decontaminate.benchmarks") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is not JSON ({error}): write one object per line") from error
        fields = [
            name for name in _FIELDS if isinstance(record, dict) and isinstance(record.get(name), str | int | float)
        ]
        if not fields:
            raise ValueError(f"{path}:{number}: has no text under {' or '.join(_FIELDS)}: add or rename a field")
        for name in fields:
            for text in _variants(str(record[name])):
                yield Item(path.stem, number, name), text


def _variants(text: str) -> list[str]:
    """The text, and GSM8K's solution without the line that repeats its result ("#### 18")."""
    solution, mark, _ = text.rpartition("####")
    return [text, solution] if mark and Words.of(solution).lengths()[0] > 2 else [text]
