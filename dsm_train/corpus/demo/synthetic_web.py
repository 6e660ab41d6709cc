"""Synthetic web with known truth: HTML pages of many sites, in real WARC files.

    truth = make(Path("web"), seed=0, pages=4000)

writes web/warc/*.warc.gz, web/benchmark.jsonl and web/truth.json. The same seed gives the same bytes.

Some sites are mathematics, most are not, and in some it is a section or a page here and there. The seed of the
classifier knows only the *visible* sites. The *hidden* ones treat topics further and further from it: the first share
its formal words and some formulas, the next only words of the first, and the Chinese ones meet English on a single
bilingual site. Only several rounds of domains and generalisation can find them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Literal
from uuid import NAMESPACE_URL, uuid5

from dsm_train.corpus.demo import synthetic_text as text
from dsm_train.corpus.demo.synthetic_html import MARKUPS, Damage, Look, make_look, render
from dsm_train.corpus.demo.synthetic_words import CHINESE_MATHEMATICS, CHINESE_OTHER, MATHEMATICS, OTHER
from dsm_train.corpus.engine.page import page_id, replacing

Copy = Literal["", "url", "exact", "near"]


@dataclass(frozen=True, slots=True)
class PageTruth:
    """Truth of a page."""

    url: str
    date: str
    mathematics: bool
    language: str
    topic: str
    hidden: bool
    """True on a site that is all mathematics and unknown to the seed."""
    seed: bool = False
    """Among the positives of round 1."""
    copy: Copy = ""
    """Same address again, same bytes elsewhere, or nearly the same text elsewhere."""
    original: str = ""
    """Id of the page that this is a copy of; its own id otherwise."""
    contaminated: bool = False
    """Holds a question or an answer of the benchmark."""
    near_miss: bool = False
    """Holds eight words of one in a row: not contaminated."""
    damage: Damage = ""

    @property
    def id(self) -> str:
        """The id that the corpus gives the page."""
        return page_id(self.url, self.date)


@dataclass(frozen=True, slots=True)
class Truth:
    """Truth of a synthetic web."""

    seed: int
    pages: tuple[PageTruth, ...]
    hidden_sites: tuple[str, ...]
    """Hosts that are all mathematics and unknown to the seed."""

    @classmethod
    def load(cls, path: Path) -> Truth:
        """Read truth.json."""
        record = json.loads(path.read_text(encoding="utf-8"))
        pages = tuple(PageTruth(**page) for page in record["pages"])
        return cls(record["seed"], pages, tuple(record["hidden_sites"]))


@dataclass(frozen=True, slots=True)
class Section:
    """Pages of a site under one path: their topics, and the upper limits of formal words and of formulas in them."""

    topics: tuple[str, ...]
    core: float
    formulas: float
    weight: float = 1.0
    path: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Sites of a kind: their share of all pages, and how large and how varied each of them is."""

    share: float
    pages_per_site: int
    sections: tuple[Section, ...]
    topics: int = 3
    """Topics that a site has in each of its sections."""
    hidden: bool = False


_QUANTITATIVE = ("physics", "finance", "programming", "sports statistics", "engineering", "polls")
_WORDY = ("law", "music theory", "chess", "astrology", "crafts", "philosophy")
_ORDINARY = tuple(topic for topic in OTHER if topic not in _QUANTITATIVE + _WORDY)
_VISIBLE = ("algebra", "calculus", "number theory", "linear algebra", "probability")
_FORMAL = ("topology", "category theory", "combinatorics", "geometry")
_PLAIN = ("olympiad", "puzzles", "school arithmetic")
_PHYSICS_ZH = ("物理", "股票")
_ORDINARY_ZH = tuple(topic for topic in CHINESE_OTHER if topic not in _PHYSICS_ZH)
_ZH = tuple(CHINESE_MATHEMATICS)

