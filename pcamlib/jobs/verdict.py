"""Whether an executed notebook reached its end: judged from the file alone, because papermill's own word cannot be had.

papermill calls a cell `completed` also when its kernel was killed in it, and leaves `running`, with no exception, in a
notebook whose process got SIGTERM. What counts here is what every cell shows: it was started, answered, and is clean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from pcamlib.errors import NotebookError

INJECTED = "injected-parameters"  # papermill's tag of the cell that holds the given parameters


@dataclass(frozen=True)
class Verdict:
    """`ok`, or the first thing that is wrong; `cell` counts code cells from 1, as `In [n]` does in the file."""

    ok: bool
    reason: str = ""
    cell: int | None = None


def read(path: str | Path) -> Any:
    """The notebook in a file, in format 4.

    Raises:
        NotebookError: no such file, or no notebook.
    """
    try:
        return nbformat.read(str(path), as_version=4)
    except FileNotFoundError:
        raise NotebookError(f"{path}: no such notebook") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise NotebookError(f"{path}: not a notebook ({type(error).__name__}: {first})") from None


def code_cells(notebook: Any) -> list[Any]:
    """The code cells that have something to execute; an empty one is skipped by every front end."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def verdict(executed: Path, source: Path) -> Verdict:
    """Judge the notebook file `executed`, which was made from `source`; an unreadable file is a failure, no error."""
    try:
        notebook = read(executed)
    except NotebookError as error:
        return Verdict(False, str(error))
    return judge(notebook, read(source))


def judge(executed: Any, source: Any) -> Verdict:
    """Judge a notebook in memory; see `verdict`."""
    stored = executed.metadata.get("pcam", {})
    if stored.get("ok") is False:  # taken when the kernel died, which the cells alone may not show
        return Verdict(False, stored["reason"], stored["cell"])
    cells = code_cells(executed)
    for number, cell in enumerate(cells, start=1):
        reason = _error(cell) or _unfinished(cell)
        if reason:
            return Verdict(False, reason, number)
    present = [cell.source for cell in cells if INJECTED not in cell.metadata.get("tags", [])]
    expected = [cell.source for cell in code_cells(source) if INJECTED not in cell.metadata.get("tags", [])]
    if len(present) < len(expected):
        return Verdict(False, f"only {len(present)} of {len(expected)} code cells are there", len(cells))
    if present[-1:] != expected[-1:]:
        return Verdict(False, "the last code cell of the source is missing", len(cells))
    overall = executed.metadata.get("papermill", {})
    if overall.get("exception") or not overall.get("end_time"):
        return Verdict(False, "papermill recorded no end of the run", len(cells))
    return Verdict(True)


def _error(cell: Any) -> str:
    """`Type: first line of the message` of an error output, or nothing."""
    for output in cell.outputs:
        if output.output_type == "error":
            return f"{output.ename}: {(output.evalue.splitlines() or [''])[0]}".rstrip(": ")
    return ""


def _unfinished(cell: Any) -> str:
    """Why a cell cannot count as executed, or nothing."""
    papermill = cell.metadata.get("papermill", {})
    if cell.execution_count is None:
        return "was never executed"
    if papermill.get("exception") or papermill.get("status") != "completed":
        return f"did not finish (papermill status: {papermill.get('status', 'none')})"
    if "shell.execute_reply" not in cell.metadata.get("execution", {}):
        return "was started, but the kernel never answered"
    return ""
