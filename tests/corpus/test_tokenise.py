"""The dataset: Megatron's own classes read it, and their samples decode to the pages."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from drawn import drawn_documents

from dsm_train.corpus.config import CorpusConfig, CorpusRun, EngineConfig, TokenizerConfig
from dsm_train.corpus.engine.engine import StepError
from dsm_train.corpus.engine.page import Page, shards, write_pages
from dsm_train.corpus.tokenise import run, to_dataset
from dsm_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    sentences = [
        "Let $x^{2}+1=0$ over $\\mathbb{C}$.",
        "证明 $n>0$ 成立。",
        "café <eos>\n\n\tend",
        "Then 12 + 30 = 42.",
    ]
    return [f"{i} of {seed}: " + " ".join(rng.choices(sentences, k=rng.randint(1, 9))) for i in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards, the second without a page and the third with one that has no text, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, count in enumerate((30, 0, 12, 25)):
        pages = [
            Page(f"{index}{i:03x}", f"http://a.org/{i}", text, "en", "") for i, text in enumerate(texts(count, index))
        ]
        pages += [Page("ff", "http://b.org", "", "en", "")] * (index == 2)
        write_pages(folder / "pages" / f"{index:05d}.jsonl.gz", pages)
    train_tokenizer(texts(50, 9), 400).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def dataset(corpus: Path) -> Path:
    config = CorpusConfig(
        run=CorpusRun(out=corpus),
        engine=EngineConfig(workers=1),
        tokenizer=TokenizerConfig(path=corpus / "tokenizer"),
    )
    (corpus / "pages").rename(corpus / "decontaminate")
    report = run(config)
    assert report.counts["pages"] == 67 and report.counts["empty"] == 1
    return corpus / "dataset"


def expected() -> list[str]:
    return [text for index, count in enumerate((30, 0, 12, 25)) for text in texts(count, index)]


def tokenizer_of(dataset: Path) -> Tokenizer:
    return load_tokenizer(dataset.parent / "tokenizer")


def test_documents_are_the_pages_in_order_each_with_its_end(dataset: Path) -> None:
    from dsm_train.megatron.indexed import documents

    tokenizer = tokenizer_of(dataset)
    found = list(documents(dataset / "corpus"))
    assert all(ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in found)
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in found] == expected()
    assert found[0].dtype == np.uint16


def test_megatron_draws_samples_that_decode_to_the_pages(dataset: Path) -> None:
    tokenizer = tokenizer_of(dataset)
    read = [tokenizer.decode(ids) for ids in drawn_documents(dataset, tokenizer, 32)]
    assert len(read) >= 65  # what is left of the last piece is not drawn
    assert set(read[:-1]) <= set(expected()) and len(set(read[:-1])) == len(read) - 1
    assert any(text.startswith(read[-1]) for text in expected())


def test_the_manifest_accounts_for_everything(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    tokenizer = tokenizer_of(dataset)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in expected())
    assert (manifest["pages"], manifest["tokens"], manifest["dtype"]) == (67, tokens, "uint16")
    assert (manifest["eos_id"], manifest["vocab_size"]) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert [source["pages"] for source in manifest["sources"]] == [30, 0, 12, 25]
    assert sum(source["tokens"] for source in manifest["sources"]) == tokens
    for record in [*manifest["files"], *(source["file"] for source in manifest["sources"])]:
        content = Path(record["path"]).read_bytes()
        assert (record["bytes"], record["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (dataset / "corpus.bin").stat().st_size == 2 * tokens
    assert manifest["configuration"]["tokenizer"]["path"] == str(dataset.parent / "tokenizer")
    assert sorted(path.name for path in dataset.iterdir() if "corpus" in path.name) == ["corpus.bin", "corpus.idx"]
    assert not (dataset / "shards").exists()


def test_a_finished_dataset_is_not_made_again_and_another_tokenizer_is_refused(dataset: Path, tmp_path: Path) -> None:
    inputs, before = shards(dataset.parent / "decontaminate"), (dataset / "corpus.idx").stat().st_mtime_ns
    same = TokenizerConfig(path=dataset.parent / "tokenizer")
    assert to_dataset(inputs, same, dataset, EngineConfig(workers=1), {}).counts["pages"] == 67
    assert (dataset / "corpus.idx").stat().st_mtime_ns == before
    train_tokenizer(texts(50, 9), 300).save(tmp_path)
    with pytest.raises(StepError, match=r"another configuration \(encode.record"):
        to_dataset(inputs, TokenizerConfig(path=tmp_path), dataset, EngineConfig(), {})


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(400, "uint16"), (65_499, "uint16"), (65_500, "int32"), (152_000, "int32")]
)
def test_ids_are_stored_in_the_type_that_the_vocabulary_needs(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    from dsm_train.megatron.indexed import documents, token_dtype, writing

    assert token_dtype(vocabulary) == dtype
    with writing(tmp_path / "data", vocabulary) as writer:
        writer.add(np.array([1, vocabulary - 1]), np.array([2]))
    (ids,) = documents(tmp_path / "data")
    assert ids.tolist() == [1, vocabulary - 1] and ids.dtype == dtype


def test_a_dataset_that_fails_halfway_is_not_there(tmp_path: Path) -> None:
    from dsm_train.megatron.indexed import writing

    with pytest.raises(RuntimeError, match="the source broke"), writing(tmp_path / "data", 400) as writer:
        writer.add(np.array([1, 2, 3]), np.array([2, 1]))
        raise RuntimeError("the source broke")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="3 ids for documents of 2"), writing(tmp_path / "data", 400) as writer:
        writer.add(np.array([1, 2, 3]), np.array([2]))


def test_a_tokenizer_is_needed_and_looked_for_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.path must be given"):
        to_dataset([], TokenizerConfig(), tmp_path, EngineConfig(), {})
    with pytest.raises(ValueError, match=r"'/nowhere' cannot be read"):
        to_dataset([], TokenizerConfig(path=Path("/nowhere")), tmp_path, EngineConfig(), {})
