r"""Exact reward for a numeric answer.

Which number a text states, in this order:

1. the last `#### x`. A Markdown heading ("#### Step 2", "#### 2. Add") is none.
2. the last `\boxed{x}` or `\fbox{x}`, braces balanced.
3. the last "answer is x", to the end of its clause.
4. the last number in the text.

`x` must be one number and nothing else but markup, a name ("x ="), a currency sign, or units from the list in units.py.
A text that declares something else ("#### 1, 2", "\boxed{x+1}", a box that never closes) states none, and no later rule
is tried: what is not understood is no verdict, never another number. Gold answers are read by the same function.

* % is a unit: 50% is 50, never 0.5. A word of scale is none: "2 million", "2 dozen", "5k", "3 halves", "5 and a half";
  so are two units: "5 hours 30 minutes".
* A comma separates thousands, and only there: 1,234 is one number, "1,2" and "0,5" are none.
* 3/4 is a fraction and 5 × 10^3 is 5000; 12:30, 1/2/2024, 3.2.1, 10^3, 5-7, 6*7, "1 1/2", √5, log 5 and 2π are none.
  Rule 4 as well looks at the last thing that has the shape of a number and does not go back to an earlier one.
* Every dash is a minus sign where a sign can stand; "negative 5" is -5. A dash after a word ("x-5", "total - 5") may be
  a minus, a hyphen or punctuation: none.
* Digits inside a word (H2O, x2) are letters. ASCII and full-width digits count.
* More than 100 characters, or an exponent beyond 100, is none.

Patterns see windows of bounded length alone, so that time is linear in the text whatever it holds.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dsm_train.rewards.units import is_unit

MAX_LENGTH = 100
"""Longest number with its units, in characters."""
WINDOW = 300
"""Longest part of a text that patterns see at once."""

# Thousands need a comma at every third place; a leading zero would make "0,125" a thousand.
UNSIGNED = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_CURRENCY = "$€£¥₹"
_NUMBER = re.compile(
    rf"[{_CURRENCY}]?(?P<sign>[-+]?)[ ]?[{_CURRENCY}]?(?P<value>{UNSIGNED})"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,3})|/(?P<denominator>[0-9]+))?(?P<unit>.*)"
)
_NAME = r"[A-Za-z]\w{0,30}[ ]*=[ ]*"
_BRACKETS = re.compile(r"\(([^(){}]*)\)|\{([^(){}]*)\}")

_DECLARED = re.compile(rf"[-+{_CURRENCY}*_`( \t]*+(?:{_NAME}[-+{_CURRENCY}( ]*+)?\.?[0-9]", re.ASCII)
_HEADING = re.compile(r"[ \t]*[0-9]+[.)][ \t]+[A-Za-z]")
_STATED = re.compile(r"(?<!#)####(?!#)")
_BOX = re.compile(r"\\(?:boxed|fbox)(?=[\s{0-9$+.-])\s{0,9}(?=[{0-9$+.-])")
_ANSWER_IS = re.compile(r"\banswer is\b:?", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.,;!?](?:\s+[A-Za-z]|\s*$)|\n")

# Rule 4. A token is a word, which may hold digits, or something in the shape of a number with all that sticks to it.
# Neighbours joined by a blank or an operator belong to it, so that "1 1/2" and "6 * 7" are seen whole and refused.
_ODD = "²³¹¼-¾٠-٩۰-۹०-९⁰-₉⅐-↉①-⒛"  # digits, powers and fractions that are not read
_RUN = rf"[0-9{_ODD}](?:[0-9A-Za-z_.,:/%+*×·'’{_ODD}-]|\^\{{?|(?<=\^\{{)-|(?<=[0-9])\}})*(?:\\[A-Za-z]+|π)?"
_LEAD = rf"[{_CURRENCY}]?(?:(?<![\w)])[-+])?[{_CURRENCY}]?\.?"
_FUNCTION = r"\b(?:sqrt|log|ln|sin|cos|tan|exp|mod)[ (]{0,2}"
_DOUBT = rf"(?<=[\w)])(?:[ ]-[ ]|-)|[\^_]\{{?-?|\\[A-Za-z]+(?:\[[0-9]*\])?\{{?|[√±][(]?|\}}?\{{|{_FUNCTION}"
_PART = r"(?:half|halves|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth)s?"
_SCALE = (
    r"(?:(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?|score|gross|grand|mio|mrd|mn|bn|k|squared|cubed"
    rf"|{_PART}|(?:and )?(?:an?|one|two|three) {_PART}|[^.,;0-9\n]{{0,30}}below zero)\b"
)
_LARGE = (
    r"(?:years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|feet|foot|ft|pounds?|lbs?|kg|km|m|meters?|dollars?)"
)
_SMALL = r"(?:months?|weeks?|days?|hours?|minutes?|mins?|seconds?|secs?|inch(?:es)?|in|ounces?|oz|grams?|g|m|cm|cents?)"
_AREA = r"\b(?:[cdkm]?m|ft|in|yd|mi|units?|feet|inch(?:es)?|met(?:er|re)s?)(?:\^\{?[23]\}?|[²³])"
_TOKEN = re.compile(
    rf"{_AREA}|(?P<doubt>{_DOUBT})?(?P<number>{_LEAD}{_RUN}(?:[ ](?:[-+*/×][ ]?)?[{_CURRENCY}]?\.?{_RUN})*"
    rf"(?:[ ]{_LARGE}[ ](?:and )?{_RUN}[ ]{_SMALL}\b)?(?:[ ](?:(?i:{_SCALE})|[MBT]\b))?)|[A-Za-z_][A-Za-z0-9_]*",
    re.ASCII,
)
_DIGIT = re.compile(f"[0-9０-９{_ODD}]")

_CHARACTERS = str.maketrans(
    dict.fromkeys("‐‑‒–—―−﹣－⁻", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u3000~", " ")
    | dict(zip("０１２３４５６７８９＋．％＄＝：（）／⁄∕⋅", "0123456789+.%$=:()///·", strict=True))
)
_FRACTION = re.compile(r"([0-9]?)\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_PLAIN = (  # from LaTeX and words to plain text, in this order
    (re.compile(r"\\(?:text(?:bf|it|rm|tt)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (_FRACTION, lambda m: f"{m[1]}{' ' if m[1] else ''}{m[2] or m[3]}/{m[4] or m[5]}"),
    (re.compile(r"\{,\}|(?<=[0-9])\\,(?=[0-9]{3})"), ","),
    (re.compile(r"\\!|\\(?:left|right|big|Big)(?![A-Za-z])"), ""),
    (re.compile(r"\\q?quad(?![A-Za-z])|\\[,;: ()\[\]]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"\\sqrt(?![A-Za-z])"), "√"),
    (re.compile(r"\^(?:\\circ\b|\{\\circ\})|\\degree\b"), "°"),
    (re.compile(r"(?<=[0-9]) {0,3}[×·x*] {0,3}10 ?\^ ?(?:\{ ?([-+]?[0-9]{1,3}) ?\}|([-+]?[0-9]{1,3}))"), r"e\1\2"),
    (re.compile(r"(?<=[0-9)%] )minus (?=[$.0-9])", re.IGNORECASE), "- "),
    (re.compile(r"\b(?:minus|negative) (?=[$.0-9])", re.IGNORECASE), "-"),
    (re.compile(r"(?<=[=:(]) ?- *(?=[$.0-9])"), "-"),
)


def parse_number(text: str) -> Fraction | None:
    """Read a text that is one number, exactly; None where it is anything else."""
    return _parse(_plain(text)) if len(text) <= WINDOW else None


def extract_number(text: str) -> Fraction | None:
    """Find the number that a text states as its answer, by the rules above; None where it states none. Never raises."""
    for mark in reversed(list(_STATED.finditer(text))):
        line = _plain(text[mark.end() : mark.end() + WINDOW].split("\n", 1)[0])
        if _DECLARED.match(line) and not _HEADING.match(line):
            return _parse(line)
    if boxes := list(_BOX.finditer(text)):
        start = boxes[-1].end()
        return _parse(_plain(_braced(text[start : start + WINDOW])))
    for mark in reversed(list(_ANSWER_IS.finditer(text))):
        clause = _plain(text[mark.end() : mark.end() + WINDOW])
        if declared := _DECLARED.match(clause):
            end = _CLAUSE_END.search(clause, declared.end())
            return _parse(clause[: end.start()] if end else clause)
    return _last_number(text)


def numeric_reward(response: str, answer: str) -> float:
    """Reward 1.0 if the response states exactly the gold answer, as rational numbers, else 0.0.

    Never raises for a response; ValueError if the gold answer itself is no number, since every response would fail.
    """
    gold = parse_number(answer)
    if gold is None:
        raise ValueError(f"the gold answer must be a number, got {answer[:60]!r}: correct the task")
    return float(extract_number(response) == gold)


def _plain(text: str) -> str:
    """Rewrite a window of text in plain ASCII where it can be: LaTeX, dashes, blanks, signs in words."""
    assert len(text) <= WINDOW
    text = text.translate(_CHARACTERS)
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    return text


def _parse(text: str) -> Fraction | None:
    """Read a plain text that is one number."""
    money = text.count("$") % 2 == 1 or any(sign in text for sign in "€£¥₹")  # $5$ is LaTeX, $5 are dollars
    text = _bare(text)
    text = _bare(re.sub(f"^{_NAME}", "", text, flags=re.ASCII))
    while (inner := _BRACKETS.fullmatch(text)) is not None:
        text = _bare(inner[1] or inner[2] or "")
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None or not is_unit(match["unit"], money=money):
        return None
    value = Fraction(match["value"].replace(",", "").rstrip("."))
    if match["exponent"]:
        exponent = int(match["exponent"])
        if abs(exponent) > MAX_LENGTH:
            return None
        value *= Fraction(10) ** exponent
    if match["denominator"]:
        if int(match["denominator"]) == 0:
            return None
        value /= int(match["denominator"])
    return -value if match["sign"] == "-" else value


def _bare(text: str) -> str:
    """Strip the markup and punctuation around a text."""
    return text.strip(" \t\r\n$*_`'\"’").rstrip(" .,;:!?$*_`'\"’")


def _last_number(text: str) -> Fraction | None:
    """Find the last number (rule 4), going back through windows that each end a little after a digit."""
    backwards, end = text[::-1], len(text)
    while (digit := _DIGIT.search(backwards, len(text) - end)) is not None:
        last = len(text) - digit.start()
        end = max(0, last - WINDOW * 4 // 5)
        tokens = [m for m in _TOKEN.finditer(_plain(text[end : last + WINDOW // 5])) if m["number"]]
        if tokens:
            return None if tokens[-1]["doubt"] else _parse(tokens[-1]["number"])
    return None


def _braced(text: str) -> str:
    """Text inside the braces that a text begins with; empty without them, or when they do not close."""
    depth = 0
    for end, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:end] if end else ""
    return ""
