"""What one changed parameter does to the result, beside what another seed does (A2 Q3: why configuration matters)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcamlib.config import Config
from pcamlib.experiments import study
from pcamlib.training import metrics
from pcamlib.training.runs import Run

#: Five parameters that the course's skeleton hard-codes, each with another plausible value.
CHANGES = (
    ("optimizer.lr", "0.0001"),
    ("loader.batch_size", "32"),
    ("model.hidden_units", "[256]"),
    ("loader.sampler", "balanced"),
    ("optimizer.weight_decay", "0.5"),
)


def _at(config: Config, key: str) -> str:
    return str(functools.reduce(getattr, key.split("."), config))


def _scored(run: Run, base: Run) -> dict[str, Any]:
    """Validation scores of a run and their paired difference to the base: equal seeds draw equal resamples."""
    both = [r.predictions("valid") for r in (run, base)]
    point, reference = (metrics.scores(p.label, p.probability, np.ones((1, len(p.label)))) for p in both)
    draws, others = (metrics.bootstrap(p.label, p.probability) for p in both)
    cells: dict[str, Any] = {}
    for name in ("auc", "nll"):
        gap, bounds = point[name] - reference[name], np.percentile(draws[name] - others[name], [2.5, 97.5])
        cells[f"valid {name}"] = round(float(point[name][0]), 4)
        cells[f"{name} minus base"] = None if run is base else round(float(gap[0]), 4)
        cells[f"95 % of {name} minus base"] = None if run is base else bounds.round(4).tolist()
    return cells


def table(
    config: Config, data: Path, folder: Path, report: Callable[[str], None] = print
) -> tuple[pd.DataFrame, list[Run]]:
    """Train the base, two other seeds, and each change of `CHANGES`, one at a time.

    Returns:
        Columns parameter, from, to, and for AUC and NLL the value, its difference to the base and the 95 % interval of
        that difference (bootstrap paired over patches); and the runs.
    """
    base = study.run("base", config, data, folder, report)
    rows: list[dict[str, Any]] = [{"parameter": "(base)", "from": None, "to": None, **_scored(base, base)}]
    runs = [base]
    for key, value in (*(("seed", str(config.seed + more)) for more in (1, 2)), *CHANGES):
        changed = config.override(f"{key}={value}")
        runs.append(study.run(f"{key.replace('.', '-')}-{value.strip('[]')}", changed, data, folder, report))
        rows.append({"parameter": key, "from": _at(config, key), "to": _at(changed, key), **_scored(runs[-1], base)})
    return pd.DataFrame(rows, dtype=object), runs
