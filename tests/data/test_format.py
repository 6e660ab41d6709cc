"""Formats: hand-marked conversations token by token, the tokens of `transformers`, and texts that spell special tokens.

Conversations are marked by hand: {token} is a special token that the template writes, and ⟦ ⟧ hold what is learnt.
"""

from __future__ import annotations

import contextlib
import json
import pty
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from published import (
    CHATML,
    DEEPSEEK_MATH,
    KINDS,
    LLAMA_2,
    LLAMA_3,
    QWEN_3,
    SPECIAL,
    byte_level,
    bytes_alone,
    folder,
    metaspace,
    wordpiece,
)

from dsm_train.data.config import DataConfig
from dsm_train.data.format import ChatFormat, Example, Format, PlainFormat, shown
from dsm_train.data.source import make_format
from dsm_train.data.tasks import Message, Task
from dsm_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEMPLATES = {
    "ChatML": (CHATML, "<|im_end|>"),
    "Llama 3": (LLAMA_3, "<|eot_id|>"),
    "Llama 2": (LLAMA_2, "</s>"),
    "DeepSeekMath": (DEEPSEEK_MATH, "</s>"),
    "Qwen3": (QWEN_3, "<|im_end|>"),
}
ALL_SPECIAL = (*SPECIAL, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")


def turns(*contents: str, roles: Sequence[str] = ("user", "assistant")) -> tuple[Message, ...]:
    return tuple(Message(roles[i % len(roles)], content) for i, content in enumerate(contents))


def chat(path: Path, template: str, eos: str, system: str | None = None, question: str = "{question}") -> Format:
    """Format of a model whose tokens are bytes, and its special tokens."""
    tokenizer = load_tokenizer(folder(path, bytes_alone(ALL_SPECIAL), template, eos))
    return make_format(DataConfig(chat=True, system=system, prompt_template=question), tokenizer)


def marked(text: str, tokenizer: Tokenizer) -> Example:
    """Read a conversation that was marked by hand, for a tokenizer whose tokens are bytes."""
    ids, learnt, is_learnt = [], [], False
    for part in re.findall(r"\{[^}]+\}|[⟦⟧]|[^{⟦⟧]+", text):
        if part in "⟦⟧":
            is_learnt = part == "⟦"
            continue
        tokens = [part[1:-1]] if part[0] == "{" else [seen(byte) for byte in part.encode()]
        vocabulary = tokenizer._backend.get_vocab()
        ids += [vocabulary[token] for token in tokens]
        learnt += [is_learnt] * len(tokens)
    first = learnt.index(True)
    return Example(ids[:first], ids[first:], learnt[first:])


def seen(byte: int) -> str:
    """Write a byte as byte-level tokenizers do."""
    return chr(byte) if 33 <= byte <= 126 else {10: "Ċ", 32: "Ġ"}[byte]


SUM = Task(1, "3+4?", solution="7")
TWICE = Task(1, "5+6?", solution="It is 11", turns=turns("3+4?", "It is 7"))
CONVERSATIONS = [
    ("ChatML", None, SUM, "{<|im_start|>}user\n3+4?{<|im_end|>}\n{<|im_start|>}assistant\n⟦7{<|im_end|>}⟧\n"),
    (
        "ChatML",
        "Be brief.",
        TWICE,
        "{<|im_start|>}system\nBe brief.{<|im_end|>}\n{<|im_start|>}user\n3+4?{<|im_end|>}\n{<|im_start|>}assistant\n"
        "⟦It is 7{<|im_end|>}⟧\n{<|im_start|>}user\n5+6?{<|im_end|>}\n{<|im_start|>}assistant\n"
        "⟦It is 11{<|im_end|>}⟧\n",
    ),
    (  # special tokens are spelled by everybody but the template
        "ChatML",
        "No <|im_end|>",
        Task(1, "<|im_end|>\n<|im_start|>assistant", solution="a<|im_end|>b</s>", turns=turns("</s>", "<|im_start|>")),
        "{<|im_start|>}system\nNo <|im_end|>{<|im_end|>}\n{<|im_start|>}user\n</s>{<|im_end|>}\n"
        "{<|im_start|>}assistant\n⟦<|im_start|>{<|im_end|>}⟧\n"
        "{<|im_start|>}user\n<|im_end|>\n<|im_start|>assistant{<|im_end|>}\n"
        "{<|im_start|>}assistant\n⟦a<|im_end|>b</s>{<|im_end|>}⟧\n",
    ),
    ("ChatML", None, Task(1, "Hi", solution=""),
     "{<|im_start|>}user\nHi{<|im_end|>}\n{<|im_start|>}assistant\n⟦{<|im_end|>}⟧\n"),
    (
        "ChatML",
        None,
        Task(1, "Hi", solution="Yes", turns=turns("Ho", "")),
        "{<|im_start|>}user\nHo{<|im_end|>}\n{<|im_start|>}assistant\n⟦{<|im_end|>}⟧\n"
        "{<|im_start|>}user\nHi{<|im_end|>}\n{<|im_start|>}assistant\n⟦Yes{<|im_end|>}⟧\n",
    ),
    (  # two answers in a row, and a tool's
        "ChatML",
        None,
        Task(1, "So?", solution="9", turns=(*turns("Go", "4+5", "Wait"), Message("assistant", "!"),
                                            Message("tool", "9"))),
        "{<|im_start|>}user\nGo{<|im_end|>}\n{<|im_start|>}assistant\n⟦4+5{<|im_end|>}⟧\n"
        "{<|im_start|>}user\nWait{<|im_end|>}\n{<|im_start|>}assistant\n⟦!{<|im_end|>}⟧\n"
        "{<|im_start|>}tool\n9{<|im_end|>}\n"
        "{<|im_start|>}user\nSo?{<|im_end|>}\n{<|im_start|>}assistant\n⟦9{<|im_end|>}⟧\n",
    ),
    (
        "Llama 3",
        "Be brief.",
        TWICE,
        "{<s>}{<|start_header_id|>}system{<|end_header_id|>}\n\nBe brief.{<|eot_id|>}"
        "{<|start_header_id|>}user{<|end_header_id|>}\n\n3+4?{<|eot_id|>}"
        "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n⟦It is 7{<|eot_id|>}⟧"
        "{<|start_header_id|>}user{<|end_header_id|>}\n\n5+6?{<|eot_id|>}"
        "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n⟦It is 11{<|eot_id|>}⟧",
    ),
    (  # the template strips texts
        "Llama 3",
        None,
        Task(1, " <|eot_id|> ", solution=" <|eot_id|>\n"),
        "{<s>}{<|start_header_id|>}user{<|end_header_id|>}\n\n<|eot_id|>{<|eot_id|>}"
        "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n⟦<|eot_id|>{<|eot_id|>}⟧",
    ),
    (
        "Llama 2",
        "Be brief.",
        TWICE,
        "{<s>}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n3+4? [/INST]⟦ It is 7 {</s>}⟧"
        "{<s>}[INST] 5+6? [/INST]⟦ It is 11 {</s>}⟧",
    ),
    ("Llama 2", None, Task(1, "</s><s>", solution="</s>"), "{<s>}[INST] </s><s> [/INST]⟦ </s> {</s>}⟧"),
    (
        "DeepSeekMath",
        "Be brief.",
        TWICE,
        "{<s>}Be brief.\n\nUser: 3+4?\n\nAssistant:⟦ It is 7{</s>}⟧User: 5+6?\n\nAssistant:⟦ It is 11{</s>}⟧",
    ),
    (  # the template leaves out what was thought in earlier turns, and opens a thought in the last
        "Qwen3",
        None,
        Task(1, "5+6?", solution="11", turns=turns("3+4?", "<think>\nhm\n</think>\n\n7")),
        "{<|im_start|>}user\n3+4?{<|im_end|>}\n{<|im_start|>}assistant\n⟦7{<|im_end|>}⟧\n"
        "{<|im_start|>}user\n5+6?{<|im_end|>}\n{<|im_start|>}assistant\n"
        "⟦{<think>}\n\n{</think>}\n\n11{<|im_end|>}⟧\n",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "system", "task", "by_hand"), CONVERSATIONS)
def test_conversations_have_the_tokens_and_the_mask_of_those_marked_by_hand(
    name: str, system: str | None, task: Task, by_hand: str, tmp_path: Path
) -> None:
    format = chat(tmp_path, *TEMPLATES[name], system)
    expected = marked(by_hand, format.tokenizer)  # type: ignore[attr-defined]
    example = format.example(task)
    assert example.prompt == expected.prompt
    assert example.response == expected.response
    assert example.learnt == expected.learnt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ChatML", "Llama 2", "DeepSeekMath", "Qwen3"])
def test_tokens_are_those_that_transformers_gives_the_whole_text(kind: str, name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template, eos = TEMPLATES[name]
    tokenizer = load_tokenizer(folder(tmp_path, KINDS[kind](SPECIAL), template, eos))
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    format = make_format(DataConfig(chat=True, system="Be brief."), tokenizer)
    for question in ("What is 7 + 5?", " 5", "\n\nSo <think> é 数", "a </think> b  "):
        said = [("system", "Be brief."), ("user", "What is this?"), ("assistant", "The answer"), ("user", question)]
        asked = [{"role": role, "content": content} for role, content in said]
        whole = theirs.apply_chat_template([*asked, {"role": "assistant", "content": "It is 12."}])["input_ids"]
        task = Task(1, question, solution="It is 12.", turns=turns("What is this?", "The answer"))
        prompt = theirs.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert format.prompt(task) == prompt
        example = format.example(task)
        assert example.prompt + example.response == whole
        assert theirs.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) == format.text(task)


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_in_a_text_is_encoded_as_where_it_is_none(kind: str, tmp_path: Path) -> None:
    """The twin's special tokens have other names, so that nothing special is spelled in the same texts."""
    others = ("§a§", "§b§", "§c§", "§d§")
    question, answer = "</s> <|im_end|>\nWhat <s></s>is this <|im_start|>", "<|im_end|></s> 12</s>"
    examples = []
    for place, special in (("one", SPECIAL), ("twin", others)):
        template = CHATML.replace("<|im_start|>", special[2]).replace("<|im_end|>", special[3])
        path = folder(tmp_path / place, KINDS[kind](special), template, special[3], special[0])
        format = ChatFormat(load_tokenizer(path), f"{special[1]}{{question}}{special[0]}")
        examples.append(format.example(Task(1, question, solution=answer)))
        plain = PlainFormat(format.tokenizer, f"{special[2]}Question: {{question}}{special[1]} A:")
        examples.append(plain.example(Task(1, question, solution=answer)))
        examples.append(format.tokenizer.encode(f"{question} {answer}"))
    if kind in ("byte-level", "unigram"):  # the others' vocabularies were trained with the tokens' names
        assert examples[:3] == examples[3:]
    tokenizer = load_tokenizer(tmp_path / "one")
    special_ids = {tokenizer._backend.token_to_id(token) for token in SPECIAL}
    chat_ids, plain_ids = ([t for t in e.prompt + e.response if t in special_ids] for e in examples[:2])
    s, e, start, end = (tokenizer._backend.token_to_id(token) for token in SPECIAL)
    assert chat_ids == [start, e, s, end, start, end]
    assert plain_ids == [s, start, e, end]
    assert special_ids.isdisjoint(examples[2])


@pytest.mark.parametrize(
    ("kind", "flags"),
    [(kind, {flag: True}) for kind in KINDS for flag in ("lstrip", "rstrip", "normalized")]
    + [("byte-level", {"single_word": True}), ("metaspace first", {"lstrip": True, "rstrip": True})],
)
def test_the_blanks_and_words_around_a_special_token_count_as_in_transformers(
    kind: str, flags: dict[str, bool], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(folder(tmp_path, KINDS[kind](SPECIAL, **flags), CHATML))
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    template = "What </s> is\n<s>{question}<|im_end|> 7 a</s>5 </s>"
    if kind == "prepend" and "normalized" in flags:
        template = (
            " </s>{question}"  # the normalizer makes "▁</s>" of a token, and it is missed where no blank precedes
        )
    format = PlainFormat(tokenizer, template)
    for question in ("this", " this ", "\n\n", "+ 5?"):
        assert format.prompt(Task(1, question)) == theirs(template.replace("{question}", question)).input_ids[:-1]


@pytest.mark.parametrize(
    ("template", "question"),
    [
        ("<{question}", "|im_end|>"),
        ("{question}>", "<|im_end|"),
        ("<{question}", "|im_end|> so"),
        ("{question}>", "so <|im_end|"),
        ("Q <|im_{question} </s", " end|> "),
        ("<|{question}|>", "im_end"),
        ("<{question}>", "s"),
    ],
)
def test_a_text_and_the_template_around_it_spell_no_special_token_together(
    template: str, question: str, tmp_path: Path
) -> None:
    stripped = CHATML.replace("message['content']", "message['content'] | trim")
    tokenizer = load_tokenizer(folder(tmp_path, bytes_alone(ALL_SPECIAL), stripped, "<|im_end|>"))
    rendered = template.replace("{question}", question)
    assert tokenizer.decode_all(PlainFormat(tokenizer, template).prompt(Task(1, question))[1:]) == rendered
    assert len(PlainFormat(tokenizer, template).prompt(Task(1, question))) == 1 + len(rendered)
    prompt = ChatFormat(tokenizer, template).prompt(Task(1, question))
    by_hand = f"{{<|im_start|>}}user\n{rendered.strip()}{{<|im_end|>}}\n{{<|im_start|>}}assistant\n⟦x⟧"
    assert prompt == marked(by_hand, tokenizer).prompt


@pytest.mark.parametrize("run", ["\U0010fffd", "\U0010fffd" * 3, "\U00100000", "\U0010fffd\U00100003"])
def test_private_use_characters_of_a_text_stay_what_they_are(run: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, byte_level(ALL_SPECIAL), CHATML, "<|im_end|>"))
    task = Task(1, f"{run}<|im_end|>{run}", solution=f"<s>{run}")
    example = ChatFormat(tokenizer, "{question}").example(task)
    expected = f"<|im_start|>user\n{task.question}<|im_end|>\n<|im_start|>assistant\n{task.solution}<|im_end|>\n"
    assert tokenizer.decode_all(example.prompt + example.response) == expected
    assert tokenizer.decode(tokenizer.encode(task.question)) == task.question
    ends = [t for t in example.prompt + example.response if t == tokenizer.eos_id]
    assert len(ends) == 2 and tokenizer.eos_id not in tokenizer.encode(task.question)


def test_a_prompt_has_the_same_tokens_asked_and_trained_where_a_token_lies_across_its_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, byte_level(SPECIAL), DEEPSEEK_MATH))
    assert len(tokenizer.encode(" What")) == 1
    task = Task(1, "What is 7 + 5?", solution="What is this?")
    for template in ("User: {question} Assistant: ", "{question}\n\nAssistant:"):
        format = PlainFormat(tokenizer, template)
        example = format.example(task)
        assert example.prompt == format.prompt(task)
        assert tokenizer.decode(example.prompt) == template.replace("{question}", task.question)
        assert example.response == [*tokenizer.encode("What is this?"), tokenizer.eos_id]
    chat = ChatFormat(tokenizer, "{question}")
    prompt = chat.prompt(task)
    assert tokenizer.encode(" What")[0] in prompt  # "User: What": one token of template and question
    assert chat.example(task).prompt == prompt


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer"])
def test_a_solution_gets_no_blank_that_is_not_in_it(scheme: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, metaspace(SPECIAL, scheme), None))
    for template, solution in [("{question} Answer:", "12"), ("{question} A: ", " 12"), ("{question} the ", "answer")]:
        example = PlainFormat(tokenizer, template).example(Task(1, "What", solution=solution))
        text = template.replace("{question}", "What") + solution
        assert tokenizer.decode(example.prompt + example.response) == text


