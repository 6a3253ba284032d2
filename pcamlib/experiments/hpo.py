"""Hyperparameter search: trials in worker processes, one run folder each, resumable after anything.

    pcam hpo cnn --data DIR --out runs/hpo --workers 2 --trials 20
    pcam hpo-worker runs/hpo --data DIR       # one more worker, also from another host

    STUDY/study.json  journal.jsonl  trials/PHASE-PLACE/  workers/  champion.yaml

The same command again goes on where the search stopped. A killed worker costs its running trial, which is given out
again with the same parameters; one that is told to stop saves it, and it goes on from there. The number of trials
stays exact.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from pcamlib import config, provenance, seeding, sources
from pcamlib.config import Config
from pcamlib.data.patches import open_split
from pcamlib.errors import ConfigError, RunError
from pcamlib.experiments.space import Space, check
from pcamlib.experiments.trials import ATTEMPTS, Round, attempt, deaths, locked, pulse_in
from pcamlib.files import digest, read_json, write_json, write_text
from pcamlib.training import loop
from pcamlib.training.notice import Stopped, notice

POLL = 0.5  # seconds between two looks at the study


@dataclass
class Search:
    """A search folder: its space, and the rounds of trials in it."""

    path: Path
    space: Space
    _rounds: dict[int, Round] = field(default_factory=dict, repr=False)  # each reads the whole journal when it opens

    def round(self, phase: int) -> Round:
        """Trials of a phase; a later one repeats the best of the one before.

        Raises:
            RunError: the phase before is not finished, or none of its trials completed.
        """
        if phase not in self._rounds:
            best: list[dict[str, Any]] = []
            if phase:
                before = self.round(phase - 1)
                best = before.best(self.space.phases[phase].keep or 1)
                if not best or not before.finished():
                    what = "has no completed trial to go on with" if before.finished() else "is not finished"
                    raise RunError(f"{self.path}: phase {phase} {what}")
            self._rounds[phase] = Round(self.path, self.space, phase, best)
        return self._rounds[phase]

    def finished(self) -> bool:
        """Whether every place of every phase is done."""
        return all(self.round(phase).finished() for phase in range(len(self.space.phases)))

    def table(self, phase: int = -1) -> pd.DataFrame:
        """One row a place: trial, state, value, each parameter, evaluations, attempts, seconds, run, weights, why."""
        phase %= len(self.space.phases)
        places = self.round(phase).places()
        rows = [self._row(trial, places[trial.user_attrs["place"]]) for trial in self.round(phase).final()]
        return pd.DataFrame(rows, dtype=object)

    def _row(self, trial: FrozenTrial, attempts: list[FrozenTrial]) -> dict[str, Any]:
        about, deadly = trial.user_attrs, deaths(attempts)
        died = f"its process died {deadly} times: not enough memory?" if deadly >= ATTEMPTS else None
        return {
            "trial": about["place"] + 1,
            "state": trial.state.name.lower(),
            "value": trial.value,
            **trial.params,
            "evaluations": len(trial.intermediate_values),
            "attempts": len(attempts),
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "run": about.get("run"),
            "weights": about.get("weights"),
            "why": about.get("why", None if trial.state == TrialState.COMPLETE else died),
        }

    def best(self) -> dict[str, Any]:
        """Parameters of the best trial of the last phase.

        Raises:
            RunError: none completed.
        """
        found = self.round(len(self.space.phases) - 1).best(1)
        if not found:
            raise RunError(f"{self.path}: no trial completed; `why` in the table says what became of each")
        return found[0]

    def champion(self) -> Config:
        """The best settings as the configuration of a run of the last phase's length."""
        return self.space.config(self.best(), len(self.space.phases) - 1)

    def settings(self) -> list[dict[str, Any]]:
        """The best settings as rows setting, value."""
        return [{"setting": key, "value": value} for key, value in self.best().items()]

    def weights(self) -> dict[str, str]:
        """Digest of the best weights of each completed trial of the last phase, by name of its run."""
        rows = self.table().to_dict("records")
        return {f"{self.path.name}/{row['run']}": row["weights"] for row in rows if row["state"] == "complete"}

    def within(self, spread: float) -> int:
        """How many completed trials of the last phase the best one leads by no more than `spread`; itself counts."""
        rows = self.table()
        values = rows[rows["state"] == "complete"]["value"].astype(float)
        best = values.max() if self.space.metric == "auc" else values.min()
        return int(((values - best).abs() <= spread).sum())


def search(space: Space, data: Path, out: Path, workers: int = 2, report: Callable[[str], None] = print) -> Search:
    """Run or go on with a search until every trial is done.

    Args:
        space: what is searched.
        data: data folder in the official layout.
        out: folder of the search; new, or one begun with the same space and data.
        workers: processes started here; they share the cores, and others may join from elsewhere.
        report: told of every finished trial and of every worker that died.

    Raises:
        ConfigError: the folder was begun with another space.
        RunError: other data, or every worker ended before the search did.
    """
    found = begin(space, data, out, report)
    told: set[tuple[int, int]] = set()
    living = {} if found.finished() else dict(_start(found, data, number, workers) for number in range(workers))
    try:
        while not found.finished():
            for process in [process for process in living if process.poll() is not None]:
                log = living.pop(process)
                last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                report(f"{out}: a worker ended with code {process.returncode} ({last})")
            if not living:
                raise RunError(
                    f"{out}: every worker ended before the search did; the same command goes on with it; "
                    f"what they said is in {out / 'workers'}"
                )
            _tell(found, told, report)
            time.sleep(POLL)
        with suppress(subprocess.TimeoutExpired):  # they end by themselves
            for process in living:
                process.wait(20 * POLL)
    finally:
        for process in living:
            process.terminate()
            process.wait()
    _tell(found, told, report)
    write_text(found.path / "champion.yaml", found.champion().yaml())
    return found


