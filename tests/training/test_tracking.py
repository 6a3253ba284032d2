"""metrics.jsonl is the truth, also after a kill; wandb is a copy that leaves no trace when it is off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcamlib.errors import ConfigError, RunError
from pcamlib.training import loop, runs, sync
from pcamlib.training.tracking import MetricsFile, NullTracker, read_metrics, wandb_tracker


def written(path: Path, steps: range) -> None:
    log = MetricsFile(path)
    for step in steps:
        log.log({"step": step, "loss": step / 3})
    log.close()


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 4))
    assert read_metrics(path) == [{"step": step, "loss": step / 3} for step in (1, 2, 3)]


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path / "metrics.jsonl")
    log.log({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    log.close()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 4))
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        path.write_bytes(whole[:-cut])
        assert [row["step"] for row in read_metrics(path)] == ([1, 2, 3] if cut == 1 else [1, 2]), (
            "only a newline is gone"
        )


def test_going_on_drops_what_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 6))
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsFile(path, resume_at=3)
    log.log({"step": 4})
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_off_is_a_null_object(tiny: Any, tmp_path: Path) -> None:
    tracker = wandb_tracker(tiny(), tmp_path, 0)
    assert isinstance(tracker, NullTracker)
    tracker.log({"step": 1})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_off_never_imports_wandb(tiny: Any, tmp_path: Path) -> None:
    """In an interpreter of its own, where another test cannot have imported it."""
    code = (
        "import sys; from pathlib import Path; from pcamlib.config import parse; from pcamlib.training import loop; "
        "loop.wandb_tracker(parse({}), Path('x'), 0).log({'step': 1}); sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_without_the_package_it_says_what_to_do(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    with pytest.raises(ConfigError, match=r"pip install wandb, or tracking.wandb=off"):
        wandb_tracker(tiny("tracking.wandb=offline"), tmp_path, 0)


def test_offline_writes_one_wandb_run_an_attempt(
    tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the run's own folder; what the user's shell says of wandb neither decides nor changes."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config, out = tiny("tracking.wandb=offline", "train.checkpoint_every=1"), tmp_path / "run"

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, data, out, report=lambda line: None, on_step=stop)
    assert wandb.run is None, "an interrupted attempt has ended its wandb run; the next would continue it otherwise"
    loop.resume(out, data, report=lambda line: None)
    files = sorted(out.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.parent for file in files}) == 2
    for file in files:
        assert b"grad_norm" in file.read_bytes()
    assert os.environ["WANDB_MODE"] == "disabled"
    loop.train(config.override("tracking.wandb=off"), data, tmp_path / "off", report=lambda line: None)
    assert [
        entry for entry in runs.diff(runs.open_run(out), runs.open_run(tmp_path / "off")) if entry.what != "code.digest"
    ] == []
    assert not (tmp_path / "off" / "wandb").exists()


def test_pieces_of_a_killed_job_stay_apart_and_lose_no_step(
    tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL takes wandb's last 32 KiB, here all of it; and a shell that fixes the id would make one run of both."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_RESUME", "allow")
    monkeypatch.setenv("WANDB_RUN_GROUP", "another")
    out = tmp_path / "run"
    config = tiny("tracking.wandb=offline", "tracking.group=study", "train.checkpoint_every=1", "train.steps=5")
    code = (
        "import os, signal, sys; from pcamlib.config import parse; from pcamlib.training import loop; "
        "die = lambda step: step == 3 and os.kill(os.getpid(), signal.SIGKILL); "
        "loop.train(parse(eval(sys.argv[1])), sys.argv[2], sys.argv[3], on_step=die)"
    )
    killed = subprocess.run([sys.executable, "-c", code, repr(config.model_dump()), data, out], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = {file: file.read_bytes() for file in out.rglob("*.wandb")}
    loop.resume(out, data, report=lambda line: None)
    wandb.teardown()  # its own process writes on for a moment
    second = sync.offline(out)[-1]
    assert (second.group, second.name) == ("study", "run-1")
    assert (second.rows, second.last) == (5, 5), "it begins with the rows of the first"
    assert len(before) == 1 and all(file.read_bytes().startswith(content) for file, content in before.items())
    assert len(list(out.glob("wandb/offline-run-*"))) == 2 and not list(out.rglob("*mine*"))
    assert [row["step"] for row in runs.Run(out).metrics()] == [1, 2, 3, 4, 5]


def test_trackers_are_closed_also_when_training_fails(
    tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder(NullTracker):
        rows: list[dict[str, Any]] = []  # noqa: RUF012 - of this one test
        closed = 0

        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

        def close(self) -> None:
            Recorder.closed += 1

    monkeypatch.setattr(loop, "wandb_tracker", lambda config, folder, attempt: Recorder())
    with pytest.raises(RunError):
        loop.train(tiny("optimizer.lr=1e30"), data, tmp_path / "a", report=lambda line: None)
    assert Recorder.closed == 1
    assert Recorder.rows == runs.Run(tmp_path / "a").metrics(), "the copy is a copy"
