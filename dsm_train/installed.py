"""Start-up check of the installation; imports nothing but the standard library, for it precedes all other imports."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_KERNELS = "triton_kernels"
_INSTALL = "in this project's checkout, pip install --no-build-isolation --force-reinstall --no-deps ."


def require_own_kernels() -> None:
    """Raise `ValueError` unless `import triton_kernels` gives this project's package.

    Other distributions install a package of the same name, before ours on the path or over its very files: the import
    of an op would then fail far from the cause. Ours is known by its `__init__.py`, which registers the ops.
    """
    spec = importlib.util.find_spec(_KERNELS)
    if spec is None or spec.origin is None:
        raise ValueError(f"{_KERNELS} is not installed beside dsm_train: {_INSTALL}")
    found = Path(spec.origin)
    if f"from {_KERNELS}._register import" not in found.read_text(encoding="utf-8"):
        raise ValueError(f"{_KERNELS} is another project's package, found at {found.parent}: {_remedy(found.parent)}")


def _remedy(package: Path) -> str:
    """Say how to take the other package away: pip where it was installed by pip, the search path otherwise."""
    from importlib import metadata  # slow to import, and needed only here

    others = []
    for distribution in metadata.distributions(path=[str(package.parent)]):
        contents = {file.parts[0] for file in distribution.files or ()}
        if _KERNELS in contents and "dsm_train" not in contents:
            others.append(distribution.name)
    if others:
        return f"pip uninstall {' '.join(sorted(others))}; then, {_INSTALL}"
    return "take its folder off PYTHONPATH, or start from another folder"