GROUPS = (
    Group(0.090, 60, (Section(_VISIBLE, 0.30, 0.6),)),
    # Each of these has pages that mathematics found before leads to, and others.
    Group(0.045, 50, (Section(_VISIBLE, 0.25, 0.5, 0.35), Section(_FORMAL, 0.2, 0.4, 0.65)), hidden=True),
    Group(0.035, 50, (Section(_FORMAL, 0.2, 0.4, 0.35), Section(_PLAIN, 0.06, 0.25, 0.65)), hidden=True),
    Group(0.020, 50, (Section(_PLAIN[:1], 0.06, 0.25, 0.35), Section(_PLAIN[1:], 0.03, 0.25, 0.65)), hidden=True),
    Group(
        0.012,
        50,
        (Section(_VISIBLE, 0.2, 0.5, 0.4), Section(("geometry", *_ZH), 0.2, 0.5, 0.3), Section(_ZH, 0.2, 0.4, 0.3)),
        topics=4,
        hidden=True,
    ),
    Group(0.025, 40, (Section(_ZH, 0.2, 0.4),), hidden=True),
    # A university: mathematics is a department, a professor's notes, a section of its library.
    Group(
        0.070,
        90,
        (
            Section(_VISIBLE, 0.3, 0.6, 0.15, "departments/m2/"),
            Section(_FORMAL, 0.2, 0.4, 0.15, "~{person}/notes/"),
            Section(("physics", "engineering"), 0.1, 0.5, 0.25, "departments/p1/"),
            Section(("news", "sports statistics", "law", "health"), 0.02, 0.1, 0.45, "press/"),
        ),
    ),
    # Diaries: whatever came to mind, now and then mathematics; no path tells which.
    Group(0.050, 40, (Section(_ORDINARY, 0.02, 0.0, 0.94), Section(_VISIBLE + _FORMAL, 0.25, 0.4, 0.06))),
    Group(0.250, 50, (Section(_QUANTITATIVE, 0.08, 0.5),), topics=1),
    Group(0.120, 50, (Section(_WORDY, 0.04, 0.2),), topics=1),
    Group(0.190, 50, (Section(_ORDINARY, 0.02, 0.0),)),
    Group(0.040, 40, (Section(_PHYSICS_ZH, 0.0, 0.4),), topics=1),
    Group(0.050, 40, (Section(_ORDINARY_ZH, 0.0, 0.0),)),
)
"""The sites; shares are relative."""

_COPIES: dict[Copy, float] = {"url": 0.015, "exact": 0.03, "near": 0.04}
_DAMAGED: dict[Damage, float] = {"markup": 0.04, "charset": 0.01, "script": 0.01}
_CONTAMINATED, _NEAR_MISS, _BENCHMARK_ITEMS = 0.015, 0.005, 48
_PAGES_PER_FILE = 1000


@dataclass(frozen=True, slots=True)
class Planned:
    """A page before it is written: everything that `write_page` needs beside the benchmark."""

    truth: PageTruth
    index: int
    """Seeds the text; a copy has that of its original."""
    section: Section
    look: Look


