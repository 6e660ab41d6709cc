"""The classifier: it ranks, is deterministic, loses nothing by folding, and a model that cannot rank is refused."""

from __future__ import annotations

import math
import random
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from dsm_train.corpus.config import ClassifierConfig, TokenizerConfig
from dsm_train.corpus.mining import classifier
from dsm_train.corpus.mining.classifier import Features, Scorer, train
from dsm_train.data.tokenizer import Tokenizer, train_tokenizer

SMALL = ClassifierConfig(features="words", dim=16, lr=0.5, epochs=5, bucket=5000)
MATH = "theorem proof lemma integral matrix let denote suppose equation vector group ring".split()
OTHER = "football recipe weather holiday price shop music film city garden kitchen travel".split()
COMMON = "the of a is and in we to for with on that".split()


def texts(topic: Sequence[str], count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["\n".join(" ".join(rng.choices([*topic, *COMMON, *COMMON], k=12)) for _ in range(4)) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.bin"
    quality = train(texts(MATH, 300, 1), texts(OTHER, 300, 2), SMALL, path, seed=0)
    assert quality == classifier.Quality(1.0, 270, 270, 60)
    return path


def test_it_ranks_pages_it_has_not_seen(model: Path) -> None:
    scorer = Scorer.load(model, SMALL, TokenizerConfig())
    assert min(scorer.score(texts(MATH, 50, 3))) > 0 > max(scorer.score(texts(OTHER, 50, 4)))


def test_only_the_model_is_left_on_disk(model: Path) -> None:
    assert [path.name for path in model.parent.iterdir()] == ["model.bin"]
    assert model.stat().st_size < 5000 * 4 + 2000


def test_one_thread_gives_the_same_model_twice(model: Path, tmp_path: Path) -> None:
    again = tmp_path / "model.bin"
    used = [np.full(1 << 14, np.nan, np.float32) for _ in range(200)]  # fastText reads memory it has not written
    del used
    train(texts(MATH, 300, 1), texts(OTHER, 300, 2), SMALL, again, seed=0)
    assert again.read_bytes() == model.read_bytes()
    train(texts(MATH, 300, 1), texts(OTHER, 300, 2), SMALL, again, seed=1)
    assert again.read_bytes() != model.read_bytes()


def test_folding_keeps_the_log_odds_of_fasttext(tmp_path: Path) -> None:
    import fasttext

    features = Features(SMALL, TokenizerConfig())
    lines = [("__label__math", t) for t in texts(MATH, 100, 1)] + [("__label__other", t) for t in texts(OTHER, 90, 2)]
    random.Random(0).shuffle(lines)
    file = tmp_path / "train"
    file.write_text("".join(f"{label} {features.line(text)}\n" for label, text in lines))
    with classifier._zeroed_memory():
        full: Any = fasttext.train_supervised(
            str(file), dim=16, lr=0.5, wordNgrams=3, minCount=3, epoch=5, bucket=5000, seed=7, thread=1, verbose=0
        )
    folded = classifier._fit(file, SMALL, seed=7)
    for text in texts(MATH, 5, 3) + texts(OTHER, 5, 4) + ["theorem unheard of"]:
        labels, chances = full.predict(features.line(text), k=2)
        chance = dict(zip(labels, chances, strict=True))
        odds = math.log((chance["__label__math"] - 1e-5) / (chance["__label__other"] - 1e-5))  # it adds 1e-5 to each
        assert folded.get_sentence_vector(features.line(text))[0] == pytest.approx(odds, rel=1e-3, abs=1e-4)
        assert folded.predict(features.line(text))[0] == (labels[0],)


def test_text_cannot_pose_as_a_label_or_end_the_line() -> None:
    line = Features(SMALL, TokenizerConfig()).line("A__label__math x\n</s> f(x)=a_1\u2028__label__other 证明定理")
    assert line == "a _ _ label _ _ math x < / s > f ( x ) = a _ 1 _ _ label _ _ other 证 明 定 理"


def test_bpe_features_are_the_ids_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["证明 勾股定理 theorem 12"] * 5, 300)
    tokenizer.save(tmp_path)
    config = TokenizerConfig(path=tmp_path)
    text = "证明 theorem 12 " * 9000  # longer than one block
    features = Features(ClassifierConfig(), config)
    line = features.line(text)
    ids = [int(word) for word in line.split()]
    assert tokenizer.decode(ids) == text
    assert features.tokens(text, line) == len(ids)
    words = Features(SMALL, config)
    assert words.tokens(text, words.line(text)) == len(ids)  # the budget is in the model's tokens in any case
    assert Features(SMALL, TokenizerConfig()).tokens("a b", "a b") == 2


@pytest.mark.parametrize(
    "text",
    [
        "a b  c   d\n\ne \n f\r\ng\t h\n",
        " leading, and trailing ",
        "证明 定理。\n设 x=12, 则 x²=144",
        "word" * 40 + " " + "x" * 60000 + " 1234567890" * 30,
        "",
        " \n ",
        "it's we'll <eos> </s>\nI.e. 3.14!",
    ],
)
def test_pieces_have_the_tokens_of_the_whole_text(text: str) -> None:
    tokenizer = train_tokenizer(["it's the word, the word xx we'll 证明 定理。 a  b\n\nc   d"] * 5, 320)
    tokens = classifier._Tokens(tokenizer)
    assert tokens._in_pieces
    for _ in range(2):  # encoded, then remembered
        assert tokens.line(text) == " ".join(map(str, tokenizer.encode(text)))


def test_a_tokenizer_whose_tokens_depend_on_the_beginning_gets_the_whole_text() -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(byte_fallback=True, vocab={f"<0x{i:02X}>": i for i in range(256)}, merges=[])
    )
    backend.normalizer = tokenizers.normalizers.Prepend("_")  # as Llama 2 begins a text with a space
    tokenizer = Tokenizer(backend, eos_id=0, pad_id=0)
    tokens = classifier._Tokens(tokenizer)
    assert not tokens._in_pieces
    assert (
        tokens.line("a b c") == " ".join(map(str, tokenizer.encode("a b c"))) and tokens.line("a b c").count(" ") == 5
    )


