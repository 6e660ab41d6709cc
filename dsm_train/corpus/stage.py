"""Stage `corpus` of the command line: `python -m dsm_train corpus <step> --config FILE [key=value ...]`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dsm_train.stages.table import Stage

PACKAGES = tuple("datatrove fastwarc fasttext pyarrow regex resiliparse tokenizers tyro xxhash zstandard".split())
"""Packages that the steps import, from the extras `train` and `corpus`."""


@dataclass(frozen=True)
class Step:
    """Step of the corpus: its name, the function that runs it, and what it does."""

    name: str
    module: str
    function: str
    description: str
    needs: tuple[str, ...] = ()
    """Values of the configuration that have no default and are needed."""
    reads: tuple[str, ...] = ()
    """Keys of the configuration whose files and folders have to exist."""
    recipe: Path | None = None
    """Defaults of the step, below the recipe that a user gives."""


STEPS = (
    Step(
        "demo",
        "demo.run",
        "run",
        "Make a small synthetic web with known truth, run all steps on it, and show what was found.",
        recipe=Path(__file__).parent / "demo" / "demo.yaml",
    ),
    Step(
        "extract",
        "text.extract",
        "run",
        "WARC and WET files (extract.inputs) to pages of text with mathematics as LaTeX.",
        ("extract.inputs",),
    ),
    Step(
        "dedup",
        "cleaning.dedup",
        "run",
        "Keep one page of each URL, of each text, and of each group of near-duplicates.",
    ),
    Step(
        "classify",
        "mining.rounds",
        "classify",
        "Train the classifier of round 1 and score every page; no page is collected.",
        ("rounds.seeds",),
        ("rounds.seeds", "tokenizer.path"),
    ),
    Step(
        "rounds",
        "mining.rounds",
        "run",
        "Rounds of: train, score, collect the best pages up to a budget, find domains, annotate.",
        ("rounds.seeds",),
        ("rounds.seeds", "tokenizer.path", "domains.rules", "domains.annotations"),
    ),
    Step(
        "annotate",
        "mining.rounds",
        "annotate_step",
        "Write the page on which a person marks the URLs of mathematical domains.",
    ),
    Step(
        "decontaminate",
        "cleaning.decontaminate",
        "run",
        "Remove what matches the questions and answers of benchmarks.",
        ("decontaminate.benchmarks",),
        ("decontaminate.benchmarks",),
    ),
    Step(
        "tokenise",
        "tokenise",
        "run",
        "Write Megatron's indexed dataset and its manifest.",
        ("tokenizer.path",),
        ("tokenizer.path",),
    ),
)
RUN = ("extract", "dedup", "rounds", "decontaminate", "tokenise")
"""The steps of `corpus run`, in order."""


def main(arguments: Sequence[str], others: Sequence[Stage] = ()) -> None:
    """Run `corpus STEP [--config FILE] [key=value ...]`; errors are one line on stderr and exit status 2.

    `others`: the other stages, whose keys a shared recipe may hold.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    known = {step.name: step for step in STEPS}
    if name not in known and name != "run":
        near = difflib.get_close_matches(name, [*known, "run"], n=1)
        _refuse(f"{name} is no step" + (f"; did you mean {near[0]}?" if near else f": {' '.join(known)} run"))
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        _refuse(f"the corpus needs {', '.join(missing)}: pip install --no-build-isolation '.[train,corpus]'")
    steps = [known[step] for step in (RUN if name == "run" else (name,))]
    _run(f"dsm-train corpus {name}", steps, rest, others)


def _run(prog: str, steps: Sequence[Step], arguments: Sequence[str], others: Sequence[Stage]) -> None:
    from dsm_train.cli import load_config, user_errors
    from dsm_train.corpus.config import CorpusConfig

    if steps[0].recipe is not None:
        arguments = ["--config", str(steps[0].recipe), *arguments]
    description = " ".join(step.description for step in steps) if len(steps) == 1 else "All steps: " + ", ".join(RUN)
    with user_errors(prog):
        config = load_config(CorpusConfig, arguments, prog=prog, description=description, others=others)
        _check(steps, config)
        try:
            for step in steps:
                module = importlib.import_module(f"dsm_train.corpus.{step.module}")
                _show(step, getattr(module, step.function)(config))
        except OSError as error:
            raise ValueError(
                f"{error.filename or 'a file'}: {error.strerror or error}: give a path that can be used"
            ) from error
        except KeyboardInterrupt:
            print(
                f"\n{prog}: stopped; finished shards are kept, and the same command goes on from there", file=sys.stderr
            )
            raise SystemExit(130) from None


def _check(steps: Sequence[Step], config: Any) -> None:
    """Raise ValueError at once for a value or file that would be missed after hours."""

    def value(key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    for step in steps:
        for key in step.needs:
            if not value(key):
                raise ValueError(f"{key} is needed by the step {step.name}: add {key}=VALUE or set it in the recipe")
        for key in step.reads:
            named = value(key) or ()
            for path in map(Path, named if isinstance(named, tuple) else (named,)):
                if not path.exists():
                    raise ValueError(f"{key}: there is no file or folder {str(path)!r}: correct the path")


def _show(step: Step, report: Any) -> None:
    """Print the counts of a step that reports them."""
    from dsm_train.corpus.engine.engine import StepReport
    from dsm_train.corpus.engine.progress import duration

    if isinstance(report, StepReport):
        counts = ", ".join(f"{name} {count:,}" for name, count in report.counts.items())
        print(f"{step.name}: {counts} ({report.shards} shards, {duration(report.seconds)})", flush=True)


def _refuse(message: str) -> NoReturn:
    print(f"dsm-train corpus: {message}", file=sys.stderr)
    raise SystemExit(2)


def _usage() -> str:
    width = max(len(step.name) for step in STEPS)
    steps = "\n".join(f"  {step.name:<{width}}  {step.description}" for step in STEPS)
    return f"""usage: dsm-train corpus <step> [--config FILE] [key=value ...]

From Common Crawl to training tokens, in rounds, as DeepSeekMath did (arXiv:2402.03300, section 2.1). Steps:
{steps}
  {"run":<{width}}  {", ".join(RUN)}: one after the other.

Each step reads what the one before wrote to run.out and writes a folder there, with report.json. A step that was
stopped goes on where it was when the same command is given again. dsm-train corpus <step> --help explains every key.
First try: dsm-train corpus demo"""
