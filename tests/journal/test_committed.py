"""The journals in this repository are what their evidence says, and their evidence is what this code makes."""

from __future__ import annotations

import pytest

from pcamlib.journal.check import check
from pcamlib.journal.draft import NAMES
from pcamlib.sources import ROOT


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_journal_has_no_fault(name: str) -> None:
    """Stale? `make journal`, and commit JOURNAL*.md, assets/ and journal/evidence/ with the change."""
    faults = [str(finding) for finding in check(ROOT, name) if finding.severity == "fault"]
    assert faults == []
