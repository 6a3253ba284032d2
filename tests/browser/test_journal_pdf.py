"""A journal printed by a real Chromium."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pcamlib.journal.page import pdf
from pcamlib.journal.render import render
from pcamlib.sources import ROOT

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_a_page_is_printed(tmp_path: Path) -> None:
    for folder in ("journal", "assets"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    page = render("dtu_exam", tmp_path)[1]
    printed = pdf(page).read_bytes()
    assert printed.startswith(b"%PDF") and printed.rstrip().endswith(b"%%EOF")
    assert len(printed) > 100_000, "with its images"
    assert [path.name for path in tmp_path.glob("*.pdf")] == ["JOURNAL_dtu_exam.pdf"]
