"""The ledger: every job once, damaged lines told, submissions one at a time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pcamlib.errors import PcamError
from pcamlib.jobs import ledger
from pcamlib.jobs.ledger import Entry

ENTRY = Entry("12", "00_data", "/r/00_data.ipynb", ("slurm/notebook.sbatch", "00_data"), "ab", ("3", "4"), "sbatch",
              "/r/00_data-12.out", "pcam submit journal", "smoke.yaml", "local", "2026-01-01T00:00:00")  # fmt: skip


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "slurm"
    assert ledger.read(folder) == []
    for number in ("12", "13"):
        ledger.append(folder, replace(ENTRY, id=number))
    assert ledger.read(folder) == [ENTRY, replace(ENTRY, id="13")]


def test_a_number_that_came_again_stands_for_its_last_job(tmp_path: Path) -> None:
    for entry in (ENTRY, replace(ENTRY, id="13"), replace(ENTRY, name="other")):
        ledger.append(tmp_path, entry)
    assert ledger.read(tmp_path) == [replace(ENTRY, id="13"), replace(ENTRY, name="other")]


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "3"}', "null"])
def test_a_damaged_line_is_told(tmp_path: Path, line: str) -> None:
    ledger.append(tmp_path, ENTRY)
    with open(tmp_path / "jobs.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(PcamError, match=r"jobs.jsonl, line 2: damaged; delete that line"):
        ledger.read(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(PcamError, match="cannot be written"):
        ledger.append(tmp_path / "runs", ENTRY)
    with pytest.raises(PcamError, match="cannot be written"), ledger.alone(tmp_path / "runs"):
        pytest.fail("was let in")


def test_a_second_submission_waits(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from pcamlib.jobs import ledger\n"
        "with ledger.alone(pathlib.Path(sys.argv[1])): print('in')"
    )
    with ledger.alone(tmp_path):
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.communicate(timeout=1.0)
    assert other.communicate(timeout=30)[0] == "in\n"
