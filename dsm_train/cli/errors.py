"""Errors of the user: one line on stderr and exit status 2, told by one rank, and by torchrun at its end."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PATIENCE = 10.0
"""Seconds that a rank waits for torchrun to end it, because another rank has told the same error."""


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Turn a ValueError of the block into the line `prog: message` on stderr and exit status 2.

    Wrap the preparation of a run in it (configuration, data, layout, output folder) and never the training, whose
    crashes keep their traceback. With DSM_TRACEBACK=1 the preparation keeps it as well. Rank 0 prints; other ranks wait
    for torchrun to end them, and print only if it does not, since their error is then their own.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("DSM_TRACEBACK"):
            raise
        elsewhere = [os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK")]
        time.sleep(_PATIENCE * sum(elsewhere))
        line = f"{prog}: {' '.join(str(error).split())}"
        print(line, file=sys.stderr, flush=True)
        tell_torchrun(line)
        raise SystemExit(2) from None


def tell_torchrun(line: str) -> None:
    """Leave this rank's last words where torchrun looks for them, which prints them at the end of its own report."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        words = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": words}))
