"""Rewriting of a page's markup: formulas become LaTeX, elements that are not text go.

The markup is scanned as a string, from one relevant tag to the next: no tree is built, nothing recurses, and every
search is bounded or memoised, so that time is linear in the page, whatever it holds.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from functools import lru_cache

from dsm_train.corpus.text.boilerplate import is_boilerplate
from dsm_train.corpus.text.formula import CLOSE, OPEN, image_latex, is_script, latex_in, normalised
from dsm_train.corpus.text.mathml import in_mathematics

INLINE = (
    "span|a|em|strong|b|i|u|s|font|var|small|big|cite|dfn|abbr|acronym|label|mark|ins|bdi|bdo|nobr|code|tt|q|su[bp]"
)
"""Elements that text flows through."""
_ATTRIBUTES = r"""((?:[^"'>]++|(?<==)"[^"]*+(?:"|\Z)|(?<==)'[^']*+(?:'|\Z)|["'])*+)"""
_SOURCE = ("d-math", "tex-math", "la-tex", "tex", "katex")
"""Elements whose text is TeX."""
_NAMES = "|".join(
    (
        *("/?su[bp]", "math", "(?:m|mml):math", "mjx-container", *_SOURCE),
        r"img(?=[^>]*(?:tex|TeX|math|equation|formula|\$|\\))",
        r"""script(?=[^>]*\btype=["']?math/)""",
    )
)
_MADE = (
    r"""(span|div)\s+((?:(?:id|style)="[^"<]*+"\s+)?+(?:class=["']?(?:katex|mwe-math-element|mw-editsection|MathJax"""
    r"""|mjx-chtml|MJXc-display|ztext-math|ql-formula|wp-katex-eq|texhtml|tex-span"""
    r"""|math(?: inline| display)?["'])|data-(?:tex|latex|original-tex)=)[^>]*+)>"""
)
"""Elements that a library for mathematics made, or added to."""
_WRITTEN = re.compile(r"""class=["']?(?:wp-katex-eq|texhtml|tex-span|math(?: inline| display)?["'])""")
"""Library elements whose content is the formula, in TeX or in HTML's own means."""
_DOUBTFUL = (
    r"(nav|aside|footer|dialog|(?:div|section|ul|ol|header|form|table|p|li|dl)(?=\s)"
    r"""|a(?=\s+class="(?:skip|mw-jump|screen-reader))|span(?=\s+(?:class="[^"]*+"\s+)?(?:style="[^"]*(?:none|hidden)|hidden|aria-hidden)))(\s[^<>]*+)?>"""
)
"""Elements that may not be part of the text."""
_TELLING = re.compile(rf"<(?:({_NAMES})(?![\w:-]){_ATTRIBUTES}(?:>|\Z)|{_MADE}|{_DOUBTFUL})", re.S)
"""Tags and delimiters that the pass stops at. Like the two below it begins with one character: a fast search."""
_ENVIRONMENTS = r"(?:equation|align|gather|multline|eqnarray|displaymath|flalign|alignat|math)\*?"
_OPENING = (re.compile(rf"\\(?<!\\\\)(?:[(\[]|begin\{{{_ENVIRONMENTS}\}})"), re.compile(r"\$\$"))
_ASIDE = re.compile(
    r"<(?:(pre|code|kbd|samp|textarea|tt|script|style|noscript|svg|template|iframe)(?![\w:-])[^>]*+>|!--)"
)
"""Elements without formulas; the first six may hold formulas that are marked up as such."""
_CODE = frozenset("pre code kbd samp textarea tt".split())
_DISPLAYED = re.compile(
    r"(?:katex|math|formula|equation)[\w-]*[ -](?:display|block)\b|MathJax_Display|MJXc-display|\sblock\b|eeimg=.2"
    r"""|(?:display|mode)\s*=\s*["']?(?:block|true|display)"""
)
_DELIMITED = {
    "\\(": re.compile(r"\\\(((?:[^\\]++|\\[^()\[\]])*+)\\\)"),
    "\\[": re.compile(r"\\\[((?:[^\\]++|\\[^\[\]])*+)\\\]"),
    "$$": re.compile(r"\$\$((?:[^$\\]++|\\.|\$(?!\$))*+)\$\$", re.S),
}
_BLOCK = re.compile(r"</?(?:div|td|tr|table|li|ul|ol|h[1-6]|pre|script|math|img|section|article)\b")
"""Tags that a formula in the text does not span."""
_MAIN = re.compile(r"""<(?:main\b|(?:div|article|section)\s[^<>]*\brole=["']?main\b)""")
_TITLE = re.compile(r"<(?:article|body|h1)\b")
_LONGEST = 20_000
_PATIENCE = 50
"""Number of elements too large to be boilerplate, or large without a formula, that mark a page as broken."""
_SCRIPT = re.compile(r"<su([bp])\b[^>]*>")
_BREAK = re.compile(r"<(?:br|/?p)\b[^>]*>")
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->", re.S)
_INLINE_TAG = re.compile(rf"</?(?:{INLINE})\b[^<>]*>")


