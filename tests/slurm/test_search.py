"""A search by an array of workers on a real Slurm: whatever kills them, the number of trials stays exact."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import SLACK, Cluster
from optuna.trial import TrialState

from pcamlib.config import validate
from pcamlib.data.synthetic import generate
from pcamlib.experiments import hpo
from pcamlib.experiments.space import Space
from pcamlib.locks import _read as who
from pcamlib.sources import ROOT
from pcamlib.training import runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def space(trials: int, samples: int) -> Space:
    """Of three thousand weights; independent of who runs what."""
    given = {
        "base": "mlp",
        "set": {
            "model.crop": 32, "model.hidden_units": [1], "train.threads": 1, "train.precision": "fp32",
            "train.device": "cpu",
        },
        "metric": "auc",
        "sampler": {"name": "random"},
        "pruner": {"name": "none"},
        "phases": [{"trials": trials, "samples": samples, "evaluations": 2}],
        "parameters": {"optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
    }  # fmt: skip
    return validate(Space, given)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a place") / "data"
    generate(folder, seed=0, sizes={"train": 512, "valid": 256}, report=lambda line: None)
    return folder


def submit(cluster: Cluster, found: hpo.Search, data: Path, *more: str) -> str:
    """The number of an array of workers."""
    sbatch = ["sbatch", "--parsable", "--cpus-per-task=1", "--mem=900M", "--time=10", *more]
    sbatch += [f"--output={found.path.parent}/%a.out", "--export=ALL,PCAM_SITE=local"]
    return cluster.call(*sbatch, "slurm/hpo_worker.sbatch", str(found.path), str(data), cwd=ROOT)


def until(cluster: Cluster, array: str, reached: Callable[[], bool], seconds: float = 200) -> None:
    """Wait; a task back in the queue starts soon: see test_training."""
    deadline = time.monotonic() + SLACK * seconds
    while not reached():
        assert time.monotonic() < deadline, cluster.call("squeue")
        waiting = cluster.call("squeue", "-h", "-r", "-j", array, "-t", "PD", "-o", "%A %r", check=False)
        for job, reason in (line.split(" ", 1) for line in waiting.splitlines()):
            if reason == "BeginTime":
                time.sleep(2)
                cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        time.sleep(0.5)


def living(found: hpo.Search) -> list[Path]:
    """Signs of life of the workers."""
    return [path for path in (found.path / "workers").glob("*") if who(path)]


def gone(cluster: Cluster, array: str) -> bool:
    return not cluster.call("squeue", "-h", "-j", array, check=False)


def exact(found: hpo.Search, trials: int, killed: int = 0) -> None:
    """Every place has one result, of a finished run of its own; who was killed left its sign of life behind."""
    again = hpo.open_search(found.path)
    table = again.table()
    assert again.finished() and list(table["trial"]) == list(range(1, trials + 1))
    assert set(table["state"]) == {"complete"} and table["run"].is_unique
    assert sum(t.state == TrialState.COMPLETE for t in again.round(0).study.trials) == trials
    assert not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in again.round(0).study.trials)
    for row in table.to_dict("records"):
        run = runs.open_run(found.path / "trials" / row["run"])
        assert run.success and run.success["best"] == row["weights"] and run.provenance["attempts"][-1]["exit"] == "ok"
    assert len(living(found)) == killed


def test_twelve_tasks_on_two_nodes_of_which_one_is_killed(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    found = hpo.begin(space(12, 12_800), data, tmp_path / "a study", lambda line: None)
    array = submit(cluster, found, data, "--array=0-11")
    until(cluster, array, lambda: len(living(found)) == 2 and bool(found.round(0).final()))
    assert {who(path)["node"] for path in living(found)} == {"n1", "n2"}
    victim = who(living(found)[0])
    os.kill(victim["pid"], signal.SIGKILL)
    until(cluster, array, lambda: gone(cluster, array))
    states = [cluster.state(f"{array}_{task}") for task in range(12)]
    assert sorted(set(states)) == ["COMPLETED", "FAILED"] and states.count("FAILED") == 1
    exact(found, 12, killed=1)


def test_workers_told_of_their_time_limit_and_cancelled_ones_lose_no_trial(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    found = hpo.begin(space(4, 640_000), data, tmp_path / "a study", lambda line: None)
    array = submit(cluster, found, data, "--array=0-1")
    until(cluster, array, lambda: len(list((found.path / "trials").glob("*/metrics.jsonl"))) == 2)
    cluster.call("scancel", "--signal=USR1", "--batch", f"{array}_0")
    log = tmp_path / "0.out"
    until(cluster, array, lambda: "back into the queue" in log.read_text() and "start 1" in log.read_text())
    until(cluster, array, lambda: len(living(found)) == 2)
    cluster.call("scancel", array)
    until(cluster, array, lambda: gone(cluster, array))
    stopped = [run for run in runs.list_runs(found.path / "trials") if not run.success]
    done = [trial.number for trial in found.round(0).final()]
    assert stopped and len(done) < 4
    array = submit(cluster, found, data, "--array=0-1")
    until(cluster, array, lambda: gone(cluster, array))
    exact(found, 4)
    assert set(done) <= {trial.number for trial in found.round(0).final()}
    assert all("stopped" in [entry["exit"] for entry in run.provenance["attempts"]] for run in stopped)
    assert not any("again" in run.name for run in stopped), "saved, and gone on with, not trained anew"