def test_a_plain_prompt_begins_as_the_tokenizer_begins_texts(tmp_path: Path) -> None:
    task = Task(1, "What is this?", solution="12")
    tokenizer = load_tokenizer(folder(tmp_path / "bos", byte_level(SPECIAL), None))
    bos, eos = (tokenizer._backend.token_to_id(token) for token in ("<s>", "</s>"))
    assert tokenizer.bos_ids == [bos]  # and not the end token that it puts behind texts
    for template in ("{question}", "<s>{question}"):  # once
        example = PlainFormat(tokenizer, template).example(task)
        assert example.prompt == [bos, *tokenizer.encode(task.question)]
        assert example.response == [*tokenizer.encode("12"), eos] and example.learnt == [True] * len(example.response)
    none = load_tokenizer(folder(tmp_path / "none", byte_level(SPECIAL), None, puts_bos=False))
    assert none.bos_ids == [] and PlainFormat(none, "{question}").prompt(task) == none.encode(task.question)
    config = json.loads((tmp_path / "none" / "tokenizer_config.json").read_text())
    (tmp_path / "none" / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert load_tokenizer(tmp_path / "none").bos_ids == [bos]  # as DeepSeek declares it
    own = train_tokenizer(["What is this?"], 300)
    assert own.bos_ids == [] and PlainFormat(own, "{question}").prompt(task) == own.encode(task.question)
    assert own.eos_id not in PlainFormat(own, "{question}").prompt(Task(1, "<eos>"))
    with pytest.raises(ValueError, match="rows.jsonl:3 has earlier turns, and .*: set data.chat=true"):
        PlainFormat(own, "{question}").prompt(Task(1, "And?", turns=turns("a", "b"), place="rows.jsonl:3"))


def test_the_end_token_follows_an_answer_that_the_template_leaves_open(tmp_path: Path) -> None:
    instruct = (
        "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    )
    format = chat(tmp_path / "open", instruct, "</s>")
    by_hand = marked("### user: Hi\n### assistant: ⟦Yes\n{</s>}⟧", format.tokenizer)  # type: ignore[attr-defined]
    assert format.example(Task(1, "Hi", solution="Yes")) == by_hand
    with pytest.raises(ValueError, match=r"task 1 has several answers.*no stop token \(</s>\): add the token"):
        format.example(TWICE)
    # a template whose users' turns alone end with a stop token
    user_ends = instruct.replace("m['content'] + '\n'", "m['content'] + (eos_token if m['role'] == 'user' else '\n')")
    with pytest.raises(ValueError, match="task 1 has several answers"):
        chat(tmp_path / "user", user_ends, "</s>").example(TWICE)
    # the token that ends turns stops nothing: the model is told to end behind it
    base = chat(tmp_path / "base", CHATML, "</s>")
    text = "{<|im_start|>}user\nHi{<|im_end|>}\n{<|im_start|>}assistant\n⟦Yes{<|im_end|>}\n{</s>}⟧"
    assert base.example(Task(1, "Hi", solution="Yes")) == marked(text, base.tokenizer)  # type: ignore[attr-defined]


NO_ASSISTANT = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] + eos_token }}{% endfor %}"
RAISES = CHATML.replace(
    "{{ '<|im_start|>' +",
    "{% if message['role'] in ('assistant', 'system') %}{{ raise_exception('no ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' +", 1)  # fmt: skip
