"""Deduplication against a union of all pairs in memory, against datatrove's own stages, and on small cases."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig
from peak import printed_by

from dsm_train.corpus.cleaning import dedup
from dsm_train.corpus.cleaning.dedup import Sizes, deduplicate
from dsm_train.corpus.cleaning.fingerprints import Near, normalise_url
from dsm_train.corpus.config import DedupConfig, EngineConfig
from dsm_train.corpus.engine.engine import StepError, StepReport
from dsm_train.corpus.engine.page import Page, page_id, read_pages, shards, write_pages

ENGINE = EngineConfig(workers=1)
CONFIG = DedupConfig()
TINY = Sizes(chunk=512, part=900, block=64)  # several chunks, ranges and blocks for a few hundred pages
WORDS = [f"word{i}" for i in range(2000)]


def page(url: str, text: str, date: str = "2024-01-01T00:00:00Z") -> Page:
    return Page(page_id(url, date), url, text, "en", date)


def sentence(rng: random.Random, words: int = 80) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def edited(rng: random.Random, text: str, words: int) -> str:
    parts = text.split()
    for place in rng.sample(range(len(parts)), words):
        parts[place] = rng.choice(WORDS)
    return " ".join(parts)


def small_web(seed: int, count: int) -> list[Page]:
    """New pages, the same address again, the same text again, and near-duplicates of near-duplicates."""
    rng, pages = random.Random(seed), []
    for i in range(count):
        kind = rng.random()
        url, text = f"http://site{i}.org/page", sentence(rng)
        if pages and kind < 0.15:
            url = rng.choice(pages).url.replace("http://", "https://www.") + "/#top"
        elif pages and kind < 0.3:
            text = rng.choice(pages).text.replace(" ", "\n")
        elif pages and kind < 0.5:
            text = edited(rng, rng.choice(pages).text, 2)
        pages.append(page(url, text, f"2024-01-{rng.randint(1, 28):02d}T00:00:00Z"))
    return pages


def run(folder: Path, parts: Iterable[Sequence[Page]], config: DedupConfig = CONFIG, sizes: Sizes = TINY) -> StepReport:
    for i, pages in enumerate(parts):
        write_pages(folder / "in" / f"{i:05d}.jsonl.gz", pages)
    return deduplicate(shards(folder / "in"), folder / "out", config, ENGINE, sizes)


def kept(folder: Path) -> list[Page]:
    return [page for shard in shards(folder / "out") for page in read_pages(shard)]


def earliest_of_each(pages: list[Page], hashes: dict[str, list[object]]) -> list[Page]:
    """The straightforward way: all pages in memory, linked over the hashes they share."""
    parent = {page.id: page.id for page in pages}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    groups: dict[object, str] = {}
    for page in pages:
        for value in hashes[page.id]:
            parent[root(page.id)] = root(groups.setdefault(value, page.id))
    members: dict[str, list[Page]] = defaultdict(list)
    for page in pages:
        members[root(page.id)].append(page)
    return [min(group, key=lambda page: (page.date, page.id)) for group in members.values()]


def test_it_keeps_what_a_union_of_all_pairs_in_memory_keeps(tmp_path: Path) -> None:
    pages = small_web(0, 700)
    report = run(tmp_path, [pages[i::5] for i in range(5)])
    near = Near(CONFIG.buckets, CONFIG.hashes, CONFIG.ngram)
    urls = earliest_of_each(pages, {p.id: [normalise_url(p.url)] for p in pages})
    texts = earliest_of_each(urls, {p.id: [p.text.split().__repr__()] for p in urls})
    expected = earliest_of_each(texts, {p.id: list(near.hashes(p.text)) for p in texts})
    assert {p.id for p in kept(tmp_path)} == {p.id for p in expected}
    lost = {"url": 700 - len(urls), "exact": len(urls) - len(texts), "near": len(texts) - len(expected)}
    assert report.counts == {"pages": 700, **lost, "kept": len(expected)}
    assert min(lost.values()) > 40, "the web must hold enough of each kind"
    assert not (tmp_path / "out" / "parts").exists()


def test_how_pages_are_dealt_to_shards_and_memory_does_not_matter(tmp_path: Path) -> None:
    pages = small_web(1, 300)
    run(tmp_path / "a", [pages[:10], [], pages[10:]], sizes=Sizes.of(1))
    random.Random(0).shuffle(pages)
    run(tmp_path / "b", [pages[i::7] for i in range(7)])
    run(tmp_path / "c", [pages[i::7] for i in range(7)])
    assert sorted(p.id for p in kept(tmp_path / "a")) == sorted(p.id for p in kept(tmp_path / "b"))
    for path in shards(tmp_path / "b" / "out"):
        assert path.read_bytes() == (tmp_path / "c" / "out" / path.name).read_bytes()


def test_shards_are_joined_where_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = small_web(1, 60)
    run(tmp_path / "a", [pages[i::7] for i in range(7)])
    monkeypatch.setattr(dedup, "_SHARDS", 3)
    run(tmp_path / "b", [pages[i::7] for i in range(7)])
    assert kept(tmp_path / "a") == kept(tmp_path / "b")
    assert [path.name for path in shards(tmp_path / "b" / "out")] == [f"0000{i}.jsonl.gz" for i in range(3)]


def test_a_full_disk_says_so() -> None:
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        dedup._write(file, np.zeros((3, 5), np.uint64))


def test_as_many_pages_stay_as_after_the_four_stages_of_datatrove(tmp_path: Path) -> None:
    rng = random.Random(2)
    pages = [page(f"http://a.org/{i}", sentence(rng)) for i in range(150)]
    pages += [page(f"http://b.org/{i}", edited(rng, pages[i].text, 1)) for i in range(40)]
    pages += [page(f"http://c.org/{i}", edited(rng, pages[150 + i].text, 1)) for i in range(20)]
    ours = run(tmp_path, [pages[:100], pages[100:]], DedupConfig(url=False, exact=False))

    signature = Near(CONFIG.buckets, CONFIG.hashes, CONFIG.ngram)._signature
    signature.output_folder = type(signature.output_folder)(str(tmp_path / "signatures"), auto_mkdir=True)
    config, left = MinhashConfig(CONFIG.ngram, CONFIG.buckets, CONFIG.hashes), []
    names = [str(tmp_path / name) for name in ("signatures", "buckets", "clusters")]
    documents = [Document(text=page.text, id=page.id) for page in pages]
    for steps, tasks in (
        ([documents, signature], 1),
        ([MinhashDedupBuckets(names[0], names[1], config=config)], CONFIG.buckets),
        ([MinhashDedupCluster(names[1], names[2], config=config)], 1),
        ([documents, MinhashDedupFilter(names[2]), lambda data, rank, world: left.extend(data)], 1),
    ):
        executor = LocalPipelineExecutor(
            steps, tasks, workers=1, logging_dir=str(tmp_path / f"logs{len(steps)}{tasks}")
        )
        executor.skip_completed = False
        for rank in range(tasks):
            executor._run_for_rank(rank)
    assert ours.counts["near"] >= 55 and ours.counts["kept"] == len(left)


def test_the_earliest_stays_then_the_smallest_id(tmp_path: Path) -> None:
    early, late, undated = page("http://a.org", "x", "2023-05-01T09:00:00Z"), page("http://a.org", "y"), "http://b.org"
    same = [Page(name, "http://c.org", name, "en", "2024-01-01") for name in ("0b", "0a", "0c")]
    others = [page(undated, "z", ""), page(undated, "w", "2025-01-01"), *same]
    run(tmp_path, [[late, others[0]], [others[1], early, *same]])
    assert {p.text for p in kept(tmp_path)} == {"x", "w", "0a"}


def test_one_of_two_captures_that_are_the_same_in_everything_stays(tmp_path: Path) -> None:
    assert run(tmp_path, [[page("http://a.org", "x")] * 3, [page("http://a.org", "x")]]).counts["kept"] == 1
    assert [len(list(read_pages(path))) for path in shards(tmp_path / "out")] == [1, 0]


def test_a_text_does_not_go_with_a_page_that_goes_for_its_url(tmp_path: Path) -> None:
    """The third page has the text of the second, which goes: as its URL's later capture."""
    pages = [page("http://a.org", "x", "2021"), page("http://a.org", "y", "2022"), page("http://b.org", "y", "2023")]
    run(tmp_path, [pages])
    assert {p.url for p in kept(tmp_path)} == {"http://a.org", "http://b.org"}


