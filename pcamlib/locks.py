"""Who holds what, told across hosts and on disks without file locks: a file that a living process locks and touches.

The lock (flock) tells at once, but only where it is seen: on one host, or on a disk that passes locks on. The touch,
every `BEAT` seconds, is seen wherever the file is. A folder is held through numbered files `.lock-N`, each made with
O_EXCL: to take over from N is to make N + 1, which only one can. It is left as `.lock`, which says who was last here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pcamlib.errors import RunError

BEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds of silence after which a process on another host is taken for dead
POLL = 1.0  # seconds between two looks at a process that is waited for


class Pulse:
    """A process's sign of life: a file that it locks and touches every `BEAT` seconds until it closes or dies.

    Args:
        path: made here; it says host, process and Slurm job.

    Raises:
        FileExistsError: somebody else has made it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lost = path, False
        self._file = open(path, "x")  # noqa: SIM115 - lives as long as the process
        with suppress(OSError):  # no locks on this disk: the touches alone must do
            fcntl.flock(self._file, fcntl.LOCK_EX)
        json.dump({"name": path.name, **_me()}, self._file)
        self._file.flush()
        self._seen = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self.lost and not self._over.wait(BEAT):
            with suppress(OSError):  # a disk that is away for a moment: the next beat tries again
                self.touch()

    def touch(self) -> float:
        """Touch the file; returns its time, by the clock of the file system.

        Raises:
            FileNotFoundError: another process has removed it.
        """
        try:
            if not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                raise FileNotFoundError(self.path)
            os.utime(self.path)
        except OSError as error:
            self.lost = self.lost or error.errno in (None, errno.ENOENT, errno.ESTALE)
            raise
        self._seen = time.monotonic()
        return self.path.stat().st_mtime

    def check(self) -> None:
        """Raise RunError where another process has taken over; to be called before anything is written.

        Between two beats that were heard, nobody can have: who takes over from the living waits two of them.
        """
        if not self.lost and time.monotonic() - self._seen > 1.5 * BEAT:
            with suppress(OSError):  # of a disk that is away the write itself will tell
                self.touch()
        if self.lost:
            raise RunError(
                f"{self.path.parent}: taken over by {_told(_newest(self.path.parent))}; this process stops and writes "
                f"nothing more"
            )

    def close(self, leave: Path | None = None) -> None:
        """End as one who is done: the file is removed, or renamed to `leave`."""
        self._over.set()
        self._thread.join()
        with suppress(FileNotFoundError):
            if not self.lost:
                self.path.replace(leave) if leave else self.path.unlink()
        self._file.close()


def lives(path: Path, now: Callable[[], float]) -> bool:
    """Whether the process that made a file as `Pulse` does lives.

    On its own host its lock tells at once. From another host a lock need not be seen, so the age of the last touch
    decides, against `now`: both times must come from the file system's clock.
    """
    try:
        with open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _read(path).get("host") == socket.gethostname():
                return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:  # no locks on this disk
        pass
    return age(path, now) < STALE


def age(path: Path, now: Callable[[], float]) -> float:
    """Seconds since a file was touched; for ever where it is gone."""
    try:
        return now() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


@contextmanager
def held(folder: Path, report: Callable[[str], None] = print) -> Iterator[Callable[[], None]]:
    """Hold a folder against every process on every host; yields `check`, to be called before anything is written.

    A job that Slurm started again takes over from its own earlier start, which a node that was cut off may still be
    running: when that is silent, or after `STALE` seconds.

    Raises:
        RunError: another process lives in it; or, from `check`, has taken over.
    """
    pulse = _take(folder, report)
    try:
        yield pulse.check
    finally:
        pulse.close(leave=folder / ".lock")


def _take(folder: Path, report: Callable[[str], None]) -> Pulse:
    began, waiting = time.monotonic(), False
    while True:
        before = _newest(folder)
        alive = before is not None and lives(before, lambda: _clock(folder))
        if before is not None and alive:
            ours = _read(before).get("job") == os.environ.get("SLURM_JOB_ID", "none")
            if not (ours and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"):
                raise RunError(
                    f"{folder}: another process is writing this run; wait for it or choose --out ({_told(before)}, "
                    f"last sign of life {max(0.0, age(before, lambda: _clock(folder))):.0f} s ago)"
                )
            if not waiting:
                report(f"{folder}: an earlier start of this job still runs, {_told(before)}; waiting up to {STALE:g} s")
            waiting = True
            if time.monotonic() - began < STALE:
                time.sleep(POLL)
                continue
        number = max(_number(path) for path in (before, folder / ".lock"))
        try:
            pulse = Pulse(folder / f".lock-{number + 1}")
        except FileExistsError:
            continue
        # another came, and perhaps went, since the look: its number was this one or was not looked at
        if set(folder.glob(".lock-*")) - {before} != {pulse.path} or _number(folder / ".lock") > number:
            pulse.close()
            continue
        if before:
            before.unlink(missing_ok=True)
        if alive:
            time.sleep(2 * BEAT)  # in which its holder sees that, and stops
        return pulse


def _newest(folder: Path) -> Path | None:
    """The holder's file: that of the highest number."""
    return max(folder.glob(".lock-*"), key=_number, default=None)


def _number(path: Path | None) -> int:
    """Of `.lock-N`, or that which `.lock` had when it was held: no number comes twice; 0 where there is none."""
    name = path.name if path and path.name != ".lock" else str(_read(path).get("name", ""))
    return int(name.rpartition("-")[2] or 0)


def _me() -> dict[str, Any]:
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    return {"host": socket.gethostname(), "node": node, "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _read(path: Path | None) -> dict[str, Any]:
    """What a pulse's file says; nothing where it is gone or was only just made."""
    if path is None:
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _told(path: Path | None) -> str:
    """A holder for people."""
    who = _read(path)
    job = f"job {who['job']}, " if who.get("job") else ""
    return f"{job}process {who['pid']} on {who['node']}" if who else "a process that has ended since"


def _clock(folder: Path) -> float:
    """Now, by the clock of the file system that holds a folder."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock.") as file:
        return Path(file.name).stat().st_mtime