def _plain_text(markup: str) -> str:
    return html.unescape(_MARKUP.sub("", _BREAK.sub(" ", markup)) if "<" in markup else markup)


def _written_out(markup: str) -> str:
    """LaTeX of a formula that is TeX, or is written with italics, superscripts and subscripts."""
    text = _plain_text(re.sub(r"</su[bp]\s*>", CLOSE, _SCRIPT.sub(lambda m: "_^"[m[1] == "p"] + OPEN, markup)))
    tex = text if re.search(r"[\\{^_](?!\x03)", text) else in_mathematics(text.replace("\xa0", " "))
    return tex.replace(OPEN, "{").replace(CLOSE, "}")


@lru_cache(256)
def _closing(name: str) -> re.Pattern[str]:
    return re.compile("-->" if name == "!--" else rf"</{re.escape(name)}(?![\w:-])[^>]*>")


@lru_cache(256)
def _either(name: str) -> re.Pattern[str]:
    return re.compile(rf"<(/?){re.escape(name)}(?![\w:-])[^>]*>")


class Markup:
    """Single pass over the markup of a page; tag names are in lower case."""

    def __init__(self, source: str) -> None:
        self.formulas = 0
        """Formulas found; superscripts and subscripts of HTML are not counted, nor formulas that stand in `$..$` already."""
        self._source = source
        self._out: list[str] = []
        self._copied = 0  # how far the source has gone into `_out`
        self._scripts: list[str] = []  # what closes the open ones; "" for one that is no mathematics
        self._unclosed: set[str] = set()
        self._refused = 0
        self._empty = 0
        self._asides = self._find_asides()
        self._aside: tuple[int, int, str] = (0, 0, "")
        self._tag = (0, -1)  # how far tags were followed, and where the one open there begins
        openings = (match for opening in _OPENING for match in opening.finditer(source))
        self._openings = sorted(openings, key=re.Match.start, reverse=True)

    def rewritten(self) -> str:
        """The markup with its formulas as LaTeX, and without boilerplate that its tags give away."""
        position = searched = 0  # where the text goes on, and the search for tags
        while match := _TELLING.search(self._source, searched):
            start, end = match.span()
            name, attributes, made, library, doubtful, others = match.groups()
            if doubtful and not is_boilerplate(doubtful, others):
                searched = end
                continue
            position = self._text_until(start, position)
            if position <= start:
                within = self._within(start)
                if within and within not in _CODE:
                    position = end
                elif doubtful:
                    position = self._boilerplate(doubtful, start, end)
                elif made:
                    position = self._made(made, library, start, end)
                else:
                    position = self._element(name, attributes, start, end, code=bool(within))
            searched = position
        self._text_until(len(self._source), position)
        self._out.append(self._source[self._copied :])
        return "".join(self._out)

    # All methods below that take a place return where to go on.

    def _replace(self, start: int, end: int, text: str) -> int:
        if start > self._copied:
            self._out.append(self._source[self._copied : start])
        if text:
            self._out.append(text)
        self._copied = end
        return end

    def _boilerplate(self, name: str, start: int, end: int) -> int:
        """Leave an element out, unless it holds the main part of the page, or is most of one that has none."""
        if self._refused > _PATIENCE:
            return end
        outer = self._balanced(name, end)[1]
        if outer and not (_MAIN.search(self._source, end, outer) or _TITLE.search(self._source, end, outer)):
            if 2 * (outer - end) < len(self._source) or _MAIN.search(self._source):
                return self._replace(start, outer, " ")
        self._refused += 1
        return end

    def _formula(self, start: int, end: int, tex: str, display: bool) -> int:
        """Put a formula in the place of [start, end)."""
        self._replace(start, end, "")
        if formula := normalised(tex, display):
            self.formulas += 1
            markup = html.escape(formula, quote=False)
            if formula.startswith("$$"):
                markup = f"<br>{markup}<br>"
            elif self._out and self._out[-1].endswith("$"):
                markup = " " + markup
            self._out.append(markup)
        return end

    def _text_until(self, stop: int, position: int) -> int:
        """Handle LaTeX's own delimiters in [position, stop)."""
        while self._openings and self._openings[-1].start() < stop:
            match = self._openings.pop()
            if match.start() >= position and not self._within(match.start()) and not self._in_tag(match.start()):
                position = self._delimited(match[0], *match.span())
        return position

    def _in_tag(self, position: int) -> bool:
        """True if a position is in a tag, as in the value of an attribute; positions of successive calls ascend."""
        start, opened = self._tag if self._tag[0] >= self._copied else (self._copied, -1)
        opened = max(opened, self._source.rfind("<", start, position))
        if opened <= self._source.rfind(">", start, position) or self._source[opened + 1] in " \n=0123456789":
            opened = -1
        self._tag = position, opened
        return opened >= 0

    def _delimited(self, opening: str, start: int, end: int) -> int:
        """Handle LaTeX's own delimiters where they delimit a formula."""
        if opening.startswith("\\begin"):
            closing = opening.replace("begin", "end", 1)
            inner = self._source.find(closing, end, end + _LONGEST)
            outer = inner + len(closing)
            if inner < 0 or _BLOCK.search(self._source, end, inner):
                return end
            return self._formula(start, outer, _plain_text(self._source[start:outer]), "{math}" not in opening)
        match = _DELIMITED[opening].match(self._source, start)
        if not match or len(match[1]) > _LONGEST or _BLOCK.search(match[1]):
            return end
        tex = _plain_text(match[1])
        if opening == "$$" and not re.search(r"[\\^_=<>+]|^\s*\w\s*$", tex):
            return end  # two prices
        return self._formula(start, match.end(), tex, opening != "\\(")

    def _element(self, name: str, attributes: str, start: int, end: int, code: bool) -> int:
        """An opening tag of a name that means mathematics, or the closing one of a script."""
        if name == "img":
            tex, display = image_latex(attributes)
            return self._formula(start, end, tex, display) if tex else end
        if name in ("/sup", "/sub"):
            closing = self._scripts.pop() if self._scripts else ""
            return self._replace(start, end, closing) if closing else end
        if name in ("sup", "sub"):
            return self._script(name, attributes, start, end, code)
        inner, outer = self._closing_tag(name, end)
        if not outer:
            return end
        display = _DISPLAYED.search(attributes) is not None
        if name in _SOURCE:
            return self._formula(start, outer, _plain_text(self._source[end:inner]), display)
        if name == "script" and "mml" not in attributes:
            return self._formula(start, outer, self._source[end:inner], "display" in attributes)
        return self._formula(start, outer, latex_in(self._source[start:outer]), display)

    def _script(self, name: str, attributes: str, start: int, end: int, code: bool) -> int:
        """The opening tag of a superscript or subscript: in code it keeps its braces, and is no formula."""
        content, closed, after = self._source[end : end + 400].partition(f"</{name}>")
        text, after = _plain_text(content), _plain_text(after[:60])[:4]
        if not closed or not is_script(name, attributes, self._text_before(start), text, after, "<a " in content):
            self._scripts.append("")
            return end
        self._scripts.append("}" if code else CLOSE)
        return self._replace(start, end, ("^" if name == "sup" else "_") + ("{" if code else OPEN))

    def _made(self, name: str, attributes: str, start: int, end: int) -> int:
        """Handle an element that a library made for a formula, or added to one."""
        inner, outer = self._balanced(name, end) if self._empty < _PATIENCE else (0, 0)
        if not outer:
            return end
        if re.search(r"mw-editsection|MathJax_Preview|katex-html", attributes):
            return self._replace(start, outer, "")
        if re.search(r"MathJax|mjx-chtml|MJXc-display", attributes) and "math/tex" in self._source:
            return self._replace(start, outer, "")  # the script beside it has the source
        element = self._source[start:outer]
        tex = latex_in(element)
        if not tex and _WRITTEN.search(attributes) and not _BLOCK.search(content := self._source[end:inner]):
            tex = _written_out(content)
        if not tex:
            self._empty += outer - start > 2000
            return end
        return self._formula(start, outer, tex, _DISPLAYED.search(element, 0, 600) is not None)

    def _text_before(self, start: int) -> str:
        """The end of the text before `start`, other elements than inline ones as white space."""
        tail = self._source[max(self._copied, start - 80) : start]
        for piece in reversed(self._out):
            if len(tail) >= 80:
                break
            tail = piece[-80:] + tail
        return re.sub(r"<[^<>]*>|^[^<]*>", " ", _INLINE_TAG.sub("", tail))

    def _within(self, position: int) -> str:
        """Name of the element aside of the text that holds a position, or ""; positions of successive calls ascend."""
        while self._aside[1] <= position:
            self._aside = next(self._asides, (len(self._source) + 1, len(self._source) + 1, ""))
        return self._aside[2] if self._aside[0] < position else ""

    def _find_asides(self) -> Iterator[tuple[int, int, str]]:
        position = 0
        while match := _ASIDE.search(self._source, max(position, self._copied)):
            name = match[1] or "!--"
            position = self._closing_tag(name, match.end())[1]
            if position:
                yield match.start(), position, name
            else:
                position = match.end()

    def _closing_tag(self, name: str, position: int) -> tuple[int, int]:
        """Begin and end of the next closing tag of this name; (0, 0) if there is none."""
        if name not in self._unclosed:
            if match := _closing(name).search(self._source, position):
                return match.span()
            self._unclosed.add(name)
        return 0, 0

    def _balanced(self, name: str, position: int) -> tuple[int, int]:
        """Begin and end of the closing tag that belongs to an element; (0, 0) if there is none."""
        depth = 1
        if name not in self._unclosed:
            for match in _either(name).finditer(self._source, position):
                depth += -1 if match[1] else 1
                if not depth:
                    return match.span()
            self._unclosed.add(name)
        return 0, 0
