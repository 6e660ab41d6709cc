"""Text of the synthetic web: a page is sentences whose words come from a mixture of topics, with formulas in some.

A formula is written in a small part of TeX, from which `synthetic_html` makes every kind of markup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from dsm_train.corpus.demo import synthetic_words as words
from dsm_train.corpus.demo.synthetic_words import Lexicon

FORMULAS = {
    "algebra": ["@^2-#@+#=0", r"\frac{@^2-#}{@+#}=@-#", r"@=\frac{-b\pm\sqrt{b^2-4ac}}{2a}", r"(@+#)^3", r"@_1+@_2=#"],
    "calculus": [r"\int_0^{#} @^2 d@", r"\lim_{n\to\infty}\frac{#}{n}=0", r"\frac{df}{d@}=#@^2", r"\sum_{k=1}^n k^2"],
    "number theory": [r"a\equiv b\mod #", "@^2+y^2=#", r"#\cdot #=#", r"p_n<#\sqrt{n}", r"2^{#}-1"],
    "linear algebra": [r"A@=\lambda @", r"@^TA@\geq 0", r"\sum_{i=1}^n a_i@_i=0", r"\sqrt{@_1^2+@_2^2}"],
    "probability": [r"P(A)=\frac{#}{#}", r"\sigma^2=\frac{1}{n}\sum_{i=1}^n(@_i-\mu)^2", r"\mu\pm #\sigma"],
    "topology": [r"f:X\to Y", r"\pi_1(X)", r"H_n(X)=0", r"\chi=V-E+F", r"U\subset X"],
    "category theory": [r"F:C\to D", r"g\circ f=h", r"F(g\circ f)=F(g)\circ F(f)", r"A\times B\to C"],
    "combinatorics": [r"\frac{n!}{k!(n-k)!}", r"V-E+F=2", r"\sum_{k=0}^n a_k=2^n", r"a_n=a_{n-1}+#", r"n\leq #"],
    "geometry": [r"a^2+b^2=c^2", r"\alpha+\beta+\gamma=180", r"\frac{AB}{CD}=\frac{#}{#}", r"S=\pi r^2"],
    "olympiad": [r"n\leq #", r"@+y+z=#", r"\frac{n(n+1)}{2}", r"# \times #"],
    "puzzles": [r"# \times #", "#+#=#", "2^{#}", r"\frac{1}{#}"],
    "school arithmetic": [r"\frac{#}{#}+\frac{#}{#}", "#+#=#", r"# \times #=#", "#-#=#", r"\frac{#}{#}<\frac{#}{#}"],
    "代数": ["@^2-#@+#=0", r"f(@)=\frac{#}{@}", r"@_1+@_2=#", r"\sqrt{@+#}", r"\sum_{k=1}^n k^2"],
    "几何": [r"a^2+b^2=c^2", r"\alpha+\beta+\gamma=180", r"S=\pi r^2", r"\frac{AB}{CD}=\frac{#}{#}"],
    "奥数": [r"# \times #=#", r"\frac{#}{#}", "#+#=#", r"n\leq #"],
    "physics": [r"E=\frac{1}{2}mv^2", r"\lambda=\frac{h}{p}", r"\int_0^{#} F d@", "@(t)=#t^2", r"\sqrt{#}", "10^{#}"],
    "物理": [r"E=\frac{1}{2}mv^2", r"\lambda=\frac{h}{p}", "10^{#}", r"F=\frac{#}{r^2}"],
    "finance": [r"(1+r)^{#}", r"\frac{#}{#}", r"\sigma_p", r"V=\frac{C}{(1+r)^n}", "#-#=#", r"\sum_{t=1}^n C_t"],
    "股票": [r"(1+r)^{#}", r"\frac{#}{#}", "#-#=#"],
    "programming": ["O(n^2)", "2^{#}", "a_i=a_{i-1}", r"n\leq #", "f(@)=#"],
    "sports statistics": [r"\frac{#}{#}", "#-#", "#+#=#", r"\frac{H}{AB}"],
    "engineering": [r"P=\frac{F}{A}", r"\sigma=#", "I^2R", r"\sqrt{#}", r"V=#\times #"],
    "polls": [r"\pm #", r"\frac{#}{#}", r"n=#", r"\sqrt{\frac{p(1-p)}{n}}"],
    "music theory": [r"\frac{3}{2}", r"2^{\frac{#}{12}}", r"f=#"],
}
"""Formulas of each topic that has any: `#` a number, `@` an unknown."""

_SYLLABLES = "ar bel cor dan el far gil hal is jor kel lan mor nor os per quin ros sal tor ul ver wes yor zan".split()
_ENDINGS = "ton ford wick ham ley son berg mann field stone".split()
_ACCENTED = ("Hélène Durançon", "José Muñoz", "Jürgen Weiß", "Zoë Krüger", "Renée Gagné")
_SURNAMES, _GIVEN = "王李张刘陈杨赵黄周吴", "伟芳娜敏静丽强磊军洋"
_PLACES = ("北京", "上海", "杭州", "成都", "西安", "武汉", "南京", "苏州")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True, slots=True)
class Formula:
    """Mathematics inside a text, in TeX."""

    tex: str


Paragraph = tuple["str | Formula", ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Text of a page, before any markup."""

    title: str
    paragraphs: tuple[Paragraph, ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Mixture of topics that a page's words are drawn from, and its share of sentences with a formula."""

    topics: tuple[str, ...]
    language: str
    topic_share: float
    core_share: float
    formula_share: float
    sentences: int


def pick_mixture(rng: Random, topic: str, near: Sequence[str], core: float, formulas: float) -> Mixture:
    """Draw the wording of a page on `topic`, now and then beside one of `near`.

    `core` and `formulas` are upper limits of formal words and of sentences with a formula: most pages are far below.
    """
    chinese = topic in words.CHINESE_MATHEMATICS or topic in words.CHINESE_OTHER
    known = {**words.CHINESE_MATHEMATICS, **words.CHINESE_OTHER} if chinese else {**words.MATHEMATICS, **words.OTHER}
    beside = [other for other in near if other in known and other != topic]
    return Mixture(
        topics=(topic, rng.choice(beside)) if beside and rng.random() < 0.3 else (topic,),
        language="zh" if chinese else "en",
        topic_share=rng.uniform(0.18, 0.42),
        core_share=core * rng.random(),
        formula_share=formulas * rng.random() if rng.random() < 0.7 else 0.0,
        sentences=rng.randint(12, 44),
    )


def write_document(rng: Random, mixture: Mixture) -> Document:
    """Write a page. The same generator state gives the same page."""
    sentences = _english(rng, mixture) if mixture.language == "en" else _chinese(rng, mixture)
    paragraphs: list[Paragraph] = []
    written = 0
    while written < mixture.sentences:
        count = rng.randint(2, 6)
        paragraph: list[str | Formula] = []
        for _ in range(count):
            paragraph += sentences()
        paragraphs.append(tuple(paragraph))
        written += count
    title = next(line for line in iter(sentences, None) if len(line) == 1)[0]
    return Document(title=str(title).rstrip(" .。?？"), paragraphs=tuple(paragraphs))


def lexicon(topic: str) -> Lexicon:
    """The words of a topic of either language."""
    for topics in (words.MATHEMATICS, words.OTHER, words.CHINESE_MATHEMATICS, words.CHINESE_OTHER):
        if topic in topics:
            return topics[topic]
    raise ValueError(f"no topic {topic!r}")


def _english(rng: Random, mixture: Mixture) -> Callable[[], list[str | Formula]]:
    lexicons = [lexicon(topic) for topic in mixture.topics]

    def word(kind: str) -> str:
        draw = rng.random()
        if draw < mixture.topic_share:
            source = lexicons[0] if len(lexicons) == 1 or rng.random() < 0.7 else lexicons[1]
        elif draw < mixture.topic_share + mixture.core_share:
            source = words.CORE
        else:
            source = words.GENERAL
        return rng.choice(_words(source, kind))

    fillers = {"Name": lambda: english_name(rng), "Place": lambda: _place(rng)}
    return _sentences(rng, mixture, word, fillers, words.SENTENCES, words.WITH_FORMULA, " ")


def _chinese(rng: Random, mixture: Mixture) -> Callable[[], list[str | Formula]]:
    lexicons = [lexicon(topic) for topic in mixture.topics]

    def word(kind: str) -> str:
        # Chinese has no words of CORE: theorems and equations are among those of its topics.
        own = rng.random() < mixture.topic_share + mixture.core_share
        return rng.choice(_words(rng.choice(lexicons) if own else words.CHINESE_GENERAL, kind))

    fillers = {"Name": lambda: _chinese_name(rng), "Place": lambda: rng.choice(_PLACES)}
    return _sentences(rng, mixture, word, fillers, words.CHINESE_SENTENCES, words.CHINESE_WITH_FORMULA, "")


def _sentences(
    rng: Random,
    mixture: Mixture,
    word: Callable[[str], str],
    fillers: dict[str, Callable[[], str]],
    plain: Sequence[str],
    with_formula: Sequence[str],
    space: str,
) -> Callable[[], list[str | Formula]]:
    """A function that writes the next sentence."""
    formulas = [formula for topic in mixture.topics for formula in FORMULAS.get(topic, ())]

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in fillers:
            return fillers[slot]()
        if slot == "number":
            return str(rng.randint(3, 400))
        return str(rng.randint(1890, 2024)) if slot == "year" else word(slot)

    def filled(template: str) -> str:
        return _ARTICLE.sub(r"\1n ", _SLOT.sub(fill, template))

    def sentence() -> list[str | Formula]:
        if not formulas or rng.random() >= mixture.formula_share:
            return [filled(rng.choice(plain)) + space]
        before, after = rng.choice(with_formula).split("{f}")
        return [filled(before), _formula(rng, formulas), filled(after) + space]

    return sentence


def _words(source: Lexicon, kind: str) -> tuple[str, ...]:
    return source.nouns if kind == "n" else source.verbs if kind == "v" else source.adjectives


def _formula(rng: Random, formulas: Sequence[str]) -> Formula:
    unknown = rng.choice("xyzuwst")
    tex = rng.choice(formulas).replace("@", unknown)
    return Formula(re.sub("#", lambda _: str(rng.randint(2, 99)), tex))


def invented(rng: Random, syllables: int) -> str:
    """A lower-case name that no list of words holds."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(syllables)) + rng.choice(_ENDINGS)


def english_name(rng: Random) -> str:
    """A person; some have accents."""
    return rng.choice(_ACCENTED) if rng.random() < 0.1 else invented(rng, 1).capitalize()


def _place(rng: Random) -> str:
    return invented(rng, 2).capitalize()


def _chinese_name(rng: Random) -> str:
    return rng.choice(_SURNAMES) + "".join(rng.choice(_GIVEN) for _ in range(rng.randint(1, 2)))


# Things planted in pages.


def with_edits(rng: Random, document: Document) -> Document:
    """A near-duplicate: a word of the text replaced, and a short sentence more."""
    index = rng.randrange(len(document.paragraphs))
    paragraph = list(document.paragraphs[index])
    place = rng.choice([i for i, piece in enumerate(paragraph) if isinstance(piece, str) and piece.strip()])
    text = paragraph[place]
    assert isinstance(text, str)
    general = rng.choice(words.GENERAL.nouns)
    if " " in text.strip():
        parts = text.split(" ")
        parts[rng.randrange(len(parts) - 1)] = general
        paragraph[place] = " ".join(parts)
    else:
        paragraph[place] = text.replace("的", "之", 1)
    edited = (*document.paragraphs[:index], tuple(paragraph), *document.paragraphs[index + 1 :])
    return Document(document.title, (*edited, (f"{invented(rng, 2).capitalize()} {rng.randint(2, 28)}.",)))


def with_passage(rng: Random, document: Document, passage: str) -> Document:
    """The document with a passage among its paragraphs, or inside one of them."""
    index = rng.randrange(len(document.paragraphs))
    if rng.random() < 0.5:
        paragraphs = (*document.paragraphs[:index], (passage,), *document.paragraphs[index:])
    else:
        inside = (*document.paragraphs[index], f" {passage} ")
        paragraphs = (*document.paragraphs[:index], inside, *document.paragraphs[index + 1 :])
    return Document(document.title, paragraphs)


@dataclass(frozen=True, slots=True)
class Item:
    """A question and its answer of the made-up benchmark."""

    question: str
    answer: str
    language: str


def make_benchmark(rng: Random, items: int) -> list[Item]:
    """Questions with worked answers: word problems of ten words and more, every sixth shorter, every fifth Chinese."""
    made = []
    for index in range(items):
        name, place = english_name(rng), _place(rng)
        a, b, c = rng.randint(11, 99), rng.randint(3, 19), rng.randint(101, 999)
        thing, other = rng.sample(["pears", "stamps", "candles", "kites", "pencils", "eggs", "shells", "tickets"], 2)
        if index % 5 == 4:
            person = _chinese_name(rng)
            question = f"{person}有{a}支铅笔，又买来{b}盒，每盒{c}支，送给同学{a - b}支以后还剩多少支？"
            answer = f"{person}一共有{a + b * c}支铅笔，送出后还剩{a + b * c - (a - b)}支，所以答案是{b * c + b}。"
            made.append(Item(question, answer, "zh"))
        elif index % 6 == 5:
            made.append(Item(f"Compute {a} times {c} minus {b}.", f"{a * c - b}", "en"))
        else:
            question = (
                f"{name} of {place} packs {a} {thing} into each of {b} crates and then sells {c} {other} at the fair. "
                f"How many {thing} and {other} did {name} handle in all?"
            )
            answer = (
                f"The {b} crates hold {a} * {b} = {a * b} {thing}. With the {c} {other} sold at the fair that is "
                f"{a * b} + {c} = {a * b + c} in all. #### {a * b + c}"
            )
            made.append(Item(question, answer, "en"))
    return made
