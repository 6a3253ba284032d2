"""What one changed parameter does to the result, beside what another seed does (A2 Q3: why configuration matters)."""

from __future__ import annotations

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


def _at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _scored(run: Run, base: Run) -> dict[str, Any]:
    """Validation scores of a run and their paired difference to the base."""
    mine, other = (r.predictions("valid") for r in (run, base))
    cells: dict[str, Any] = {}
    for name in ("auc", "nll"):
        value, reference = (
            float(metrics.scores(p.label, p.probability, np.ones((1, len(p.label))))[name][0]) for p in (mine, other)
        )
        # equal seeds draw equal resamples: the difference is paired, patch by patch
        gap = (
            metrics.bootstrap(mine.label, mine.probability)[name]
            - metrics.bootstrap(other.label, other.probability)[name]
        )
        cells[f"valid {name}"] = round(value, 4)
        cells[f"{name} minus base"] = None if run is base else round(value - reference, 4)
        cells[f"95 % of {name} minus base"] = (
            None if run is base else [round(float(q), 4) for q in np.percentile(gap, [2.5, 97.5])]
        )
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
        rows.append(
            {"parameter": key, "from": str(_at(config, key)), "to": str(_at(changed, key)), **_scored(runs[-1], base)}
        )
    return pd.DataFrame(rows, dtype=object), runs
