"""HTML of the synthetic web: documents with every kind of mathematics markup, inside the pages of sites.

`render` gives the bytes of a page, damage included.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from dsm_train.corpus.demo.synthetic_text import Document, Formula, Paragraph, invented

Markup = Literal["mathjax", "delimiters", "dollars", "katex", "mathml", "annotated", "image", "html"]
Damage = Literal["", "markup", "charset", "script"]
Layout = Literal["article", "forum", "table", "plain"]

MARKUPS: tuple[Markup, ...] = ("mathjax", "delimiters", "dollars", "katex", "mathml", "annotated", "image", "html")


@dataclass(frozen=True, slots=True)
class Look:
    """Appearance of a site, the same on all its pages."""

    host: str
    language: str
    markup: Markup
    layout: Layout
    charset: str
    menu: tuple[str, ...]


# A formula is parsed once into nodes (name, children), which the kinds of markup then write.


@dataclass(frozen=True, slots=True)
class Node:
    """`row`, `frac`, `sqrt`, `sup`, `sub` with children, or a symbol."""

    name: str
    children: tuple[Node, ...] = ()


_TOKEN = re.compile(r"\\[A-Za-z]+|\d+|\S")
_SYMBOLS = {
    r"\int": "∫", r"\lim": "lim", r"\to": "→", r"\infty": "∞", r"\sum": "∑", r"\equiv": "≡", r"\mod": "mod",
    r"\cdot": "·", r"\lambda": "λ", r"\geq": "≥", r"\leq": "≤", r"\sigma": "σ", r"\mu": "μ", r"\pm": "±", r"\pi": "π",
    r"\chi": "χ", r"\subset": "⊂", r"\circ": "∘", r"\times": "×", r"\alpha": "α", r"\beta": "β", r"\gamma": "γ",
}  # fmt: skip


def parse_tex(tex: str) -> Node:
    """Parse the part of TeX that `synthetic_text.FORMULAS` is written in. Raises ValueError for any other."""
    tokens = _TOKEN.findall(tex)[::-1]
    node = _row(tokens)
    if tokens:
        raise ValueError(f"unbalanced braces in {tex!r}")
    return node


def _row(tokens: list[str]) -> Node:
    children: list[Node] = []
    while tokens and tokens[-1] != "}":
        if tokens[-1] in "^_":
            kind = "sup" if tokens.pop() == "^" else "sub"
            children.append(Node(kind, (children.pop(), _atom(tokens))))
        else:
            children.append(_atom(tokens))
    return children[0] if len(children) == 1 else Node("row", tuple(children))


def _atom(tokens: list[str]) -> Node:
    if not tokens:
        raise ValueError("a formula ends where an argument is due")
    token = tokens.pop()
    if token == "{":
        node = _row(tokens)
        tokens.pop()
        return node
    if token == r"\frac":
        return Node("frac", (_atom(tokens), _atom(tokens)))
    if token == r"\sqrt":
        return Node("sqrt", (_atom(tokens),))
    if token.startswith("\\") and token not in _SYMBOLS:
        raise ValueError(f"unknown command {token}")
    return Node(_SYMBOLS.get(token, token))


_MATHML = {"row": "mrow", "frac": "mfrac", "sqrt": "msqrt", "sup": "msup", "sub": "msub"}


def _mathml(node: Node) -> str:
    if not node.children:
        tag = "mn" if node.name.isdigit() else "mi" if node.name.isalpha() else "mo"
        return f"<{tag}>{html.escape(node.name)}</{tag}>"
    return f"<{_MATHML[node.name]}>{''.join(map(_mathml, node.children))}</{_MATHML[node.name]}>"


def _plain_html(node: Node) -> str:
    parts = [_plain_html(child) for child in node.children]
    if not parts:
        return f"<i>{node.name}</i>" if node.name.isalpha() and len(node.name) == 1 else html.escape(node.name)
    if node.name in ("sup", "sub"):
        return f"{parts[0]}<{node.name}>{parts[1]}</{node.name}>"
    if node.name == "frac":
        return f"({parts[0]})/({parts[1]})"
    return f"√({parts[0]})" if node.name == "sqrt" else "".join(parts)


def _katex(node: Node, tex: str) -> str:
    annotation = f'<annotation encoding="application/x-tex">{tex}</annotation>'
    semantics = f"<semantics><mrow>{_mathml(node)}</mrow>{annotation}</semantics>"
    return (
        f'<span class="katex"><span class="katex-mathml"><math xmlns="http://www.w3.org/1998/Math/MathML">{semantics}'
        f'</math></span><span class="katex-html" aria-hidden="true"><span class="base">{_plain_html(node)}</span>'
        "</span></span>"
    )


def formula_html(formula: Formula, markup: Markup) -> str:
    """A formula in one of the eight kinds of markup."""
    tex, node = html.escape(formula.tex, quote=True), parse_tex(formula.tex)
    namespace = 'xmlns="http://www.w3.org/1998/Math/MathML"'
    annotation = f'<annotation encoding="application/x-tex">{tex}</annotation>'
    # Functions, since most of the work would be for kinds that are not asked for.
    writers: dict[Markup, Callable[[], str]] = {
        "mathjax": lambda: f'<script type="math/tex">{formula.tex}</script>',
        "delimiters": lambda: rf"\({tex}\)",
        "dollars": lambda: f"${tex}$",
        "katex": lambda: _katex(node, tex),
        "mathml": lambda: f"<math {namespace}>{_mathml(node)}</math>",
        "annotated": lambda: f"<math {namespace}><semantics>{_mathml(node)}{annotation}</semantics></math>",
        "image": lambda: f'<img class="tex" src="/cgi/eq{len(tex)}.png" alt="${tex}$">',
        "html": lambda: _plain_html(node),
    }
    return writers[markup]()


# Pages.

_MENUS = {
    "en": "Home About Contact Archive Search Login Gallery Help Topics Newsletter Shop Events Members Links".split(),
    "zh": "首页 关于我们 联系 登录 搜索 归档 帮助 专题 会员 活动 友情链接".split(),
}
_FOOTERS = {
    "en": "Copyright {year} {host}. All rights reserved. Privacy policy. Terms of use.",
    "zh": "版权所有 {year} {host} 隐私政策 使用条款",
}


def make_look(rng: Random, host: str, language: str, markup: Markup) -> Look:
    """Draw how a site looks. One in seven of either language is not in UTF-8."""
    menu = tuple(rng.sample(_MENUS[language], 6))
    charset = "utf-8" if rng.random() > 0.15 else {"en": "cp1252", "zh": "gb18030"}[language]
    layouts: list[Layout] = ["article", "article", "forum", "table", "plain"]
    layout = rng.choice(layouts)
    return Look(host, language, markup, layout, charset, menu)


def render(rng: Random, document: Document, look: Look, damage: Damage = "", padding: int = 0) -> tuple[bytes, str]:
    """The bytes of a page and its Content-Type header.

    `damage`: "markup" leaves tags open, closes others twice and cuts the page off in its footer; "charset" declares no
    character set, or none that is true; "script" leaves the text to a script, as sites do that are an application.
    `padding`: bytes of script and menus besides.
    """
    text = _script_only(document) if damage == "script" else _body(rng, document, look)
    declared = look.charset if damage != "charset" else rng.choice(["", "x-unknown"])
    in_header = rng.random() < 0.5
    scripts, menus = _padding(look.host, padding) if padding else ("", "")
    meta = f'<meta charset="{declared}">' if declared and not in_header else ""
    page = (
        f'<!DOCTYPE html>\n<html lang="{look.language}"><head>{meta}<title>{html.escape(document.title)} - {look.host}'
        f"</title><style>body{{margin:0}} nav li{{float:left}}</style><script>var page={{id:{rng.randint(1, 10**6)}}};"
        f"</script>{scripts}</head>\n<body>{menus}{text}</body></html>\n"
    )
    if damage == "markup":
        page = _tear(rng, page)
    header = f"text/html; charset={declared}" if declared and in_header else "text/html"
    return page.encode(look.charset, "xmlcharrefreplace"), header


def _body(rng: Random, document: Document, look: Look) -> str:
    paragraphs = [_paragraph(paragraph, look.markup) for paragraph in document.paragraphs]
    title = html.escape(document.title)
    menu = "".join(f'<li><a href="/{index}">{name}</a></li>' for index, name in enumerate(look.menu))
    navigation = f"<header><nav><ul>{menu}</ul></nav></header>"
    related = "".join(f'<li><a href="/r/{i}">{invented(rng, 2).capitalize()}</a></li>' for i in range(4))
    footer = f"<footer>{_FOOTERS[look.language].format(year=rng.randint(2009, 2024), host=look.host)}</footer>"
    if look.layout == "article":
        main = f"<main><article><h1>{title}</h1>{_blocks('p', paragraphs)}</article></main>"
    elif look.layout == "forum":
        posts = "".join(
            f'<div class="post"><div class="author">{invented(rng, 1)}</div><div class="post-body">{_blocks("p", two)}'
            "</div></div>"
            for two in (paragraphs[i : i + 2] for i in range(0, len(paragraphs), 2))
        )
        main = f'<main><h1>{title}</h1><div class="thread">{posts}</div></main>'
    elif look.layout == "table":
        main = f"<table><tr><td><h2>{title}</h2>{_blocks('p', paragraphs)}</td></tr></table>"
    else:
        main = f'<div id="content"><h1>{title}</h1>{"<br><br>".join(paragraphs)}</div>'
    return f"{navigation}\n{main}\n<aside><ul>{related}</ul></aside>\n{footer}"


def _blocks(tag: str, texts: list[str]) -> str:
    return "\n".join(f"<{tag}>{text}</{tag}>" for text in texts)


def _paragraph(paragraph: Paragraph, markup: Markup) -> str:
    return "".join(
        formula_html(piece, markup) if isinstance(piece, Formula) else html.escape(piece, quote=False)
        for piece in paragraph
    )


def _script_only(document: Document) -> str:
    text = " ".join(piece for paragraph in document.paragraphs for piece in paragraph if isinstance(piece, str))
    state = text.replace("\\", "").replace('"', "").replace("<", "")
    return f'<div id="root"></div><script>window.__STATE__={{"body":"{state}"}};start();</script>'


def _tear(rng: Random, page: str) -> str:
    """Break the markup the way the web does: the text stays on the page."""
    for tag in ("</p>", "</div>", "</td>", "</li>"):
        page = "".join(part + (tag if rng.random() < 0.5 else "") for part in page.split(tag))
    page = page.replace("</h1>", "</h1></span></b>", 1).replace(
        "<footer>", "</div></div><footer class='x' class=\"y>", 1
    )
    return page[: len(page) - rng.randint(20, 60)]


@functools.lru_cache(64)
def _padding(host: str, size: int) -> tuple[str, str]:
    """Filler around the text of a page: three fifths script, two fifths menus."""
    rng = Random(f"padding/{host}")
    names = [invented(rng, 2) for _ in range(200)]
    data, menu = [], []
    while sum(map(len, data)) < 0.6 * size:
        data.append(f'"{rng.choice(names)}":{{"id":{rng.randrange(10**6)},"href":"/{rng.choice(names)}","on":true}},')
    while sum(map(len, menu)) < 0.4 * size:
        name = rng.choice(names)
        link = f'<a href="/{name}" title="{name}"><span>{name}</span></a>'
        menu.append(f'<li class="item level-{rng.randrange(9)}">{link}</li>')
    return f"<script>window.site={{{''.join(data)}}};</script>", f"<nav><ul>{''.join(menu)}</ul></nav>"