def make(folder: Path, seed: int, pages: int, padding: int = 0) -> Truth:
    """Write a web of `pages` HTML pages.

    `padding`: bytes of script, style and menus around each page, as real ones have, for measurements of time. Raises
    ValueError below 500 pages, which hold too little of each kind.
    """
    if pages < 500:
        raise ValueError(f"a synthetic web needs at least 500 pages, got {pages}")
    rng = Random(f"{seed}/web")
    planned, hidden_sites = _plan(rng, pages, seed)
    benchmark = text.make_benchmark(Random(f"{seed}/benchmark"), _BENCHMARK_ITEMS)
    (folder / "warc").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": item.question, "answer": item.answer}, ensure_ascii=False) for item in benchmark]
    (folder / "benchmark.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rng.shuffle(planned)
    for number, start in enumerate(range(0, len(planned), _PAGES_PER_FILE)):
        with open(folder / "warc" / f"synthetic-{number:05d}.warc.gz", "wb") as file:
            file.write(_record("warcinfo", "", "2024-01-01T00:00:00Z", b"software: dsm synthetic web\r\n"))
            for plan in planned[start : start + _PAGES_PER_FILE]:
                body, content_type = write_page(plan, seed, benchmark, padding)
                file.write(_response(plan.truth.url, plan.truth.date, content_type, body))
                if rng.random() < 0.05:
                    file.write(_no_page(rng, plan))
    truth = Truth(seed, tuple(plan.truth for plan in planned), tuple(hidden_sites))
    with replacing(folder / "truth.json") as temporary:  # last and whole: where it stands, all else does
        temporary.write_text(json.dumps(asdict(truth), ensure_ascii=False) + "\n", encoding="utf-8")
    return truth


def _plan(rng: Random, pages: int, seed: int) -> tuple[list[Planned], list[str]]:
    copies: dict[Copy, int] = {copy: round(share * pages) for copy, share in _COPIES.items()}
    originals = pages - sum(copies.values())
    planned: list[Planned] = []
    hidden_sites: list[str] = []
    whole = sum(group.share for group in GROUPS)
    done = 0.0
    for group in GROUPS:
        done += group.share
        count = round(originals * done / whole) - len(planned)
        sites = max(1, round(count / group.pages_per_site))
        for site in range(sites):
            look = _site(rng, group)
            hidden_sites += [look.host] * group.hidden
            sections = [_narrowed(rng, section, group.topics) for section in group.sections]
            for _ in range(count * (site + 1) // sites - count * site // sites):
                planned.append(
                    _page(rng, len(planned), look, rng.choices(sections, [s.weight for s in sections])[0], group)
                )
    planned = _with_passages(rng, planned)
    return planned + _copies(rng, planned, copies), hidden_sites


def _site(rng: Random, group: Group) -> Look:
    topics = [topic for section in group.sections for topic in section.topics]
    language = "zh" if all(topic in CHINESE_MATHEMATICS or topic in CHINESE_OTHER for topic in topics) else "en"
    name = text.invented(rng, rng.randint(1, 2))
    host = rng.choice(["www.{}{}.example", "{}{}.example", "blog.{}{}.example", "{}{}.org.example"])
    look = make_look(rng, host.format(name, rng.randint(1, 999)), language, rng.choice(MARKUPS))
    bilingual = language == "en" and any(topic in CHINESE_MATHEMATICS for topic in topics)
    return replace(look, charset="utf-8") if bilingual else look


def _narrowed(rng: Random, section: Section, topics: int) -> Section:
    chosen = rng.sample(section.topics, min(topics, len(section.topics)))
    return replace(
        section,
        path=section.path.format(person=text.invented(rng, 1)),
        topics=tuple(chosen),
    )


def _page(rng: Random, index: int, look: Look, section: Section, group: Group) -> Planned:
    topic = rng.choice(section.topics)
    kinds: list[Damage] = ["", *_DAMAGED]
    damage = rng.choices(kinds, [1 - sum(_DAMAGED.values()), *_DAMAGED.values()])[0]
    address = Random(look.host).choice(["{}{}.html", "{}p/{}", "{}view?id={}"])  # a site has its own way
    url = f"https://{look.host}/" + address.format(section.path, 1000 + index)
    date = datetime(2024, 2, 1, tzinfo=UTC) + timedelta(seconds=rng.randrange(10**6))
    truth = PageTruth(
        url=url,
        date=date.strftime("%Y-%m-%dT%H:%M:%SZ"),
        mathematics=topic in MATHEMATICS or topic in CHINESE_MATHEMATICS,
        language=_language(topic),
        topic=topic,
        hidden=group.hidden,
        seed=group is GROUPS[0] and damage == "" and rng.random() < 0.7,
        damage=damage,
    )
    return Planned(replace(truth, original=truth.id), index, section, look)


def _language(topic: str) -> str:
    return "zh" if topic in CHINESE_MATHEMATICS or topic in CHINESE_OTHER else "en"


def _with_passages(rng: Random, planned: list[Planned]) -> list[Planned]:
    """Mark the pages that a passage of the benchmark is planted in: three of four are mathematics."""
    readable = [plan.index for plan in planned if plan.truth.damage in ("", "markup")]
    weights = [10.0 if planned[index].truth.mathematics else 1.0 for index in readable]
    many = round((_CONTAMINATED + _NEAR_MISS) * len(planned))
    chosen = list(dict.fromkeys(rng.choices(readable, weights, k=2 * many)))[:many]
    for number, index in enumerate(chosen):
        contaminated = number < len(chosen) * _CONTAMINATED / (_CONTAMINATED + _NEAR_MISS)
        truth = replace(planned[index].truth, contaminated=contaminated, near_miss=not contaminated)
        planned[index] = replace(planned[index], truth=truth)
    return planned


def _copies(rng: Random, planned: list[Planned], copies: dict[Copy, int]) -> list[Planned]:
    """Copies of clean pages: the same address crawled again, and mirrors that copy from everywhere."""
    clean = [plan for plan in planned if not (plan.truth.damage or plan.truth.contaminated or plan.truth.near_miss)]
    mirrors = [f"mirror{rng.randint(1, 99)}.{text.invented(rng, 2)}.example" for _ in range(1 + len(planned) // 600)]
    made, chosen = [], rng.sample(clean, sum(copies.values()))
    for copy, count in copies.items():
        for plan in (chosen.pop() for _ in range(count)):
            old = plan.truth
            if copy == "url":
                spelling = rng.choice(["{}", "{}#top", "http:{}"])
                url = spelling.format(old.url.removeprefix("https:") if spelling.startswith("http:") else old.url)
            else:
                url = f"https://{rng.choice(mirrors)}/{old.url.split('//')[1]}"
            truth = replace(old, url=url, date=f"2024-03{old.date[7:]}", copy=copy, hidden=False, seed=False)
            made.append(replace(plan, truth=truth))
    return made


def write_page(plan: Planned, seed: int, benchmark: Sequence[text.Item], padding: int = 0) -> tuple[bytes, str]:
    """The bytes of a planned page and its Content-Type header."""
    rng = Random(f"{seed}/page/{plan.index}")
    document = _document(rng, plan)
    if plan.truth.copy == "url":
        later = _document(rng, plan)  # most of the page has changed since
        kept = document.paragraphs[: len(document.paragraphs) // 4]
        document = replace(later, paragraphs=kept + later.paragraphs)
    elif plan.truth.copy == "near":
        document = text.with_edits(rng, document)
    elif plan.truth.contaminated or plan.truth.near_miss:
        document = text.with_passage(rng, document, _passage(rng, plan.truth, benchmark))
    return render(Random(f"{seed}/render/{plan.index}"), document, plan.look, plan.truth.damage, padding)


def _document(rng: Random, plan: Planned) -> text.Document:
    """A page on its topic; on a site in two languages, each paragraph is followed by one in the other."""
    section, topic = plan.section, plan.truth.topic
    others = [other for other in section.topics if _language(other) != _language(topic)]
    mixture = text.pick_mixture(rng, topic, section.topics, section.core, section.formulas)
    document = text.write_document(rng, mixture)
    if not others:
        return document
    other = text.write_document(rng, text.pick_mixture(rng, rng.choice(others), (), section.core, section.formulas))
    pairs = zip(document.paragraphs, other.paragraphs, strict=False)
    return replace(document, paragraphs=tuple(paragraph for pair in pairs for paragraph in pair))


def _passage(rng: Random, truth: PageTruth, benchmark: Sequence[text.Item]) -> str:
    """A question, an answer or both; of a near miss, eight words in a row of a long English question."""
    if truth.near_miss:
        words = rng.choice([item for item in benchmark if len(item.question.split()) > 20]).question.split()
        start = rng.randrange(len(words) - 8)
        return f"It was said that {' '.join(words[start : start + 8])} or so it seems."
    item = rng.choice(benchmark)
    worked = item.language == "zh" or len(item.answer.split()) > 10
    return rng.choice([item.question, f"{item.question} {item.answer}", item.answer if worked else item.question])


# WARC.


def _record(kind: str, url: str, date: str, block: bytes, content_type: str = "application/warc-fields") -> bytes:
    """A WARC/1.0 record, compressed by itself as the format asks."""
    target = f"WARC-Target-URI: {url}\r\n" if url else ""
    header = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Date: {date}\r\n"
        f"WARC-Record-ID: <urn:uuid:{uuid5(NAMESPACE_URL, kind + url + date)}>\r\n{target}"
        f"Content-Type: {content_type}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return gzip.compress(header.encode() + block + b"\r\n\r\n", compresslevel=5, mtime=0)


def _response(url: str, date: str, content_type: str, body: bytes, status: str = "200 OK") -> bytes:
    header = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return _record("response", url, date, header.encode() + body, "application/http; msgtype=response")


def _no_page(rng: Random, plan: Planned) -> bytes:
    """Records of a crawl that are no pages: requests, errors, other types of file."""
    host, date = plan.look.host, plan.truth.date
    url = f"https://{host}/x/{plan.index}"
    kind = rng.choice(["request", "error", "file"])
    if kind == "request":
        block = f"GET /x/{plan.index} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        return _record("request", url, date, block, "application/http; msgtype=request")
    if kind == "error":
        return _response(url, date, "text/html", b"<html><body><h1>Not Found</h1></body></html>", "404 Not Found")
    return _response(url, date, "application/pdf", b"%PDF-1.4 " + rng.randbytes(400))
