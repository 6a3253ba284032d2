"""data.lock: written from evidence, and what is stale when it names other data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcamlib.errors import DataError
from pcamlib.journal import datalock
from pcamlib.journal.evidence import Recorder
from pcamlib.sources import ROOT


@pytest.fixture
def locked(complete: Path) -> Path:
    """A complete root with its data.lock."""
    datalock.write(complete)
    return complete


def edit(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = root / "data.lock"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def test_it_names_every_data_set_with_its_notebooks(locked: Path) -> None:
    first, second = datalock.read(locked)
    assert (first.name, first.fingerprint, first.synthetic) == ("train", "a" * 64, True)
    assert first.notebooks == second.notebooks == ["00_data", "01_reproducibility"]
    assert datalock.findings(locked) == []


def test_a_changed_fingerprint_names_the_notebooks_that_are_stale(locked: Path) -> None:
    edit(locked, lambda stored: stored[0].update(fingerprint="e" * 64))
    found = datalock.findings(locked)
    assert [where for where, _, _ in found] == [
        "journal/evidence/00_data.json", "journal/evidence/01_reproducibility.json"
    ]  # fmt: skip
    assert found[0][1] == (
        "data set 'train' is synthetic eeeeeeeeeeee in data.lock, and 00_data ran on synthetic aaaaaaaaaaaa"
    )
    assert "make journal" in found[0][2]
    datalock.write(locked)
    edit(locked, lambda stored: stored[0].update(synthetic=False))
    assert (
        "is real aaaaaaaaaaaa in data.lock, and 00_data ran on synthetic aaaaaaaaaaaa"
        in datalock.findings(locked)[0][1]
    )


def test_two_versions_under_one_name_are_two_entries(locked: Path) -> None:
    other = Recorder("01_reproducibility", locked, data={"train": "f" * 64}, synthetic=False)
    other.value("repro.other", 1)
    other.close()
    (found,) = [what for where, what, _ in datalock.findings(locked) if where.endswith("01_reproducibility.json")]
    assert "ran on real ffffffffffff" in found
    assert ("data.lock", "01_reproducibility does not rest on a data set 'valid'") in [
        (where, what) for where, what, _ in datalock.findings(locked)
    ]
    datalock.write(locked)
    assert datalock.findings(locked) == []
    entries = [(entry.name, entry.synthetic, entry.notebooks) for entry in datalock.read(locked)]
    assert entries == [
        ("train", True, ["00_data"]), ("train", False, ["01_reproducibility"]), ("valid", True, ["00_data"])
    ]  # fmt: skip


def test_a_data_set_that_is_not_locked(locked: Path) -> None:
    edit(locked, lambda stored: stored.pop())
    assert [what for _, what, _ in datalock.findings(locked)] == ["its data set 'valid' is not in data.lock"] * 2


@pytest.mark.parametrize("text", ["[{", '{"train": 1}', '[{"name": "train"}]', "[1]", "", "null"])
def test_a_damaged_lock_is_one_finding(locked: Path, text: str) -> None:
    (locked / "data.lock").write_text(text)
    ((where, what, do),) = datalock.findings(locked)
    assert where == "data.lock" and what and "\n" not in what and "pcam data lock" in do
    with pytest.raises(DataError, match=r"data\.lock: .*`pcam data lock`"):
        datalock.read(locked)


def test_without_a_lock_nothing_is_said_but_reading_it_is_an_error(complete: Path) -> None:
    assert datalock.findings(complete) == []
    with pytest.raises(DataError, match=r"data\.lock: no such file; `pcam data lock`"):
        datalock.read(complete)


def test_damaged_evidence_is_not_told_twice(locked: Path) -> None:
    (locked / "journal/evidence/00_data.json").write_text("{")
    assert datalock.findings(locked) == []


def test_the_command(locked: Path, pcam: Callable[..., Any]) -> None:
    assert pcam("data", "lock", "--check", "--root", locked)[:2] == (0, "")
    edit(locked, lambda stored: stored[1].update(fingerprint="e" * 64))
    code, out, _ = pcam("data", "lock", "--check", "--root", locked)
    assert code == 1 and "data set 'valid' is synthetic eeeeeeeeeeee" in out
    assert pcam("data", "lock", "--root", locked)[0] == 0 and datalock.findings(locked) == []
    (locked / "data.lock").unlink()
    code, _, err = pcam("data", "lock", "--check", "--root", locked)
    assert code == 2 and err.startswith("pcam: data.lock: no such file")


def test_the_committed_lock_is_that_of_the_evidence() -> None:
    """Stale? `make journal`, or `pcam data lock`, and commit data.lock."""
    assert datalock.read(ROOT) == datalock.entries(ROOT)
