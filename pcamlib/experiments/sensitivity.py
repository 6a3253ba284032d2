"""What one changed parameter does to the result, beside what another seed does (A2 Q3: why configuration matters)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pcamlib.config import Config
from pcamlib.experiments import study
from pcamlib.training.runs import Run

#: Five parameters that the course's skeleton hard-codes, each with another plausible value.
CHANGES = (
    ("optimizer.lr", "0.0001"),
    ("loader.batch_size", "32"),
    ("model.hidden_units", "[256]"),
    ("loader.sampler", "balanced"),
    ("train.epochs", "3"),
)


def _at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _scored(run: Run) -> dict[str, Any]:
    found = run.predictions("valid").report()["metrics"]
    cells: dict[str, Any] = {}
    for name in ("auc", "nll"):
        cells[f"valid {name}"] = round(found[name]["value"], 4)
        cells[f"{name} interval"] = [round(bound, 4) for bound in found[name]["interval"]]
    return cells


def table(
    config: Config, data: Path, folder: Path, report: Callable[[str], None] = print
) -> tuple[pd.DataFrame, list[Run]]:
    """Train the base, another seed, and each change of `CHANGES`, one at a time.

    Returns:
        Columns parameter, from, to, valid auc, auc interval, valid nll, nll interval; and the runs.
    """
    rows: list[dict[str, Any]] = []
    runs = [study.run("base", config, data, folder, report)]
    rows.append({"parameter": "(base)", "from": "", "to": "", **_scored(runs[0])})
    for key, value in (("seed", str(config.seed + 1)), *CHANGES):
        changed = config.override(f"{key}={value}")
        runs.append(study.run(key.replace(".", "-"), changed, data, folder, report))
        rows.append(
            {"parameter": key, "from": str(_at(config, key)), "to": str(_at(changed, key)), **_scored(runs[-1])}
        )
    return pd.DataFrame(rows), runs