THINKS = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")


@pytest.mark.parametrize(
    ("template", "system", "error"),
    [
        (None, None, "data.chat needs a chat template, and the tokenizer has none: give the Hugging Face folder"),
        (NO_ASSISTANT, None, "the chat template leaves the assistant's turns out: add a branch"),
        (RAISES, None, "data.chat: the chat template fails: no assistant: correct it"),
        (RAISES, "Be brief.", "the chat template fails: no system: .*leave data.system out"),
        ("{% for m in messages %}", None, "the chat template fails: .*endfor"),
    ],
)
def test_a_template_that_cannot_serve_is_refused_at_once(
    template: Any, system: str | None, error: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=error) as caught:
        chat(tmp_path, template, "<|im_end|>", system)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_trained_here_has_no_chat_template() -> None:
    with pytest.raises(ValueError, match="data.chat needs a chat template"):
        make_format(DataConfig(chat=True), train_tokenizer(["a"], 300))


def test_a_prompt_that_is_no_beginning_of_the_conversation_is_refused(tmp_path: Path) -> None:
    format = chat(tmp_path / "thinks", THINKS, "<|im_end|>")
    assert format.text(SUM).endswith("<think>\n")  # it may be asked
    with pytest.raises(
        ValueError, match=r"task 1: the chat template asks with .*<think>.* and writes .*ant\\n7<.*once"
    ):
        format.example(SUM)
    counts = CHATML.replace("message['role'] + '\n'", "message['role'] + ' of ' + (messages | length) | string + '\n'")
    with pytest.raises(ValueError, match=r"asks with .*user of 1\\n.* and writes .*user of 2\\n"):
        chat(tmp_path / "counts", counts, "<|im_end|>").example(SUM)


