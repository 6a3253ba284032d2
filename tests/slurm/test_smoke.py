"""The whole smoke journal through a real Slurm; its wall time is measured by benchmarks/slurm.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

from pcamlib.jobs import ledger, scale
from pcamlib.journal import evidence
from pcamlib.journal.check import check

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(2400)]


def test_the_smoke_journal(cluster: Cluster, login: Callable[..., Any], tmp_path: Path) -> None:
    """Every job completes, and every number carries the job that made it."""
    code, out, err = login("submit", "journal", "--site", "local", "--scale", "smoke", "--root", tmp_path)
    assert code == 0, (out, err)
    ids = {entry.name: entry.id for entry in ledger.read(tmp_path / "runs" / "slurm")}
    assert set(ids) == {*scale.load("smoke"), "journal"}
    states = dict(zip(ids, cluster.wait(list(ids.values()), 2100), strict=True))
    _, told, _ = login("jobs", "--root", tmp_path)
    assert set(states.values()) == {"COMPLETED"}, told
    made = {stem: record.provenance["slurm"]["job_id"] for stem, record in evidence.records(tmp_path).items()}
    assert made == {name: job for name, job in ids.items() if name != "journal"}
    assert [str(finding) for finding in check(tmp_path, jobs=True) if finding.severity == "fault"] == []
