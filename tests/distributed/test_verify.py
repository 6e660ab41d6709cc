"""The same optimizer step in every layout, on the made-up batch; and what is 1 % wrong in a layout is found there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import verify_worker
from ranks import run_ranks
from verify_worker import CLASSES, FOUR_RANKS, LATER, REPLICATED, TWO_RANKS, cases

SOUND = [*TWO_RANKS, *FOUR_RANKS]
FAULTY = [name for world in (2, 4) for name in cases(world) if "!" in name]
Lines = dict[str, dict[str, Any]]
"""The lines of a comparison by what they compare."""


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lines]:
    """Each case's comparison with one rank; all cases of a number of ranks in one set of processes."""
    out = tmp_path_factory.mktemp("verify")
    for world in (1, 2, 4):
        run_ranks(verify_worker.main, world, out)
    return {
        name: {line["name"]: line for line in json.loads((out / f"{name}.json").read_text())} for name in SOUND + FAULTY
    }


@pytest.mark.parametrize("name", SOUND)
def test_the_step_is_the_same(name: str, comparisons: dict[str, Lines]) -> None:
    lines = comparisons[name]
    tied = (TWO_RANKS | FOUR_RANKS)[name].model == "tied"
    first = "step 1: " if name.endswith("_stages") else ""
    assert {f"{first}{what}" for what in ("loss", "gradient norm", "gradient final_layernorm")} <= lines.keys()
    assert (f"{first}gradient output_layer" in lines) != tied
    for what, line in lines.items():
        assert line["holds"], line
        if "gradient" in what:
            assert line["tolerance"] <= (1e-3 if first else 1e-5)
            assert line["there"] > 1e-4, line  # there is something to compare


@pytest.mark.parametrize("name", FAULTY)
def test_a_wrong_step_is_found(name: str, comparisons: dict[str, Lines]) -> None:
    lines, fault = comparisons[name], name.split("!")[1]
    wrong = {what: line["difference"] for what, line in lines.items() if not line["holds"]}
    if fault in CLASSES:
        # the class that is off, the norm of all gradients, and nothing else
        kinds = {what for what, line in lines.items() if CLASSES[fault].removesuffix(".weight") in line["worst"]}
        assert wrong.keys() == {what for what in kinds if what.startswith("gradient ")} | {"gradient norm"}
        assert all(abs(value - 0.01) < 1e-3 for what, value in wrong.items() if what != "gradient norm")
    elif fault in REPLICATED:
        apart = {"gradient norm", "updated weights", "copies on several ranks"}
        assert wrong.keys() - apart == {f"gradient {kind}" for kind in REPLICATED[fault]}
        assert "copies on several ranks" in wrong
    elif fault in LATER:
        assert wrong and all(what.startswith("step 2: ") for what in wrong)
        assert ("step 2: learning rate" in wrong) == (fault == "schedule")
    elif fault in ("idle", "rate"):
        assert wrong.keys() == {"updated weights"} | ({"learning rate"} if fault == "rate" else set())
        assert wrong["updated weights"] == pytest.approx(1.0 if fault == "idle" else 0.01, rel=0.02)
    elif name == "dp!rank" or name == "dp_silent!rank":
        assert wrong.keys() == {"copies on several ranks"}  # the main rank's own gradient is right
    else:
        assert len([what for what in wrong if what.startswith("gradient")]) > 5
