r"""HTML to text that keeps mathematics, as LaTeX in `$..$` and `$$..$$`.

Three steps. markup.py writes the formulas as LaTeX and leaves out elements that are not text. resiliparse parses what
is left and lays it out as lines; its own search for the main content is not asked for, as it takes more time than all
the rest. Rows and lists of links, which only show once they are lines, go last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from resiliparse.extract.html2text import extract_plain_text

from dsm_train.corpus.text.detect import decode, detect_language, printable
from dsm_train.corpus.text.formula import CLOSE, scripts_as_formulas
from dsm_train.corpus.text.markup import Markup

MAX_DEPTH = 1000
"""Deeper markup was written by a loop, not for a reader; laying it out would take time without bound."""


class NestedTooDeep(ValueError):
    """Elements nested deeper than MAX_DEPTH."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """Text of a page, with its language, character set and number of formulas."""

    text: str
    """Main text, mathematics as LaTeX; "" if the page shows none."""
    language: str
    """ISO 639-1 code, or "" if it is not known."""
    charset: str
    """Name of the encoding that the page was decoded from."""
    formulas: int
    """Formulas written as LaTeX; those that stood in `$..$` already are not counted."""


def html_to_text(html: bytes, *, charset: str | None = None) -> Extracted:
    """Extract the main text of a page.

    `charset` is what the HTTP header says, if anything. Raises NestedTooDeep, and nothing else whatever the bytes.
    """
    source, encoding = decode(html, charset)
    source = _lower_case(source)
    markup = Markup(source)
    reduced = _reduced(markup.rewritten())
    if _deeper_than(MAX_DEPTH, reduced):
        raise NestedTooDeep(f"elements nested deeper than {MAX_DEPTH}: not a page for readers")
    text = _without_links(extract_plain_text(reduced, alt_texts=False))
    if CLOSE in text:
        text = "\n".join(scripts_as_formulas(line) if CLOSE in line else line for line in text.split("\n"))
    text = _cleaned(printable(text))
    declared = _LANGUAGE.search(source, 0, 4096)
    return Extracted(text, detect_language(text, declared[1] if declared else ""), encoding, markup.formulas)


_LANGUAGE = re.compile(r"""<html\b[^>]*?\slang=["']?([A-Za-z]{2,3})\b""")
_SHOUTED = re.compile(r"<(?:HTML|HEAD|TITLE|BODY|P|BR|TABLE|DIV)\b")
_NESTED = re.compile(r"<(/?)(?:div|article|ul|ol)\b")
"""Elements that resiliparse takes more time for, or indents, the deeper they are."""


def _lower_case(source: str) -> str:
    """Tag names in lower case: patterns that ignore case take twice the time, and only old pages shout."""
    if _SHOUTED.search(source, 0, 8192):
        return re.sub(r"</?[A-Z][A-Za-z0-9]*(?=[\s>/])", lambda match: match[0].lower(), source)
    return source


def _deeper_than(limit: int, markup: str) -> bool:
    depth = 0
    if markup.count("<") > limit and sum(map(markup.count, ("<div", "<article", "<ul", "<ol"))) > limit:
        for match in _NESTED.finditer(markup):
            depth = max(depth - 1, 0) if match[1] else depth + 1
            if depth > limit:
                return True
    return False


_LEAF = re.compile(
    r"""<(?:span|em|strong|b|i|u|s|font|var|small|big|code|tt)(?: class="(?:[a-z]\w?\w?|hljs-[\w-]+|token \w+)")?>([^<]*+)"""
    r"</(?:span|em|strong|b|i|u|s|font|var|small|big|code|tt)>"
)


def _reduced(markup: str) -> str:
    """Markup with its links marked and meaningless inline elements, such as code highlighting, unwrapped."""
    markup = "".join(_LEAF.split(markup))
    return markup.replace("<a ", "\x01<a ").replace("</a>", "</a>\x02")


_LINK = re.compile("\x01([^\x01\x02]*)\x02?")
_SIGN = re.compile("\x01[¶#§🔗]?\x02")
"""A link without text, or to the heading that it stands in."""
_FEW = 3
"""Number of links in a row, or of lines that are links, that may be text."""


def _without_links(text: str) -> str:
    """Text without rows of links and runs of lines that are all links: navigation shows only once it is laid out."""
    lines: list[str] = []
    run: list[str] = []
    for line in _SIGN.sub("", text).split("\n"):
        if "\x01" in line:
            plain, links = _LINK.subn("", line)
            line = line.replace("\x01", "").replace("\x02", "")
            share = len(plain.strip(" \t•|·/,0123456789.")) / (len(line) or 1)
            if links > _FEW and share < 0.4:
                continue
            if share < 0.2:
                run.append(line)
                continue
        elif run and not line:
            run.append(line)
            continue
        if run:
            lines += _few(run)
            run = []
        lines.append(line)
    return "\n".join(lines + _few(run))


def _cleaned(text: str) -> str:
    for unwanted, wanted in (("\xa0", " "), ("\xad", ""), ("\u200b", "")):
        text = text.replace(unwanted, wanted)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip()


def _few(run: list[str]) -> list[str]:
    """The lines of a run where they are few; otherwise its last paragraph if that is one line, such as a heading."""
    if sum(map(bool, run)) <= _FEW:
        return run
    *_, before, line, after = run[-3:] if len(run) > 2 else ["", "x", "", ""]
    return ["", line, ""] if line and not before and not after else [""]
