"""Configuration of `dsm-train corpus`: one frozen dataclass per step, with the paper's values as defaults.

DeepSeekMath (arXiv:2402.03300), section 2.1. The sentence below a field is its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dsm_train.config import require


@dataclass(frozen=True)
class CorpusRun:
    """Settings of every step."""

    out: Path = Path("runs/corpus")
    """Folder of the corpus; every step has a folder in it."""
    seed: int = 0
    """Seed of sampling and of the classifier; the same seed gives the same corpus."""


@dataclass(frozen=True)
class SlurmConfig:
    """Request of a Slurm job; read with engine.executor=slurm."""

    partition: str = ""
    """Partition to submit to."""
    time: str = "20:00:00"
    """Time limit of a task, as Slurm writes it."""
    qos: str = ""
    """Quality of service; empty: the cluster's default."""
    tasks_per_job: int = 1
    """Shards that one element of the job array does, one after the other."""
    max_array: int = 1000
    """Largest job array the cluster accepts."""
    setup: str = ""
    """Shell command that activates the Python environment on a node; empty: this one's bin folder goes on PATH."""

    def __post_init__(self) -> None:
        for name in ("tasks_per_job", "max_array"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


@dataclass(frozen=True)
class EngineConfig:
    """Execution of a step: place, workers, format of shards."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """Place to run: this machine, a Slurm cluster, or a Ray cluster."""
    workers: int = 0
    """Shards worked on at once; 0: one per core of this machine, or without a limit on a cluster."""
    format: Literal["jsonl.gz", "jsonl.zst", "parquet"] = "jsonl.gz"
    """Format in which shards of pages are written; any of them is read."""
    memory_gb: int = 4
    """Memory of a worker: requested on a cluster; deduplication uses half of it at most."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Slurm."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        require(self.memory_gb >= 1, "memory_gb", "at least 1", self.memory_gb)
        require(
            self.executor != "slurm" or bool(self.slurm.partition),
            "slurm.partition",
            "given with executor=slurm (sinfo lists them)",
            repr(self.slurm.partition),
        )


@dataclass(frozen=True)
class ExtractConfig:
    """Step `extract`: WARC and WET files to pages."""

    inputs: tuple[str, ...] = ()
    """WARC or WET files, folders of them, or globs."""
    languages: tuple[str, ...] = ()
    """Languages to keep (en, zh, ...); empty: all, as in the paper."""
    min_chars: int = 100
    """Shorter texts are dropped and counted."""
    max_html_mb: int = 16
    """Larger records are dropped and counted; memory per worker grows with this."""

    def __post_init__(self) -> None:
        require(self.min_chars >= 0, "min_chars", "at least 0", self.min_chars)
        require(self.max_html_mb >= 1, "max_html_mb", "at least 1", self.max_html_mb)


@dataclass(frozen=True)
class DedupConfig:
    """Step `dedup`: one page of each URL, of each text, and of each group of near-duplicates."""

    url: bool = True
    """Keep the earliest page of each normalised URL."""
    exact: bool = True
    """Keep the earliest page of each text (white space aside)."""
    near: bool = True
    """Keep the earliest page of each group of near-duplicates (MinHash)."""
    buckets: int = 14
    """MinHash: pages that agree in all hashes of any bucket are near-duplicates."""
    hashes: int = 8
    """MinHash: hashes per bucket; 14 buckets of 8 find pages that share about 72 % of their n-grams or more."""
    ngram: int = 5
    """MinHash: words per n-gram (characters, in Chinese and Japanese)."""

    def __post_init__(self) -> None:
        for name in ("buckets", "hashes", "ngram"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer of the model: counts tokens, cuts text into features, writes the dataset."""

    path: Path | None = None
    """Folder of a tokenizer, or a tokenizer.json."""
    eos_token: str | None = None
    """Token that ends a page, where the tokenizer does not say."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The fastText classifier."""

    features: Literal["bpe", "words"] = "bpe"
    """Cut text into the tokens of tokenizer.path (Chinese has no spaces), or into words."""
    dim: int = 256
    """Size of the word vectors."""
    lr: float = 0.1
    """Learning rate."""
    word_ngrams: int = 3
    """Longest word n-gram."""
    min_count: int = 3
    """Words that occur less often are left out."""
    epochs: int = 3
    """Passes over the training pages."""
    bucket: int = 2_000_000
    """Hash buckets of n-grams; training takes dim * bucket * 4 bytes, 2 GB by default, and scoring 4 * bucket."""
    threads: int = 1
    """Training threads; more than one is faster and no longer gives the same model twice."""

    def __post_init__(self) -> None:
        for name in ("dim", "word_ngrams", "min_count", "epochs", "bucket", "threads"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.lr > 0, "lr", "above 0", self.lr)


@dataclass(frozen=True)
class DomainsConfig:
    """Discovery of mathematical domains, and their annotation."""

    share: float = 0.10
    """A domain is mathematical when more than this share of its pages was collected."""
    min_pages: int = 10
    """Domains with fewer pages are left out: their share says little."""
    annotations: Path | None = None
    """File of URL prefixes that a person marked as mathematical; none: annotations.yaml of each round."""
    rules: Path | None = None
    """File of rules that mark URL prefixes, for those who prefer text; none: no rules."""
    listed: int = 200
    """Domains on the annotation page, those that matter most first."""
    samples: int = 5
    """Sample pages per domain on the annotation page."""

    def __post_init__(self) -> None:
        require(0 <= self.share < 1, "share", "in 0..1", self.share)
        for name in ("min_pages", "listed", "samples"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


@dataclass(frozen=True)
class RoundsConfig:
    """Step `rounds`: train, score, cut, find domains, annotate, again."""

    seeds: tuple[str, ...] = ()
    """Shards of pages that are the positives of round 1 (the paper: OpenWebMath)."""
    positives: int = 500_000
    """Positives to train on, at most."""
    negatives: int = 500_000
    """Random pages to train on as negatives, at most."""
    budget_tokens: tuple[int, ...] = (40_000_000_000, 89_000_000_000, 120_000_000_000)
    """Tokens that each round collects, the best pages first; the last one serves all later rounds."""
    rounds: int = 4
    """Rounds, at most."""
    overlap: float = 0.98
    """Stop when this share of a round's pages was collected in the round before."""

    def __post_init__(self) -> None:
        for name in ("positives", "negatives", "rounds"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(0 < self.overlap <= 1, "overlap", "above 0 and at most 1", self.overlap)
        tokens = self.budget_tokens
        require(bool(tokens) and min(tokens) >= 1, "budget_tokens", "a list of at least one count", list(tokens))


@dataclass(frozen=True)
class DecontaminateConfig:
    """Step `decontaminate`: no page holds a benchmark's question or answer."""

    inputs: Path | None = None
    """Folder of pages to decontaminate; none: the collection of the last round."""
    benchmarks: tuple[str, ...] = ()
    """JSONL files of benchmark items (question, answer)."""
    ngram: int = 10
    """Words (characters, for Chinese) that match a benchmark exactly make a match."""
    min_ngram: int = 3
    """Benchmark texts shorter than ngram match as a whole, down to this length."""
    level: Literal["segment", "page"] = "segment"
    """Remove the segment that holds the match, or the whole page."""

    def __post_init__(self) -> None:
        require(1 <= self.min_ngram <= self.ngram, "min_ngram", f"in 1..{self.ngram}", self.min_ngram)


@dataclass(frozen=True)
class TokeniseConfig:
    """Step `tokenise`: pages to Megatron's indexed dataset."""

    inputs: Path | None = None
    """Folder of pages to tokenise; none: the output of decontaminate."""


@dataclass(frozen=True)
class DemoConfig:
    """Step `demo`: the whole pipeline on a synthetic web whose truth is known."""

    pages: int = 4000
    """HTML pages of the synthetic web."""

    def __post_init__(self) -> None:
        require(self.pages >= 500, "pages", "at least 500", self.pages)


@dataclass(frozen=True)
class CorpusConfig:
    """`dsm-train corpus`."""

    run: CorpusRun = field(default_factory=CorpusRun)
    """Run."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Engine."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    """Extraction."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Deduplication."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Classifier."""
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    """Rounds."""
    domains: DomainsConfig = field(default_factory=DomainsConfig)
    """Domains."""
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    """Decontamination."""
    tokenise: TokeniseConfig = field(default_factory=TokeniseConfig)
    """Dataset."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """Demo."""
