"""Question/answer files: what is read, and one clear line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsm_train.data.format import PlainFormat
from dsm_train.data.jsonl import read_jsonl
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import train_tokenizer
from dsm_train.rewards import numeric_reward, parse_number


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_gsm8k_format(tmp_path: Path) -> None:
    worked = "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is $<<24*50=1200>>1,200.\n#### 1,200"
    path = write(tmp_path / "a.jsonl", {"question": "How much?", "answer": worked})
    solution = "She sold 48/2 = 24 clips in May.\nThat is $1,200.\n#### 1200"
    assert read_jsonl(path) == [Task(1, "How much?", "1200", solution, place=f"{path}:1")]
    assert numeric_reward(solution, "1200") == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("72", "72"), (" -1,234.5 ", "-1234.5"), ("1/2", "1/2"), ("$5", "$5")]
    # numbers of JSON, digit for digit
    + [(72, "72"), (-0.1, "-0.1"), (1e30, "1e+30"), (10**40, "1" + "0" * 40)],
)
def test_plain_answers_have_no_solution(tmp_path: Path, answer: object, gold: str) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": answer, "source": "extra fields are ignored"})
    assert read_jsonl(path) == [Task(1, "q", gold, place=f"{path}:1")]


@pytest.mark.parametrize("gold", ["1,200", "$1,234.50", "\u22125", "5 km/h", "1/3", ".5", "-3", "50%", "\\frac{1}{2}"])
def test_gold_answers_are_read_as_responses_are(tmp_path: Path, gold: str) -> None:
    (task,) = read_jsonl(write(tmp_path / "a.jsonl", {"question": "q", "answer": f"so #### {gold}"}))
    assert numeric_reward(f"#### {gold}", task.answer) == numeric_reward(task.solution or "", task.answer) == 1.0
    assert parse_number(task.answer) == parse_number(gold)


def test_a_mark_without_work_is_a_solution(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "#### 7"})
    assert read_jsonl(path)[0].solution == "#### 7"


def test_blank_lines_bom_crlf_and_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # U+2028 inside a string is no end of line
    lines = ['{"question": "a\u2028b", "answer": "1"}', "", "  ", '{"question": "é", "answer": "2"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [(task.id, task.question) for task in read_jsonl(path)] == [
        (1, "a\u2028b"),
        (4, "é"),
    ]


def test_template_keeps_its_own_braces() -> None:
    template = "User: {question}\nput your final answer within \\boxed{}.\n\nAssistant:"
    tokenizer = train_tokenizer(["What is {x}?"], 258)
    assert PlainFormat(tokenizer, template).text(Task(1, "What is {x}?")) == template.replace(
        "{question}", "What is {x}?"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "q", "answer": ', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),  # deeper than the parser goes
        (b'["q", "1"]', "must be a JSON object.*list"),
        (b'{"prompt": "q", "answer": "1"}', "no field 'question'.*prompt, answer"),
        (b'{"question": "q"}', "no field 'answer'"),
        (b"{}", "no field 'question'.*none"),
        (b'{"question": " ", "answer": "1"}', "question is empty"),
        (b'{"question": "q", "answer": ""}', "answer is empty"),
        (b'{"question": "q", "answer": true}', "answer must be a string or a number, got True"),
        (b'{"question": "q", "answer": NaN}', "answer must be a string or a number, got nan"),
        (b'{"question": "q", "answer": [7]}', "answer must be a string or a number, got \\["),
        (b'{"question": 72, "answer": "1"}', "question must be a string, got '72'"),
        # a decimal comma, or a slip in a thousand: either reading would be a guess
        (b'{"question": "q", "answer": "0,5"}', "answer must be a number.*'0,5': write a decimal point; a comma sep"),
        (b'{"question": "q", "answer": "#### 1,2"}', "'#### 1,2': write a decimal point"),
        (b'{"question": "q", "answer": "1.234,56"}', "'1.234,56': write a decimal point"),
        (b'{"question": "q", "answer": "12,34"}', "'12,34': write a decimal point"),
        (b'{"question": "q", "answer": "5k"}', "answer must be a number.*'5k'$"),
        (b'{"question": null, "answer": "1"}', "question must be a string, got None"),
        (b'{"question": "q", "answer": "seventy"}', "answer must be a number.*'seventy'"),
        (b'{"question": "q", "answer": "so 5\\n####"}', "answer must be a number"),
        (b'{"question": "q", "answer": "#### x"}', "answer must be a number"),
        (b'{"question": "\xe9", "answer": "1"}', "is not UTF-8"),
        (b'{"question": "\\ud800", "answer": "1"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "1"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"bad.jsonl:3: .*{message}") as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_tasks_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="empty.jsonl: holds no task"):
        read_jsonl(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_an_unreadable_path_is_a_value_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_jsonl(tmp_path / name)
