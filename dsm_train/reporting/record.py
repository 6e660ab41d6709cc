"""Record of a start of a run: command, code, versions, device, layout and seed."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dsm_train import __version__
from dsm_train.config import ParallelConfig

CHANGES = "changes"
"""Folder of the patches, within that of the run."""
PACKAGES = ("torch", "megatron-core", "triton", "transformers")
SOURCES = ("dsm_train", "triton_kernels", "csrc")
"""Folders whose files run; one that git does not know is a change as well."""
_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 5.0
"""Time limit of a call of git."""
_MOST = 2**20
"""Bytes of the largest patch that is kept."""


@dataclass(frozen=True)
class Code:
    """State of a git work tree; None: not known, or not one that holds this code."""

    commit: str | None = None
    changed: tuple[str, ...] | None = None
    """Files that differ from the commit."""
    patch: str | None = None
    """Difference from the commit; None as well where there is none, and where it is too large to keep."""

    @classmethod
    def at(cls, root: Path) -> Code:
        """Read the work tree that tracks the package in `root`, whatever the current folder is; never fails."""
        if _git(root, "ls-files", "--error-unmatch", "--", "dsm_train/__init__.py") is None:
            return cls()
        commit = _git(root, "rev-parse", "--verify", "HEAD")
        tracked = _git(root, "diff", "--name-only", "--relative", "-z", "HEAD", "--", ".")
        new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *SOURCES)
        if commit is None or tracked is None or new is None:
            return cls(None if commit is None else commit.strip())
        names = [[name for name in text.split("\0") if name] for text in (tracked, new)]
        return cls(commit.strip(), tuple(names[0] + names[1]), _patch(root, *names))

    @property
    def patch_name(self) -> str | None:
        """Name of the patch, within the folder of the run: the same changes have the same name."""
        if self.patch is None:
            return None
        return f"{CHANGES}/{hashlib.sha256(_encoded(self.patch)).hexdigest()[:12]}.patch"

    def save(self, run: Path) -> None:
        """Write the patch, if there is one; `git apply` in a checkout of the commit gives the code back."""
        if self.patch is not None and self.patch_name is not None:
            file = run / self.patch_name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(_encoded(self.patch))


@cache
def own_code() -> Code:
    """Read the work tree of the code that runs, once: what is changed later does not run."""
    return Code.at(_ROOT)


@dataclass(frozen=True)
class Layout:
    """Layout of a run in numbers."""

    ranks: int | None = None
    nodes: int | None = None
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    dp: int | None = None
    sp: bool | None = None
    distributed_optimizer: bool | None = None

    def __str__(self) -> str:
        sizes = [(name, getattr(self, name)) for name in ("tp", "pp", "vpp", "dp")]
        parts = [f"{name} {size}" for name, size in sizes if size not in (None, 1)]
        parts += ["sp"] * bool(self.sp) + ["distributed optimizer"] * bool(self.distributed_optimizer)
        nodes = f" on {self.nodes} nodes" if self.nodes not in (None, 1) else ""
        return f"{self.ranks} rank(s){nodes}" + (f": {', '.join(parts)}" if parts else "")


@dataclass(frozen=True)
class Record:
    """Start of a run, for a person who asks later what ran; None: not known."""

    time: str | None = None
    """Date, time and offset from UTC, as ISO 8601 writes them."""
    host: str | None = None
    directory: str | None = None
    """Folder that the command was given in."""
    command: str | None = None
    """Command for a shell; torchrun's own options as far as its ranks know them."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    commit: str | None = None
    """Git commit of the code that ran."""
    clean: bool | None = None
    """True when the code was that of the commit."""
    changed: int | None = None
    """Files that differed from it."""
    patch: str | None = None
    """File of the difference, within the folder of the run."""
    devices: tuple[str, ...] = ()
    """GPUs of all ranks, or the CPU of the main rank's machine."""
    layout: Layout = field(default_factory=Layout)
    seed: int | None = None

    @classmethod
    def now(cls, parallel: ParallelConfig, seed: int, *, ranks: int = 1, gpus: Sequence[str] = ()) -> Record:
        """Record the start that this process is; never fails. For the main rank.

        ranks: of the whole run; gpus: the name of each rank's, none on the CPU.
        """
        code = own_code()
        return cls(
            time=datetime.now().astimezone().isoformat(timespec="seconds"),
            host=socket.gethostname(),
            directory=_directory(),
            command=command(sys.argv, os.environ),
            versions={"dsm": __version__, "python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
            commit=code.commit,
            clean=None if code.changed is None else not code.changed,
            changed=None if code.changed is None else len(code.changed),
            patch=code.patch_name,
            devices=tuple(f"{n} x {name}" for name, n in Counter(gpus).items()) or (_cpu(),),
            layout=Layout(
                ranks=ranks,
                nodes=_nodes(os.environ),
                tp=parallel.tp,
                pp=parallel.pp,
                vpp=parallel.vpp,
                dp=parallel.replicas(ranks),
                sp=parallel.sp,
                distributed_optimizer=parallel.distributed_optimizer,
            ),
            seed=seed,
        )

    @classmethod
    def of(cls, values: object) -> Record:
        """Read a record that was written as JSON, by an earlier or a later version too: the keys that are known."""
        record = _known(cls, values)
        versions, devices = record.get("versions"), record.get("devices")
        record["versions"] = versions if isinstance(versions, Mapping) else {}
        record["devices"] = tuple(map(str, devices)) if isinstance(devices, (list, tuple)) else ()
        record["layout"] = Layout(**_known(Layout, record.get("layout")))
        return cls(**record)


def command(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Write down the command that started this process, or torchrun with it, for a shell."""
    words = ["dsm-train"]
    if "TORCHELASTIC_RUN_ID" in environment:
        nodes = _nodes(environment)
        words = ["torchrun", *(["--standalone"] if nodes in (None, 1) else ["--nnodes", str(nodes)])]
        words += ["--nproc-per-node", environment.get("LOCAL_WORLD_SIZE", "1")]
        restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
        words += [] if restarts == "0" else ["--max-restarts", restarts]
        words += ["-m", "dsm_train"]
    elif Path(argv[0]).name == "__main__.py":
        words = ["python", "-m", "dsm_train"]
    return shlex.join([*words, *argv[1:]])


def _nodes(environment: Mapping[str, str]) -> int | None:
    """Count the machines: torchrun starts equally many ranks on each, and says how many."""
    ranks = environment.get("WORLD_SIZE", "1")
    try:
        return int(ranks) // int(environment.get("LOCAL_WORLD_SIZE", "1" if ranks == "1" else "none"))
    except (ValueError, ZeroDivisionError):
        return None


def _patch(root: Path, tracked: list[str], new: list[str]) -> str | None:
    """Write the difference from the commit; None where there is none, it is too large, or git does not tell."""
    plain = ("diff", "--no-ext-diff", "--no-textconv", "--no-color")
    texts = [_git(root, *plain, "--relative", "HEAD", "--", ".")] if tracked else []
    for name in new[:100]:
        texts.append(_git(root, *plain, "--no-index", "--", os.devnull, name, fine=(0, 1)))
    known = [text for text in texts if text is not None]
    whole = "".join(known)
    return whole if whole and len(known) == len(tracked[:1]) + len(new) and len(_encoded(whole)) <= _MOST else None


def _git(root: Path, *arguments: str, fine: tuple[int, ...] = (0,)) -> str | None:
    """Return the output of git about the work tree of `root`; None where it fails, is not there, or hangs.

    The code of this tree runs already, whoever owns it: no danger comes from its configuration.
    """
    told = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # GIT_DIR: another tree
    call = ["git", "-C", str(root), "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(
            call,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            env=told | {"GIT_OPTIONAL_LOCKS": "0"},
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="surrogateescape") if done.returncode in fine else None


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _known(cls: type, values: object) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {}
    return {item.name: values[item.name] for item in fields(cls) if item.name in values}


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Name the processor, with the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {cores} core(s)"
