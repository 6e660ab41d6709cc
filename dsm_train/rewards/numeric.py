r"""Exact reward for a numeric answer.

Which number a text states, in this order:

1. the last `#### x`. A Markdown heading ("#### Step 2", "#### 2. Add") is none.
2. the last `\boxed{x}`, braces balanced.
3. the last "answer is x", to the end of its clause.
4. the last number in the text.

`x` must be one number and nothing else but markup, a currency sign, % or unit words: a text that declares something
else ("#### 1, 2", "\boxed{x+1}", a box that never closes) states none, and no later rule is tried. Choices:

* % is a unit: 50% is 50, never 0.5. So is "apples"; "2 million" is refused rather than read as 2.
* A comma separates thousands, and only there: 1,234 is one number, "1,2" and "0,5" are none.
* 3/4 is a fraction; 12:30, 1/2/2024, 3.2.1, 10^3, 5-7, 6*7 and "1 1/2" are none, also for rule 4, which looks at the
  last thing that has the shape of a number and does not go back to an earlier one.
* Digits inside a word (H2O, x2) are letters. Only ASCII digits count.
* More than 100 characters, or an exponent beyond 100, is none.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 100

# Thousands need a comma at every third place; a leading zero would make "0,125" a thousand.
UNSIGNED = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_SCALE = r"(?:hundred|thousand|million|billion|trillion)"
_NUMBER = re.compile(
    rf"[$€£]?(?P<sign>[-+]?)[$€£]?(?P<value>{UNSIGNED})(?:e(?P<exponent>[-+]?[0-9]{{1,3}})|/(?P<denominator>[0-9]+))?"
    rf"\s*%?\s*(?!{_SCALE})(?:/?[a-z°€£¥][a-z°./ ]*(?:\^\{{?[0-9]\}}?)?)?",
    re.IGNORECASE,
)

_OPENING = r"[-+$€£*_` \t]*+"
_HEADING = r"[0-9]+[.)][ \t]+[A-Za-z]"
_STATED = re.compile(rf"(?<!#)####(?!#)[ \t]*+(?!{_HEADING})(?={_OPENING}\.?[0-9])(.*)")
_ANSWER_IS = re.compile(
    rf"\banswer is:?[ \t]*+(?={_OPENING}\.?[0-9])(.*?)(?=[.,;!?](?:\s+[A-Za-z]|\s*$)|\n|$)", re.IGNORECASE
)
# A word, which may hold digits, or something in the shape of a number with all that sticks to it. Neighbours joined by
# a space or an operator belong to it, so that "1 1/2" and "6 * 7" are seen whole and refused.
_RUN = r"[0-9][0-9A-Za-z_.,:/^%+*×²³½¼¾-]*"
_LEAD = r"[$€£]?(?:(?<![\w)])[-+])?[$€£]?\.?"
_TOKEN = re.compile(
    rf"[A-Za-z_][A-Za-z0-9_]*|(?P<number>{_LEAD}{_RUN}(?:[ ](?:[-+*/×][ ])?[$€£]?\.?{_RUN})*(?:[ ]{_SCALE}\b)?)",
    re.ASCII,
)

_FRACTION = re.compile(r"([0-9]?)\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_LATEX = (  # to plain text, in this order
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}"), r" \1"),
    (_FRACTION, lambda m: f"{m[1]}{' ' if m[1] else ''}{m[2] or m[3]}/{m[4] or m[5]}"),
    (re.compile(r"\{,\}|(?<=[0-9])\\,(?=[0-9]{3})"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ()\[\]]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\^(?:\\circ\b|\{\\circ\})"), "°"),
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile(r"(?<=[=:(] )-[ ](?=[$.0-9])"), "-"),
)


def parse_number(text: str) -> Fraction | None:
    """The one number that a text is, exactly; None where it is anything else."""
    text = text.strip(" \t\r\n$*_`").rstrip(" .,;:!?$*_`")
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None:
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


def extract_number(text: str) -> Fraction | None:
    """The number that a text states as its answer, by the rules above; None where it states none. Never raises."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    if stated := _STATED.findall(text):
        return parse_number(stated[-1])
    if (start := text.rfind("\\boxed{")) >= 0:
        return parse_number(_braced(text, start + len("\\boxed{")))
    if answers := _ANSWER_IS.findall(text):
        return parse_number(answers[-1])
    numbers = [match["number"] for match in _TOKEN.finditer(text) if match["number"]]
    return parse_number(numbers[-1]) if numbers else None


def numeric_reward(response: str, answer: str) -> float:
    """1.0 if the response states exactly the gold answer, as rational numbers, else 0.0.

    Never raises for a response; ValueError if the gold answer itself is no number, since every response would fail.
    """
    gold = parse_number(answer)
    if gold is None:
        raise ValueError(f"the gold answer must be a number, got {answer[:60]!r}: correct the task")
    return float(extract_number(response) == gold)


def _braced(text: str, start: int) -> str:
    """The text from `start` to the brace that closes it; empty if none does."""
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return ""
