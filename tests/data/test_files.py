"""Files of questions: what is read from each format, and one clear line for what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsm_train.data.config import DataConfig
from dsm_train.data.files import read_tasks
from dsm_train.data.format import PlainFormat
from dsm_train.data.tasks import Message, Task
from dsm_train.data.tokenizer import train_tokenizer
from dsm_train.rewards import format_reward, numeric_reward, parse_number


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def read(path: Path, **names: Any) -> list[Task]:
    return read_tasks(path, DataConfig(**names))


def test_gsm8k_format(tmp_path: Path) -> None:
    worked = "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is $<<24*50=1200>>1,200.\n#### 1,200"
    path = write(tmp_path / "a.jsonl", {"question": "How much?", "answer": worked})
    solution = "She sold 48/2 = 24 clips in May.\nThat is $1,200.\n#### 1,200"
    assert read(path) == [Task(1, "How much?", "1,200", solution, place=f"{path}:1")]
    assert numeric_reward(solution, "1,200") == numeric_reward("#### 1200", "1,200") == format_reward(solution) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("72", "72"), (" -1,234.5 ", "-1,234.5"), ("seventy", "seventy"), (r"\frac{\pi}{2}", r"\frac{\pi}{2}")]
    # numbers of JSON, digit for digit
    + [(72, "72"), (-0.1, "-0.1"), (1e30, "1e+30"), (10**40, "1" + "0" * 40)],
    ids=str,
)
def test_plain_answers_have_no_solution(tmp_path: Path, answer: object, gold: str) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": answer})
    assert read(path) == [Task(1, "q", gold, place=f"{path}:1")]


@pytest.mark.parametrize("gold", ["1,200", "$1,234.50", "\u22125", "5 km/h", "1/3", ".5", "-3", "50%", "\\frac{1}{2}"])
def test_gold_answers_are_read_as_responses_are(tmp_path: Path, gold: str) -> None:
    (task,) = read(write(tmp_path / "a.jsonl", {"question": "q", "answer": f"so #### {gold}"}))
    assert numeric_reward(f"#### {gold}", task.answer) == numeric_reward(task.solution or "", task.answer) == 1.0
    assert parse_number(task.answer) == parse_number(gold)


def test_a_mark_without_work_is_a_solution(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "#### 7"})
    assert read(path)[0].solution == "#### 7"


def test_blank_lines_bom_crlf_and_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # U+2028 inside a string is no end of line
    lines = ['{"question": "a\u2028b", "answer": "1"}', "", "  ", '{"question": "é", "answer": "2"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [(task.id, task.question) for task in read(path)] == [
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
        (b'{"question": null, "answer": "1"}', "question must be a string, got None"),
        (b'{"question": "q", "answer": "so 5\\n####"}', "answer is empty after its last '####'"),
        (b'{"question": "\xe9", "answer": "1"}', "is not UTF-8"),
        (b'{"question": "\\ud800", "answer": "1"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "1"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"bad.jsonl:3: .*{message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


USER, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def test_names_lead_to_fields_and_the_rest_of_a_row_is_kept(tmp_path: Path) -> None:
    row = {
        "problem": "What is $1+1$?",
        "reward_model": {"style": "rule", "ground_truth": 2.50},
        "extra_info": {"index": 7},
        "worked": "One and one.",
        "tests": ["f(1) == 2", {"n": 1, "x": 1e30, "nothing": None, "yes": True}],
        "bound": float("nan"),
    }
    names = {"question_field": "problem", "answer_field": "reward_model.ground_truth", "solution_field": "worked"}
    path = write(tmp_path / "a.jsonl", row)
    (task,) = read(path, **names, id_field="extra_info.index")
    fields = {key: row[key] for key in ("reward_model", "extra_info", "tests")} | {"bound": None}
    assert task == Task(1, "What is $1+1$?", "2.5", "One and one.", (), "7", f"{path}:1", 0, fields)
    assert {type(value) for value in task.fields["tests"][1].values()} == {int, float, type(None), bool}
    assert task.label == f"{path}:1 (7)"


def test_a_name_with_dots_in_it_is_taken_before_the_way_into_an_object(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"a": {"b": "wrong"}, "a.b": "right", "answer": "1"})
    assert read(path, question_field="a.b")[0].question == "right"


@pytest.mark.parametrize(
    ("messages", "turns", "question", "solution"),
    [
        ([USER], [], "2+2?", None),
        ([USER, ANSWERED], [], "2+2?", "4"),
        ([USER, {"role": "assistant", "content": ""}], [], "2+2?", ""),
        (
            [{"role": "system", "content": " Be brief. "}, USER, ANSWERED, {"role": "user", "content": " 3+3? "}],
            [Message("system", " Be brief. "), Message("user", "2+2?"), Message("assistant", "4")],
            " 3+3? ",
            None,
        ),
    ],
    ids=["a question", "its answer", "an empty answer", "turns, blanks kept"],
)
@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_conversations(
    tmp_path: Path, field: str, messages: list[dict[str, str]], turns: list[Message], question: str, solution: str
) -> None:
    path = write(tmp_path / "a.jsonl", {field: messages, "answer": "so #### 9", "question_id": 3})
    names = {} if field == "messages" else {"messages_field": field}
    (task,) = read(path, **names)
    assert (task.question, list(task.turns), task.answer) == (question, turns, "9")
    assert task.solution == ("so\n#### 9" if solution is None else solution)
    assert task.fields == {"question_id": 3}


def test_a_question_comes_before_a_conversation_unless_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "plain", "messages": [USER], "answer": "1"})
    assert read(path)[0].question == "plain"
    assert read(path, messages_field="messages")[0].question == "2+2?"


def test_a_row_with_a_solution_of_its_own_may_lack_the_answer(tmp_path: Path) -> None:
    (chat,) = read(write(tmp_path / "a.jsonl", {"messages": [USER, ANSWERED]}))
    (pair,) = read(
        write(tmp_path / "b.jsonl", {"prompt": "q", "completion": "c", "answer": None}),
        question_field="prompt",
        solution_field="completion",
    )
    (trl,) = read(
        write(tmp_path / "d.jsonl", {"prompt": [USER], "completion": [ANSWERED]}),
        messages_field="prompt",
        solution_field="completion",
    )
    assert (trl.question, trl.answer, trl.solution) == ("2+2?", "", "4")
    (asked,) = read(write(tmp_path / "c.jsonl", {"question": "q", "answer": "x"}), answer_field=None)
    assert (chat.answer, chat.solution, pair.answer, pair.solution) == ("", "4", "", "c")
    assert (asked.answer, asked.solution, asked.fields) == ("", None, {"answer": "x"})


def test_an_answer_beside_a_solution_field_is_taken_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "#### Heading", "solution": "s"})
    (task,) = read(path, solution_field="solution")
    assert (task.answer, task.solution) == ("#### Heading", "s")


@pytest.mark.parametrize("given", ["n-7", 7, None, ""])
def test_ids_of_rows_are_kept_as_names(tmp_path: Path, given: object) -> None:
    (task,) = read(write(tmp_path / "a.jsonl", {"id": given, "question": "q", "answer": "1"}))
    assert (task.name, task.id, task.fields) == ("" if given is None else str(given), 1, {})


def test_all_formats_give_the_same_tasks(tmp_path: Path) -> None:
    """Rows as verl's data sets have them, in every format that is read."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n}\u2028+{n}?"}],
            "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
            "extra_info": {"index": n, "scores": [0.5, None], "right": n > 1},
        }
        for n in range(3000)  # more than a batch of Parquet
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    write(tmp_path / "lines.json", *rows)
    names = {"messages_field": "prompt", "answer_field": "reward_model.ground_truth", "id_field": "extra_info.index"}
    first, *others = (
        [replace(task, place=task.place.rpartition(":")[2]) for task in read(tmp_path / name, **names)]
        for name in ("a.parquet", "a.jsonl", "a.json", "lines.json")
    )
    assert all(other == first for other in others) and len(first) == 3000
    assert (first[7].id, first[7].place, first[7].name, first[7].answer) == (8, "8", "7", "14")


