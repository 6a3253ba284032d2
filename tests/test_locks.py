"""Who holds what: the living are told from the dead, one holds a folder, and who lost it writes nothing more."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pcamlib import locks
from pcamlib.errors import RunError
from pcamlib.locks import Pulse


@pytest.fixture
def pulse(tmp_path: Path) -> Iterator[Pulse]:
    made = Pulse(tmp_path / "workers" / "mine")
    yield made
    made.close()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without file locks."""

    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", none)


def foreign(path: Path, age: float = 0.0, job: str | None = "7") -> Path:
    """The file of a process elsewhere that gave its last sign of life `age` seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "node": "n2", "pid": 7, "job": job}))
    os.utime(path, (time.time() - age,) * 2)
    return path


# The living and the dead


def test_on_one_host_the_lock_tells_at_once(tmp_path: Path, pulse: Pulse) -> None:
    other = Pulse(tmp_path / "workers" / "other")
    assert locks.lives(other.path, pulse.touch) and locks.lives(pulse.path, pulse.touch)
    other.close()
    assert not locks.lives(other.path, pulse.touch)
    died = foreign(tmp_path / "workers" / "died")
    died.write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))
    assert not locks.lives(died, pulse.touch), "its file is fresh, and nobody locks it"


def test_of_another_host_the_age_of_the_last_touch_tells(tmp_path: Path, pulse: Pulse) -> None:
    far = tmp_path / "workers" / "far"
    assert locks.lives(foreign(far, locks.STALE / 2), pulse.touch)
    assert not locks.lives(foreign(far, locks.STALE * 2), pulse.touch)
    far.write_text("")  # made a moment ago, not yet written
    assert locks.lives(far, pulse.touch)


def test_where_the_disk_has_no_locks_the_age_tells(tmp_path: Path, pulse: Pulse, no_locks: None) -> None:
    other = Pulse(tmp_path / "workers" / "other")
    assert locks.lives(other.path, pulse.touch)
    os.utime(other.path, (pulse.touch() - locks.STALE * 2,) * 2)
    assert not locks.lives(other.path, pulse.touch)
    other.close()


def test_a_living_process_keeps_touching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.01)
    made = Pulse(tmp_path / "made")
    os.utime(made.path, (0, 0))
    for _ in range(1000):
        if made.path.stat().st_mtime > 0:
            break
        time.sleep(0.01)
    assert made.path.stat().st_mtime > 0
    made.close()
    assert not made.path.exists()


# A folder


def test_who_holds_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    told = rf"another process is writing this run; .* \(job 4711, process {os.getpid()} on n1, last sign of life"
    with locks.held(tmp_path) as check:
        check()
        with pytest.raises(RunError, match=told), locks.held(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "it says who was last here"
    with locks.held(tmp_path):
        pass


def test_one_that_lives_elsewhere_is_left_alone_and_a_dead_one_is_not(tmp_path: Path) -> None:
    foreign(tmp_path / ".lock-3", locks.STALE / 2)
    with (
        pytest.raises(RunError, match=r"job 7, process 7 on n2, last sign of life (29|3\d) s ago"),
        locks.held(tmp_path),
    ):
        pass
    foreign(tmp_path / ".lock-3", locks.STALE * 2)
    with locks.held(tmp_path) as check:
        check()
        assert [path.name for path in tmp_path.iterdir()] == [".lock-4"]
    with locks.held(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock-5"], "no number comes twice"


def test_a_job_started_again_waits_for_its_earlier_start_and_then_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier one still lives and gives signs of it; it stops before it writes again."""
    for name, value in {"BEAT": 0.05, "STALE": 0.5, "POLL": 0.01}.items():
        monkeypatch.setattr(locks, name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    early, said = Pulse(tmp_path / ".lock-1"), list[str]()
    with pytest.raises(RunError, match="another process"), locks.held(tmp_path):  # two tasks of one job
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    with locks.held(tmp_path, said.append) as check:
        assert time.monotonic() - began > locks.STALE
        assert len(said) == 1 and "an earlier start of this job still runs, job 7" in said[0]
        check()
        with pytest.raises(RunError, match=r"taken over by job 7, process \d+ .*stops and writes nothing more"):
            early.check()
        early.close()
        assert [path.name for path in tmp_path.iterdir()] == [".lock-2"], "who lost takes nothing with it"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    other = foreign(tmp_path / ".lock-1")
    with pytest.raises(RunError, match="another process"), locks.held(tmp_path):
        pass
    assert other.exists()


def test_who_was_suspended_for_long_finds_out_before_it_writes(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / ".lock-1")
    pulse.path.unlink()
    Pulse(pulse.path).close(leave=tmp_path / ".lock")
    again = Pulse(pulse.path)  # the same name, another file
    pulse.check()
    pulse._seen -= 2 * locks.BEAT  # as if it had slept
    with pytest.raises(RunError, match="taken over by process"):
        pulse.check()
    again.check()
    again.close()


def test_a_lock_made_meanwhile_under_another_number_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a dead holder and taking over, others came and went."""
    foreign(tmp_path / ".lock-2", locks.STALE * 2)
    real = locks.lives

    def slow(path: Path, now: Any) -> bool:
        if path.name == ".lock-2":
            path.unlink(missing_ok=True)
            foreign(tmp_path / ".lock-1")
            return False
        return real(path, now)

    monkeypatch.setattr(locks, "lives", slow)
    with pytest.raises(RunError, match="another process"), locks.held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock-1"]


def contend(folder: Path, count: int) -> None:
    for _ in range(count):
        try:
            with locks.held(folder):
                with open(folder / "inside", "x"):
                    time.sleep(0.002)
                (folder / "inside").unlink()
                with open(folder / "done", "a") as file:
                    file.write("x")
        except RunError:
            time.sleep(0.001)


def test_of_many_that_want_a_folder_one_has_it(tmp_path: Path) -> None:
    """`open(..., "x")` would fail in the second of two."""
    several = [multiprocessing.get_context("fork").Process(target=contend, args=(tmp_path, 60)) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0] * 4
    assert len((tmp_path / "done").read_text()) > 10 and not (tmp_path / "inside").exists()