def test_bpe_features_learn_chinese(tmp_path: Path) -> None:
    def chinese(topic: str, seed: int) -> list[str]:
        rng = random.Random(seed)
        return ["".join(rng.choices(topic + "的是在了有和人这中大", k=60)) for _ in range(200)]

    train_tokenizer(chinese("证明定理函数方程", 0) + chinese("天气足球电影旅游", 1), 400).save(tmp_path)
    config, tokenizer = replace(SMALL, features="bpe"), TokenizerConfig(path=tmp_path)
    good, bad = chinese("证明定理函数方程", 2), chinese("天气足球电影旅游", 3)
    assert train(good, bad, config, tmp_path / "model.bin", 0, tokenizer).auc == 1.0


def test_a_page_without_features_is_last(model: Path) -> None:
    assert Scorer.load(model, SMALL, TokenizerConfig()).score(["", " \n"]) == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SMALL, lr=1000.0), "training diverged .*lower classifier.lr"),
        (replace(SMALL, lr=1e-46), "same score: raise classifier.lr"),
    ],
)
def test_a_model_that_cannot_rank_is_refused_and_not_written(
    config: ClassifierConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(texts(MATH, 100, 1), texts(OTHER, 100, 2), config, tmp_path / "model.bin", seed=0)
    assert not list(tmp_path.iterdir())


def test_positives_like_negatives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not tell held-out positives from negatives .*cleaner seeds"):
        train(texts(OTHER, 1000, 1), texts(OTHER, 1000, 2), SMALL, tmp_path / "model.bin", seed=0)


def test_scores_that_are_no_ranking_are_refused() -> None:
    good, bad = np.array([1.0, 2.0]), np.array([0.0, 1.0])
    assert classifier._check(good, bad, 4, SMALL) == 3.5 / 4  # the tie counts half
    with pytest.raises(ValueError, match="same score"):
        classifier._check(np.zeros(3), np.zeros(2), 5, SMALL)
    with pytest.raises(ValueError, match="no numbers"):
        classifier._check(np.array([math.nan, 1.0]), bad, 4, SMALL)


def test_too_few_pages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="19 positives are too few .*rounds.seeds"):
        train(texts(MATH, 19, 1), texts(OTHER, 50, 2), SMALL, tmp_path / "model.bin", seed=0)


def test_bpe_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer.path must be given"):
        Features(ClassifierConfig(), TokenizerConfig())


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_model_cut_short_is_refused(kept: float, model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    (tmp_path / "model.bin").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="model.bin is no model of this program, or cut short: delete it"):
        Scorer.load(tmp_path / "model.bin", SMALL, TokenizerConfig())


def test_a_disk_too_full_for_the_model_is_noticed(tmp_path: Path) -> None:
    good, bad = texts(MATH, 30, 1), texts(OTHER, 30, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL.bucket * 4 - 1, limits[1]))  # the texts are shorter
    try:
        with pytest.raises(OSError, match="No space left"):
            train(good, bad, SMALL, tmp_path / "model.bin", seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
