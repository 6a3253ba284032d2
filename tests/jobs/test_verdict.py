"""The verdict: what papermill leaves behind after each kind of death is a failure, also where the file looks whole."""

from __future__ import annotations

import copy

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output, writes

from pcamlib.errors import NotebookError
from pcamlib.jobs.verdict import judge, read, verdict

SOURCE = new_notebook(cells=[new_code_cell("a = 1"), new_code_cell("b = 2"), new_code_cell("")])


def executed():
    """SOURCE as papermill leaves it after a good run, with injected parameters and the empty cell untouched."""
    notebook = copy.deepcopy(SOURCE)
    notebook.cells.insert(1, new_code_cell("a = 5", metadata={"tags": ["injected-parameters"]}))
    for count, cell in enumerate(notebook.cells[:-1], start=1):
        cell.execution_count = count
        cell.metadata.update(papermill={"status": "completed", "exception": False})
        cell.metadata.update(execution={"shell.execute_reply": "2026-01-01T00:00:00Z"})
    notebook.metadata["papermill"] = {"end_time": "2026-01-01T00:00:00Z", "exception": None}
    return notebook


def test_a_complete_run_passes():
    assert judge(executed(), SOURCE).ok


def error_output(notebook):
    notebook.cells[1].outputs = [new_output("error", ename="ValueError", evalue="bad\nmore", traceback=[])]


def never_executed(notebook):
    notebook.cells[2].execution_count = None


def left_running(notebook):  # SIGTERM to papermill
    notebook.cells[2].metadata.papermill["status"] = "running"


def left_pending(notebook):
    notebook.cells[2].metadata.papermill["status"] = "pending"


def no_papermill(notebook):
    del notebook.cells[0].metadata["papermill"]


def kernel_killed(notebook):  # papermill says completed, exception False
    del notebook.cells[2].metadata.execution["shell.execute_reply"]


def last_missing(notebook):
    del notebook.cells[2]


def last_replaced(notebook):
    notebook.cells[2].source = "b = 3"


def exception_recorded(notebook):
    notebook.metadata.papermill["exception"] = True


def no_end(notebook):
    notebook.metadata.papermill["end_time"] = None


def verdict_stored(notebook):
    notebook.metadata["pcam"] = {"ok": False, "reason": "the kernel was killed", "cell": 3}


@pytest.mark.parametrize(
    ("damage", "reason", "cell"),
    [
        (error_output, "ValueError: bad", 2),
        (never_executed, "was never executed", 3),
        (left_running, "did not finish (papermill status: running)", 3),
        (left_pending, "did not finish (papermill status: pending)", 3),
        (no_papermill, "did not finish (papermill status: none)", 1),
        (kernel_killed, "was started, but the kernel never answered", 3),
        (last_missing, "only 1 of 2 code cells are there", 2),
        (last_replaced, "the last code cell of the source is missing", 3),
        (exception_recorded, "papermill recorded no end of the run", 3),
        (no_end, "papermill recorded no end of the run", 3),
        (verdict_stored, "the kernel was killed", 3),
    ],
)
def test_every_damage_is_a_failure(damage, reason, cell):
    notebook = executed()
    damage(notebook)
    found = judge(notebook, SOURCE)
    assert (found.ok, found.reason, found.cell) == (False, reason, cell)


def test_a_file_is_judged_and_an_unreadable_one_fails(tmp_path):
    source, good, cut = tmp_path / "source.ipynb", tmp_path / "good.ipynb", tmp_path / "cut.ipynb"
    source.write_text(writes(SOURCE))
    good.write_text(writes(executed()))
    cut.write_text(writes(executed())[:200])
    assert verdict(good, source).ok
    assert "not a notebook" in verdict(cut, source).reason
    assert "no such notebook" in verdict(tmp_path / "none.ipynb", source).reason
    with pytest.raises(NotebookError, match="not a notebook"):
        read(cut)
