r"""Questions read from files: JSON Lines, a JSON list, or Parquet, with the same rules for all.

{"question": "...", "answer": "48/2 = <<48/2=24>>24 clips in May.\\n#### 24"} as GSM8K has it, or just
{"question": "...", "answer": "24"}, or {"question": "...", "answer": 24}, or a conversation
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsm_train.data.config import DataConfig
from dsm_train.data.tasks import Message, Task

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_ABSENT = object()
ROWS_PER_FILE = 2**32
"""Distance of the ids of two files: the first file's ids are its line numbers."""


class _Number(str):
    """A JSON number, as it is written in the file."""


def read_tasks(path: Path, config: DataConfig, file: int = 0) -> list[Task]:
    """Read every task of a file, the `file`-th of its list; blank lines are skipped.

    Parquet is known by the ending .parquet; a .json file may hold one list of objects; all else is JSON Lines.
    `Task.id` is the line (the row, for Parquet and lists), from 1, plus `file` times 2**32. Fields are found by the
    names in `config`; a name with dots leads into objects. Fields without a use of their own are kept in `Task.fields`.

    An answer with "####" in it is worked solution and gold answer, unless a field holds the solution: the gold is what
    follows the last "####", and calculator annotations are left out of the solution. Any other answer is the gold
    itself. A row that has its solution elsewhere may lack the answer.

    Raises ValueError, one line with path:line and what to do, for a file that cannot be read or holds no task, for
    malformed JSON, and for a field that is missing, empty or of another type.
    """
    tasks = []
    for number, row in _rows(path):
        place = f"{path}:{number}"
        try:
            record = _parse(row) if isinstance(row, bytes) else row
            tasks.append(_task(record, config, file * ROWS_PER_FILE + number, place, file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from error
    if not tasks:
        raise ValueError(f"{path}: holds no task: write one JSON object with question and answer per line")
    return tasks


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number the rows of a file, each an object, or the bytes of a line that still has to be parsed."""
    try:
        if path.suffix.lower() == ".parquet":
            with path.open("rb") as stream:
                batches = pq.ParquetFile(stream, page_checksum_verification=True).iter_batches(1024)
                yield from enumerate((row for b in batches for row in b.to_pylist(maps_as_pydicts="strict")), start=1)
            return
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from error
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: is damaged or no Parquet file ({reason}): write it anew") from error
    except (KeyError, ValueError) as error:  # a map with a key twice; a time that Python's are too coarse for
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: a value cannot be read ({reason}): cast or drop its column") from error
    if path.suffix.lower() == ".json" and data.lstrip().startswith(b"["):
        try:
            yield from enumerate(_parse(data), start=1)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return
    yield from ((number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip())


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), parse_int=_Number, parse_float=_Number)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start} of the line): save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}): write one object per line") from error


def _task(record: Any, config: DataConfig, id: int, place: str, file: int) -> Task:
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object with question and answer, got a {type(record).__name__}")
    messages = config.messages_field or "messages"
    is_conversation = config.messages_field is not None or (
        config.question_field is None and "question" not in record and messages in record
    )
    asked = messages if is_conversation else config.question_field or "question"
    found = _find(
        record,
        asked,
        "data.messages_field" if is_conversation else "data.question_field, or a conversation with data.messages_field",
    )
    turns, solution = (), None
    if is_conversation:
        question, turns, solution = _conversation(found, asked)
    else:
        question = _text(found, asked)
    if config.solution_field is not None:
        written = _find(record, config.solution_field, "data.solution_field")
        solution = solution if written is None else _solution(written, config.solution_field)
    answer = _answer(record, config.answer_field, optional=solution is not None)
    if config.solution_field is None and "####" in answer:
        worked, _, answer = answer.rpartition("####")
        answer = answer.strip()
        if not answer:
            raise ValueError(f"{config.answer_field} is empty after its last '####': write the gold answer there")
        if solution is None:
            solution = f"{_CALCULATOR.sub('', worked).rstrip()}\n#### {answer}".lstrip("\n")
    name = _name(record, config.id_field)
    used = {asked, config.answer_field, config.solution_field, config.id_field}
    fields = {key: _plain(value) for key, value in record.items() if key not in used}
    return Task(id, question, answer, solution, turns, name, place, file, fields)


def _find(record: Mapping[str, Any], name: str, setting: str, default: object = _ABSENT) -> Any:
    """Look a field up by its name, or along the dots of its name; absent and without default: ValueError."""
    value: Any = record
    for part in (name,) if name in record else name.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    if value is _ABSENT and default is _ABSENT:
        there = ", ".join(_names(record)) or "none"
        raise ValueError(f"has no field {name!r} (fields: {there}): name the right one with {setting}")
    return default if value is _ABSENT else value


def _names(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """List the fields of a row, those of an object in it with dots."""
    for key, value in record.items():
        yield from _names(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else (f"{prefix}{key}",)


def _conversation(value: Any, name: str) -> tuple[str, tuple[Message, ...], str | None]:
    """Split a conversation into its last question, what was said before, and the answer to it where there is one."""
    if not isinstance(value, list) or not value:
        hint = f": a text is read with data.question_field={name}" if type(value) is str else ""
        raise ValueError(f"{name} must be a list of messages {{role, content}}, got {value!r:.60}{hint}")
    messages = [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]
    asked = max((index for index, message in enumerate(messages) if message.role == "user"), default=None)
    if asked is None:
        raise ValueError(f"{name} has no message of role user: the last of them is the question")
    after = messages[asked + 1 :]
    if [message.role for message in after] not in ([], ["assistant"]):
        roles = ", ".join(message.role for message in after)
        raise ValueError(f"{name} must end in a user's message or one assistant's answer to it, got {roles} after it")
    if not messages[asked].content.strip():
        raise ValueError(f"{name}[{asked}].content is empty: fill it or remove the line")
    return messages[asked].content, tuple(messages[:asked]), after[0].content if after else None


def _solution(value: Any, name: str) -> str:
    """Read a worked solution: a text, or a list of one assistant's message."""
    if not _is_conversation(value):
        return _text(value, name)
    messages = [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if [message.role for message in messages] != ["assistant"]:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(f"{name} must be a text or one assistant's message, got messages of {roles}")
    return messages[0].content


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        got = f"fields {', '.join(map(str, item)) or 'none'}" if isinstance(item, Mapping) else repr(item)[:60]
        raise ValueError(f"{name} must be a message with role and content, got {got}")
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            raise ValueError(f"{name} calls a tool ({key}), which is not read: remove the line")
    texts = {}
    for key in ("role", "content"):
        if type(item[key]) is not str:
            raise ValueError(f"{name}.{key} must be a text, got {item[key]!r:.60}")
        texts[key] = _encodable(item[key], f"{name}.{key}")
    return Message(**texts)


def _answer(record: Mapping[str, Any], name: str | None, *, optional: bool) -> str:
    """Read the gold answer; optional: a row may lack it, or have it empty."""
    if name is None:
        return ""
    remedy = "data.answer_field, or set data.answer_field=null for questions without an answer"
    value = _find(record, name, remedy, None if optional else _ABSENT)
    return "" if optional and value in (None, "") else _text(value, name, or_number=True)


def _name(record: Mapping[str, Any], name: str | None) -> str:
    """Read the row's own id; the usual field may be absent, one that was asked for may not."""
    value = None if name is None else _find(record, name, "data.id_field", None if name == "id" else _ABSENT)
    return "" if value in (None, "") else _text(value, name or "", or_number=True)


def _text(value: Any, name: str, *, or_number: bool = False) -> str:
    """Check that a field is a text that says something, or a number, which becomes text digit for digit."""
    is_number = isinstance(value, (_Number, int, float, Decimal)) and not isinstance(value, bool)
    if is_number and or_number and (isinstance(value, str) or math.isfinite(value)):
        return str(value)
    if type(value) is not str:
        kinds = "a string or a number" if or_number else "a string"
        hint = f"read a conversation with data.messages_field={name}" if _is_conversation(value) else "put it in quotes"
        raise ValueError(f"{name} must be {kinds}, got {value!r:.60}: {hint}")
    if not value.strip():
        raise ValueError(f"{name} is empty: fill it or remove the line")
    return _encodable(value, name).strip()


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}: remove it") from error
    return text


def _plain(value: Any) -> Any:
    """Turn a value into what JSON has: NaN and infinities become None, bytes base64, dates and times text."""
    if isinstance(value, _Number):
        value = json.loads(value)
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
