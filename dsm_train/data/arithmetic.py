"""Arithmetic and word problems, generated, with a train / held-out split that cannot leak.

A task is a form (a bare sum or one wording) and two operands. The split is a fixed hash of the unordered pair of
operands, and of nothing else: 47+38, 38+47, 47-38 and every story about 47 and 38 are on the same side, for every seed,
count and number of digits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsm_train.data.tasks import Task

KINDS = ("add", "sub", "mul", "word")
SPLITS = ("train", "heldout")
STYLES = ("answer", "steps")
HELDOUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class _Form:
    kind: str
    operator: str
    text: str


# A task's id holds its form's index here: append, never reorder.
_FORMS = (
    _Form("add", "+", "{a}+{b}="),
    _Form("sub", "-", "{a}-{b}="),
    _Form("mul", "*", "{a}*{b}="),
    _Form("word", "+", "Tom has {a} apples and gets {b} more. How many apples does he have?\nAnswer: "),
    _Form("word", "+", "One book has {a} pages and another has {b}. How many pages do they have?\nAnswer: "),
    _Form("word", "+", "A box holds {a} red balls and {b} blue balls. How many balls does it hold?\nAnswer: "),
    _Form("word", "+", "Mia walks {a} steps, rests, and walks {b} steps. How many steps is that?\nAnswer: "),
    _Form("word", "+", "A shop sold {a} cups on Monday and {b} on Tuesday. How many cups did it sell?\nAnswer: "),
    _Form("word", "-", "Anna has {a} coins and spends {b}. How many coins are left?\nAnswer: "),
    _Form("word", "-", "A train carries {a} people and {b} get off. How many people stay on?\nAnswer: "),
    _Form("word", "-", "Ben has read {b} of the {a} pages of a book. How many pages remain?\nAnswer: "),
    _Form("word", "-", "A farm has {a} hens and sells {b}. How many hens does it keep?\nAnswer: "),
    _Form("word", "-", "Leo is {a} years old and his cousin is {b}. How many years older is Leo?\nAnswer: "),
)


def arithmetic_tasks(
    kinds: Sequence[str],
    split: str,
    *,
    count: int | None = None,
    seed: int = 0,
    style: str = "answer",
    digits: int = 2,
) -> list[Task]:
    """Generate tasks of the given kinds from one side of the split, in an order that `seed` draws.

    Operands have exactly `digits` digits (a product's second factor is 2 to 9); differences are never negative. `count`
    is shared evenly among the kinds, and what a small kind lacks the others give; None means all. `style` sets
    `Task.solution`: the bare answer, or column steps that end in "#### answer". The same arguments give the same list
    on every machine. `Task.id` is the same for a task in every such list of one `digits`.

    Raises ValueError for an unknown kind, split or style, digits other than 2 or 3, and a count beyond what there is.
    """
    _check(kinds, split, style, digits)
    pools = sorted((_Pool(kind, split, 10**digits) for kind in kinds), key=len)
    total = sum(map(len, pools))
    remaining = total if count is None else count
    if not 1 <= remaining <= total:
        raise ValueError(
            f"data.{split}_tasks must be 1 to {total}, the number of {split} tasks of {', '.join(kinds)} with {digits} "
            f"digits, got {count}: lower it or add kinds"
        )
    rng = random.Random(seed)
    tasks: list[Task] = []
    for taken, pool in enumerate(pools):  # smallest first, so that later kinds make up for it
        share = min(len(pool), remaining // (len(pools) - taken))
        tasks += [pool.task(index, style) for index in rng.sample(range(len(pool)), share)]
        remaining -= share
    rng.shuffle(tasks)
    return tasks


def count_tasks(kinds: Sequence[str], split: str, *, digits: int = 2) -> int:
    """Count the tasks that `arithmetic_tasks` can give."""
    _check(kinds, split, STYLES[0], digits)
    return sum(len(_Pool(kind, split, 10**digits)) for kind in kinds)


def _check(kinds: Sequence[str], split: str, style: str, digits: int) -> None:
    if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be a list of different names out of {', '.join(KINDS)}, got {kinds!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if digits not in (2, 3):  # one digit has only 19 sums; four have 10**8 pairs
        raise ValueError(f"digits must be 2 or 3, got {digits!r}")


class _Pool:
    """Every task of a kind on one side of the split, by index; the forms of one operator share their operands."""

    def __init__(self, kind: str, split: str, base: int) -> None:
        self._base = base
        pairs_by_operator = {
            operator: [pair for pair in _operands(kind, operator, base) if _is_heldout(*pair) == (split == "heldout")]
            for operator in sorted({form.operator for form in _FORMS if form.kind == kind})
        }
        self._forms = [
            (number, form, pairs_by_operator[form.operator]) for number, form in enumerate(_FORMS) if form.kind == kind
        ]

    def __len__(self) -> int:
        return sum(len(pairs) for _, _, pairs in self._forms)

    def task(self, index: int, style: str) -> Task:
        for number, form, pairs in self._forms:
            if index < len(pairs):
                a, b = pairs[index]
                return _task((number * self._base + a) * self._base + b, form, a, b, style)
            index -= len(pairs)
        raise IndexError(index)


def _operands(kind: str, operator: str, base: int) -> Iterator[tuple[int, int]]:
    low = base // 10
    for a in range(low, base):
        for b in {"+": range(low, base), "-": range(low, a + 1), "*": range(2, 10)}[operator]:
            yield a, b


def _is_heldout(a: int, b: int) -> bool:
    if a > b:
        a, b = b, a
    # splitmix64's mixer: the same everywhere, as hash() is not, and light enough for a million pairs
    mixed = (a << 32 | b) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return (mixed ^ mixed >> 31) % HELDOUT_ONE_IN == 0


def _task(id: int, form: _Form, a: int, b: int, style: str) -> Task:
    answer = str({"+": a + b, "-": a - b, "*": a * b}[form.operator])
    solution = answer
    if style == "steps":
        restated = f"{a}{form.operator}{b}" if form.kind == "word" else ""
        solution = "\n".join([restated, *_steps(form.operator, a, b), f"#### {answer}"])
    return Task(id=id, question=form.text.format(a=a, b=b), answer=answer, solution=solution)


def _steps(operator: str, a: int, b: int) -> list[str]:
    """Write out the work as on paper: places from the right with carry or borrow, or partial products and their sum."""
    if operator == "*":
        parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(a))) if digit != "0"]
        lines = [f"{part}*{b}={part * b}" for part in parts]
        return lines if len(parts) < 2 else [*lines, "+".join(str(part * b) for part in parts) + f"={a * b}"]
    lines, carry = [], 0
    for place in range(len(str(max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        carried = f"{operator}1" if carry else ""
        if operator == "+":
            value = x + y + carry
            carry = value // 10
        else:
            borrow = x < y + carry
            x += 10 * borrow
            value = x - y - carry
            carry = int(borrow)
        lines.append(f"{x}{operator}{y}{carried}={value}")
    return lines
