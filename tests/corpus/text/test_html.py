"""HTML to text: every kind of mathematics is kept, boilerplate is removed, and no bytes raise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from growth import TIMES, is_linear

from dsm_train.corpus.text.detect import decode, detect_language, printable
from dsm_train.corpus.text.html import NestedTooDeep, html_to_text

PAGES = Path(__file__).parent / "pages"
"""Pages in the markup that the tools themselves write, with menus and footers, and the text that should come out."""


def text_of(body: str) -> str:
    return html_to_text(f"<html><body>{body}</body></html>".encode()).text


@pytest.mark.parametrize("name", sorted(path.stem for path in PAGES.glob("*.html")))
def test_pinned_pages(name: str) -> None:
    extracted = html_to_text((PAGES / f"{name}.html").read_bytes())
    assert extracted.text == (PAGES / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")
    assert extracted.language == ("zh" if name == "chinese" else "en")
    assert extracted.charset == ("gbk" if name == "chinese" else "utf-8")


@pytest.mark.parametrize(
    "markup, text",
    [
        ("x<sup>2</sup>", "$x^{2}$"),
        ("10<sup>−3</sup>", "$10^{-3}$"),
        ("(a + b)<sup>2</sup>", "$(a + b)^{2}$"),
        ("<i>x</i><sub><i>i</i></sub><sup>2</sup>y<sup>2</sup>", "$x_{i}^{2}y^{2}$"),
        ("H<sub>2</sub>O", "$H_{2}O$"),
        ("<sup>14</sup>C", "$^{14}C$"),
        ("2<sup>2<sup>n</sup></sup>", "$2^{2^{n}}$"),
        ("O(n<sup>2</sup>)", "$O(n^{2})$"),
        ("sin<sup>2</sup>θ<sub>max</sub>", r"$\sin^{2}\theta_{\max}$"),
        ("x<sup>{1%}</sup>", r"$x^{\{1\%\}}$"),
        ("CO<sub>2</sub>-free", "$CO_{2}$-free"),
        ("面积6米<sup>2</sup>的", "面积6米$^{2}$的"),
        ("$x$<sup>2</sup>", "$x^{2}$"),
        (r"\(a\)x<sup>2</sup>", "$a$ $x^{2}$"),
        ("$5 for 3 m<sup>2</sup> and $7", "$5 for 3 $m^{2}$ and $7"),
        ("<code>10<sup>5</sup></code>", "10^{5}"),
    ],
)
def test_superscripts_and_subscripts(markup: str, text: str) -> None:
    assert text_of(f"<p>{markup}</p>") == text


@pytest.mark.parametrize(
    "markup",
    [
        "1<sup>st</sup>",
        "said<sup>[1]</sup>",
        "said<sup>3</sup>",
        'x<sup><a href="#1">1</a></sup>',
        "in 1905<sup>2</sup>",
    ]
    + ["Unix<sup>®</sup>", "a word<sup>*</sup>", 'a<sup class="reference">2</sup>', "T<sub>E</sub>X"],
)
def test_notes_ordinals_and_marks_are_not_mathematics(markup: str) -> None:
    assert "$" not in text_of(f"<p>{markup}</p>")


@pytest.mark.parametrize(
    "markup, text",
    [
        (r"<p>costs $$5 or $$7 now</p>", "costs $$5 or $$7 now"),
        (r"<p>\[ a < b \]</p>", "$$a < b$$"),
        (r"<p>\(a\)\(b\)</p>", "$a$ $b$"),
        (r"<p>line \\[2pt] end \(x\)</p>", r"line \\[2pt] end $x$"),
        (r"<p>\( never closed</p><p>\(x\)</p>", "\\( never closed\n\n$x$"),
        ("<pre>\\(x\\)\n  y</pre>", "\\(x\\)\n  y"),
        ('<p>a <script type="math/tex">b<c</script> d</p>', "a $b<c$ d"),
        ('<p><span data-latex="\\frac12">½</span></p>', r"$\frac12$"),
        ('<p><img src="cat.jpg" alt="a cat"> and <img class="latex" alt="">.</p>', "and ."),
        ("<p>a<!-- \\(x\\) -->b</p>", "ab"),
        ('<p><span class="math inline"><em>x</em><sup>2</sup> &le; √5</span></p>', r"$x^{2} \le\sqrt{5}$"),
        ('<p><span class="tex-span">(1 ≤ <i>i</i> ≤ <i>n</i>)</span></p>', r"$(1 \le i \le n)$"),
        ('<p><span class="wp-katex-eq" data-display="false">\\ell_P</span></p>', r"$\ell_P$"),
        (
            '<p><span style="display: inline-block" class="MathJax_SVG" data-mathml="<math><mi>A</mi></math>"></span>',
            "$A$",
        ),
    ],
)
def test_formulas_in_odd_places(markup: str, text: str) -> None:
    assert text_of(markup) == text


def test_navigation_goes_and_a_page_of_one_big_element_stays() -> None:
    menu = "<ul>" + "".join(f'<li><a href="/{i}">Chapter {i}</a></li>' for i in range(9)) + "</ul>"
    assert text_of(f"{menu}<p>Words of the page.</p>") == "Words of the page."
    all_of_it = "All that there is of this page stands in a box."
    assert text_of(f'<div class="sidebar"><p>{all_of_it}</p></div>') == all_of_it
    assert (
        text_of('<div style="display:none">gone</div><p hidden>gone</p><p>Here, for all to see.</p>').count("gone") == 0
    )


RUSSIAN = "Множество называется открытым, если каждая его точка является внутренней."


@pytest.mark.parametrize(
    "data, header, charset",
    [
        (RUSSIAN.encode(), "windows-1251", "utf-8"),
        (RUSSIAN.encode("cp1251"), "windows-1251", "cp1251"),
        (f"<meta charset=windows-1251>{RUSSIAN}".encode("cp1251"), None, "cp1251"),
        (f"<meta charset=utf-8>{RUSSIAN}".encode("cp1251"), "bogus-8", "cp1251"),
        (RUSSIAN.encode("koi8_r"), "KOI8-R", "koi8-r"),
        (b"\xff\xfe" + RUSSIAN.encode("utf-16-le"), None, "utf-16-le"),
        (b"\xef\xbb\xbf" + RUSSIAN.encode(), "latin-1", "utf-8"),
        (RUSSIAN.encode()[:-1], None, "utf-8"),
    ],
)
def test_charset(data: bytes, header: str | None, charset: str) -> None:
    text, found = decode(data, header)
    assert found == charset and RUSSIAN[:-2] in text


@pytest.mark.parametrize(
    "language, text",
    [
        ("ru", RUSSIAN),
        ("bg", "Нека функцията е непрекъсната в интервала. Докажете, че тя достига най-голямата си стойност."),
        ("uk", "Нехай функція неперервна на відрізку. Доведіть, що вона досягає свого найбільшого значення."),
        ("de", "Jede stetige Funktion auf einem abgeschlossenen Intervall nimmt ihr Maximum und ihr Minimum an."),
        ("zh", "设 $f$ 在闭区间上连续，则 $f$ 在该区间上有最大值。"),
        ("ja", "連続関数は閉区間で最大値をとることを証明せよ。"),
        ("en", r"$\int_0^1$ The maximum of the function is attained at the end of the interval and is $2$."),
        ("", "$x^2$ 1 2 3"),
    ],
)
def test_language(language: str, text: str) -> None:
    assert detect_language(text) == language


def test_data_is_no_text() -> None:
    noise = bytes(random.Random(0).choices(range(256), k=5000))
    assert html_to_text(b"<html>" + noise).text == ""
    assert (
        printable("a\x00b\x1f, a long line with two control characters")
        == "ab, a long line with two control characters"
    )
    assert html_to_text(b"<html><script>var x = 1;</script><style>p {}</style></html>").text == ""
    assert html_to_text(b"").text == ""


def test_broken_markup_never_raises() -> None:
    source = b"".join(path.read_bytes() for path in sorted(PAGES.glob("*.html")))
    draw = random.Random(0)
    for _ in range(200):
        start = draw.randrange(len(source))
        page = bytearray(source[start : start + 3000])
        for _ in range(draw.choice((1, 10, 100))):
            place = draw.randrange(len(page))
            page[place : place + draw.randrange(4)] = draw.choice(
                (b"<", b">", b'"', b"$$", b"\\(", b"</div>", b"\xff", b"")
            )
        html_to_text(bytes(page))


def test_formulas_in_the_text_are_found_whatever_stands_between_them() -> None:
    boxes = '<p class="a">Let \\(x\\) be</p><div class="b">and \\[y\\]</div><table id="c"><td>$$z^2$$</td></table>'
    assert text_of(boxes).split() == ["Let", "$x$", "be", "and", "$$y$$", "$$z^2$$"]
    assert text_of("<p>if a < b then \\(c\\), and a <5 as \\(d\\)") == "if a < b then $c$, and a <5 as $d$"
    assert text_of('<p>see <a href="#" title="\\(no\\) $$no=1$$">here</a> for \\(c\\)') == "see here for $c$"


GROWING = {
    "unclosed divisions": lambda n: '<div class="menu">' * (n // 40) + "<p>x",
    "unclosed tag": lambda n: "<p " * n + "$$ x^2 $$",
    "unclosed formulas": lambda n: "\\( x <b>y</b> \\[ $$ " * n,
    "pairs of dollars": lambda n: "$$ " * n,
    "environments": lambda n: r"\begin{align} x " * n,
    "unclosed scripts": lambda n: '<script type="math/tex"> x <p> ' * n,
    "unclosed math": lambda n: "<math><mrow> " * n,
    "rows in one formula": lambda n: "<math>" + "<mrow><mi>x</mi>" * (n // 4) + "</math>",
    "superscripts": lambda n: "x<sup>2</sup>(a" * (n // 4),
    "nested superscripts": lambda n: "x<sup>" * (n // 4),
    "nested formulas that are none": lambda n: '<span class="katex">' * (n // 4) + "word" + "</span>" * (n // 4),
    "comments": lambda n: "<!-- \\(x\\) " * n,
    "quotes": lambda n: '<img class="tex" alt="$x ' * n,
    "links": lambda n: "<a href=x>y " * n,
    "blocks of boilerplate": lambda n: '<nav>x</nav><div class="ad">y</div>' * n,
}


@pytest.mark.parametrize("name", GROWING)
def test_time_is_linear_in_the_page(name: str) -> None:
    assert is_linear(html_to_text, *(GROWING[name](count).encode() for count in (4_000, 4_000 * TIMES)))


def test_elements_nested_without_end_are_refused() -> None:
    with pytest.raises(NestedTooDeep, match="deeper than 1000"):
        html_to_text(b"<div>" * 200_000 + b"x")
