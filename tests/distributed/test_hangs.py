"""Ranks that sleep, stop, die or raise: the run ends soon, with a line that names the rank and its phase."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import hang_worker
import pytest
from hang_worker import SCENARIOS, TIMEOUT
from ranks import run_ranks


@dataclass(frozen=True)
class Ends:
    """How the three ranks of a scenario ended: exit status (None: it did not), seconds, and what each printed."""

    status: list[int | None]
    seconds: float
    printed: list[str]

    @property
    def lines(self) -> list[str]:
        """The watchdogs' lines, without torch's own words on a broken connection."""
        return [line for text in self.printed for line in text.splitlines() if line.startswith("dsm-train grpo: ")]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ends]:
    """All scenarios, which run side by side: most of their time is waiting."""
    out = tmp_path_factory.mktemp("hangs")
    run_ranks(hang_worker.main, 1, out, *SCENARIOS, timeout=120)
    results = json.loads((out / "results.json").read_text())
    return {
        name: Ends(
            [end and end[0] for end in ranks],
            max((end[1] for end in ranks if end), default=0.0),
            [(out / f"{name}-{rank}.txt").read_text() for rank in range(len(ranks))],
        )
        for name, ranks in results.items()
    }


WAIT = r'while ranks 0, 2 \(host \S+\) wait in "{}": ended'
BUSY = r'rank 1 \(host \S+\) has been in "update of step 2" without progress for \d+ s ' + WAIT
SILENT = (
    r'rank {} \(host \S+\) was in "update of step 2" and has given no sign of life for \d+ s{}: ended\. Killed, stop'
)
FAILED = r'rank {} \(host \S+\) failed in "scoring of step 2": {}: ended'


@pytest.mark.parametrize(
    ("name", "status", "line"),
    [
        (
            "late_for_the_next_phase",
            [1, 1, 1],
            BUSY.format("rollout of step 3") + r"\. Alive, at .*hang_worker\.py:\d+",
        ),
        ("late_within_a_phase", [1, 1, 1], BUSY.format("update of step 2") + r"\. Alive, .*Raise parallel\.timeout_m"),
        ("stopped", [1, 1, None], SILENT.format(2, r' while ranks 0-1 \(host \S+\) wait in "update of step 2"')),
        ("killed_in_a_collective", [-9, 1, 1], SILENT.format(0, "")),
        ("killed_while_others_work", [1, -9, 1], SILENT.format(1, "")),
        ("raises", [1, 1, 1], FAILED.format(1, "ValueError: the reward is not a number")),
        ("raises_in_a_collective", [1, 1, 1], FAILED.format(1, "RuntimeError: .*invalid root rank: 3")),
        ("exits", [1, 1, 3], FAILED.format(2, "exit status 3")),
        (
            "deadlock",
            [1, 1, 1],
            r"all ranks wait for one another, for \d+ s: "
            r'rank 0 \(host \S+\) is in "rollout of step 3" at \S+ \(recv\), '
            r'ranks 1-2 \(host \S+\) are in "update of step 2" at \S+ \(recv\): ended\. .* cannot be told',
        ),
        ("finished", [1, None, 1], r"rank 1 finished " + WAIT.format("update of step 2").replace(": ended", ", for")),
    ],
)
def test_the_line_names_the_rank_and_its_phase(
    name: str, status: list[int | None], line: str, ends: dict[str, Ends]
) -> None:
    end = ends[name]
    assert end.status == status
    assert len(end.lines) == 1, end.printed  # one for the node, whoever is left to print it
    assert re.match("dsm-train grpo: " + line, end.lines[0]), end.lines[0]
    assert end.seconds < TIMEOUT + 7


@pytest.mark.parametrize(
    ("name", "raises"), [("raises", "second line"), ("raises_in_a_collective", "invalid root rank")]
)
def test_the_rank_that_raises_keeps_its_traceback(name: str, raises: str, ends: dict[str, Ends]) -> None:
    assert ["Traceback" in text for text in ends[name].printed] == [False, True, False]
    assert raises in ends[name].printed[1]


@pytest.mark.parametrize(
    ("name", "what"),
    [("store_ends", r"has gone \(DistNetworkError: .*\)"), ("store_stops", r"has not answered for \d+ s")],
)
def test_a_store_that_is_gone_ends_the_run(name: str, what: str, ends: dict[str, Ends]) -> None:
    end = ends[name]
    assert end.status == [1, 1, 1]
    for rank, line in enumerate(end.lines):  # nobody can agree on who prints
        assert re.match(rf"dsm-train grpo: the run's store on the first node {what}: ", line), line
        assert f"rank {rank} (host " in line and 'was in "update of step 2": ended' in line
    assert len(end.lines) == 3 and end.seconds < TIMEOUT + 7


@pytest.mark.parametrize("name", ["works", "computes"])
def test_waiting_that_is_no_hang(name: str, ends: dict[str, Ends]) -> None:
    """For work of unknown length, for work that makes progress; and work for which nobody waits."""
    assert ends[name].status == [0, 0, 0] and ends[name].printed == [""] * 3
    assert ends[name].seconds > TIMEOUT + 1