def _start(found: Search, data: Path, number: int, workers: int) -> tuple[subprocess.Popen[bytes], Path]:
    """A worker process with its share of the cores, and the file it talks to."""
    log = found.path / "workers" / f"{socket.gethostname()}-{os.getpid()}-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, seeding.cores() // workers))
    call = [sys.executable, "-m", "pcamlib.cli", "hpo-worker", str(found.path), "--data", str(data)]
    with open(log, "w") as target:
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        return subprocess.Popen(call, stdout=target, stderr=target, env=environment), log


def begin(space: Space, data: Path, out: Path, report: Callable[[str], None] = print) -> Search:
    """A search folder for this space and data, made or found again; errors as in `search`."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "space": space.model_dump(mode="json"),
        "base": config.parse(config.recipe(space.base)).model_dump(exclude={"data": {"dir"}}),
        "data": {split: open_split(data, split).fingerprint for split in ("train", "valid")},
        "code": sources.digests(Path(loop.__file__)),
    }
    with locked(out / "study"):
        path = out / "study.json"
        before = read_json(path) if path.exists() else record
        _same(_comparable(before), _comparable(record), path)
        if before["code"] != record["code"]:
            report(f"{out}: the training code changed since this search began; earlier trials ran the old one")
        had, wanted = before["space"]["phases"][0]["trials"], space.total(0)
        if wanted < had:
            raise ConfigError(f"{out}: this search was begun with {had} trials, {wanted} are asked for; not fewer")
        if wanted > had and len(space.phases) > 1 and Search(out, space).round(0).study.get_trials(deepcopy=False):
            raise ConfigError(f"{out}: with later phases the number of trials is fixed at {had}; choose another --out")
        write_json(path, {**before, "space": record["space"]})
    return Search(out, space)


def open_search(out: Path) -> Search:
    """A search folder as it is.

    Raises:
        RunError: there is none.
    """
    if not (out / "study.json").is_file():
        raise RunError(f"{out}: no search here (no study.json); `pcam hpo SPACE --out {out}` begins one")
    return Search(out, check(config.validate(Space, read_json(out / "study.json")["space"]), str(out)))


def place(space: Space, data: Path, folder: Path, name: str) -> Path:
    """`FOLDER/NAME-DIGEST`, a folder of its own for each space, data and training code; older ones are removed."""
    basis = [
        space.model_dump(mode="json"),
        sources.digests(Path(loop.__file__)),
        config.parse(config.recipe(space.base)).digest(),
        [open_split(data, split).fingerprint for split in ("train", "valid")],
    ]
    path = folder / f"{name}-{digest(basis)[:8]}"
    for old in folder.glob(f"{name}-????????"):
        if old != path:
            shutil.rmtree(old)
    return path


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """What must not change while a search runs; not how many trials the first phase has, nor why something is tried."""
    phases = {str(number): {**phase} for number, phase in enumerate(record["space"]["phases"], 1)}
    phases["1"].pop("trials")
    parameters = {
        key: {name: value for name, value in parameter.items() if name != "why"}
        for key, parameter in record["space"]["parameters"].items()
    }
    space = {**record["space"], "phases": phases, "parameters": parameters}
    return {"space": space, "base": record["base"], "data": record["data"]}


def _same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    changed = provenance.difference(before, now)
    told = "; ".join(f"{key.removeprefix('space.')} was {a}, is {b}" for key, a, b in changed[:3])
    if any(key.startswith("data.") for key, _, _ in changed):
        raise RunError(f"{path}: this search was begun on other patches ({told}); give its data, or another --out")
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(f"{path}: this search was begun with another space: {told}{more}; choose another --out")


def _tell(found: Search, told: set[tuple[int, int]], report: Callable[[str], None]) -> None:
    """Report what finished since the last time."""
    for phase in range(len(found.space.phases)):
        if phase and not found.round(phase - 1).finished():
            break
        for row in found.table(phase).to_dict("records"):
            if (phase, row["trial"]) in told:
                continue
            told.add((phase, row["trial"]))
            shown = {key: f"{v:.3g}" if isinstance(v := row[key], float) else v for key in found.space.parameters}
            setting = ", ".join(f"{key}={value}" for key, value in shown.items())
            score = f"valid {found.space.metric} {row['value']:.4f}" if row["value"] is not None else "no score"
            place = f"phase {phase + 1}  trial {row['trial']}/{found.round(phase).total}"
            report(f"  {place}  {row['state']}  {score}  {setting}{'  ' + row['why'] if row['why'] else ''}")


def work(found: Search, data: Path, report: Callable[[str], None] = print) -> None:
    """Claim and run trials until every place of every phase is done.

    Raises:
        Stopped: USR1 or TERM came; the trial's run is saved, and whoever gets its place next goes on with it.
    """
    with notice() as came:
        pulse = pulse_in(found.path / "workers")
        try:
            for phase in range(len(found.space.phases)):
                trials = found.round(phase)
                while not trials.finished():
                    if came:
                        raise Stopped(f"{found.path}: told to stop ({came[0]}); another worker goes on with the search")
                    if trial := trials.claim(pulse):
                        attempt(trials, trial, data, report)
                    else:  # the rest is being worked on; it comes back if its worker dies
                        time.sleep(POLL)
        finally:
            pulse.close()
