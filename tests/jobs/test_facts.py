"""Facts of the machine and the repository: read, never guessed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pcamlib.jobs import facts, states
from pcamlib.jobs.ledger import Entry, append
from pcamlib.jobs.slurm import SlurmError
from pcamlib.models.mlp import MLP
from pcamlib.sources import ROOT

ENTRY = Entry("7", "use", "/r/a", ("s",), "ab", (), "sbatch", "/r/use-7.out", "pcam", "smoke.yaml", "local", "now")


def column(rows: facts.Rows, key: str, value: str) -> dict[str, object]:
    return {row[key]: row[value] for row in rows}


def test_the_environment_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "clone" / ".venv"
    prefix.mkdir(parents=True)
    (prefix / "a.py").write_bytes(b"x" * 2**20)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    found = column(facts.environment(tmp_path / "clone"), "what", "value")
    assert found["environment"] == ".venv" and found["size"] == "1 MiB in 1 files"
    assert found["torch"] == torch.__version__ and found["Python"] == sys.version.split()[0]
    assert found["CUDA available"] == ("yes" if torch.cuda.is_available() else "no")
    assert "installed in" not in found and str(tmp_path) not in str(found), "not recorded, and no path of this machine"
    for name, time in (("pyvenv.cfg", 1000), (".installed", 1138)):
        (prefix / name).touch()
        os.utime(prefix / name, (time, time))
    assert column(facts.environment(tmp_path / "clone"), "what", "value")["installed in"] == "138 s"
    assert column(facts.environment(tmp_path / "other"), "what", "value")["environment"] == "outside of the repository"


def test_tests_are_counted_from_the_sources(tmp_path: Path) -> None:
    (tmp_path / "tests/data").mkdir(parents=True)
    (tmp_path / "tests/test_a.py").write_text("def test_a(): pass\nasync def test_b(): pass\ndef helper(): pass\n")
    (tmp_path / "tests/data/test_c.py").write_text("class TestC:\n    def test_c(self): pass\n'def test_d(): pass'\n")
    (tmp_path / "tests/data/conftest.py").write_text("def test_no(): pass\n")
    assert facts.tests(tmp_path) == [{"folder": "tests/data", "tests": 1}, {"folder": "tests", "tests": 2}]
    assert column(facts.tests(ROOT), "folder", "tests")["tests/jobs"] > 50


def test_coverage_is_measured_or_nothing(tmp_path: Path) -> None:
    assert facts.coverage(tmp_path) is None
    (tmp_path / "half.py").write_text("import sys\nif len(sys.argv) > 5:\n    a = 1\n    b = 2\n")
    subprocess.run([sys.executable, "-m", "coverage", "run", "half.py"], cwd=tmp_path, check=True)
    assert facts.coverage(tmp_path) == 50.0
    (tmp_path / ".coverage").write_text("damaged")
    assert facts.coverage(tmp_path) is None


def test_what_git_ignores_and_why(tmp_path: Path) -> None:
    assert facts.ignored(tmp_path) == []
    (tmp_path / ".gitignore").write_text(".venv/\n\n# data: never committed\n*.h5\n!tests/data/\n")
    assert facts.ignored(tmp_path) == [
        {"pattern": "`.venv/`", "about": ""},
        {"pattern": "`*.h5`", "about": "data: never committed"},
        {"pattern": "`!tests/data/`", "about": "data: never committed"},
    ]


def test_the_dimensions_are_those_of_the_network() -> None:
    rows = facts.dimensions((3, 96, 96), (64, 32))
    network = MLP((3, 96, 96), (64, 32))
    assert [row["outputs"] for row in rows] == [27648, 64, 32, 2] and rows[0]["inputs"] == "3 x 96 x 96"
    assert sum(row["weights"] for row in rows) == sum(p.numel() for p in network.parameters())


def test_jobs_with_the_times_that_slurm_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts.job_records(tmp_path) == [], "no job ran"
    append(tmp_path, ENTRY)
    append(tmp_path, replace(ENTRY, id="8", name="dead", writes="/r/b"))
    queue = "7|use|COMPLETED|n1|0:08|1:00|0|0|None|100M|\n8|dead|FAILED|n2|0:03|1:00|0|256|None|100M|\n"

    def ask(*command: str) -> subprocess.CompletedProcess[str]:
        times = "7|2026-11-30T10:00:00|2026-11-30T10:00:08|\n9|x|y|\n" if "StartTime" in command[-1] else queue
        return subprocess.CompletedProcess(command, int(command[0] == "sacct"), times, "accounting is disabled")

    monkeypatch.setattr(states, "ask", ask)
    monkeypatch.setattr(facts, "ask", ask)
    first, second = facts.job_records(tmp_path)
    assert first == {
        "JobID": "7", "Name": "use", "Start": "2026-11-30T10:00:00", "End": "2026-11-30T10:00:08", "Elapsed": "0:08",
        "State": "COMPLETED", "Node": "n1",
    }  # fmt: skip
    assert second["State"] == "FAILED" and second["Start"] is None, "not told, so left empty"

    def silent(*command: str) -> subprocess.CompletedProcess[str]:
        raise SlurmError("no Slurm on this machine")

    monkeypatch.setattr(states, "ask", silent)
    monkeypatch.setattr(facts, "ask", silent)
    assert [(row["JobID"], row["State"], row["Start"]) for row in facts.job_records(tmp_path)] == [
        ("7", "UNKNOWN", None), ("8", "UNKNOWN", None),
    ]  # fmt: skip
