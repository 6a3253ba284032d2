"""Facts of the machine and the repository that a set-up journal is asked for; a notebook records them as evidence.

Rows are dicts, as a table of evidence takes them; a fact that cannot be read is left out, never guessed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import math
import platform
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pcamlib.jobs import board
from pcamlib.jobs.slurm import SlurmError, ask
from pcamlib.sources import ROOT

Rows = list[dict[str, Any]]


def environment(root: Path = ROOT) -> Rows:
    """`what` and `value` of this Python environment; its folder relative to `root`, its size in MiB of 2^20 bytes."""
    import torch

    prefix = Path(sys.prefix)
    inside = prefix.is_relative_to(root)
    files = [path for path in prefix.rglob("*") if path.is_file() and not path.is_symlink()]
    facts = {
        "Python": platform.python_version(),
        "environment": prefix.relative_to(root).as_posix() if inside else "outside of the repository",
        "size": f"{sum(path.stat().st_size for path in files) / 2**20:,.0f} MiB in {len(files):,} files",
        "packages": str(len({dist.name for dist in importlib.metadata.distributions()})),
        "torch": torch.__version__,
        "built for CUDA": torch.version.cuda or "no, for CPUs only",
        "CUDA available": "yes" if torch.cuda.is_available() else "no",
    }
    stamp, begun = prefix / ".installed", prefix / "pyvenv.cfg"  # make writes the first last, venv the second first
    times = [path.stat().st_mtime for path in (begun, stamp) if path.is_file()]
    if len(times) == 2 and times[1] > times[0]:  # not so in a copy of the folder
        facts["installed in"] = f"{times[1] - times[0]:.0f} s"
    return [{"what": what, "value": value} for what, value in facts.items()]


def tests(root: Path = ROOT) -> Rows:
    """`folder` and its `tests`, counted from the sources: functions named test_*, a parametrised one once."""
    counted: dict[str, int] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        folder = path.parent.relative_to(root).as_posix()
        functions = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_test(node)]
        counted[folder] = counted.get(folder, 0) + len(functions)
    return [{"folder": folder, "tests": number} for folder, number in counted.items()]


def coverage(root: Path = ROOT) -> float | None:
    """Percentage of the lines of pcamlib that the last `make unit` ran; None where it left no data."""
    from coverage import Coverage
    from coverage.exceptions import CoverageException

    if not (root / ".coverage").is_file():
        return None
    config = root / "pyproject.toml"
    measured = Coverage(data_file=str(root / ".coverage"), config_file=config.is_file() and str(config))
    try:
        measured.load()
        with open(Path("/dev/null"), "w") as nowhere:
            return round(measured.report(file=nowhere), 1)
    except CoverageException:  # of other sources, or of none
        return None


def ignored(root: Path = ROOT) -> Rows:
    """`pattern` and the comment `about` the block it stands in, of .gitignore."""
    path, about, rows = root / ".gitignore", "", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.startswith("#") or not line.strip():
            about = line.lstrip("# ")
        else:
            rows.append({"pattern": f"`{line.strip()}`", "about": about})
    return rows


def job_records(folder: Path) -> Rows:
    """JobID, Name, Start, End, Elapsed, State and Node of each job in the ledger of `folder`; none where none ran.

    Start and end are Slurm's own, from its accounting where there is one, else from the controller's memory.
    """
    rows, _ = board.rows(folder, everything=True)
    known = _times([row.state.job for row in rows])
    return [
        {
            "JobID": row.state.job,
            "Name": row.entry.name,
            "Start": known.get(row.state.job, ("", ""))[0] or None,
            "End": known.get(row.state.job, ("", ""))[1] or None,
            "Elapsed": row.state.elapsed or None,
            "State": row.state.state,
            "Node": row.state.node or None,
        }
        for row in rows
    ]


def dimensions(shape: Sequence[int], hidden: Sequence[int], classes: int = 2) -> Rows:
    """`layer`, `inputs`, `outputs` and `weights` (with biases) of a multi-layer perceptron on images of `shape`."""
    sizes = [math.prod(shape), *hidden, classes]
    rows: Rows = [
        {"layer": "flatten", "inputs": " x ".join(map(str, shape)), "outputs": sizes[0], "weights": 0},
    ]
    for number, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        rows.append(
            {
                "layer": f"linear {number}",
                "inputs": f"{inputs:,}",
                "outputs": outputs,
                "weights": (inputs + 1) * outputs,
            }
        )
    return rows


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")


def _times(jobs: list[str]) -> dict[str, tuple[str, str]]:
    """Start and end of each job that Slurm still knows."""
    found: dict[str, tuple[str, str]] = {}
    listed = ",".join(jobs)
    calls = (
        ("squeue", "-h", "-r", "--me", "--states=all", "-O", "JobArrayID:|,StartTime:|,EndTime:|"),
        ("sacct", "-n", "-P", "-X", "-j", listed, "-o", "JobID,Start,End"),
    )
    for call in calls if jobs else ():
        try:
            done = ask(*call)
        except SlurmError:
            return found
        for line in done.stdout.splitlines() if done.returncode == 0 else []:
            job, start, end = line.split("|")[:3]
            if job in jobs:
                found[job] = (start, end)
    return found
