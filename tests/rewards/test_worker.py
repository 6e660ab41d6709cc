"""The process that runs functions of the user's: whatever they do, the trainer has its answer in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsm_train.data.tasks import Task
from dsm_train.rewards import RewardConfig, RewardFunction
from dsm_train.rewards.grader import Grader
from dsm_train.rewards.outcome import Failed, Returned
from dsm_train.rewards.worker import Worker, find_source

MINE = """
import os, re, subprocess, sys, time, warnings


def process(completions, tasks):
    return [os.getpid() for _ in completions]


def loop(completions, tasks):
    while True:
        pass


def backtrack(completions, tasks):
    return [re.match("(a+)+$", "a" * 60 + "b") for _ in completions]  # centuries, in C


def starts_another(completions, tasks):
    other = subprocess.Popen(["sleep", "1000"])
    open(completions[0], "w").write(str(other.pid))
    other.wait()


def prints(completions, tasks):
    print("I say", completions[0])
    warnings.warn("I warn")
    return [0] * len(completions)


def leaves(completions, tasks):
    sys.exit("enough")


def ends(completions, tasks):
    os._exit(3)


def crashes(completions, tasks):
    os.kill(os.getpid(), 11)


def heavy(completions, tasks):
    return ["torch" in sys.modules or "numpy" in sys.modules]


def one(completions, tasks):
    return [1]


def scalar(completions, tasks):
    return 1


def words(completions, tasks):
    return ["1"] * len(completions)


def numbers(completions, tasks):
    return (value for value in [True, None, 3, 0.5])


def lines(completions, tasks):
    raise KeyError("two\\nlines")


class Checker:
    def score(completions, tasks):
        return [7]


