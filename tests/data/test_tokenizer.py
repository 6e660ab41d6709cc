"""Tokenizers: exact round trips, the same ids after saving, and special tokens that text cannot forge."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from published import CHATML, KINDS, SPECIAL, byte_level, folder
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from dsm_train.data.arithmetic import arithmetic_tasks
from dsm_train.data.format import PlainFormat
from dsm_train.data.tasks import Message, Task
from dsm_train.data.tokenizer import EOS, PAD, Tokenizer, _bounded, load_tokenizer, train_tokenizer

TEXTS = [f"{task.question}{task.solution}" for task in arithmetic_tasks(["word"], "train", count=300, style="steps")]
HARD_TEXTS = [
    "",
    " ",
    "  two  spaces \n\n\t tab\r\n",
    "don't can 't , . !",
    "é ü 数学 ٣ ½ 🎲👩‍👩‍👧 \u2028 \x00 \ufeff",
    "e\u0301 is not é: no normalisation",
    f"spelled out: {EOS}{PAD}<eos >",
    "####  85 \\boxed{1,234}",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def test_round_trip_is_exact_and_never_gives_special_tokens(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    random_texts = ["".join(rng.choices(characters, k=rng.randrange(40))) for _ in range(300)]
    for text in [*HARD_TEXTS, *TEXTS, *random_texts]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def test_special_tokens_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id != tokenizer.pad_id
    assert tokenizer.decode([*tokenizer.encode("85"), tokenizer.eos_id, tokenizer.pad_id]) == "85"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"  # cut inside a character


def test_every_digit_is_a_token_and_words_are_merged(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1234567890")) == 10
    assert [tokenizer.decode([id]) for id in tokenizer.encode("47+38=85")] == list("47+38=85")
    assert len(tokenizer.encode(" apples")) < len(" apples")


def test_training_is_deterministic_and_bounded(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(iter(TEXTS), 400)
    assert again.vocab_size == tokenizer.vocab_size == 400
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)
    assert train_tokenizer(["ab"], 258).vocab_size == 258
    assert train_tokenizer(["ab ab"], 1000).vocab_size < 270  # few texts, few merges
    with pytest.raises(ValueError, match="at least 258.*got 257"):
        train_tokenizer(TEXTS, 257)


# runs of letters, blanks and other characters: what the pre-tokenizer leaves in one piece
@pytest.mark.parametrize("run", ["a", "數", " ", "\n", "-", "_", "\u0301"])
def test_no_piece_that_is_trained_on_exceeds_its_bound(run: str) -> None:
    text = f"so {run * 1000} it is, {run * 256} and {run * 255}"
    parts = list(_bounded(text))
    assert "".join(parts) == text
    assert max(part.count(run) for part in parts) < 2 * 256
    assert list(_bounded("short " * 1000)) == ["short " * 1000]  # ordinary text stays whole, whatever its length


def test_a_long_run_of_one_character_trains_as_its_pieces_do(tokenizer: Tokenizer) -> None:
    trained = train_tokenizer(["a" * 1_000_000], 300)
    assert trained.decode(trained.encode("aaaa")) == "aaaa" and len(trained.encode("a" * 256)) == 1


def test_a_fingerprint_tells_tokenizers_apart_and_survives_saving(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()
    other = train_tokenizer(reversed([*TEXTS[:100], "zebras " * 100]), 400)
    assert other.vocab_size == tokenizer.vocab_size and other.fingerprint() != tokenizer.fingerprint()
    renamed = load_tokenizer(tmp_path / "tokenizer.json", eos_token=PAD)  # the same tokens, another end of text
    assert renamed.fingerprint() != tokenizer.fingerprint()


def test_saved_folder_and_file_give_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (
            tokenizer.eos_id,
            tokenizer.pad_id,
            tokenizer.vocab_size,
        )
        for text in [*HARD_TEXTS, *TEXTS]:
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.decode(loaded.encode(text)) == text


def test_transformers_reads_our_folder_and_we_read_its(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    theirs.chat_template = "{{ messages }}"
    theirs.save_pretrained(tmp_path / "theirs")

    loaded = load_tokenizer(tmp_path / "theirs")
    assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.vocab_size,
    )
    for text in TEXTS:
        assert loaded.encode(text) == theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode(EOS) == tokenizer.encode(EOS) != [tokenizer.eos_id]
    assert loaded.fingerprint() == tokenizer.fingerprint()
    loaded.save(tmp_path / "again")  # nothing that came with it is lost
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", local_files_only=True)
    assert again.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("files", "stop"),
    [
        ({}, ["</s>"]),
        ({"generation_config.json": ["<|im_end|>", "</s>"]}, ["</s>", "<|im_end|>"]),
        ({"generation_config.json": "<|im_end|>", "config.json": "<s>"}, ["</s>", "<|im_end|>"]),
        ({"generation_config.json": None, "config.json": "<|im_end|>"}, ["</s>", "<|im_end|>"]),
        ({"config.json": ["<|im_end|>", "<|im_end|>"]}, ["</s>", "<|im_end|>"]),
    ],
)
def test_a_response_ends_at_every_token_that_the_folder_names(
    files: dict[str, Any], stop: list[str], tmp_path: Path
) -> None:
    backend = byte_level(SPECIAL)
    folder(tmp_path, backend, None)
    for name, tokens in files.items():
        ids = [backend.token_to_id(token) for token in tokens] if isinstance(tokens, list) else None
        value = backend.token_to_id(tokens) if isinstance(tokens, str) else ids
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path, eos_token="</s>")
        assert [loaded.token(id_) for id_ in loaded.stop_ids] == stop
        assert loaded.token(loaded.eos_id) == "</s>"
        assert loaded.decode([*loaded.encode("12"), *loaded.stop_ids]) == "12"


@pytest.mark.parametrize(
    ("value", "shown"), [(406, "406"), ([2, 99_999], "99999"), (-1, "-1"), ("</s>", "'</s>'"), ([True], "True")]
)
def test_a_stop_token_that_the_tokenizer_does_not_have_is_refused(value: Any, shown: str, tmp_path: Path) -> None:
    folder(tmp_path, byte_level(SPECIAL), None)
    assert load_tokenizer(tmp_path).vocab_size <= 406
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        ValueError, match=f"generation_config.json: eos_token_id = {shown} is no token of the tokenizer"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="generation_config.json must hold a JSON object"):
        load_tokenizer(tmp_path)


def test_a_stop_token_that_is_an_ordinary_one_stays_so_in_texts(tmp_path: Path) -> None:
    backend = byte_level(SPECIAL)
    folder(tmp_path, backend, None)
    line = backend.token_to_id("Ċ")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [line]}))
    loaded = load_tokenizer(tmp_path)
    assert line in loaded.stop_ids and loaded.encode("\n") == [line] and loaded.decode([line]) == "\n"


def test_a_folder_is_saved_as_it_came(tmp_path: Path) -> None:
    folder(tmp_path / "came", byte_level(SPECIAL), CHATML)
    files = {
        "special_tokens_map.json": b'{"pad_token":   "</s>"}\n',
        "chat_template.jinja": CHATML.encode() + b"{# as it is #}",
        "additional_chat_templates/tool_use.jinja": b"{{ bos_token }}",
    }
    for name, content in files.items():
        (tmp_path / "came" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "came" / name).write_bytes(content)
    (tmp_path / "came" / "generation_config.json").write_text("{}")
    (tmp_path / "came" / "README.md").write_text("not the tokenizer's")
    came = {p.relative_to(tmp_path / "came"): p.read_bytes() for p in (tmp_path / "came").rglob("*") if p.is_file()}
    loaded = load_tokenizer(tmp_path / "came")
    shutil.rmtree(tmp_path / "came")  # a run may last longer than the folder
    loaded.save(tmp_path / "saved")
    saved = {p.relative_to(tmp_path / "saved"): p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert saved == {p: content for p, content in came.items() if p.name not in ("generation_config.json", "README.md")}
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint() == loaded.fingerprint() and again.stop_ids == loaded.stop_ids
    assert again.render([Message("user", "Hi")], ask=True) == loaded.render([Message("user", "Hi")], ask=True)


def test_a_file_is_saved_as_it_came_and_with_its_end_token(tmp_path: Path) -> None:
    folder(tmp_path, byte_level(SPECIAL), None)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # another way to write it
    loaded = load_tokenizer(path, eos_token="<|im_end|>")
    loaded.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == path.read_bytes()
    assert load_tokenizer(tmp_path / "saved").fingerprint() == loaded.fingerprint()
    renamed = load_tokenizer(tmp_path, eos_token="<|im_end|>")  # a folder's end token that was overruled
    renamed.save(tmp_path / "renamed")
    assert load_tokenizer(tmp_path / "renamed").eos_id == renamed.eos_id == loaded.eos_id


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_gives_a_special_token_and_all_others_stay(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    loaded = load_tokenizer(folder(tmp_path, KINDS[kind](SPECIAL), None))
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    special = {theirs.convert_tokens_to_ids(token) for token in SPECIAL}
    for text in [*(text for text in HARD_TEXTS if "<" not in text), "What is 7 + 5?", "<think> so </think>"]:
        assert loaded.encode(text) == theirs.encode(text, add_special_tokens=False)
    for text in ("</s>", "What </s></s>is <s>", "<|im_start|>user <|im_end|>", "</s"):
        assert special.isdisjoint(loaded.encode(text))


def test_our_own_folder_is_read_without_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    program = (
        "import sys; from dsm_train.data.tokenizer import load_tokenizer; "
        f"load_tokenizer({str(tmp_path)!r}).encode('7'); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_chat_template_that_is_put_beside_our_own_tokenizer_renders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert not load_tokenizer(tmp_path).has_chat_template
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    loaded = load_tokenizer(tmp_path)
    assert loaded.render([Message("user", "7?")], ask=True) == "user: 7?\n"
    assert loaded.fingerprint() == tokenizer.fingerprint() and loaded.pad_id == tokenizer.pad_id
    loaded.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").has_chat_template


def test_a_folder_whose_pad_token_is_null_pads_with_the_end_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    assert load_tokenizer(tmp_path).pad_id == tokenizer.eos_id


def test_pad_falls_back_to_eos_and_gaps_in_the_ids_count(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 9}, "unk_token": "</s>"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    loaded = load_tokenizer(path, eos_token="</s>")
    assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (0, 0, 10)
    with pytest.raises(ValueError, match="no end token '<eos>'"):
        load_tokenizer(path)


def test_a_folder_without_an_end_token_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match="has no eos token: set eos_token"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, eos_token=EOS).eos_id == tokenizer.eos_id


def test_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at.*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("normalizer", "token", "spellings"),
    [
        (normalizers.NFKC(), "<｜end▁of▁sentence｜>", ["<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>"]),
        (
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            "</s>",
            ["</s>", "a </s> b"],
        ),
        (normalizers.Lowercase(), "[END]", ["[END]", "[end]"]),
    ],
    ids=["NFKC", "Metaspace", "lower case"],
)
def test_a_special_token_that_is_looked_for_in_normalized_text_is_not_spelled_by_texts(
    normalizer: normalizers.Normalizer, token: str, spellings: list[str]
) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        [], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, normalized=True)])
    eos_id = backend.token_to_id(token)
    assert eos_id in backend.encode(token, add_special_tokens=False).ids  # else there is nothing to prevent
    tokenizer = Tokenizer(backend, eos_id, eos_id)
    assert tokenizer.token(eos_id) == token
    for text in spellings:
        assert eos_id not in tokenizer.encode(text)
        format = PlainFormat(tokenizer, "{question} " + token)  # a normalizer may make the blank a part of the token
        assert format.prompt(Task(1, text)).count(eos_id) == 1