def test_values_of_parquet_become_those_of_json(tmp_path: Path) -> None:
    columns = {
        "question": ["q"],
        "answer": pa.array([Decimal("1.50")]),
        "id": pa.array([3], pa.int32()),
        "when": [datetime(2024, 5, 6, 7)],
        "image": [b"\xff\x00"],
        "score": pa.array([float("inf")], pa.float32()),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "kind": pa.array(["x"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (task,) = read(tmp_path / "a.parquet")
    assert (task.answer, task.name) == ("1.50", "3")
    expected = {"when": "2024-05-06 07:00:00", "image": "/wA=", "score": None, "map": {"k": 1}, "kind": "x"}
    assert json.loads(json.dumps(task.fields, allow_nan=False)) == expected


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        (
            {"problem": "q", "a": {"b": "1"}},
            {},
            r"'question' \(fields: problem, a.b\): .* data.question_field, or",
        ),
        ({"question": "q"}, {}, "'answer' .*: name .* data.answer_field, or set data.answer_field=null"),
        ({"question": "q", "a": {"b": "1"}}, {"answer_field": "a.c"}, r"'a.c' \(fields: question, a.b\)"),
        ({"question": "q", "answer": "1"}, {"solution_field": "s"}, "'s' .* data.solution_field"),
        ({"question": "q", "answer": "1"}, {"id_field": "n"}, "'n' .* data.id_field"),
        ({"question": "q", "answer": "1", "id": [1]}, {}, "id must be a string or a number"),
        (
            {"question": [USER], "answer": "1"},
            {},
            "question must be a string.*read .* data.messages_field=question",
        ),
        ({"prompt": "q", "answer": "1"}, {"messages_field": "prompt"}, "list of messages.*data.question_field=prompt"),
        (
            {"question": "q", "s": [USER, ANSWERED]},
            {"solution_field": "s"},
            "s must be .*, got messages of user, assistant",
        ),
        ({"messages": []}, {}, r"messages must be a list of messages .* got \[\]"),
        ({"messages": [ANSWERED]}, {}, "messages has no message of role user"),
        ({"messages": [USER, ANSWERED, ANSWERED]}, {}, "must end in .*, got assistant, assistant after it"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, {}, "must end in .*, got tool after it"),
        ({"messages": [{"from": "human", "value": "q"}]}, {}, r"messages\[0\] must be .* got fields from, value"),
        ({"messages": ["q"]}, {}, r"messages\[0\] must be a message with role and content, got 'q'"),
        ({"messages": [{"role": "user", "content": 5}]}, {}, r"messages\[0\].content must be a text, got '5'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {}, r"messages\[0\].content must be a text"),
        ({"messages": [{"role": "user", "content": " "}]}, {}, r"messages\[0\].content is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, {}, r"messages\[0\].content holds half of a surrogate"),
        ({"messages": [USER, {**ANSWERED, "tool_calls": [1]}, USER]}, {}, r"messages\[1\] calls a tool"),
        ({"messages": [USER]}, {}, "has no field 'answer'"),
    ],
)
def test_a_row_that_does_not_fit_names_the_field_and_the_setting(
    tmp_path: Path, row: dict[str, Any], names: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"bad.jsonl:1: .*{message}") as caught:
        read(write(tmp_path / "bad.jsonl", row), **names)
    assert "\n" not in str(caught.value)


def test_a_bad_row_of_a_parquet_file_or_a_list_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["q", None], "answer": [1.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet:2: question must be a string, got None"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text('[{"question": "q", "answer": 1}, 5]')
    with pytest.raises(ValueError, match="a.json:2: must be a JSON object"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64())), "'k'"),
        (pa.array([1], pa.timestamp("ns")), "Nanosecond"),
    ],
)
def test_a_value_of_parquet_that_json_cannot_have_is_one_line(value: pa.Array, reason: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["q"], "answer": ["1"], "odd": value}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet: a value cannot be read .*{reason}.*: cast or drop its column"):
        read(tmp_path / "a.parquet")


def test_a_file_that_is_no_parquet_or_is_cut_off_is_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["q"] * 5000, "answer": [str(n) for n in range(5000)]}), whole)
    for data in (b"", b"no", b'{"question": "q"}\n', whole.read_bytes()[:-100]):
        (tmp_path / "bad.parquet").write_bytes(data)
        with pytest.raises(ValueError, match="bad.parquet: is damaged or no Parquet file") as caught:
            read(tmp_path / "bad.parquet")
        assert "\n" not in str(caught.value)
    (tmp_path / "bad.json").write_text("[1, ")
    with pytest.raises(ValueError, match="bad.json: is not JSON"):
        read(tmp_path / "bad.json")


def test_ids_do_not_meet_between_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "1"}, {"question": "r", "answer": "1"})
    assert [(task.id, task.file) for task in read_tasks(path, DataConfig(), file=3)] == [
        (3 * 2**32 + 1, 3),
        (3 * 2**32 + 2, 3),
    ]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_tasks_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="empty.jsonl: holds no task"):
        read(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "."])
def test_an_unreadable_path_is_a_value_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / name)