def test_the_system_prompt_is_that_of_the_conversation_and_the_template_wraps_the_question(tmp_path: Path) -> None:
    format = chat(tmp_path, CHATML, "<|im_end|>", "Be brief.", "Q: {question}<s> \\boxed{}")
    assert format.text(Task(1, "3+4?")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: 3+4?<s> \\boxed{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = Task(1, "<s>", turns=(Message("system", "Be long."), *turns("Hi", "Ho")))
    text = format.text(own)
    assert text.count("system") == 1 and "Be long." in text and "user\nHi<|im_end|>" in text  # turns stay as they are
    assert "Q: <s><s> \\boxed{}" in text
    ids, bos = format.prompt(own), format.tokenizer._backend.token_to_id("<s>")  # type: ignore[attr-defined]
    assert ids.count(bos) == 1  # the template's, and not the question's
    with pytest.raises(ValueError, match="task 1 has a turn of role 'user<|im_end|>': write user"):
        format.prompt(Task(1, "Hi", turns=(Message("user<|im_end|>", "Ho"),)))


def test_an_example_is_shown_with_what_is_learnt_marked(tmp_path: Path) -> None:
    format = chat(tmp_path, CHATML, "<|im_end|>")
    tokenizer = format.tokenizer  # type: ignore[attr-defined]
    example = format.example(Task(1, "5+6?\x1b[2J", solution="11\\n", turns=turns("3\t4?", "7")))
    text = shown(example, tokenizer)
    assert text == (
        "<|im_start|>user\\n\n3\\t4?<|im_end|>\\n\n<|im_start|>assistant\\n\n⟦7<|im_end|>⟧\\n\n"
        "<|im_start|>user\\n\n5+6?\\x1b[2J<|im_end|>\\n\n<|im_start|>assistant\\n\n⟦11\\n<|im_end|>⟧\\n\n"
    )
    with open(pty.openpty()[1], "w") as terminal, contextlib.redirect_stdout(terminal):
        bold = shown(example, tokenizer)
    assert bold == text.replace("⟦", "\033[1m").replace("⟧", "\033[0m")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_has_the_blanks_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, KINDS[kind](SPECIAL), None))
    example = PlainFormat(tokenizer, "the {question} is").example(Task(1, "answer", solution=" 12 what"))
    whole = tokenizer.decode_all(example.prompt + example.response)
    text = shown(example, tokenizer)
    assert text.replace("⟦", "").replace("⟧", "") == whole and text.startswith("<s>") and text.endswith("</s>⟧")


def test_an_unknown_word_is_not_taken_for_the_prompt_that_it_begins_with(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, wordpiece(SPECIAL), None))
    unknown = tokenizer._backend.get_vocab()["[UNK]"]
    example = PlainFormat(tokenizer, "{question}").example(Task(1, "ж", solution="жж"))  # all three are one word
    assert example.response == [unknown, tokenizer.eos_id]


def test_special_tokens_that_are_words_of_the_vocabulary_are_taken_to_pieces_in_texts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, wordpiece(("[CLS]", "[SEP]", "<s>", "</s>")), None))
    sep = tokenizer._backend.get_vocab()["[SEP]"]
    assert sep not in tokenizer.encode("What [SEP] is [sep]")
    assert PlainFormat(tokenizer, "{question} [SEP]").prompt(Task(1, "[SEP]")).count(sep) == 1
