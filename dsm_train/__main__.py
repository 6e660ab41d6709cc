"""Entry point of the command line: `python -m dsm_train <stage> --config recipes/x.yaml [key=value ...]`."""

from __future__ import annotations

import os
import signal
import sys
from importlib import metadata
from importlib.util import find_spec

from dsm_train import __version__
from dsm_train.installed import require_own_kernels
from dsm_train.stages import table

PACKAGES = ("megatron", "pyarrow", "transformers", "tyro")
"""Packages of the extra `train` that a stage imports, unless its row says otherwise."""


def main(argv: list[str] | None = None) -> None:
    """Run the stage that the arguments name; `dsm-train` on the command line."""
    # OpenMP's threads spin while they wait, which starves every other process of the machine, and is starved by them:
    # asleep, a step is as fast alone and several times faster beside others. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments) and hasattr(signal, "SIGPIPE") and argv is None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback
    if not arguments or arguments[0] in ("-h", "--help"):
        print(table.usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(versions())
        return
    name, rest = arguments[0], arguments[1:]
    try:
        require_own_kernels()
        stage, others = table.find(name), table.others(name)
        if not stage.has_steps:
            asks = bool({"-h", "--help"} & set(rest))
            _check_packages(PACKAGES if stage.needs_trainer and not asks else ("tyro",))
    except ValueError as error:
        print(f"dsm-train: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if stage.has_steps:
        stage.run(rest, others)
        return
    prog = f"dsm-train {name}"
    if argv is None and "RANK" not in os.environ:  # a rank that waits for others hears nothing, and has to end
        _end_at_signals(prog)
    from dsm_train.cli import load_config, user_errors

    with user_errors(prog):
        config = load_config(stage.configuration(), rest, prog=prog, description=stage.sentence, others=others)
    stage.run(config)


def _end_at_signals(prog: str) -> None:
    """End with a line when a signal comes; a stage that trains saves instead, once it has begun."""

    def end(number: int, frame: object) -> None:
        os.write(2, f"{prog}: stopped by {signal.Signals(number).name}\n".encode())
        raise SystemExit(75)  # as cli/errors.py has it, whose import takes a while

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def versions() -> str:
    """Name the versions of what a run depends on, from their metadata: torch is not imported."""
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [f"dsm-train {__version__}", f"python {python}"]
    for package in ("torch", "megatron-core"):
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    return "\n".join(lines)


def _check_packages(packages: tuple[str, ...]) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(f"the trainer needs {', '.join(missing)}: pip install --no-build-isolation '.[train]'")


if __name__ == "__main__":
    main()
