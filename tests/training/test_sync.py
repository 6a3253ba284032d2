"""wandb's offline files: read to the last whole row, listed with their commands, sent only when asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcamlib.errors import RunError
from pcamlib.training import sync
from pcamlib.training.tracking import WandbTracker

ROWS = 400  # some 120 KiB: several blocks of the file


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run a-0 with `ROWS` rows, a run b-1 with one, and a run that was killed before its first."""
    from pcamlib.config import parse

    wandb = pytest.importorskip("wandb")
    study = tmp_path_factory.mktemp("study")
    for name, attempt, rows in (("a", 0, ROWS), ("b", 1, 1)):
        (study / name).mkdir()
        tracker = WandbTracker(
            parse({"tracking": {"wandb": "offline", "group": "seeds"}, "train": {"steps": 1}}), study / name, attempt
        )
        for step in range(1, rows + 1):
            tracker.log({"step": step, "loss": 1 / step})
        tracker.close()
    wandb.teardown()  # its own process writes on for a moment
    (study / "c" / "wandb" / "offline-run-0-x").mkdir(parents=True)
    (study / "c" / "wandb" / "offline-run-0-x" / "run-x.wandb").write_bytes(b"")
    return study


def test_rows_size_group_and_name_come_from_the_files(written: Path) -> None:
    found = sync.offline(written)
    assert [(one.group, one.name, one.rows, one.last) for one in found] == [
        ("", "run-x", 0, 0), ("seeds", "a-0", ROWS, ROWS), ("seeds", "b-1", 1, 1)
    ]  # fmt: skip
    assert found[1].size == next(found[1].path.glob("*.wandb")).stat().st_size > 2 * 32768
    assert found[1].command == ["wandb", "sync", str(found[1].path)] and not found[1].sent


def test_a_torn_file_is_read_up_to_its_tear(written: Path, tmp_path: Path) -> None:
    source = next((written / "a").rglob("*.wandb"))
    whole = source.read_bytes()
    rows = []
    for cut in (len(whole) - 1, len(whole) // 2, 32768 + 3, 32768, 7, 0):
        torn = tmp_path / "wandb" / "offline-run-0-x" / "run-x.wandb"
        torn.parent.mkdir(parents=True, exist_ok=True)
        torn.write_bytes(whole[:cut])
        rows.append(sync.offline(tmp_path)[0].rows)
    assert rows[0] == ROWS and ROWS > rows[1] > rows[2] >= rows[3] > 0 and rows[4:] == [0, 0]


def test_it_prints_what_it_would_send_and_sends_nothing(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was sent"))
    said: list[str] = []
    todo = sync.sync(written, report=said.append)
    assert len(todo) == 2 and f"seeds/a-0  {ROWS} rows to step {ROWS}" in said[0]
    assert said[0].splitlines()[1] == f"  wandb sync {todo[0].path}"
    assert said[-1].startswith("2 wandb runs, ")
    assert said[-1].endswith("to be sent; --send sends them; 1 empty (killed before wandb wrote a row)")


def test_sending_calls_wandb_once_a_run_and_skips_what_was_sent(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def fake(call: list[str], check: bool) -> Any:
        calls.append(call)
        return subprocess.CompletedProcess(call, int("b" in Path(call[-1]).parts))

    monkeypatch.setattr(subprocess, "run", fake)
    first = sync.offline(written)[1]
    with pytest.raises(RunError, match=r"wandb could not send it; is there internet here, and did `wandb login` run"):
        sync.sync(written, send=True, report=lambda line: None)
    assert calls[0] == [sys.executable, "-m", "wandb", "sync", str(first.path)] and len(calls) == 2
    mark = next(first.path.glob("*.wandb")).with_suffix(".wandb.synced")  # what wandb itself leaves
    mark.touch()
    said: list[str] = []
    try:
        assert [one.name for one in sync.sync(written, report=said.append)] == ["b-1"]
    finally:
        mark.unlink()
    assert "; 1 sent before; 1 empty" in said[-1]


def test_nothing_there(tmp_path: Path) -> None:
    assert sync.sync(tmp_path, report=lambda line: None) == []
    with pytest.raises(RunError, match="no such folder; name the one that holds the runs"):
        sync.sync(tmp_path / "nowhere")
