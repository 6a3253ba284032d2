"""What `pcam journal check` takes for a file, and what for the name of a journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcamlib.errors import EvidenceError
from pcamlib.journal.report import report
from pcamlib.sources import ROOT

BLANK = (ROOT / "journal" / "templates" / "dtu_exam.md").read_text()


@pytest.mark.parametrize("name", ["filled.txt", "filled", "FILLED.MD", "./FILLED.MD", "./filled"])
def test_a_file_is_one_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(BLANK)
    text, wrong = report(ROOT, name, "dtu_exam")
    assert wrong and text.endswith("31 answers of 31; 31 fall short")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.MD", "none.MD: no such file"),
        ("./none", "none: no such file"),
        ("filled.txt/x.md", "filled.txt/x.md: no such file"),
        ("none.txt", "there is no journal or form 'none.txt'"),
        ("n" * 300 + ".md", "cannot be read (File name too long)"),
    ],
)
def test_no_such_file_or_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("filled.txt").write_text(BLANK)
    with pytest.raises(EvidenceError) as caught:
        report(ROOT, name, "dtu_exam")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_does_not_hide_the_journal_of_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    Path("dtu_exam").write_text(BLANK)
    assert "open places" in report(root, "dtu_exam", "dtu_exam")[0]
