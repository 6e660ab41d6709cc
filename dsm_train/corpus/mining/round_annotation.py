"""Annotation after a round: by a person or by rules, and the files that ask a person for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsm_train.corpus.config import DomainsConfig
from dsm_train.corpus.engine.page import read_pages
from dsm_train.corpus.mining.annotate import (
    Annotations,
    apply_rules,
    from_decisions,
    load_rules,
    write_annotations,
)
from dsm_train.corpus.mining.annotate_page import Domain, Sample, write_annotation_page
from dsm_train.corpus.mining.domains import Count, collected_rows
from dsm_train.corpus.mining.select import Cut

_SAMPLED_SHARDS = 64
"""Number of leading shards in which samples are sought, until every domain has enough."""
_SNIPPET = 400
"""Characters of a sample."""


@dataclass(frozen=True)
class Shard:
    """Shard of pages, with their index and scores."""

    pages: Path
    index: Path
    scores: Path


def annotate(
    config: DomainsConfig,
    title: str,
    folder: Path,
    counts: Sequence[Count],
    shards: Sequence[Shard],
    cut: Cut,
    base: Annotations,
) -> Annotations | None:
    """Decide which prefixes are mathematics: `folder/annotations.yaml` when a person is done with it, or else the rules
    and the file of the configuration.

    `counts`: the mathematical domains, most pages to gain first, each followed by its prefixes. `base`: what was
    annotated before, which stays unless something else is said. Writes the file and the page for the browser unless
    they are there, and `folder/annotated.yaml`, what is decided. None: a person has not set `done` in the file yet.
    """
    path = folder / "annotations.yaml"
    domains = _by_domain(counts)
    if not (folder / "annotate.html").exists():
        listed = domains[: config.listed]
        samples = find_samples([domain[0].prefix for domain in listed], shards, cut, config.samples)
        shown = [Domain(tuple(domain), tuple(samples[domain[0].prefix])) for domain in listed]
        write_annotation_page(folder / "annotate.html", title, shown, base)
    written = Annotations.load(path) if path.exists() else None
    if written is not None and written.done:
        decided = written
    elif config.rules is not None or config.annotations is not None or not counts:
        decided = apply_rules(load_rules(config.rules), counts, base) if config.rules else base
        if config.annotations is not None:
            decided = from_decisions({**decided.decisions, **Annotations.load(config.annotations).decisions})
    else:
        if written is None:
            heading = f"{title}\n{_HEADING.format(count=len(domains))}"
            write_annotations(path, replace(base, done=False), heading, domains[: config.listed])
        return None
    write_annotations(folder / "annotated.yaml", decided, f"{title}\nWhat the next round takes as mathematics.")
    return decided


_HEADING = """\
Take the # off the lines that are mathematics, of the {count} domains below, those first that would bring most pages.
Add prefixes of your own if you like. Under not_math go longer prefixes that are none. Then set done to true, and run
the same command again. annotate.html beside this file shows samples of each domain and writes this file for you."""


def _by_domain(counts: Sequence[Count]) -> list[list[Count]]:
    groups: dict[str, list[Count]] = defaultdict(list)
    for count in counts:
        groups[count.prefix.partition("/")[0]].append(count)
    return [sorted(group, key=lambda count: count.prefix.split("/")) for group in groups.values()]


def find_samples(
    domains: Sequence[str], shards: Sequence[Shard], cut: Cut, per_domain: int
) -> Mapping[str, list[Sample]]:
    """Sample pages of each domain, one of them collected and the others not, from the first shards."""
    wanted = {domain: {0: max(1, per_domain - 1), 1: min(1, per_domain - 1)} for domain in domains}
    found: dict[str, list[Sample]] = {domain: [] for domain in domains}
    for shard in shards[:_SAMPLED_SHARDS]:
        rows = _choose(shard, cut, wanted)
        if rows:
            pages = (page for page in enumerate(read_pages(shard.pages)) if page[0] in rows)
            for number, page in pages:
                domain, collected = rows[number]
                text = " ".join(page.text[: 4 * _SNIPPET].split())[:_SNIPPET]
                found[domain].append(Sample(page.url, text, bool(collected)))
        if not any(any(left.values()) for left in wanted.values()):
            break
    return {domain: sorted(samples, key=lambda sample: sample.collected) for domain, samples in found.items()}


def _choose(shard: Shard, cut: Cut, wanted: dict[str, dict[int, int]]) -> dict[int, tuple[str, int]]:
    """Rows of a shard to show, with their domain and whether they were collected; takes them off `wanted`."""
    chosen: dict[int, tuple[str, int]] = {}
    for number, (domain, collected) in enumerate(_rows(shard, cut)):
        if domain in wanted and wanted[domain][collected]:
            wanted[domain][collected] -= 1
            chosen[number] = (domain, collected)
    return chosen


def _rows(shard: Shard, cut: Cut) -> Iterator[tuple[str, int]]:
    for table in collected_rows(shard.index, shard.scores, cut, ("domain",)):
        yield from zip(table.column("domain").to_pylist(), table.column("collected").to_pylist(), strict=True)