def test_near_duplicates_of_near_duplicates_are_one_group(tmp_path: Path) -> None:
    """Each page differs from the next in a few words; the first and the last have little in common."""
    rng, texts = random.Random(3), [sentence(random.Random(3), 200)]
    for _ in range(15):
        texts.append(edited(rng, texts[-1], 3))
    near = Near(CONFIG.buckets, CONFIG.hashes, CONFIG.ngram)
    assert not set(near.hashes(texts[0])) & set(near.hashes(texts[-1]))
    pages = [page(f"http://a.org/{i}", text, f"2024-01-{i + 1:02d}") for i, text in enumerate(texts)]
    rng.shuffle(pages)
    run(tmp_path, [pages[:4], pages[4:]])
    assert [p.date for p in kept(tmp_path)] == ["2024-01-01"]


def test_pages_of_the_same_hash_without_number_need_no_memory(tmp_path: Path) -> None:
    report = run(tmp_path, [[page(f"http://a.org/{i}", "404 not found") for i in range(s, 3000, 3)] for s in range(3)])
    assert report.counts == {"pages": 3000, "url": 0, "exact": 2999, "near": 0, "kept": 1}


def test_parts_can_be_turned_off_and_a_finished_folder_is_not_taken_for_another(tmp_path: Path) -> None:
    pages = [page("http://a.org", "x"), page("http://a.org#b", "y"), page("http://c.org", "y")]
    assert run(tmp_path, [pages], DedupConfig(url=False, near=False)).counts == {"pages": 3, "exact": 1, "kept": 2}
    with pytest.raises(StepError, match="another configuration"):
        run(tmp_path, [], DedupConfig(exact=False))


