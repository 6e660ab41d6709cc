"""MathML without a TeX annotation, and MathJax's rendering of it, become LaTeX."""

from __future__ import annotations

import pytest
from growth import TIMES, is_linear

from dsm_train.corpus.text.formula import normalised
from dsm_train.corpus.text.mathml import MAX_CHARS, in_mathematics, to_latex

X, Y, N, ONE = "<mi>x</mi>", "<mi>y</mi>", "<mi>n</mi>", "<mn>1</mn>"


def mo(text: str) -> str:
    return f"<mo>{text}</mo>"


@pytest.mark.parametrize(
    "markup, tex",
    [
        (f"<mfrac>{X}<mrow>{Y}{mo('+')}{ONE}</mrow></mfrac>", r"\frac{x}{y+1}"),
        (f"<msqrt>{X}{mo('+')}{Y}</msqrt>", r"\sqrt{x+y}"),
        (f"<mroot>{X}<mn>3</mn></mroot>", r"\sqrt[3]{x}"),
        (f"<msup><mrow>{mo('(')}{X}{mo('+')}{Y}{mo(')')}</mrow><mn>2</mn></msup>", "(x+y)^{2}"),
        (f"<msup><mrow>{X}{mo('+')}{Y}</mrow><mn>2</mn></msup>", "{x+y}^{2}"),
        (f"<msubsup>{X}{N}<mn>2</mn></msubsup>", "x_{n}^{2}"),
        (f"<msup><mi>f</mi>{mo('′')}</msup>", "f'"),
        (f"<munderover>{mo('∑')}<mrow>{N}{mo('=')}{ONE}</mrow><mi>∞</mi></munderover>{X}", r"\sum_{n=1}^{\infty}x"),
        (f"<munder><mi>lim</mi><mrow>{N}{mo('→')}<mi>∞</mi></mrow></munder>", r"\lim_{n\to\infty}"),
        (f"<munder><mi>colim</mi>{N}</munder>", r"\operatorname*{colim}_{n}"),
        (f"<mover>{X}{mo('^')}</mover><mover>{X}{mo('→')}</mover>", r"\hat{x}\vec{x}"),
        (f"<mover><mrow>{X}{Y}</mrow>{mo('¯')}</mover>", r"\overline{xy}"),
        (f"{X}<mover>{mo('→')}<mi>f</mi></mover>{Y}", r"x\xrightarrow{f}y"),
        (f"{mo('(')}<mfrac linethickness='0'>{N}<mi>k</mi></mfrac>{mo(')')}", r"\binom{n}{k}"),
        (
            f"{mo('[')}<mtable><mtr><mtd>{X}</mtd><mtd>{Y}</mtd></mtr></mtable>{mo(']')}",
            r"\begin{bmatrix}x & y\end{bmatrix}",
        ),
        (
            f"{mo('{')}<mtable><mtr><mtd>{X}</mtd></mtr><mtr><mtd>{Y}</mtd></mtr></mtable>",
            r"\begin{cases}x \\ y\end{cases}",
        ),
        (f"<mfenced open='⟨' close='⟩'>{X}{Y}</mfenced>", r"\langle x,y\rangle"),
        ("<mmultiscripts><mi>C</mi><mprescripts/><mn>6</mn><mn>14</mn></mmultiscripts>", "{}_{6}^{14}C"),
        (f"<menclose notation='box'>{X}</menclose>", r"\boxed{x}"),
        ('<mi mathvariant="double-struck">R</mi><mi>ℝ</mi><mi>𝔤</mi><mi>𝑥</mi>', r"\mathbb{R}\mathbb{R}\mathfrak{g}x"),
        (f"<mi>sin</mi>{mo('&#x2061;')}{X}<mtext> if </mtext><mi>&alpha;</mi>", r"\sin x\text{ if }\alpha"),
        ("<mi>mod</mi><mn>5</mn><mo>%</mo>", r"\mathrm{mod}5\%"),
        (f"<mphantom>{X}</mphantom><mspace width='1em'/>{Y}", r"\quad y"),
        ("<semantics><mi>x</mi><annotation-xml><ci>x</ci></annotation-xml></semantics>", "x"),
        ("<m:mfrac><m:mi>a</m:mi><m:mi>b</m:mi></m:mfrac>", r"\frac{a}{b}"),
        (f"<mfrac>{X}<mrow>{Y}", r"\frac{x}{y}"),  # left open
        (f"<mfrac>{X}</mfrac></mrow>{Y}", r"\frac{x}{}y"),
    ],
)
def test_mathml(markup: str, tex: str) -> None:
    assert to_latex(f"<math>{markup}</math>") == tex


def test_what_mathjax_draws() -> None:
    x, two = ('<mjx-mi><mjx-c class="mjx-c1D465"></mjx-c></mjx-mi>', '<mjx-mn><mjx-c class="mjx-c32"></mjx-c></mjx-mn>')
    chtml = f"<mjx-math><mjx-msup>{x}<mjx-script>{two}</mjx-script></mjx-msup></mjx-math>"
    assert to_latex(chtml) == "x^{2}"
    svg = '<svg><g data-mml-node="math"><g data-mml-node="mi"><use data-c="1D6FC"></use></g></g></svg>'
    assert to_latex(svg) == r"\alpha"


@pytest.mark.parametrize(
    ("repeated", "end", "tex"), [("<mrow>", X, "x"), ('<mi class="', "", "")], ids=["elements", "quotes"]
)
def test_time_is_linear_in_what_is_left_open(repeated: str, end: str, tex: str) -> None:
    small, large = (repeated * count + end for count in (2_000, 2_000 * TIMES))
    assert to_latex(large) == tex and is_linear(to_latex, small, large)


def test_markup_that_is_too_long_is_not_read() -> None:
    assert to_latex("<math>" + "<mi>x</mi>" * (MAX_CHARS // 10 + 1) + "</math>") == ""
    assert to_latex("<math><mi>x</mi>" + " " * (MAX_CHARS - 30) + "</math>") == "x"


def test_plain_text_in_a_formula() -> None:
    assert in_mathematics("log_2 2π−5%") == r"\log_2 2\pi-5\%"


@pytest.mark.parametrize(
    "tex, formula",
    [
        ("x", "$x$"),
        ("$x$", "$x$"),
        (r"\(x\)", "$x$"),
        ("$$x$$", "$$x$$"),
        (r"\begin{equation} x \end{equation}", "$$x$$"),
        (r"{\displaystyle x^{2}}", "$x^{2}$"),
        ("$latex x$", "$x$"),
        ("x % a comment\n + 1", "$x + 1$"),
        ("<![CDATA[ x ]]>", "$x$"),
        ("{}", ""),
        ("  ", ""),
    ],
)
def test_a_formula_has_one_form(tex: str, formula: str) -> None:
    assert normalised(tex) == formula
