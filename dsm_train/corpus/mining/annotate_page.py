"""Page to annotate domains in a browser: one HTML file that needs no network and exports the annotation file.

It shows text from the web, which is only ever set as text, never as HTML; a policy forbids the page every request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dsm_train.corpus.engine.page import replacing
from dsm_train.corpus.mining.annotate import Annotations
from dsm_train.corpus.mining.domains import Count


@dataclass(frozen=True)
class Sample:
    """Sample page of a domain, to judge it by."""

    url: str
    text: str
    """The beginning of its text."""
    collected: bool


@dataclass(frozen=True)
class Domain:
    """Domain as a person sees it: counts and sample pages."""

    counts: tuple[Count, ...]
    """The domain, and below it its prefixes, in alphabetical order."""
    samples: tuple[Sample, ...]


def write_annotation_page(path: Path, title: str, domains: Sequence[Domain], annotations: Annotations) -> None:
    """Write the page, with domains in the order given and what is annotated already ticked."""
    data = {
        "title": title,
        "math": annotations.math,
        "not_math": annotations.not_math,
        "domains": [
            {
                "counts": [[count.prefix, count.pages, count.collected] for count in domain.counts],
                "samples": [asdict(sample) for sample in domain.samples],
            }
            for domain in domains
        ],
    }
    # In a script element only "</script" and "<!--" are special: no "<" is left.
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").encode("utf-8", "replace").decode()
    with replacing(path) as temporary:
        temporary.write_text(_PAGE.replace("DATA", embedded, 1), encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which of these are mathematics?</title>
<style>
  body { font: 15px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 70em; padding: 0 1em 4em; color: #222; }
  header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: .6em 0; z-index: 1; }
  h1 { font-size: 1.1em; margin: 0 0 .4em; }
  section { border-bottom: 1px solid #ddd; padding: .7em 0; }
  section:focus-within { background: #f6f9ff; }
  label { display: block; padding: .1em 0; }
  .count { color: #666; margin-left: .6em; }
  .explicit { font-weight: 600; }
  .sample { margin: .3em 0 .3em 1.6em; padding-left: .6em; border-left: 3px solid #ddd; overflow-wrap: anywhere; }
  .sample.missed { border-color: #e0a030; }
  .sample a { color: #456; font-size: .85em; }
  button, input[type=search] { font: inherit; padding: .2em .6em; }
  textarea { width: 100%; height: 14em; font: 13px monospace; margin-top: .5em; }
</style>
<header>
  <h1 id="title"></h1>
  <input type="search" id="filter" placeholder="only domains with ..." aria-label="filter domains">
  <button id="download">Save annotations.yaml</button>
  <button id="show">Show it</button>
  <span id="status" role="status"></span>
  <textarea id="yaml" readonly hidden aria-label="annotation file"></textarea>
</header>
<p>Tick what is mathematics. A prefix goes with the one above it unless you say otherwise (bold). Samples that the
classifier missed have an orange bar. What you tick is kept in this browser. Save the file over annotations.yaml beside
this page, and run the same command again.</p>
<main id="domains"></main>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
// Decisions: prefix -> true or false; a prefix that is not in it goes with the one above.
function above(prefix) {
  const end = prefix.lastIndexOf("/");
  return end < 0 ? null : prefix.slice(0, end);
}
function decide(decisions, prefix) {
  for (let p = prefix; p !== null; p = above(p)) if (decisions.has(p)) return decisions.get(p);
  return false;
}
function set(decisions, prefix, value) {
  decisions.delete(prefix);
  if (decide(decisions, prefix) !== value) decisions.set(prefix, value);
}
function scalar(prefix) {
  return /^[A-Za-z0-9_][A-Za-z0-9_.\\/~%+@=:-]*$/.test(prefix) ? prefix : JSON.stringify(prefix);
}
function toYaml(decisions) {
  const of = value => [...decisions].filter(d => d[1] === value && decide(decisions, above(d[0])) !== value)
    .map(d => d[0]).sort();
  const list = (name, prefixes) =>
    name + ":" + (prefixes.length ? "\\n- " + prefixes.map(scalar).join("\\n- ") : " []");
  return "done: true\\n" + list("math", of(true)) + "\\n" + list("not_math", of(false)) + "\\n";
}
function gained(decisions, domains) {  // pages of the ticked prefixes that were not collected
  let pages = 0;
  for (const domain of domains) {
    for (const [prefix, all, collected] of domain.counts) {
      const up = above(prefix);
      pages += (decide(decisions, prefix) - (up !== null && decide(decisions, up))) * (all - collected);
    }
  }
  return pages;
}
function element(kind, parent, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  parent.append(made);
  return made;
}
function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const key = "annotations of " + data.title + location.pathname;
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(key)); } catch (e) {}  // some browsers keep nothing for local files
  const decisions = new Map(kept || [...data.math.map(p => [p, true]), ...data.not_math.map(p => [p, false])]);
  const boxes = [];
  const yaml = document.getElementById("yaml");
  document.getElementById("title").textContent = data.title;

  function refresh() {
    for (const [box, prefix, label] of boxes) {
      box.checked = decide(decisions, prefix);
      label.classList.toggle("explicit", decisions.has(prefix));
    }
    const ticked = data.domains.filter(d => d.counts.some(c => decide(decisions, c[0]))).length;
    document.getElementById("status").textContent =
      `${ticked} of ${data.domains.length} domains, ${gained(decisions, data.domains)} pages to gain`;
    yaml.value = toYaml(decisions);
    try { localStorage.setItem(key, JSON.stringify([...decisions])); } catch (e) {}
  }
  for (const domain of data.domains) {
    const section = element("section", document.getElementById("domains"));
    section.dataset.domain = domain.counts[0][0];
    for (const [prefix, pages, collected] of domain.counts) {
      const label = element("label", section);
      label.style.marginLeft = 1.4 * (prefix.split("/").length - 1) + "em";
      const box = element("input", label);
      box.type = "checkbox";
      box.addEventListener("change", () => { set(decisions, prefix, box.checked); refresh(); });
      element("span", label, " " + prefix);
      const share = Math.round(100 * collected / pages);
      element("span", label, `${pages} pages, ${share} % collected, ${pages - collected} to gain`, "count");
      boxes.push([box, prefix, label]);
    }
    for (const sample of domain.samples) {
      const block = element("div", section, undefined, sample.collected ? "sample" : "sample missed");
      if (/^https?:/i.test(sample.url)) {
        const link = element("a", block, sample.url);
        link.href = sample.url;
        link.target = "_blank";
        link.rel = "noreferrer noopener";
      } else element("span", block, sample.url);
      element("div", block, sample.text);
    }
  }
  document.getElementById("filter").addEventListener("input", event => {
    for (const section of document.querySelectorAll("section"))
      section.hidden = !section.dataset.domain.includes(event.target.value.trim().toLowerCase());
  });
  document.getElementById("show").addEventListener("click", () => { yaml.hidden = !yaml.hidden; });
  document.getElementById("download").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([yaml.value], { type: "text/yaml" }));
    link.download = "annotations.yaml";
    link.click();
  });
  refresh();
}
if (typeof document !== "undefined") start();
</script>
</html>
"""
