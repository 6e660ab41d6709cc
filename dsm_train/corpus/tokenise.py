"""Conversion of pages to Megatron's indexed dataset, with a manifest of its contents and sources."""

from __future__ import annotations

import array
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsm_train.config import require
from dsm_train.corpus.config import CorpusConfig, EngineConfig, TokenizerConfig
from dsm_train.corpus.engine.engine import StepReport, Task, claim, finished_shards, read_report, run_step, write_json
from dsm_train.corpus.engine.page import read_pages, replacing
from dsm_train.data.tokenizer import Tokenizer, load_tokenizer

NAME = "corpus"
"""Name of the dataset: OUT/dataset/corpus.bin and corpus.idx, with OUT/dataset/corpus as Megatron's prefix."""
_BLOCK = 1 << 20
"""Characters encoded at once: the tokenizer takes a hundred bytes of memory per token."""


@dataclass(frozen=True)
class FileRecord:
    """Record of a file that identifies its contents."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A shard of pages that went into the dataset."""

    file: FileRecord
    pages: int
    tokens: int
    empty: int
    """Pages left out, without text."""


@dataclass(frozen=True)
class Manifest:
    """`OUT/dataset/manifest.json`."""

    pages: int
    """Documents of the dataset."""
    tokens: int
    """Tokens of the dataset, with the one that ends each page."""
    dtype: str
    """Type in which ids are stored."""
    vocab_size: int
    """Largest id of the tokenizer, plus 1."""
    eos_id: int
    """The id that ends each page."""
    files: tuple[FileRecord, ...]
    """The dataset."""
    tokenizer: FileRecord
    """The tokenizer; of a folder, its files' hashes, hashed."""
    sources: tuple[Source, ...]
    """Shards it was made from, in the order of the documents."""
    configuration: Mapping[str, Any]
    """The configuration of the corpus."""


def run(config: CorpusConfig) -> StepReport:
    """Step `tokenise`: the pages in OUT/decontaminate, or tokenise.inputs, to OUT/dataset."""
    inputs = finished_shards(config.tokenise.inputs or config.run.out / "decontaminate")
    return to_dataset(inputs, config.tokenizer, config.run.out / "dataset", config.engine, asdict(config))


def to_dataset(
    inputs: Sequence[Path],
    tokenizer: TokenizerConfig,
    out: Path,
    engine: EngineConfig,
    configuration: Mapping[str, Any],
) -> StepReport:
    """Write all pages, in order, as `out/corpus.bin`, `out/corpus.idx` and `out/manifest.json`.

    Each page is a document that ends in the end token; pages without text are left out and counted (`empty`). The
    counts of the report are `pages`, `tokens` and `empty`. `configuration` goes into the manifest as it is. Raises
    ValueError where there is no tokenizer, and what `run_step` raises.
    """
    require(tokenizer.path is not None, "tokenizer.path", "given: the dataset holds its tokens", tokenizer.path)
    encode = _Encode(tokenizer, _record(tokenizer.path))  # type: ignore[arg-type]
    encode.load()  # before hours of work, not after
    parts = out / "shards"
    whole, merge = [Task(0, tuple(inputs), out / "manifest.json")], _Merge(encode, parts, configuration)
    claim("tokenise", whole, merge, out)
    if read_report(out) is None:
        tasks = [Task(index, (path,), parts / f"{index:05d}.json") for index, path in enumerate(inputs)]
        run_step("tokenise, shards", tasks, encode, engine, parts)
    report = run_step("tokenise", whole, merge, engine, out)
    shutil.rmtree(parts, ignore_errors=True)
    return report


@dataclass(frozen=True)
class _Encode:
    """Work of a shard: its ids and the lengths of its documents as plain int32, and a `Source` beside them.

    Megatron's own format is left to the merge, since to import Megatron takes a worker longer than many a shard.
    """

    tokenizer: TokenizerConfig
    record: FileRecord

    def __call__(self, task: Task) -> Mapping[str, int]:
        tokenizer, lengths, empty = self.load(), array.array("i"), 0
        with replacing(_ids(task.output)) as temporary, open(temporary, "wb") as file:
            for page in read_pages(task.inputs[0]):
                ids = array.array("i")
                for part in _blocks(page.text):
                    ids.extend(tokenizer.encode(part))
                if ids:
                    ids.append(tokenizer.eos_id)
                    ids.tofile(file)
                    lengths.append(len(ids))
                else:
                    empty += 1
        with replacing(_lengths(task.output)) as temporary:
            temporary.write_bytes(lengths.tobytes())
        pages, tokens = len(lengths), sum(lengths)
        write_json(task.output, asdict(Source(_record(task.inputs[0]), pages, tokens, empty)))
        return {"pages": pages, "tokens": tokens, "empty": empty}

    def load(self) -> Tokenizer:
        """The tokenizer, for which "<eos>" in a page is text like any other."""
        return load_tokenizer(self.tokenizer.path, eos_token=self.tokenizer.eos_token)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Merge:
    """Work of the whole: one dataset of all shards, and the manifest."""

    encode: _Encode
    parts: Path = field(compare=False)
    configuration: Mapping[str, Any] = field(compare=False)

    def __call__(self, task: Task) -> Mapping[str, int]:
        from dsm_train.megatron.indexed import token_dtype, writing

        tokenizer, out = self.encode.load(), task.output.parent
        sources = []
        with writing(out / NAME, tokenizer.vocab_size) as dataset:
            for index in range(len(task.inputs)):
                made = self.parts / f"{index:05d}.json"
                source = json.loads(made.read_text(encoding="utf-8"))
                sources.append(Source(FileRecord(**source.pop("file")), **source))
                dataset.add(_read(_ids(made)), _read(_lengths(made)))
        manifest = Manifest(
            pages=sum(source.pages for source in sources),
            tokens=sum(source.tokens for source in sources),
            dtype=token_dtype(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            files=tuple(_record(out / f"{NAME}.{suffix}") for suffix in ("bin", "idx")),
            tokenizer=self.encode.record,
            sources=tuple(sources),
            configuration=self.configuration,
        )
        write_json(task.output, asdict(manifest))
        empty = sum(source.empty for source in sources)
        return {"pages": manifest.pages, "tokens": manifest.tokens, "empty": empty}


def _ids(made: Path) -> Path:
    return made.with_suffix(".ids")


def _lengths(made: Path) -> Path:
    return made.with_suffix(".lengths")


def _read(path: Path) -> np.ndarray:
    return np.memmap(path, np.int32, "r") if path.stat().st_size else np.empty(0, np.int32)


def _blocks(text: str) -> Iterator[str]:
    return (text[start : start + _BLOCK] for start in range(0, len(text), _BLOCK))


def _record(path: Path) -> FileRecord:
    """The record of a file, or of all files directly in a folder together."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    try:
        hashes = []
        for file in files:
            with open(file, "rb") as content:
                hashes.append(hashlib.file_digest(content, "sha256").hexdigest())
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error.strerror}): correct the path") from error
    joined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return FileRecord(str(path), sum(file.stat().st_size for file in files), joined)
