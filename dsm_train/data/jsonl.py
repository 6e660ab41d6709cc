"""Question/answer files: one JSON object per line, as GSM8K has it.

{"question": "...", "answer": "48/2 = <<48/2=24>>24 clips in May.\\n#### 24"}, or just
{"question": "...", "answer": "24"}, or {"question": "...", "answer": 24}.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dsm_train.data.tasks import Task
from dsm_train.rewards.numeric import parse_number

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_DECIMAL_COMMA = re.compile(r"[0-9],[0-9]")


class _Number(str):
    """A JSON number, as it is written in the file."""


def read_jsonl(path: str | Path) -> list[Task]:
    r"""Read every task of a file; blank lines are skipped, and `Task.id` is the line number.

    The gold answer is what follows the last "####", and the solution is the answer's text without calculator
    annotations. An answer without "####" is the gold itself, and there is no solution. Gold answers are read as those
    of responses are, by `parse_number`; their thousands commas are then left out, which changes no number.

    Raises ValueError, one line with path:line and what to do, for a file that cannot be read or holds no task, for
    malformed JSON, and for a field that is missing, empty, of another type or without a numeric answer.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    tasks = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                tasks.append(_task(number, line, f"{path}:{number}"))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    if not tasks:
        raise ValueError(f"{path}: holds no task: write one JSON object with question and answer per line")
    return tasks


def _task(number: int, line: bytes, place: str) -> Task:
    try:
        record = json.loads(line.decode("utf-8"), parse_int=_Number, parse_float=_Number)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start} of the line): save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}): write one object per line") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object with question and answer, got a {type(record).__name__}")
    question, text = _field(record, "question"), _field(record, "answer", or_number=True)
    worked, mark, gold = text.rpartition("####")
    gold = gold.strip()
    if parse_number(gold) is None:
        hint = ": write a decimal point; a comma separates thousands" if _DECIMAL_COMMA.search(gold) else ""
        raise ValueError(f"answer must be a number or end in '#### number', got {text[-60:]!r}{hint}")
    gold = gold.replace(",", "")
    solution = None
    if mark:
        worked = _CALCULATOR.sub("", worked).rstrip()
        solution = f"{worked}\n#### {gold}".lstrip("\n")
    return Task(number, question, gold, solution, place=place)


def _field(record: dict[str, object], name: str, *, or_number: bool = False) -> str:
    if name not in record:
        raise ValueError(f"has no field {name!r} (fields: {', '.join(record) or 'none'}): add or rename it")
    value = record[name]
    if not isinstance(value, str) or (isinstance(value, _Number) and not or_number):
        kinds = "a string or a number" if or_number else "a string"
        raise ValueError(f"{name} must be {kinds}, got {value!r:.60}: put it in quotes")
    if not value.strip():
        raise ValueError(f"{name} is empty: fill it or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}: remove it") from error
    return value.strip()
