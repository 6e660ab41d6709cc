"""Rewards: exact, hard to fool, and safe on any text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from dsm_train.rewards import extract_number, format_reward, numeric, numeric_reward, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # 1. "####" comes first, the last one counts, headings are none
        ("\\boxed{9} the answer is 8\n#### 72\nwell, 5", 72),
        ("#### 1\n#### 2", 2),
        ("40+32=72 #### 72", 72),
        ("#### $1,234.50", Fraction("1234.5")),
        ("#### 85 apples.", 85),
        ("#### **-85**", -85),
        ("#### Step 1\nthe sum\n#### 2. Add them\n\\boxed{9}", 9),
        ("##### 5\nso 6", 6),
        ("stopped at 85\n####", 85),
        # 2. \boxed, braces balanced
        ("\\boxed{1} and \\boxed{\\frac{1}{2}} of 7", "1/2"),
        ("\\boxed{-\\dfrac12}", "-1/2"),
        ("$\\boxed{72\\text{ dollars}}$", 72),
        ("\\boxed{1\\,234} \\text{km}", 1234),
        ("\\boxed{1{,}234{,}567}", 1234567),
        ("\\boxed{14.3\\%}", "14.3"),
        ("\\boxed{5\\text{ cm}^2}", 5),
        ("\\boxed{90^\\circ}", 90),
        ("\\boxed{\\boxed{5}}", 5),
        ("\\boxed {5}, then 6", 5),
        ("\\fbox{5} is not 6", 5),
        ("\\boxed{x=5} and y=6", 5),
        ("\\boxed{\\left(5\\right)}", 5),
        ("\\boxed{(-5)}", -5),
        ("\\boxed{- 5}", -5),
        ("\\boxed{5\\ \\text{km}^2}", 5),
        ("\\boxed{$5\\text{ cm}$}", 5),
        ("\\boxed{3.2 \\times 10^{-2}}", "0.032"),
        # 3. "answer is"
        ("The answer is 5. No: the answer is: **85**, since 40+45 is 85 and not 7", 85),
        ("The final Answer is \\$18.", 18),
        ("The answer is (5). It was 6.", 5),
        ("The answer is n = 5, from 2 + 3", 5),
        ("The answer is negative 5, and not 5", -5),
        ("The answer is 5 miles per hour", 5),
        # 4. the last number
        ("47+38=85", 85),
        ("x = - 3", -3),
        ("cost \N{MINUS SIGN}5", -5),
        ("he owes -$5", -5),
        ("he owes $-5.00", -5),
        ("- 3 apples", 3),
        ("$7200/year", 7200),
        ("$5 \\times 10^{3}$", 5000),
        ("5·10^3 or so", 5000),
        ("5 x 10^3", 5000),
        ("minus 5", -5),
        ("(-5)", -5),
        ("the \uff18\uff15", 85),  # full-width digits
        ("the 5th", 5),
        ("an area of 5 m^2", 5),
        ("5 cm\u00b2 in all", 5),
        ("5 hours for 30 people, so 150", 150),
        ("about .5", "1/2"),
        ("3/4", "3/4"),
        ("3.0 kg (H2O)", 3),
        ("共85个。", 85),
        ("1.5e3", 1500),
        ("2e-3", "0.002"),
        ("007", 7),
        ("9" * 100, int("9" * 100)),
    ],
)
def test_the_number_a_text_states(text: str, number: int | str | Fraction) -> None:
    assert extract_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        # something that is stated, and is not one number
        "#### 1, 2",
        "#### 1/0",
        "#### 85 or 86",
        "#### 72 = 6*12",
        "72 \\boxed{x+1}",
        "72 \\boxed{7",
        "72 \\boxed{(1,2)}",
        "72. The answer is 1, 2 and 3",
        "the answer is 2 million",
        # shapes that hold digits and are no number
        "it costs 2 million",
        "it costs 5k",
        "it costs 5M",
        "#### 5k",
        "#### $5m",
        "#### 5 m people",
        "#### 5 widgets",  # no unit of the list: it might be a multiple
        "2 dozen",
        "3 halves",
        "5 and a half",
        "5 degrees below zero",
        "2 lakh",
        "8 squared",
        # parts of a formula
        "10^{3}",
        "10\u2074",
        "\\sqrt{5}",
        "\u221a5",
        "2\\pi",
        "2\u03c0",
        "2x",
        "x^5",
        "a_{5}",
        "\u00b15",
        "log 5",
        "sqrt(5)",
        "n = 3 (mod 7)",
        "5a",
        "5 hours 30 minutes",
        "5 hours and 30 minutes",
        "the answer is 6 feet 2 inches",
        "$5 and 30 cents, or 5 dollars 30 cents",
        "7 minus 5",
        "7 -5",
        "x-5",
        "total - 5",
        "x\u2009\u2013\u20095",
        "2\u00b75",
        "1\u202f234",
        "1'234",
        "5'10",
        "\\frac{1}{2",
        "72 \\boxed 5",
        "72 \\boxed{5\\pi}",
        "72 \\boxed{x^2=25}",
        "72 \\boxed{5 \\pm 1}",
        "at 12:30",
        "on 1/2/2024",
        "version 3.2.1",
        "1,2",
        "0,125",
        "1.234,5",
        "1234,567",
        "10^3",
        "10²",
        "1 1/2",
        "1\\frac{1}{2}",
        "85 85",
        "pages 5-7",
        "6*7",
        "6 * 7",
        "a 5-year-old",
        "H2O",
        "x_2",
        "0x1F",
        "\u0668\u0665",  # Arabic-Indic digits
        # absurd sizes
        "9" * 101,
        "#### " + "9" * 5000,
        "1e999999999",
        "1e-101",
        "1/" + "9" * 5000,
    ],
)
def test_a_text_that_states_no_number(text: str) -> None:
    assert extract_number(text) is None
    assert numeric_reward(text, "72") == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("#### 0.50", "1/2", 1.0),
        ("#### 1,200.00", "1200", 1.0),
        ("#### $18", "18", 1.0),
        ("#### 50%", "50", 1.0),
        # near is not equal, and no factor of 100 is forgiven
        ("#### 0.3333333333333333", "1/3", 0.0),
        ("#### 50%", "0.5", 0.0),
        ("#### 500", "5", 0.0),
        ("#### -5", "5", 0.0),
        (f"#### {2**60 + 1}", str(2**60), 0.0),  # equal as floats
    ],
)
def test_equal_means_equal_as_rational_numbers(response: str, answer: str, expected: float) -> None:
    assert numeric_reward(response, answer) == expected


@pytest.mark.parametrize("answer", ["", "seventy", "1,2", "12:30", "#### 5"])
def test_a_gold_answer_that_is_no_number_is_an_error(answer: str) -> None:
    assert parse_number(answer) is None
    with pytest.raises(ValueError, match="gold answer must be a number"):
        numeric_reward("#### 5", answer)


def test_random_text_never_raises() -> None:
    rng = random.Random(0)
    pieces = [
        *"0123456789.,:/^%+-*×$€{}()[]\\_# \n\t²½é数\ud800\x00",
        "####",
        "#### ",
        "\\boxed{",
        "\\frac",
        "\\frac{1}",
    ]
    pieces += ["{2}", "\\text{", "\\,", "\\!", "answer is ", "million", "e9", "e999", "1,000", "apples", "\\circ"]
    found = 0
    for _ in range(10_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        number = extract_number(text)
        found += number is not None
        assert number is None or extract_number(f"#### {number}") == number or len(str(number)) > 100
        assert format_reward(text) in (0.0, 1.0)
    assert found > 1000


@pytest.mark.parametrize("dash", "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d")
def test_every_dash_is_a_minus_sign_where_a_sign_can_stand(dash: str) -> None:
    for text in (f"#### {dash}5", f"\\boxed{{{dash}5}}", f"the answer is {dash}5.", f"x = {dash}5", f"it is {dash} 5."):
        assert extract_number(text) in (-5, None), text
        assert numeric_reward(text, "5") == 0.0
    assert numeric_reward(f"#### {dash}5", f"{dash}5") == numeric_reward(f"x = {dash} 5", "-5") == 1.0
    assert extract_number(f"pages 5{dash}7") is None


@pytest.mark.parametrize(
    ("multiple", "unit"),
    [("5M", "5 m"), ("5 K", "5 kg"), ("$5mm", "5 mm"), ("\u20ac5m", "5 m"), ("5G", "5 g"), ("5B", "5 GB")],
)
def test_a_multiple_is_not_read_as_the_unit_that_looks_like_it(multiple: str, unit: str) -> None:
    assert parse_number(multiple) is None and parse_number(unit) == 5


@pytest.mark.parametrize(
    "text",
    [
        "5 apples",
        "5 Apples.",
        "5 boxes",
        "5 puppies",
        "5 km/h",
        "5 m/s^2",
        "5 cm\u00b2",
        "5 sq. ft.",
        "5%",
        "5 %",
        "$5 per hour",
    ]
    + ["$5/hour", "$5 a day", "5 dollars each", "5 USD", "5\u20ac", "5\u00b0C", "5 pieces", "5 people in all"],
)
def test_units_of_the_list_are_no_part_of_the_number(text: str) -> None:
    assert parse_number(text) == extract_number(f"so 7. The answer is {text}") == 5


# what each of the patterns could be made to scan again and again
@pytest.mark.parametrize(
    "piece",
    ["answer is ", "answer is 1 ", "#### ", "\\frac{", "\\frac{1}{", "\\boxed{", "\\text{", "1", "1,", "1 ", "1 - "]
    + ["-", "$", " ", "*", ". ", "a", "1 million", "####1 \n", "= -", "{", "H2O ", "1^{", "\\sqrt{1", "minus "],
)
@pytest.mark.parametrize("frame", ["{}", "answer is{}", "####{}", "answer is 1{}x", "\\frac{}", "1{}"])
def test_work_is_linear_in_the_length(frame: str, piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns with repeats see windows of bounded length alone; the characters in them are counted."""
    seen = 0

    def counted(text: str, plain: Callable[[str], str] = numeric._plain) -> str:
        nonlocal seen
        assert len(text) <= numeric.WINDOW
        seen += len(text)
        return plain(text)

    monkeypatch.setattr(numeric, "_plain", counted)
    work = []
    for length in (2_000, 4_000):
        seen, text = 0, frame.replace("{}", piece * (length // len(piece)))
        extract_number(text)
        format_reward(text)
        work.append(seen)
    # a mark of 4 characters every 4 characters, each with the window after it
    assert work[1] <= 4_000 * numeric.WINDOW / 4 and work[1] <= 2.2 * work[0] + 2 * numeric.WINDOW


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("7+8=15\n#### 85", 1.0),
        ("#### -1,234.5\n\n", 1.0),
        ("#### 1/2", 1.0),
        ("85", 0.0),
        ("#### 85 apples", 0.0),
        ("####85", 0.0),
        ("so #### 85", 0.0),
        ("#### 85\nand so on", 0.0),
        ("#### 84\n#### 85", 0.0),
        ("or #### 84?\n#### 85", 0.0),
        ("#### 1,2", 0.0),
        ("####", 0.0),
        ("", 0.0),
    ],
)
def test_format_is_one_answer_on_the_last_line(response: str, expected: float) -> None:
    assert format_reward(response) == expected


def test_format_pattern_can_be_given() -> None:
    pattern = r"<answer>[^<]+</answer>"
    assert format_reward("<think>x</think>\n<answer>5</answer>", pattern) == 1.0
    assert format_reward("<answer>4</answer>\n<answer>5</answer>", pattern) == 0.0
    assert format_reward("#### 5", pattern) == 0.0


def test_the_documented_examples_are_read_so() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*)` \| (none|[-0-9/.]+)", page, re.MULTILINE)
    assert len(rows) >= 25
    for text, number in rows:
        assert extract_number(text) == (None if number == "none" else Fraction(number)), text