value = 3
"""
OTHERS = """
def first(prompts, completions, **kw): return [0] * len(completions)
def second(completions, prompts=None, **kw): return [0] * len(completions)
def named(completions, *, tasks): return [0] * len(completions)
async def later(completions, tasks): return [0] * len(completions)
"""
EXIT, RAISE = (
    MINE.splitlines().index(line) + 1 for line in ('    sys.exit("enough")', '    raise KeyError("two\\nlines")')
)
NAMES = [line.split("(")[0][4:] for line in MINE.splitlines() if line.startswith("def ")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("x = 1\nreturn x\n")
    (tmp_path / "needy.py").write_text("import of_nobody\n")
    (tmp_path / "others.py").write_text(OTHERS)
    (tmp_path / "wrong.py").write_text("import os\n\nos.nothing\n")
    return tmp_path


@pytest.fixture
def worker(folder: Path) -> Iterator[Worker]:
    worker = Worker([f"mine:{name}" for name in NAMES], [str(folder)], timeout_seconds=0.5)
    yield worker
    worker.close()


def call(worker: Worker, name: str, *completions: str) -> Returned | Failed:
    return worker.call(NAMES.index(name), completions or ("a",), [Task(1, "q", "1")] * max(1, len(completions)))


def process_of(worker: Worker) -> int:
    outcome = call(worker, "process")
    assert isinstance(outcome, Returned) and outcome.values[0] is not None
    return int(outcome.values[0])


def runs(process: int) -> bool:
    """True unless a process has ended; one that waits to be reaped has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends_within(process: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while runs(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not runs(process)


@pytest.mark.parametrize("name", ["loop", "backtrack"])
def test_a_call_that_never_returns_is_stopped_and_the_next_one_served(name: str, worker: Worker) -> None:
    first = process_of(worker)
    assert first != os.getpid() and process_of(worker) == first  # a process of its own, kept
    began = time.monotonic()
    assert call(worker, name) == Failed("took longer than rewards.timeout_seconds = 0.5")
    assert time.monotonic() - began < 5 and not runs(first)
    assert process_of(worker) not in (first, os.getpid())


def test_what_a_function_started_ends_with_it(worker: Worker, tmp_path: Path) -> None:
    assert isinstance(call(worker, "starts_another", str(tmp_path / "pid")), Failed)
    assert ends_within(int((tmp_path / "pid").read_text()), 5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("leaves", f"mine.py:{EXIT}: SystemExit: enough"),
        ("lines", rf"mine.py:{RAISE}: KeyError: 'two\nlines'"),
        ("one", "returned 1 values for 2 completions"),
        ("scalar", "returned 1 (int), not a list of 2 numbers"),
        ("words", "returned '1' (str) among its values, not a number or None"),
        ("ends", "the process of the reward functions exited with status 3"),
        ("crashes", "the process of the reward functions was ended by SIGSEGV"),
    ],
)
def test_what_goes_wrong_in_a_function_is_one_line(name: str, reason: str, worker: Worker) -> None:
    outcome = call(worker, name, "a", "b")
    assert isinstance(outcome, Failed) and outcome.reason.endswith(reason), outcome
    assert len(outcome.reason.splitlines()) == 1
    assert isinstance(call(worker, "process"), Returned)


def test_values_of_any_kind_of_number_arrive_as_numbers(worker: Worker) -> None:
    outcome = call(worker, "numbers", *"abcd")
    assert outcome == Returned((1.0, None, 3.0, 0.5)) and isinstance(outcome, Returned)
    assert [type(value) for value in outcome.values] == [float, type(None), float, float]
    assert call(worker, "heavy") == Returned((0.0,))


def test_what_a_function_prints_reaches_the_terminal(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    call(worker, "prints", "hello")
    printed = capfd.readouterr()
    assert printed.out == "I say hello\n" and "UserWarning: I warn" in printed.err


def test_a_batch_larger_than_a_pipe_goes_through(worker: Worker) -> None:
    outcome = call(worker, "process", *["x" * 1000] * 5000)
    assert isinstance(outcome, Returned) and len(outcome.values) == 5000


def test_a_closed_worker_has_no_process_and_starts_again(worker: Worker) -> None:
    first = process_of(worker)
    worker.close()
    assert not runs(first) and process_of(worker) != first


@pytest.mark.parametrize(
    ("called", "reason"),
    [
        ("nowhere:f", "no module nowhere: looked in {folder} and the installed packages"),
        ("nowhere.inside:f", "no module nowhere: looked in"),
        ("mine:missing", "module mine ({folder}/mine.py) has no missing: it has process, loop, backtrack"),
        ("mine:missing", "ends, crashes, ..."),
        ("mine:value", "mine:value is no function, but of type int"),
        ("mine:Checker.nothing", "has no Checker.nothing: it has score"),
        ("broken:f", "{folder}/broken.py:2: SyntaxError: 'return' outside function"),
        ("needy:f", "{folder}/needy.py:1: ModuleNotFoundError: No module named 'of_nobody'"),
        ("wrong:f", "{folder}/wrong.py:3: AttributeError: module 'os' has no attribute 'nothing'"),
        ("mine:one", "returned 1 values for 2 completions"),
        ("mine:leaves", f"{{folder}}/mine.py:{EXIT}: SystemExit: enough"),
        ("json:dumps", "must be f(completions, tasks); got f(obj, *, skipkeys=False"),
        ("others:first", "must be f(completions, tasks); got f(prompts, completions, **kw)"),
        ("others:second", "must be f(completions, tasks); got f(completions, prompts=None, **kw)"),
        ("others:named", "must be f(completions, tasks); got f(completions, *, tasks)"),
        ("others:later", "must be f(completions, tasks); got async def"),
    ],
)
def test_functions_are_tried_before_they_are_needed(called: str, reason: str, folder: Path) -> None:
    functions = (RewardFunction("numeric"), RewardFunction(call=called))
    grader = Grader(RewardConfig(functions), [str(folder)])
    with pytest.raises(ValueError) as error:
        grader.try_functions(Task(1, "q", "1"))
    words = str(error.value)
    assert words.startswith(f"item 2 of rewards.functions, {called}: ")
    assert reason.format(folder=folder) in words and "child.py" not in words, words


def test_a_function_that_works_is_tried_with_a_right_completion(folder: Path) -> None:
    (folder / "right.py").write_text(
        "def f(completions, tasks):\n    assert completions == ['so 2', 'so 2'], completions\n    return [1.0, None]\n"
    )
    grader = Grader(RewardConfig((RewardFunction(call="right:f"),)), [str(folder)])
    assert grader.try_functions(Task(1, "1+1", "2", "so 2")) == []
    grader.close()


def test_a_function_without_a_verdict_on_a_right_completion_is_told_of(folder: Path) -> None:
    (folder / "unsure.py").write_text("def f(completions, tasks):\n    return [None, float('nan')]\n")
    grader = Grader(RewardConfig((RewardFunction(call="unsure:f"),)), [str(folder)])
    (note,) = grader.try_functions(Task(1, "1+1", "2", "so 2"))
    assert note.startswith("item 1 of rewards.functions, unsure:f: no verdict on")
    grader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the process with its parent on Linux alone")
def test_a_killed_run_leaves_no_process_that_never_returns(folder: Path) -> None:
    program = f"""
from dsm_train.rewards.worker import Worker, find_source
worker = Worker(["mine:process", "mine:backtrack"], [{str(folder)!r}], 1000)
print(int(worker.call(0, ["a"], [None]).values[0]), flush=True)
worker.call(1, ["a"], [None])
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    process = int(run.stdout.readline())
    time.sleep(0.2)  # it is in the second call
    assert runs(process)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert ends_within(process, 5)


def test_the_file_of_a_module_is_found_without_importing_it(tmp_path: Path) -> None:
    package = tmp_path / "mine" / "inner"
    package.mkdir(parents=True)
    for file in (tmp_path / "plain.py", package / "rewards.py", package / "__init__.py"):
        file.write_text("raise RuntimeError\n")
    assert find_source("plain", [str(tmp_path)]) == tmp_path / "plain.py"
    assert find_source("mine.inner.rewards", [str(tmp_path)]) == package / "rewards.py"
    assert find_source("json.decoder", [str(tmp_path)]) == Path(json.decoder.__file__)
    assert find_source("gone", [str(tmp_path)]) is None and find_source("plain.inner", [str(tmp_path)]) is None
