"""Ends of a job that are no crash: one line on stderr and an exit status, told by one rank, and by torchrun at its end.

| status | |
|---|---|
| 0 | finished |
| 1 | crashed, or another rank did |
| 2 | the user's input is wrong |
| 74 | the disk is full, read-only or broken |
| 75 | stopped by a signal; what was done is saved, and the same command continues |
| 76 | a loss or a gradient is not finite |
| 130 | ended at once by a second Ctrl-C |
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DISK, STOPPED, NOT_FINITE, INTERRUPTED = 74, 75, 76, 130
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
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
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": words}))


class Ended(SystemExit):
    """End of the job that is no crash; `line` is for the user."""

    def __init__(self, status: int, line: str, *, agreed: bool = True) -> None:
        """Agreed: every rank raises it."""
        super().__init__(status)
        self.status, self.line, self.agreed = status, line, agreed

    def __str__(self) -> str:
        return self.line


def end_of(error: BaseException, folder: Path, place: str | None) -> Ended | None:
    """Find the end of a job that an exception stands for; None: a crash.

    folder: of the run; place: of its last checkpoint.
    """
    if isinstance(error, Ended):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Ended(INTERRUPTED, "stopped by SIGINT at once: what was not saved is lost", agreed=False)
    disk = disk_error(error, folder)
    if disk is None:
        return None
    saved = "there is no checkpoint yet" if place is None else f"the last checkpoint is whole: {place}"
    reason = os.strerror(disk.errno or 0)
    return Ended(DISK, f"the disk of {folder}: {reason}; {saved}; make room, or have it writable again", agreed=False)


def disk_error(error: BaseException | None, folder: Path) -> OSError | None:
    """Find the trouble with the disk that an exception comes from; None where it comes from elsewhere.

    Writers of libraries hide the system's reason behind one of their own: the folder is tried then.
    """
    cause, hidden = error, False
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OF_DISKS:
            return cause
        hidden |= isinstance(cause, (OSError, RuntimeError)) and ("writ" in str(cause) or "iostream" in str(cause))
        cause = cause.__cause__ or cause.__context__
    if not hidden:
        return None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as found:
        return found
    return None
