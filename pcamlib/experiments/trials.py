"""Trials that several processes share: a journal file that survives a kill, signs of life, and exact places.

A study has a fixed number of places. A place is done when one of its trials completed or was pruned; a trial whose
process died fails, and the place is given out again with the same parameters. Everything goes through one journal file
and two lock files (`O_EXCL`, right on NFS too), so the processes may sit on several hosts that share a disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from pcamlib.errors import RunError
from pcamlib.experiments.space import Space

BEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds of silence after which a process on another host is taken for dead
ATTEMPTS = 3  # a place whose processes died this often is given up: it kills them
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@contextmanager
def locked(path: Path, grace: int = 30) -> Iterator[None]:
    """Hold `PATH.lock` against all processes on all hosts; Optuna breaks one that was not released for `grace` s."""
    lock = JournalFileOpenLock(str(path), grace)
    lock.acquire()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # broken by another who waited for so long
            lock.release()


class Journal(JournalFileBackend):
    """Optuna's journal file, minus what a killed writer left at its end.

    Optuna reads over a torn last line, but the next record would be glued to it and both lost: the file could not be
    read any more. The tail is cut before anything is appended; whole lines are never touched.
    """

    def __init__(self, path: Path, report: Callable[[str], None] = print) -> None:
        super().__init__(str(path), JournalFileOpenLock(str(path)))
        self._path, self._say = path, report
        with locked(path):
            self._mend(path.read_bytes())

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records under the lock, flushed to disk."""
        with locked(self._path), open(self._path, "rb+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    self._mend(self._path.read_bytes())
            file.seek(0, os.SEEK_END)
            file.write(b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs))
            file.flush()
            os.fsync(file.fileno())

    def _mend(self, content: bytes) -> None:
        """Cut a last line that is no whole record; a damaged line before it is an error."""
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            with suppress(ValueError):
                if line.endswith(b"\n") and isinstance(json.loads(line), dict):
                    continue
            if number < len(lines):
                raise RunError(
                    f"{self._path}: line {number} of {len(lines)} is damaged, and no kill does that; put a copy back, "
                    f"or cut the file before that line to go on from there"
                )
            os.truncate(self._path, len(content) - len(line))
            self._say(f"{self._path}: the last record was torn by a kill ({len(line)} bytes): cut, nothing else lost")


class Pulse:
    """A process's sign of life: a file that it locks and touches every `BEAT` seconds until it closes or dies."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._path = folder / self.name
        self._file = open(self._path, "w")  # noqa: SIM115 - lives as long as the process
        with suppress(OSError):  # no locks on this disk: the touches alone must do
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):  # a disk that is away for a moment: the next beat tries again
                self.touch()

    def touch(self) -> float:
        """Touch the file; returns its time, by the clock of the file system."""
        os.utime(self._path)
        return self._path.stat().st_mtime

    def close(self) -> None:
        """End as one who is done."""
        self._over.set()
        self._thread.join()
        self._file.close()
        self._path.unlink(missing_ok=True)

    def lives(self, name: str) -> bool:
        """Whether the process of that name lives.

        On this host its lock tells at once. From another host a lock need not be seen, so the age of its last touch
        decides, against a touch of our own: both times come from one clock.
        """
        path = self._path.with_name(name)
        try:
            with open(path, "r+") as file:
                if name.rsplit("-", 2)[0] == socket.gethostname():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:  # no locks on this disk
            pass
        return self.touch() - path.stat().st_mtime < STALE


class Round:
    """The trials of one phase, as an Optuna study in `FOLDER/journal.jsonl`.

    Args:
        folder: of the whole search.
        space: what is searched.
        phase: number of the phase.
        fixed: parameters of every place, where a phase repeats those of another; empty: the sampler proposes.
        report: told of a torn record.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        phase: int,
        fixed: list[dict[str, Any]],
        report: Callable[[str], None] = print,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self._fixed, self._folder = space, fixed, folder
        self.total = len(fixed) or space.total(phase)
        storage = JournalStorage(Journal(folder / "journal.jsonl", report))
        name, pruner = f"phase-{phase + 1}", space.pruner.build()
        if any(found.study_name == name for found in storage.get_all_studies()):  # who only reads writes nothing
            self.study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
        else:
            self.study = optuna.create_study(
                study_name=name, storage=storage, pruner=pruner, direction=space.direction, load_if_exists=True
            )

    def places(self) -> dict[int, list[FrozenTrial]]:
        """The trials of every place that has any, in the order in which they began."""
        found: dict[int, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if "place" in trial.user_attrs:
                found.setdefault(trial.user_attrs["place"], []).append(trial)
        return found

    def final(self) -> list[FrozenTrial]:
        """The trial that decided each place that is done, by place."""
        decided = ([t for t in trials if t.state in DONE] for _, trials in sorted(self.places().items()))
        return [trials[0] for trials in decided if trials]

    def finished(self) -> bool:
        """Whether every place is done."""
        return len(self.final()) >= self.total

    def best(self, count: int) -> list[dict[str, Any]]:
        """Parameters of the best completed trials, best first; fewer where fewer completed."""
        sign = -1 if self.space.metric == "auc" else 1
        complete = [trial for trial in self.final() if trial.state == TrialState.COMPLETE]
        return [trial.params for trial in sorted(complete, key=lambda t: sign * (t.value or 0.0))[:count]]

    def claim(self, pulse: Pulse) -> optuna.Trial | None:
        """A trial for an open place, its parameters drawn; None where every place is done or being worked on."""
        with locked(self._folder / "claim", grace=60):  # longer than the journal's, which its holder may wait for
            self._reap(pulse)
            places, distributions = self.places(), self.space.distributions()
            waiting = self.study.get_trials(
                deepcopy=False, states=(TrialState.WAITING,)
            )  # of a claim that died halfway
            held = {place for place, trials in places.items() if any(t.state != TrialState.FAIL for t in trials)}
            open_ = [t.user_attrs["place"] for t in waiting] or [p for p in range(self.total) if p not in held]
            if not open_:
                return None
            place = open_[0]
            drawn = [t.params for t in places.get(place, []) if t.params.keys() == distributions.keys()]
            if not waiting and (again := drawn[:1] or self._fixed[place : place + 1]):
                self.study.enqueue_trial(again[0], user_attrs={"place": place})
            self.study.sampler = self.space.draw(place)
            trial = self.study.ask(distributions)
            trial.set_user_attr("place", place)
            trial.set_user_attr("worker", pulse.name)
            return trial

    def _reap(self, pulse: Pulse) -> None:
        """Fail the running trials of the dead; one that has killed its process too often is pruned for good."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # without a worker: it died between two records of `claim`, which nobody else is in now
            if "worker" in trial.user_attrs and pulse.lives(trial.user_attrs["worker"]):
                continue
            attempts = len(self.places().get(trial.user_attrs.get("place", -1), []))
            self.study.tell(trial.number, state=TrialState.PRUNED if attempts >= ATTEMPTS else TrialState.FAIL)