@pytest.mark.parametrize(
    ("first", "second", "are_near"),
    [
        ("A page. " * 3 + "Let x be, then, five!", "a  page a page A PAGE let x be then\nfive", True),
        ("Übung über Äpfel und Öl für alle", "Ubung uber Apfel und Ol fur alle", True),
        ("证明：对任意整数有这个结论成立。", "证明 对任意整数有这个结论成立", True),
        ("What is 12 plus 30, given that we add?", "What is 13 plus 31, given that we add?", False),
        ("设甲数为三求乙数之值等于多少", "已知圆的半径是五求它的面积和周长", False),
    ],
)
def test_what_counts_as_near(first: str, second: str, are_near: bool) -> None:
    near = Near(14, 8, 5)
    assert (near.hashes(first) == near.hashes(second)) is are_near
    assert len(near.hashes(first)) == 14


def test_texts_without_an_ngram_are_no_near_duplicates(tmp_path: Path) -> None:
    assert Near(14, 8, 5).hashes("one two three four") == Near(14, 8, 5).hashes("") == []


@pytest.mark.parametrize(
    ("url", "same_as"),
    [
        ("HTTPS://WWW.Site.org:443/A/b/#part", "http://site.org/A/b"),
        ("http://site.org/?utm_source=x&b=2&a=1&fbclid=3", "http://site.org?a=1&b=2"),
        ("http://site.org/%7Euser/caf%C3%A9", "http://site.org/~user/café"),
        ("http://site.org./", "site.org//site.org"),
    ],
)
def test_addresses_of_one_page(url: str, same_as: str) -> None:
    expected = normalise_url(same_as) if same_as.startswith("http") else "site.org"
    assert normalise_url(url) == expected


def test_addresses_of_different_pages_stay_different() -> None:
    urls = [
        "http://a.org/A",
        "http://a.org/a",
        "http://a.org:8080/a",
        "http://b.a.org/a",
        "http://a.org/a?b=",
        "http://[",
    ]
    assert len({normalise_url(url) for url in urls}) == len(urls)


MEMORY = """
from pathlib import Path
import numpy as np
from dsm_train.corpus.cleaning import dedup
from dsm_train.corpus.engine.engine import Task
from dsm_train.corpus.cleaning.fingerprints import Near
folder, sizes = Path(sys.argv[1]), dedup.Sizes(chunk=1 << 13, part=1 << 14, block=1 << 10)
near = Near(14, 8, 5)
near.hashes("so that what is loaded once is loaded " * 1000)
before = peak_kibibytes()
task = Task(0, (folder / "00000.jsonl.gz",), folder / "rows" / "00000.rows")
rows = dedup._Rows("near", near, (), sizes)(task)["rows"]
ranges = max(1, rows // sizes.part)
for index in range(ranges):
    dedup._Groups(ranges, sizes)(Task(index, (folder / "rows",), folder / "groups" / f"{index:05d}.rows"))
dedup._Settle(sizes)(Task(0, (folder / "groups",), folder / "settled" / "00000.rows"))
print(rows, peak_kibibytes() - before)
"""


def test_memory_does_not_grow_with_the_pages(tmp_path: Path) -> None:
    grown = []
    for count in (2_000, 12_000):
        rng, folder = random.Random(0), tmp_path / str(count)
        pages = (page(f"http://a.org/{i}", sentence(rng, 12 if i % 3 else 5)) for i in range(count))
        write_pages(folder / "00000.jsonl.gz", pages)
        rows, kibibytes = map(int, printed_by(MEMORY, folder).split())
        assert rows == 14 * count
        grown.append(kibibytes)
    assert grown[1] < grown[0] + 3000, f"{grown} KiB"  # the rows of 12,000 pages take 6560 KiB


def test_a_page_of_many_megabytes_takes_little_more_than_itself(tmp_path: Path) -> None:
    long = page("http://a.org", "word " * 3_000_000)
    write_pages(tmp_path / "00000.jsonl.gz", [long])
    code = """
from pathlib import Path
from dsm_train.corpus.cleaning import dedup
from dsm_train.corpus.engine.engine import Task
from dsm_train.corpus.cleaning.fingerprints import Near
before = peak_kibibytes()
rows = dedup._Rows("near", Near(14, 8, 5), (), dedup.Sizes.of(4))
rows(Task(0, (Path(sys.argv[1]) / "00000.jsonl.gz",), Path(sys.argv[1]) / "00000.rows"))
print(peak_kibibytes() - before)
"""
    output = printed_by(code, tmp_path)
    assert int(output) < 250_000, f"{int(output)} KiB for a page of 15 MB"
