r"""Conversion of Presentation MathML to LaTeX, in one pass with a stack: no tree, no recursion, linear time.

    to_latex("<math><mfrac><mi>a</mi><mn>2</mn></mfrac></math>") == r"\frac{a}{2}"

The output of MathJax 3 (`<mjx-math>`, `<svg><g data-mml-node=...>`) mirrors MathML and is read by the same pass.
https://www.w3.org/TR/mathml-core/
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from dsm_train.corpus.text.mathml_symbols import FUNCTIONS, NAMED_FONTS, PLAIN, SYMBOLS, TEXT_ESCAPES, VARIANTS

MAX_CHARS = 200_000
"""Longer markup is no formula that anyone reads; it is not converted."""


class Part(NamedTuple):
    """A finished element: the name that it acts under, its LaTeX, and the text of a token (the rows of a table)."""

    tag: str
    tex: str
    raw: str = ""


class _Open(NamedTuple):
    name: str
    tag: str
    attributes: str
    parts: list[Part]


_TOKEN = re.compile(
    r"<!--.*?(?:-->|\Z)|<(?P<close>/?)(?P<name>[A-Za-z][\w:.-]*)"
    r"""(?P<attributes>(?>[^>=]+|=\s*+(?:"[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z))?)*+)(?:>|\Z)"""
    r"|(?P<text>[^<]++)",
    re.DOTALL,
)
_HIDDEN = {"annotation", "annotation-xml", "mphantom", "surd", "nstrut", "dstrut", "tstrut", "line", "spacer", "rect"}
_LEAVES = {"mspace", "mprescripts", "none", "mglyph", "c", "use", "path"}
_TOKENS = {"mi", "mn", "mo", "mtext", "ms"}


def to_latex(markup: str) -> str:
    """LaTeX of a `<math>` element, without delimiters; "" for one that shows nothing or is longer than MAX_CHARS.

    Broken markup gives what can be read of it: an element left open ends with its parent.
    """
    if len(markup) > MAX_CHARS:
        return ""
    stack = [_Open("", "math", "", [])]
    counts: Counter[str] = Counter()
    for match in _TOKEN.finditer(markup):
        text, name = match["text"], match["name"]
        if text is not None:
            _add_text(stack[-1], text)
        elif name is None:
            continue
        elif not match["close"]:
            attributes = match["attributes"]
            tag = _tag(name, attributes)
            if attributes.endswith("/") or tag in _LEAVES:
                _close(stack[-1], _Open(name, tag, attributes, []))
            else:
                stack.append(_Open(name, tag, attributes, []))
                counts[name] += 1
        elif counts[name]:
            while (element := stack.pop()).name != name:
                counts[element.name] -= 1
                _close(stack[-1], element)
            counts[name] -= 1
            _close(stack[-1], element)
    while len(stack) > 1:
        element = stack.pop()
        _close(stack[-1], element)
    return _tidy(_join(stack[0].parts))


def _tag(name: str, attributes: str) -> str:
    """MathML name of an element: without prefix (m:mi, mjx-mi), or as MathJax's SVG has it."""
    if name == "g":
        name = _attribute(attributes, "data-mml-node")
    tag = name.rpartition(":")[2].removeprefix("mjx-").lower()
    return "mrow" if tag == "texatom" else tag


def _attribute(attributes: str, name: str) -> str:
    match = re.search(rf"""(?<![\w-]){name}\s*=\s*["']?([^"'>]*)""", attributes) if name in attributes else None
    return html.unescape(match[1]).strip() if match else ""


def _add_text(element: _Open, text: str) -> None:
    if element.tag not in _TOKENS:
        text = text.strip()
    if text:
        text = html.unescape(text) if "&" in text else text
        element.parts.append(Part("text", _text(text), text))


def _close(parent: _Open, element: _Open) -> None:
    """Reduce a finished element to parts of its parent."""
    tag, parts = element.tag, element.parts
    if tag in _HIDDEN:
        return
    if tag in _TOKENS:
        parent.parts.append(_token(tag, "".join(part.raw for part in parts), element.attributes))
    elif tag in ("num", "den", "mtd") or tag in _GROUPS and len(parts) != 1:
        parent.parts.append(Part(tag, _join(parts)))
    elif tag == "script":  # MathJax stacks the superscript over the subscript
        parent.parts.extend(reversed(parts))
    elif tag in ("over", "under", "base", "root"):
        parent.parts.append(Part(tag, _join(parts), parts[0].raw if len(parts) == 1 else ""))
    elif tag in _REDUCE:
        if element.name == "g":
            parts = _svg_order(tag, parts)
        parent.parts.append(_REDUCE[tag](parts, element.attributes))
    elif tag in _LEAVES:
        parent.parts.extend(_leaf(tag, element.attributes))
    else:  # a group of one, or an element of no meaning: its parts are the parent's
        parent.parts.extend(parts)


_GROUPS = {"mrow", "mstyle", "mpadded", "merror", "maction", "math", "semantics"}


def _leaf(tag: str, attributes: str) -> list[Part]:
    if tag == "mspace":
        width = re.match(r"\s*(\d*\.?\d+)\s*em", _attribute(attributes, "width"))
        return [Part(tag, r"\quad " if width and float(width[1]) >= 0.9 else r"\,")] if width else []
    if tag == "mglyph":
        return [_token("mtext", _attribute(attributes, "alt"), "")]
    if tag in ("c", "use", "path"):  # a glyph of MathJax, named by its code point
        code = re.search(r"\bmjx-c([0-9A-F]+)" if tag == "c" else r'data-c="([0-9A-F]+)"', attributes)
        return [Part("text", "", chr(int(code[1], 16)))] if code and int(code[1], 16) < 0x110000 else []
    return [Part(tag, "")]  # none, mprescripts: places that count


def _svg_order(tag: str, parts: list[Part]) -> list[Part]:
    """MathJax's SVG draws the superscript first, and the radical sign after its content."""
    if tag == "msubsup":
        return parts[:1] + parts[:0:-1]
    return [part for part in parts if part.raw != "√"] if tag in ("msqrt", "mroot") else parts


# Tokens.


@cache
def _char(char: str) -> str:
    """LaTeX of one character in mathematics; letters of the mathematical alphabets become their font and letter."""
    if char in SYMBOLS:
        command = f"\\{SYMBOLS[char]}"
        return command + " " if command[-1].isalpha() else command
    if char in PLAIN:
        return PLAIN[char]
    name = unicodedata.name(char, "")
    if name.startswith("MATHEMATICAL ") and "\U0001d400" <= char <= "\U0001d7ff" or "\u2100" <= char <= "\u214f":
        letter = unicodedata.normalize("NFKC", char)
        font = next((font for words, font in NAMED_FONTS if words in name), "")
        if len(letter) == 1 and letter != char:
            return f"\\{font}{{{_char(letter).strip()}}}" if font else _char(letter)
    return char


_FUNCTION = re.compile(rf"(?<![A-Za-z\\])(?:{'|'.join(sorted(FUNCTIONS))})(?![A-Za-z])")
_ROOT = re.compile(r"\\surd\s*(\d+|[A-Za-z]|\\[A-Za-z]+|\([^()]*\))")


def in_mathematics(text: str) -> str:
    r"""Plain text with scripts as LaTeX writes it in a formula: `log_2 2π` as `\log_2 2\pi`."""
    tex = "".join(char if char in "^_" else _char(char) for char in text)
    return _tidy(_ROOT.sub(r"\\sqrt{\1}", _FUNCTION.sub(r"\\\g<0> ", tex)))


def _text(text: str) -> str:
    return "".join(TEXT_ESCAPES.get(char, char) for char in text)


def _token(tag: str, text: str, attributes: str) -> Part:
    text = re.sub(r"[ \t\r\n]+", " ", text)
    raw = text.strip()
    if tag in ("mtext", "ms"):
        if not raw:
            return Part(tag, r"\ " if text else "")
        return Part(tag, f"\\text{{{_text(text)}}}", raw)
    raw = raw.replace("\u00a0", "") if tag == "mi" else raw
    if tag != "mn" and len(raw) > 1 and raw.isascii() and raw.replace(" ", "").isalpha():
        name = raw.replace(" ", "")
        if name in FUNCTIONS:
            return Part(tag, f"\\{name} ", raw)
        return Part(tag, f"\\{'operatorname' if tag == 'mo' else 'mathrm'}{{{raw}}}", raw)
    if tag == "mi" and len(raw) > 1 and not raw.isascii() and raw.isalpha() and not any(c in SYMBOLS for c in raw):
        if unicodedata.normalize("NFKC", raw) == raw:  # a word of another alphabet
            return Part(tag, f"\\text{{{raw}}}", raw)
    tex = "".join(map(_char, raw))
    variant = _attribute(attributes, "mathvariant")
    if variant in VARIANTS and raw and not tex.startswith("\\math") and (raw.isalnum() or variant == "bold"):
        if not (variant == "normal" and tex.startswith("\\")):  # upright capitals of Greek are the usual ones
            tex = f"\\{'boldsymbol' if 'bold' in variant and tex[0] == chr(92) else VARIANTS[variant]}{{{tex.strip()}}}"
    return Part(tag, tex, raw)


# Elements with arguments.

_FENCED = {("(", ")"): "pmatrix", ("[", "]"): "bmatrix", ("{", "}"): "Bmatrix", ("|", "|"): "vmatrix",
           ("∣", "∣"): "vmatrix", ("‖", "‖"): "Vmatrix", ("∥", "∥"): "Vmatrix"}  # fmt: skip
_LIMITS = frozenset("∑∏∐∫∬∭∮⋃⋂⨁⨂⋁⋀⨆")
_ARROWS = {"→": "xrightarrow", "⟶": "xrightarrow", "←": "xleftarrow", "⟵": "xleftarrow", "↔": "xleftrightarrow",
           "⇒": "xRightarrow", "⟹": "xRightarrow", "↦": "xmapsto"}  # fmt: skip
_OVER = {
    "^": ("hat", "widehat"), "ˆ": ("hat", "widehat"), "\u0302": ("hat", "widehat"), "~": ("tilde", "widetilde"),
    "˜": ("tilde", "widetilde"), "∼": ("tilde", "widetilde"), "\u0303": ("tilde", "widetilde"),
    "¯": ("bar", "overline"), "‾": ("bar", "overline"), "―": ("bar", "overline"), "_": ("bar", "overline"),
    "ˉ": ("bar", "overline"), "\u0304": ("bar", "overline"), "\u0305": ("bar", "overline"),
    "→": ("vec", "overrightarrow"), "⃗": ("vec", "overrightarrow"), "⇀": ("vec", "overrightarrow"),
    "←": ("overleftarrow", "overleftarrow"), "˙": ("dot", "dot"), ".": ("dot", "dot"), "⋅": ("dot", "dot"),
    "\u0307": ("dot", "dot"), "¨": ("ddot", "ddot"), "..": ("ddot", "ddot"), "\u0308": ("ddot", "ddot"),
    "ˇ": ("check", "check"), "˘": ("breve", "breve"), "´": ("acute", "acute"), "`": ("grave", "grave"),
    "⏞": ("overbrace", "overbrace"), "︷": ("overbrace", "overbrace"), "⏠": ("overparen", "overparen"),
}  # fmt: skip
_UNDER = dict.fromkeys("_¯‾―ˉ\u0332", "underline") | {"⏟": "underbrace", "︸": "underbrace", "→": "underrightarrow"}


def _join(parts: list[Part]) -> str:
    """LaTeX of a row. A table between fences is a matrix, between `{` and nothing it is cases."""
    row: list[str] = []
    parts = [part for part in parts if part.tex]
    skip = -1
    for index, part in enumerate(parts):
        if index == skip:
            continue
        tex = part.tex
        before = parts[index - 1].raw if index and row else ""
        after = parts[index + 1].raw if index + 1 < len(parts) else ""
        if part.tag == "mtable":
            if environment := _FENCED.get((before, after)):
                row[-1:], skip = [], index + 1
                tex = _environment(environment, part.raw)
            elif before == "{" and not after:
                row[-1:] = []
                tex = _environment("cases", part.raw)
        elif part.tag == "binom":
            if (before, after) == ("(", ")"):
                row[-1:], skip = [], index + 1
                tex = f"\\binom{part.raw}"
        row.append(tex)
    return "".join(row)


def _environment(name: str, rows: str) -> str:
    return f"\\begin{{{name}}}{rows}\\end{{{name}}}"


def _tidy(tex: str) -> str:
    return re.sub(r"(\\[A-Za-z]+) +(?![A-Za-z])", r"\1", tex).strip()


_ONE = re.compile(r"(?:[^\\{}_^'\s]|\d+(?:[.,]\d+)*|\\[A-Za-z]+ ?|\\[A-Za-z]+\*?\{[^{}]*\}|\([^()]*\))\Z")


def _base(part: Part) -> str:
    return part.tex if not part.tex or _ONE.match(part.tex) or part.tag == "big" else f"{{{part.tex.strip()}}}"


def _pick(parts: list[Part], count: int) -> list[Part]:
    """The first `count` arguments, empty ones where they lack."""
    return (parts + [Part("none", "")] * count)[:count]


def _scripts(base: Part, sub: Part, sup: Part) -> str:
    tex = _base(base) or "{}"
    if sub.tex:
        tex = f"{tex.rstrip()}_{{{sub.tex.strip()}}}"
    if sup.tex and not sup.tex.strip("'"):
        return f"{tex.rstrip()}{sup.tex}"
    return f"{tex.rstrip()}^{{{sup.tex.strip()}}}" if sup.tex else tex


def _named(parts: list[Part], roles: str) -> list[Part]:
    """Arguments in the order of MathML, whether by place or, in MathJax's rendering, by role."""
    by_role = {part.tag: part for part in parts if part.tag in ("base", "under", "over")}
    if not by_role:
        return _pick(parts, len(roles.split()))
    rest = [part for part in parts if part.tag not in by_role]
    return [by_role.get(role) or (rest.pop(0) if rest else Part("none", "")) for role in roles.split()]


def _stacked(base: Part, under: Part, over: Part) -> Part:
    """munder, mover, munderover: limits of an operator, an accent, or something set above or below."""
    text = base.raw.replace("\u00a0", " ").strip()
    if base.raw in _LIMITS or base.tag == "big":
        return Part("big", _scripts(base, under, over), base.raw)
    if text.replace(" ", "") in FUNCTIONS:
        return Part("big", _scripts(Part("big", base.tex), under, over), base.raw)
    if len(text) > 1 and text.isascii() and text.replace(" ", "").isalpha():
        return Part("big", _scripts(Part("big", f"\\operatorname*{{{text}}}"), under, over), base.raw)
    if base.raw in _ARROWS and (over.tex or under.tex):
        below = f"[{under.tex.strip()}]" if under.tex else ""
        return Part("mover", f"\\{_ARROWS[base.raw]}{below}{{{over.tex.strip()}}}")
    tex, tag = base.tex.strip(), "mover"
    if over.raw in _OVER:
        narrow, wide = _OVER[over.raw]
        tex = f"\\{narrow if len(base.raw) == 1 or _ONE.match(tex) and len(tex) < 2 else wide}{{{tex}}}"
        tag = "big" if over.raw in "⏞︷" else tag
    elif over.tex:
        tex = f"\\overset{{{over.tex.strip()}}}{{{tex}}}"
    if under.raw in _UNDER:
        tex = f"\\{_UNDER[under.raw]}{{{tex}}}"
        tag = "big" if under.raw in "⏟︸" else tag
    elif under.tex:
        tex = f"\\underset{{{under.tex.strip()}}}{{{tex}}}"
    return Part(tag, tex)


def _fraction(parts: list[Part], attributes: str) -> Part:
    above, below = (part.tex.strip() for part in _pick(parts, 2))
    if re.match(r"0(?!\.?\d)|0\.0", _attribute(attributes, "linethickness")):
        return Part("binom", f"{{{above} \\atop {below}}}", f"{{{above}}}{{{below}}}")
    return Part("mfrac", f"\\frac{{{above}}}{{{below}}}")


def _root(parts: list[Part], attributes: str) -> Part:
    degree = next((part for part in parts if part.tag == "root"), None)
    rest = [part for part in parts if part is not degree]
    if degree is None:
        rest, degree = rest[:1], _pick(rest, 2)[1]
    return Part("mroot", f"\\sqrt[{degree.tex.strip()}]{{{_join(rest).strip()}}}")


def _multiscripts(parts: list[Part], attributes: str) -> Part:
    split = next((i for i, part in enumerate(parts) if part.tag == "mprescripts"), len(parts))
    after, before = parts[1:split], parts[split + 1 :]
    tex = _base(_pick(parts, 1)[0]) if after else _pick(parts, 1)[0].tex
    for sub, sup in zip(after[::2], after[1::2] + [Part("none", "")], strict=False):
        tex = _scripts(Part("big", tex), sub, sup)
    for sub, sup in zip(before[::2], before[1::2] + [Part("none", "")], strict=False):
        tex = _scripts(Part("none", ""), sub, sup) + tex
    return Part("mmultiscripts", tex)


def _fenced(parts: list[Part], attributes: str) -> Part:
    opening, closing = (_attribute(attributes, n) if n in attributes else d for n, d in (("open", "("), ("close", ")")))
    marks = (_attribute(attributes, "separators") if "separators" in attributes else ",").replace(" ", "")
    row = [_token("mo", opening, "")]
    for index, part in enumerate(parts):
        if index and marks:
            row.append(_token("mo", marks[min(index, len(marks)) - 1], ""))
        row.append(part)
    return Part("mfenced", _join([*row, _token("mo", closing, "")]))


def _table(parts: list[Part], attributes: str) -> Part:
    rows = r" \\ ".join(part.tex for part in parts)
    aligned = re.match(r"right\s+(?:center\s+)?left", _attribute(attributes, "columnalign"))
    return Part("mtable", _environment("aligned" if aligned else "matrix", rows), rows)


def _cells(parts: list[Part], attributes: str) -> Part:
    return Part("mtr", " & ".join(part.tex.strip() for part in parts))


_ENCLOSURES = (("radical", "sqrt"), ("box", "boxed"), ("diagonalstrike", "cancel"), ("top", "overline"),
               ("bottom", "underline"), ("longdiv", "sqrt"))  # fmt: skip


def _enclosed(parts: list[Part], attributes: str) -> Part:
    notation = _attribute(attributes, "notation") or "longdiv"
    command = next((command for name, command in _ENCLOSURES if name in notation), "")
    tex = _join(parts)
    return Part("menclose", f"\\{command}{{{tex.strip()}}}" if command else tex)


_NONE = Part("none", "")
_REDUCE: dict[str, Callable[[list[Part], str], Part]] = {
    "mfrac": _fraction,
    "msqrt": lambda parts, _: Part("msqrt", f"\\sqrt{{{_join(parts).strip()}}}"),
    "mroot": _root,
    "msub": lambda parts, _: Part("msub", _scripts(*_pick(parts[:2], 3))),
    "msup": lambda parts, _: Part("msup", _scripts(_pick(parts, 1)[0], _NONE, _pick(parts, 2)[1])),
    "msubsup": lambda parts, _: Part("msubsup", _scripts(*_pick(parts, 3))),
    "munder": lambda parts, _: _stacked(*_named(parts[:2], "base under over")),
    "mover": lambda parts, _: _stacked((p := _named(parts, "base over"))[0], _NONE, p[1]),
    "munderover": lambda parts, _: _stacked(*_named(parts, "base under over")),
    "mmultiscripts": _multiscripts,
    "mfenced": _fenced,
    "mtable": _table,
    "mtr": _cells,
    "mlabeledtr": lambda parts, attributes: _cells(parts[1:], attributes),
    "menclose": _enclosed,
}  # fmt: skip
