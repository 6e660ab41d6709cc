r"""LaTeX of one formula, from its TeX source, attributes, MathML or an image's description."""

from __future__ import annotations

import html
import re
from urllib.parse import unquote, unquote_plus

from dsm_train.corpus.text.mathml import in_mathematics, to_latex

_ANNOTATION = re.compile(r"<(?:\w+:)?annotation\b[^>]*\bencoding\s*=\s*[\"']?[^\"'>]*tex[^>]*>(.*?)</", re.I | re.S)
_SCRIPT = re.compile(r"<script\b[^>]*\bmath/(?:tex|latex)[^>]*>(.*?)</script", re.I | re.S)
_ATTRIBUTE = re.compile(
    r"""\s(?:alttext|data-(?:tex|latex|math|formula|equation(?:-content)?|katex|original-tex|value))\s*="""
    r"""\s*(?:"([^"]+)"|'([^']+)'|([^\s"'>]+))""",
    re.I,
)
_COPY = re.compile(r'class="[^"]*\b(?:mjx-copytext|MathJax_Preview)\b[^"]*"[^>]*>(\$[^<]*\$)<', re.I)
_MATH = re.compile(r"<(?:\w+:)?math\b.*?</(?:\w+:)?math\s*>", re.I | re.S)
_MATHML_ATTRIBUTE = re.compile(r"""\sdata-mathml\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.I)
_RENDERED = re.compile(r"<mjx-math\b.*</mjx-math>|<svg\b.*data-mml-node.*</svg>", re.I | re.S)
_IMAGE = re.compile(r"<img\b([^>]*)>", re.I)


def latex_in(element: str) -> str:
    """LaTeX of an element that shows one formula, preferably the author's own source; "" if there is none."""
    if source := _ANNOTATION.search(element):
        if source[1].strip():
            return html.unescape(source[1])
    if source := _ATTRIBUTE.search(element):
        tex = html.unescape(source[1] or source[2] or source[3])
        if _reads_as_tex(tex):
            return tex
    if source := _SCRIPT.search(element) or _COPY.search(element):
        return source[1] if source.re is _SCRIPT else html.unescape(source[1])
    if source := _MATH.search(element):
        if tex := to_latex(source[0]):
            return tex
    if source := _MATHML_ATTRIBUTE.search(element):
        return to_latex(html.unescape(source[1] or source[2] or ""))
    if source := _IMAGE.search(element):
        return attribute(source[1], "alt")
    return to_latex(source[0]) if (source := _RENDERED.search(element)) else ""


def attribute(attributes: str, name: str) -> str:
    """Value of an attribute, unescaped; "" if it is missing."""
    match = re.search(rf"""(?<![\w-]){name}\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", attributes, re.I)
    return html.unescape(match[1] or match[2] or match[3] or "") if match else ""


_IMAGE_HINT = re.compile(
    r"""\b(?:class|id)\s*=\s*["']?[^"'>]*(?:\btex\b|latex|math|formula|equation)|eeimg|data-equation-content"""
    r"""|\bsrc\s*=\s*["']?[^"'\s>]*(?:latex|mathtex|mimetex|codecogs|equation|/math/|[?&]math=|cht=tx|/tex/|formula)"""
    r"""|\balt\s*=\s*["']?\s*(?:\$|\\[(\[]|\\begin\{|LaTeX:)""",
    re.I,
)
_IN_URL = re.compile(
    r"(?:latex\.php\?latex=|equation\?tex=|[?&](?:math|chl|tex|latex|from|eq)=|mathtex\.cgi\?|mimetex\.cgi\?"
    r"|codecogs\.com/(?:gif|png|svg)\.(?:latex|image|download)\?|/(?:gif|png|svg)\.latex\?)([^&#]+)",
    re.I,
)
_WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{4,}")


def image_latex(attributes: str) -> tuple[str, bool]:
    """LaTeX that an `<img>` shows, and whether it is displayed; "" for a picture."""
    if not _IMAGE_HINT.search(attributes):
        return "", False
    tex = attribute(attributes, "alt").strip()
    if not _reads_as_tex(tex):
        escaped = attributes.replace("&space;", "%20").replace("&plus;", "%2B")  # which codecogs alone writes
        source = attribute(escaped, "src")
        match = _IN_URL.search(source)
        unquoted = unquote if " " in source else unquote_plus
        tex = unquoted(match[1]) if match else attribute(attributes, "data-equation-content")
        if match and "codecogs" in source:
            tex = re.sub(r"^(?:\\(?:inline|dpi\s*\{?\d+\}?|bg_\w+|fn_\w+|large|small)\s*)+", "", tex)
        if not _reads_as_tex(tex):
            return "", False
    display = re.search(r"\bclass\s*=\s*[\"']?[^\"'>]*(?:display|center|numberedequation)", attributes, re.I)
    return tex, display is not None


def _reads_as_tex(text: str) -> bool:
    return bool(text) and (bool(re.search(r"[\\^_={}$]", text)) or not _WORDS.search(text)) and len(text) < 10_000


_WRAPPERS = (
    re.compile(r"\$\$(?P<display>.*)\$\$\Z", re.S),
    re.compile(r"\\\[(?P<display>.*)\\\]\Z", re.S),
    re.compile(r"\$(?P<inline>[^$]*)\$\Z"),
    re.compile(r"\\\((?P<inline>.*)\\\)\Z", re.S),
    re.compile(r"\\begin\{(equation\*?|displaymath)\}(?P<display>.*)\\end\{\1\}\Z", re.S),
    re.compile(r"\\begin\{math\}(?P<inline>.*)\\end\{math\}\Z", re.S),
    re.compile(r"(?:\$?latex|LaTeX:)\s+(?P<inline>[^$]*)\$?\Z"),
)
_COMMENT = re.compile(r"(?<!\\)%[^\n]*\n?")
_CDATA = re.compile(r"%?\s*<!\[CDATA\[|%?\s*\]\]>|<!--|-->")


def normalised(tex: str, display: bool = False) -> str:
    r"""A formula in `$..$`, or `$$..$$` when displayed: one line, without comments or other delimiters; "" if empty."""
    tex = _CDATA.sub("", tex) if "<!" in tex or "]]>" in tex else tex
    tex = _COMMENT.sub(" ", tex) if "%" in tex and "\n" in tex else tex
    tex = " ".join(tex.split())
    for wrapper in _WRAPPERS if tex[:1] in ("$", "\\", "l", "L") else ():
        if match := wrapper.match(tex):
            groups = match.groupdict()
            display = "display" in groups or display
            tex = groups.get("display", groups.get("inline", "")).strip()
            if "$$" in tex:  # two formulas, not one
                return ""
    if "style" in tex[:16]:
        tex = _unstyled(tex)
    if tex.endswith("\\") and not tex.endswith("\\\\"):
        tex = tex[:-1].rstrip()  # what is left of a space
    if not tex or not tex.strip("{} "):
        return ""
    return f"$${tex}$$" if display else f"${tex}$"


def _unstyled(tex: str) -> str:
    r"""Without the style around the whole formula that renderers add: `{\displaystyle x}`."""
    while match := re.match(r"(\{?)\s*\\(?:displaystyle|textstyle)(?![A-Za-z])\s*", tex):
        if not match[1]:
            tex = tex[match.end() :]
        elif tex.endswith("}") and _balanced(tex[match.end() : -1]):
            tex = tex[match.end() : -1].strip()
        else:
            break
    return tex


def _balanced(tex: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", tex):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0


# Superscripts and subscripts of HTML.

_FOOTNOTE_MARKUP = re.compile(r"\b(?:class|id|role)\s*=\s*[\"']?[^\"'>]*(?:ref|note|cite|fn|ordinal|sic)", re.I)
_ORDINAL = re.compile(r"(?:st|nd|rd|th|er|ère|re|e|è|ème|eme|nde|o|a|os|as|ª|º|te[nr]?|de|ste|TM|SM|R|C|®|©|™|℠)\Z")
_MARK = re.compile(r"[\[(].*[\])]|[*†‡§¶#⁂✝]+|\d+(?:\s*[,;]\s*\d+)+|[a-z](?:,\s*[a-z])+|citation needed|.*\?", re.S)
_WORD = re.compile(r"[^\W\d_]+\Z")
_SHORT = frozenset(
    "km cm mm dm nm ft yd in mi mol rad sec min kg hr sin cos tan cot csc sinh cosh tanh log ln exp".split()
)
"""Words of a unit or a function."""
_YEAR = re.compile(r"(?<![\d.,])(?:1[5-9]|20)\d\d\Z")
_ASIDE = re.compile(r"\([^()]*[a-z]{4,}[^()]*\)\Z")
_NUCLIDE = re.compile(r"[A-Z][a-z]?(?![a-z])")


def is_script(tag: str, attributes: str, before: str, content: str, after: str, linked: bool) -> bool:
    """True if `<sup>` or `<sub>` is mathematics, given the texts before, in and after it; `linked`: it has a link.

    Footnote marks, references, ordinals (1st) and trade marks are not.
    """
    text, before = html.unescape(content).strip(), html.unescape(before)
    if not text or any(sign in text for sign in ("$", "\\(", "′", "''")):
        return False
    base = before[-1:]
    if base + text + after[:1] in ("TEX", "LAT"):  # the names TeX and LaTeX
        return False
    if not base.strip() or base in '>-–—/,:;"“”’.?':
        return tag == "sup" and text.isdigit() and _NUCLIDE.match(after) is not None
    if tag == "sub":
        return True
    word = _WORD.search(before)
    letters = word[0] if word else ""
    if text in ("*", "†", "'"):
        return len(letters) == 1
    if linked or _FOOTNOTE_MARKUP.search(attributes) or _MARK.match(text):
        return False
    if _ORDINAL.match(text) and (base.isdigit() or letters and (len(letters) > 1 or len(text) > 1)):
        return False
    if not any(char.isdigit() for char in text):
        return len(letters) < 4 or not text.isalpha() or len(text) == 1
    if _YEAR.search(before) and len(text) < 3 or _ASIDE.search(before):
        return False
    return len(letters) < 3 or letters in _SHORT or not text.isdigit()


OPEN, CLOSE = "\x03", "\x04"
"""Placeholders for the braces of a script until `scripts_as_formulas` finds its base."""
_RAISED = r"[\^_]\x03(?:[^\x03\x04]|\x03[^\x03\x04]{0,200}\x04){0,200}+\x04"
_PIECE = (
    r"[A-Za-z0-9\u0370-\u03ff+−±∓*/=<>≤≥≠≈×·⋅°′|!∈→∞∂∇∑∏∫√ℓℏ\[\]]|-(?![A-Za-z]{3})|[.,](?=\d)|(?<=\d) [×·⋅] (?=\d)"
    rf"|\((?:{_RAISED}|[^()$\x03\x04]|\((?:{_RAISED}|[^()$\x03\x04]){{0,60}}+\)){{0,60}}+\)"
)
"""Text beside a script that belongs to its formula; parentheses may hold words."""
_INSIDE = r"[^()$\s\x03\x04^_]{0,40}+"
_GROUP = rf"\((?:{_INSIDE}{_RAISED}){{1,20}}+{_INSIDE}\)"
_SCRIPTED = re.compile(
    rf"(\$\$[^$]*\$\$|\$(?!\s)[^$]+(?<!\s)\$(?!\d))((?:{_RAISED})*)"
    rf"|(?<![A-Za-z0-9_])(?:{_PIECE}){{0,60}}(?:(?:{_RAISED}|{_GROUP})(?:{_PIECE}){{0,60}}+)++"
)
"""Formula, possibly with scripts outside of it, or any text with scripts."""


def scripts_as_formulas(line: str) -> str:
    """Line of text with its superscripts and subscripts, each with its base, as formulas in `$..$`."""
    line = _SCRIPTED.sub(_scripted, line)
    return line.replace(f"{OPEN} ", "{").replace(f" {CLOSE}", "}").replace(OPEN, "{").replace(CLOSE, "}")


def _scripted(match: re.Match[str]) -> str:
    formula, scripts = match.groups()
    if formula and not scripts:
        return formula
    tex = formula.strip("$") if formula else ""
    tex += in_mathematics(scripts or match[0])
    before, after = match.string[match.start() - 1 : match.start()], match.string[match.end() : match.end() + 1]
    return f"{' ' * (before == '$')}${tex}${' ' * (after == '$')}"
