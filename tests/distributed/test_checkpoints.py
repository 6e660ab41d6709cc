"""Checkpoints of models: the same bits in the layout that wrote them, the same step in every other."""

from __future__ import annotations

from pathlib import Path

import checkpoint_worker
import pytest
from checkpoint_worker import LAYOUTS
from ranks import run_ranks

WRITERS = ("one", "tp2", "pp2_vpp2", "dp2_sharded", "tp2_sp_dp2_sharded")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every model by every writer, each loaded again where it was written."""
    out = tmp_path_factory.mktemp("checkpoints")
    for layout in WRITERS:
        run_ranks(checkpoint_worker.save, LAYOUTS[layout][0], out, layout)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_continues_from_what_any_other_wrote(layout: str, written: Path) -> None:
    run_ranks(checkpoint_worker.resume, LAYOUTS[layout][0], written, layout, *WRITERS)
