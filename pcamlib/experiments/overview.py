"""What run folders hold, as tables: all runs below a folder, and everything in one of them.

    pcam runs table [FOLDER] [--by config] [--csv FILE]

Scores come from each run's stored report; nothing is predicted again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from pcamlib.errors import ConfigError, PcamError
from pcamlib.experiments import seeds
from pcamlib.files import digest, read_json, write_text
from pcamlib.training.runs import Run, list_runs

#: Metrics that the table shows; `pcam evaluate` prints all of them.
SHOWN = ("auc", "f2", "accuracy")

#: File of a run folder, kind of evidence, and what stands in it.
FILES = (
    ("config.yaml", "configuration", "every setting, defaults too"),
    ("provenance.json", "git and environment", "commit, code, lock, packages, machine, data; one entry an attempt"),
    ("metrics.jsonl", "metrics", "one row a step: loss, learning rate, gradient norm; validation scores"),
    ("predictions_*.npz", "predictions", "row, label and probability of each patch"),
    ("report_*.json", "scores", "every metric with interval and constants, computed from the predictions"),
    ("*.png", "plots", "drawn from metrics.jsonl"),
    ("checkpoints/last.safetensors", "checkpoint", "weights, optimiser and generators: resumes the run"),
    ("checkpoints/best.safetensors", "checkpoint", "the best weights and what they need: answers for new patches"),
    ("replay.json", "configuration", "progress at each step of the run that this one repeats"),
    ("SUCCESS", "outcome", "steps, seconds and digests of the weights, written last"),
    ("wandb/offline-run-*/run-*.wandb", "copy for wandb", "the metrics once more, one wandb run an attempt"),
    ("wandb/offline-run-*/files/requirements.txt", "environment", "every installed package, as pip freeze lists them"),
)


def table(folder: str | Path, by: str | None = None) -> pd.DataFrame:
    """One row a run below `folder`; with `by="config"` one a configuration, over its seeds.

    Raises:
        ConfigError: another `by`.
        PcamError: no such folder.
    """
    if by not in (None, "config"):
        raise ConfigError(f"--by {by}: runs are grouped by 'config' only")
    if not Path(folder).is_dir() and Path(folder) != Path("runs"):
        raise PcamError(f"{folder}: no such folder; name the one that holds the runs")
    found = list_runs(folder)
    rows = _grouped(found, Path(folder)) if by else [_row(run, Path(folder)) for run in found]
    return pd.DataFrame(rows, dtype=object)


def text(rows: pd.DataFrame, csv: str | Path | None = None) -> str:
    """The table for a terminal, four digits; written to `csv` too, in full."""
    if csv:
        write_text(csv, rows.to_csv(index=False))
    if rows.empty:
        return "no runs here"
    shown = rows.fillna("").map(lambda cell: f"{cell:.4g}" if isinstance(cell, float) else cell)
    return shown.to_string(index=False)


def contents(run: Run) -> pd.DataFrame:
    """What a run folder holds as evidence: file, kind, KiB, and what stands in it."""
    rows = []
    for pattern, kind, holds in FILES:
        for path in sorted(run.path.glob(pattern)):
            name = f"wandb/.../{path.name}" if pattern.startswith("wandb") else path.relative_to(run.path).as_posix()
            rows.append({"file": name, "kind": kind, "KiB": round(path.stat().st_size / 1024, 1), "holds": holds})
    return pd.DataFrame(rows)


def _row(run: Run, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.path.relative_to(folder).as_posix()}
    try:
        config, done, rows = run.config, run.success, run.metrics()
        report = read_json(run.path / "report_valid.json")["metrics"] if done else {}
    except PcamError as error:
        return {**row, "state": f"unreadable: {error}"}
    last = rows[-1] if rows else {}
    row |= {"model": config.model.name, "seed": config.seed}
    row |= {"steps": last.get("step", 0), "seconds": round(last.get("seconds", 0.0), 1)}
    for name in SHOWN:
        row[name] = report.get(name, {}).get("value")
        if name == "auc":  # a run under way has its best evaluation so far, and no interval
            row[name] = row[name] or max((r["valid_auc"] for r in rows if "valid_auc" in r), default=None)
            row["auc low"], row["auc high"] = report.get(name, {}).get("interval", (None, None))
    return {**row, "weights": (done or {}).get("weights", "")[:12], "state": "finished" if done else "unfinished"}


def _grouped(found: list[Run], folder: Path) -> Iterator[dict[str, Any]]:
    """One row for all finished runs that differ in their seeds only and were judged on the same patches."""
    groups: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run in found:
        member = _row(run, folder)
        if "model" not in member:
            yield {"runs": member["run"], "state": member["state"]}
        elif run.success:
            key = digest([run.config.override("seed=0").digest(), run.provenance["data"]])
            groups.setdefault(key, []).append((run, member))
    for group in groups.values():
        runs, members = [run for run, _ in group], [member for _, member in group]
        row: dict[str, Any] = {"runs": ", ".join(member["run"] for member in members), "model": members[0]["model"]}
        row |= {"seeds": ", ".join(str(member["seed"]) for member in members), "n": len(runs)}
        try:
            seeds.distinct(runs)
            problem = "" if len(runs) > 1 else "one seed has no sd"
        except PcamError as error:
            problem = str(error)
        for name in SHOWN:
            over = {} if problem else seeds.spread([member[name] for member in members])
            row |= {name: over.get("mean"), f"{name} sd": over.get("sd")}
        yield {**row, "state": problem or "distinct"}
