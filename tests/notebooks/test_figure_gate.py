"""The figure gate: what nbval cannot compare, images, is compared by the data they were drawn from.

`make nbval` runs the notebooks into runs/scratch and then this file with PCAM_FIGURES=runs/scratch. Figures that rest
on trainings are left to the machine that trained: other kernels give other weights, and the promise ends there. So are
those that a clock drew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from figure_gate import compare_figures

from pcamlib.journal.evidence import load
from pcamlib.sources import ROOT

FRESH = os.environ.get("PCAM_FIGURES")


TIMED = "bench."  # keys of notebook 07, whose figures show times


def measured(root: Path) -> dict[str, Path]:
    """Data of every figure under `root` that neither a training nor a clock stands behind."""
    figures = {key: claim for key, claim in load(root).items() if claim.kind == "figure"}
    return {key: root / claim.data for key, claim in figures.items() if not claim.runs and not key.startswith(TIMED)}


@pytest.mark.skipif(not FRESH, reason="PCAM_FIGURES unset: `make nbval` draws the figures again and sets it")
def test_figures_drawn_again_show_the_same_data() -> None:
    committed, fresh = measured(ROOT), measured(ROOT / str(FRESH))
    assert len(committed) >= 5 and set(fresh) == set(committed)
    different = {key: compare_figures(committed[key], fresh[key]) for key in committed}
    assert {key: lines for key, lines in different.items() if lines} == {}


def test_the_gate_sees_one_changed_value(tmp_path: Path) -> None:
    path = next(iter(measured(ROOT).values()))
    record = json.loads(path.read_text())
    name, series = next(iter(record["series"].items()))
    series[0] += 1
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(record))
    assert compare_figures(path, path) == []
    assert len(compare_figures(path, changed)) == 1 and f"'{name}'[0]" in compare_figures(path, changed)[0]
