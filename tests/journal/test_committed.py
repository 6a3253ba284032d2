"""The journal in this repository is what its evidence says, and its evidence is what this code makes."""

from __future__ import annotations

from pcamlib.journal.check import check
from pcamlib.sources import ROOT


def test_the_committed_journal_has_no_fault() -> None:
    """Stale? `make journal`, and commit JOURNAL.md, assets/ and journal/evidence/ with the change."""
    faults = [str(finding) for finding in check(ROOT) if finding.severity == "fault"]
    assert faults == []
