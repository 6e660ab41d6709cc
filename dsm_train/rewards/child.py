"""The process that runs functions of the user's: its side of worker.py. It imports neither torch nor the trainer.

It answers each request with what came of it, and ends when the trainer closes the connection or is gone.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from dsm_train.rewards.outcome import Failed, Returned

_PR_SET_PDEATHSIG = 1


def serve(descriptor: int, parent: int, calls: Sequence[str], folders: Sequence[str]) -> None:
    """Import the functions, say that this is done, and answer requests (index of a function, its arguments).

    descriptor: of the connection to the process `parent`; folders: searched for modules before all others.
    """
    _end_with(parent)
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    sys.path[:0] = folders
    loaded = [_load(call, folders) for call in calls]
    with suppress(EOFError, OSError):  # the trainer closed the connection
        connection.send("ready")
        while True:
            index, arguments = connection.recv()
            function = loaded[index]
            connection.send(_call(function, arguments, folders) if callable(function) else function)


def _end_with(parent: int) -> None:
    """End this process when its parent ends, even in the middle of code that never returns. Linux alone can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(0)


def _load(call: str, folders: Sequence[str]) -> Callable[..., Any] | Failed:
    """Import module:function, or say why that does not work."""
    module_name, _, attribute = call.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            return Failed(f"no module {error.name}: looked in {', '.join(folders)} and the installed packages")
        return Failed(_last_line(error, folders))
    for name in attribute.split("."):
        home, found = found, getattr(found, name, None)
        if found is None:
            functions = [key for key, value in vars(home).items() if callable(value) and not key.startswith("_")]
            place = getattr(sys.modules[module_name], "__file__", None) or "without a file"
            shown = ", ".join([*functions[:8], *(["..."] if len(functions) > 8 else [])])
            has = f"it has {shown}" if functions else "it has no function"
            return Failed(f"module {module_name} ({place}) has no {attribute}: {has}")
    if not callable(found):
        return Failed(f"{call} is no function, but of type {type(found).__name__}")
    return found if (wrong := _wrong_signature(found)) is None else Failed(wrong)


def _wrong_signature(function: Callable[..., Any]) -> str | None:
    """Say why a function cannot be called on completions and tasks; None where it can, or where nobody knows."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "must be f(completions, tasks); got async def"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return None
    names = (*signature.parameters, "", "")[:2]
    try:
        signature.bind([], [])
        others = names[0] == "prompts" or names[1] in ("prompts", "completions")  # another library's order
    except TypeError:
        others = True
    return f"must be f(completions, tasks); got f{signature}" if others else None


def _call(function: Callable[..., Any], arguments: Sequence[Any], folders: Sequence[str]) -> Returned | Failed:
    """Call a function on lists of one length, and check that it returned a number or None for each item."""
    try:
        returned, count = function(*arguments), len(arguments[0])
        if not hasattr(returned, "__iter__") or isinstance(returned, (str, bytes, dict)):
            return Failed(f"returned {_kind(returned)}, not a list of {count} numbers")
        values = list(returned)
        if len(values) != count:
            return Failed(f"returned {len(values)} values for {count} completions")
        for value in values:
            if value is not None and (isinstance(value, (str, bytes)) or not hasattr(value, "__float__")):
                return Failed(f"returned {_kind(value)} among its values, not a number or None")
        return Returned(tuple(None if value is None else float(value) for value in values))
    except BaseException as error:  # SystemExit too: a function does not end the run
        return Failed(_last_line(error, folders))


def _kind(value: Any) -> str:
    return f"{value!r:.40} ({type(value).__name__})"


def _last_line(error: BaseException, folders: Sequence[str]) -> str:
    """Write an exception as file:line: Error: message, where the user's own code is in the trace if it is at all."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    files = [(file, line) for file, line in places if file != __file__ and not file.startswith("<frozen ")]
    users = [(file, line) for file, line in files if _is_users(file, folders)]
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return "".join(f"{file}:{line}: " for file, line in (users or files)[-1:]) + message


def _is_users(file: str, folders: Sequence[str]) -> bool:
    return any(file.startswith(f"{folder}{os.sep}") for folder in folders) and "site-packages" not in file
