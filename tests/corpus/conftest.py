"""The corpus is being built and needs the extra `corpus`, which `make test` does not install yet.

Without it nothing here is collected. To have it: pip install --no-build-isolation -c constraints.txt '.[train,corpus]'.
"""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = ("datatrove", "fastwarc", "fasttext", "resiliparse", "selectolax", "xxhash", "zstandard")
collect_ignore_glob = [] if all(find_spec(package) for package in PACKAGES) else ["test_*.py"]
