"""nbval sees one changed fact: a stored output of a committed notebook is altered, and the run must fail there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pcamlib.sources import ROOT


def checked(notebook: Path, was: str, now: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """nbval on a copy that ends with its first checked cell, `was` in that cell's stored output replaced by `now`."""
    copy = nbformat.read(notebook, as_version=4)
    place, cell = next((n, c) for n, c in enumerate(copy.cells) if "NBVAL_CHECK_OUTPUT" in c.source)
    assert was in cell.outputs[0].text
    cell.outputs[0].text = cell.outputs[0].text.replace(was, now)
    copy.cells = copy.cells[: place + 1]
    path = folder / notebook.name
    nbformat.write(copy, path)
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", "--nbval-lax", str(path)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_changed_fact_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PCAM_DATA", "PCAM_COURSE"):
        monkeypatch.delenv(name, raising=False)
    notebook = ROOT / "notebooks" / "00_data.ipynb"
    assert checked(notebook, "2003", "2003", tmp_path).returncode == 0
    found = checked(notebook, "2003", "2004", tmp_path)
    assert found.returncode == 1 and "1 failed" in found.stdout and "2004" in found.stdout, found.stdout
