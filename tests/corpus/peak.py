"""Peak memory of code that runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

# Not getrusage: its ru_maxrss starts with the peak of the process that started this one.
_PEAK = """
import sys
def peak_kibibytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""


def printed_by(code: str, *arguments: object) -> str:
    """Output of `code`, which can call `peak_kibibytes()` and finds the arguments in `sys.argv[1:]`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _PEAK + code, *map(str, arguments)]
    return subprocess.check_output(command, text=True, env=environment)
