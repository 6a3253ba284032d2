"""Trials that several processes share: a journal file that survives a kill, signs of life, and exact places.

A study has a fixed number of places. A place is done when one of its trials completed or was pruned; a trial whose
process died or was told to stop fails, and the place is given out again with the same parameters. Everything goes
through one journal file and two lock files (`O_EXCL`, right on NFS too), so the processes may sit on several hosts that
share a disk.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from pcamlib.errors import ConfigError, DivergedError, RunError
from pcamlib.experiments.space import Space
from pcamlib.locks import Pulse, lives
from pcamlib.training import loop, metrics, runs
from pcamlib.training.notice import Stopped

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


def deaths(trials: list[FrozenTrial]) -> int:
    """How many of a place's trials did not end by themselves: all but those that were told to stop, and did."""
    return sum(not trial.user_attrs.get("stopped") for trial in trials)


def pulse_in(folder: Path) -> Pulse:
    """A sign of life under a name that no other process has."""
    return Pulse(folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}")


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
        self.space, self.phase, self.folder, self._fixed = space, phase, folder, fixed
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
        with locked(self.folder / "claim", grace=60):  # longer than the journal's, which its holder may wait for
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
            trial.set_user_attr("worker", pulse.path.name)
            return trial

    def _reap(self, pulse: Pulse) -> None:
        """Fail the running trials of the dead; one that has killed its process too often is pruned for good."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # without a worker: it died between two records of `claim`, which nobody else is in now
            worker = trial.user_attrs.get("worker")
            if worker and lives(pulse.path.with_name(worker), pulse.touch):
                continue
            died = deaths(self.places().get(trial.user_attrs.get("place", -1), []))
            self.study.tell(trial.number, state=TrialState.PRUNED if died >= ATTEMPTS else TrialState.FAIL)


def attempt(trials: Round, trial: optuna.Trial, data: Path, report: Callable[[str], None] = print) -> None:
    """Train one claimed trial and tell its score, computed from the stored predictions of its best weights.

    A trial that was told to stop is saved, and fails; the next one in its place goes on with the same run.

    Raises:
        Stopped: USR1 or TERM came.
    """
    place, length, metric = (
        trial.user_attrs["place"],
        trials.space.phases[trials.phase].evaluations,
        trials.space.metric,
    )
    earlier = trials.places()[place][:-1]
    stopped = bool(earlier) and earlier[-1].user_attrs.get("stopped", False)
    name = f"{trials.phase + 1}-{place + 1:03d}" + (f"-again{len(earlier)}" if earlier else "")
    name = earlier[-1].user_attrs["run"] if stopped else name
    out, seen = trials.folder / "trials" / name, list[float]()

    def judge(row: dict[str, Any]) -> None:
        seen.append(row[f"valid_{metric}"])
        trial.report(seen[-1], len(seen))
        if len(seen) < length and trial.should_prune():
            raise TrialPruned(f"at evaluation {len(seen)} of {length}")

    try:
        trial.set_user_attr("run", name)
        try:
            about = (f"tracking.group={trials.folder.name}", f"data.dir={json.dumps(str(data.resolve()))}")
            settings = trials.space.config(trial.params, trials.phase).override(*about)
            if stopped:
                for row in runs.open_run(out).metrics():
                    if f"valid_{metric}" in row:
                        judge(row)
            run = loop.train(settings, data, out, resume=stopped, report=report, on_evaluation=judge)
        # what these settings brought about themselves; anything else ends the worker, and the place is given out again
        except (TrialPruned, ConfigError, DivergedError, torch.OutOfMemoryError) as error:
            trial.set_user_attr("why", str(error).splitlines()[0])
            trials.study.tell(trial, state=TrialState.PRUNED)
            return
        except Stopped:
            trial.set_user_attr("stopped", True)
            trials.study.tell(trial, state=TrialState.FAIL)
            raise
        stored = run.predictions("valid")
        point = metrics.scores(stored.label, stored.probability, np.ones((1, len(stored.label))))
        trial.set_user_attr("weights", (run.success or {})["best"])
        trials.study.tell(trial, float(point[metric][0]), skip_if_finished=True)
    except UpdateFinishedTrialError:
        report(f"trial {name}: this process was silent for so long that it was taken for dead; its result is not used")
