"""Character set and language of a page."""

from __future__ import annotations

import codecs
import re
from functools import lru_cache

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
from resiliparse.parse.lang import detect_fast

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_META = re.compile(
    rb"""<meta\b[^>]*?\bcharset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]*?\bencoding\s*=\s*["']([\w.:-]+)""", re.I
)


def decode(data: bytes, charset: str | None = None) -> tuple[str, str]:
    """Text of a page and the encoding it was in; never fails.

    In this order: a byte order mark; UTF-8 if the bytes are valid (no other encoding is by chance, and headers that
    say otherwise are wrong); the charset of the HTTP header, then of the page; a guess. Other bytes become U+FFFD.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace"), name
    declared = None
    if b"\x1b" in data:  # ISO-2022-JP is ASCII to the eye
        declared = _known(charset) or _declared(data)
    if declared != "iso2022_jp":
        try:  # a page cut in the middle of a character is still UTF-8
            return codecs.utf_8_decode(data, "strict", False)[0], "utf-8"
        except UnicodeDecodeError:
            declared = _known(charset) or _declared(data)
    if declared in ("", "utf-8"):
        # One stray byte in a page that says UTF-8 does not make it anything else.
        text = data.decode("utf-8", "replace")
        if declared and text.count("\ufffd") * 50 < sum(char > "\x7f" for char in text):
            return text, "utf-8"
        declared = _known(detect_encoding(data, max_len=65536)) or "cp1252"
    return data.decode(declared, "replace"), declared


def _declared(data: bytes) -> str:
    match = _META.search(data, 0, 4096)
    return _known((match[1] or match[2]).decode("ascii", "replace")) if match else ""


@lru_cache(256)
def _known(charset: str | None) -> str:
    """Python's name of an encoding as browsers understand its label; "" for one that nobody knows."""
    label = map_encoding_to_html5(charset.strip(" \"'"), fallback_utf8=False) if charset else None
    try:
        return codecs.lookup(label).name if label else ""
    except (LookupError, ValueError):
        return ""


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_NO_CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127])


def printable(text: str) -> str:
    """Text without control characters; "" if one in ten is one, or did not decode: that is data, not text."""
    clean = text.translate(_NO_CONTROL) if text.isascii() else _CONTROL.sub("", text)  # the same, and faster
    return clean if 10 * (len(text) - len(clean) + text.count("\ufffd")) < len(text) else ""


_FORMULA = re.compile(r"\$\$?[^$]*\$\$?")
_SAMPLE = 1000
_ENGLISH = (" the ", " of ", " and ", " is ", " that ")
_KANA = re.compile("[\u3040-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7af]")
_HAN = re.compile("[\u4e00-\u9fff]")
_CYRILLIC = {"uk": re.compile("[іїєґ]"), "ru": re.compile("[ыэ]"), "bg": re.compile("$^")}
"""Languages that are near in letter statistics, and the letters of one that the others do not have."""


def detect_language(text: str, declared: str = "") -> str:
    """ISO 639-1 code of the language of a text, formulas aside; "" if it cannot be told.

    Chinese, Japanese and Korean are known by their characters. For the others letter statistics decide, and the page's
    own declaration if they are close.
    """
    sample = text[: 2 * _SAMPLE]
    if "$" in sample:
        sample = _FORMULA.sub(" ", sample)
    sample = sample[:_SAMPLE]
    if sum(map(sample.count, _ENGLISH)) * 60 > len(sample):
        return "en"
    if not sample.isascii():
        han, kana, hangul = (len(script.findall(sample)) for script in (_HAN, _KANA, _HANGUL))
        if 3 * (han + kana + hangul) > len(sample.split()) and 8 * (han + kana + hangul) > len(sample) / 4:
            return "ko" if hangul > han + kana else "ja" if 10 * kana > han else "zh"
    declared = declared.lower()[:2]
    best = detect_fast(sample, cutoff=2000, n_results=5)
    if not best:
        return ""
    ranked = [best] if isinstance(best, tuple) else best
    (language, distance), scores = ranked[0], dict(ranked)
    if declared in scores and scores[declared] < distance * 1.15:
        return declared
    if language in _CYRILLIC:
        return next((name for name, letters in _CYRILLIC.items() if letters.search(sample)), language)
    return language if distance < 1200 else ""
