"""Trainings on a real Slurm: time limits, requeue, preemption, lost nodes, two nodes; bitwise as if undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import SLACK, Cluster
from training.conftest import TINY, write_split

from pcamlib.config import parse
from pcamlib.sources import ROOT
from pcamlib.training import probe, runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
STEPS = 10_000  # a step takes 1 to 3 ms
SETTINGS = {**TINY, "loader": {"batch_size": 32, "augment": ["d4"]}, "schedule": {"name": "onecycle"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a recipe, its name with a space."""
    folder = tmp_path_factory.mktemp("a place")
    rng = np.random.default_rng(0)
    write_split(folder / "data", "train", rng.permutation(np.arange(256) < 96), seed=1)
    write_split(folder / "data", "valid", rng.permutation(np.arange(128) < 64), seed=2)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


def call(place: Path, *items: str) -> list[str]:
    """Options of `pcam train`."""
    every = ["train.evaluate_every=1000", "train.checkpoint_every=250"]
    return ["--recipe", f"{place / 'tiny.yaml'}", "--data", f"{place / 'data'}", *every, *items]


class Job:
    """A training that was submitted."""

    def __init__(self, cluster: Cluster, out: Path, options: list[str], *more: str, force: bool = True) -> None:
        self.cluster, self.out, self.log = cluster, out, out.with_suffix(".out")
        sbatch = ["sbatch", "--parsable", "--cpus-per-task=1", "--mem=900M", "--time=10", f"--output={self.log}", *more]
        sbatch += [f"--export=ALL,PCAM_FORCE={int(force)},PCAM_SITE=local", "slurm/train_ddp.sbatch", str(out)]
        self.number = cluster.call(*sbatch, *options, cwd=ROOT)

    def until(self, reached: Callable[[], bool], seconds: float = 200) -> None:
        """Wait; a job back in the queue starts soon, not after the two minutes for which Slurm holds it back.

        Started again within a second it would be killed: the node takes its new credential for the one revoked.
        """
        deadline = time.monotonic() + SLACK * seconds
        while not reached():
            assert time.monotonic() < deadline, f"{self.cluster.call('squeue')}\n{self.text()}"
            if self.cluster.call("squeue", "-h", "-j", self.number, "-t", "PD", "-o", "%r", check=False) == "BeginTime":
                time.sleep(2)
                self.cluster.call("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)
            time.sleep(0.3)

    def step(self) -> int:
        """The latest one that the run has noted."""
        try:
            with open(self.out / "metrics.jsonl", "rb") as file:
                return file.read().count(b"\n")
        except FileNotFoundError:
            return 0

    def text(self) -> str:
        """What it said."""
        return self.log.read_text() if self.log.exists() else ""

    def ended(self, seconds: float = 200) -> str:
        """Wait for its end; Slurm's word for it."""
        over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.until(lambda: self.cluster.state(self.number) in over, seconds)
        return self.cluster.state(self.number)


def attempts(out: Path) -> list[str | None]:
    return [entry["exit"] for entry in runs.open_run(out).provenance["attempts"]]


def same(a: Path, b: Path) -> None:
    """Bitwise equal: metrics, weights, optimiser, generators, predictions."""
    one, other = runs.open_run(a), runs.open_run(b)
    assert [entry for entry in runs.diff(one, other) if not entry.what.startswith("code.")] == []
    assert one.predictions().probability.tobytes() == other.predictions().probability.tobytes()
    assert one.success and other.success and one.success["best"] == other.success["best"]


def begun(place: Path, name: str, *items: str, processes: int = 1) -> subprocess.Popen[str]:
    """A run of one node that nothing will interrupt, outside Slurm."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*python, "-m", "pcamlib.cli", "train", "--out", str(place / name), *call(place, *items)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"}, **quiet)  # type: ignore[call-overload]


def straight(place: Path, name: str, *items: str, processes: int = 1) -> Path:
    """`begun`, to its end."""
    process = begun(place, name, *items, processes=processes)
    told = process.communicate()[1]
    assert process.returncode == 0, told
    return place / name


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return straight(place, "whole", f"train.steps={STEPS}")


def test_a_time_limit_met_twice_changes_nothing(cluster: Cluster, place: Path) -> None:
    """Slurm looks at time limits every 30 s: with 30 s of notice and a minute in all, at the first look.

    A checkpoint each step makes it long without using the processor. A look that comes while the job still imports
    finds nothing saved: rightly it is not put back then, and another one is begun.
    """
    items = ["train.steps=1000", "train.evaluate_every=1000", "train.checkpoint_every=1"]
    forecast = probe.probe(parse(SETTINGS, items), place / "data", 3)
    items[0] = f"train.steps={int(1000 * 120 / forecast.seconds)}"  # four looks, at half the forecast still two
    with begun(place, "long", *items) as whole:
        for number in range(5):
            job = Job(cluster, place / f"limited {number}", call(place, *items), "--time=1", "--signal=B:USR1@30")
            state = job.ended(400)
            if state == "COMPLETED" or "before anything was saved" not in job.text():
                break
        assert state == "COMPLETED", job.text()
        assert whole.wait() == 0
    found = attempts(job.out)
    assert found[-1] == "ok" and set(found[:-1]) == {"stopped"} and len(found) >= 3
    assert job.text().count("told to stop (SIGUSR1), saved at step") == len(found) - 1
    assert job.text().count("back into the queue") == len(found) - 1 and "did not take it back" not in job.text()
    same(job.out, place / "long")


def test_requeued_preempted_and_cancelled(cluster: Cluster, place: Path, whole: Path) -> None:
    options = call(place, f"train.steps={STEPS}")
    job = Job(cluster, place / "moved", options, "--nodelist=n1")
    job.until(lambda: job.step() > 500)
    cluster.call("scontrol", "requeue", job.number)
    job.until(lambda: job.text().count("from step") == 2 and job.step() > 2500)
    urgent = cluster.call(
        "sbatch", "--parsable", "--partition=urgent_course", "--nodelist=n1", "--output=/dev/null", "--wrap=sleep 1"
    )
    job.until(lambda: job.text().count("from step") == 3 and job.step() > 4500)
    assert cluster.state(urgent) == "COMPLETED"
    cluster.call("scancel", job.number)
    assert job.ended() == "CANCELLED"
    again = Job(cluster, job.out, options)
    assert again.ended() == "COMPLETED", again.text()
    assert attempts(job.out) == ["stopped", "stopped", "stopped", "ok"]
    same(job.out, whole)


@pytest.fixture
def mended(cluster: Cluster) -> Iterator[Callable[[str], None]]:
    """`mended(node)` loses a node, which is started again afterwards."""
    lost: list[str] = []

    def lose(node: str) -> None:
        lost.append(node)
        cluster.kill_node(node)

    yield lose
    for node in lost:
        cluster.start_node(node)
        deadline = time.monotonic() + SLACK * 60
        while "idle" not in cluster.call("sinfo", "-h", "-n", node, "-p", "thin_course", "-o", "%T"):
            cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            assert time.monotonic() < deadline
            time.sleep(1)


def test_a_node_that_was_cut_off_never_makes_two_writers(
    cluster: Cluster, mended: Callable[[str], None], place: Path, whole: Path
) -> None:
    """Its process lives on, wakes when another node has taken the run over, and writes nothing more."""
    job = Job(cluster, place / "cut off", call(place, f"train.steps={STEPS}"))
    job.until(lambda: job.step() > 500)
    early = runs.read_json(next(job.out.glob(".lock-*")))
    os.kill(early["pid"], signal.SIGSTOP)
    mended(early["node"])
    try:
        job.until(lambda: "an earlier start of this job still runs" in job.text())
        assert f"job {job.number}, process {early['pid']} on {early['node']}" in job.text()
        job.until(lambda: job.text().count("from step") == 2)
    finally:
        os.kill(early["pid"], signal.SIGCONT)
    assert job.ended() == "COMPLETED", job.text()
    job.until(lambda: "this process stops and writes nothing more" in job.text())
    assert f"{job.out}: taken over by job {job.number}, process " in job.text()
    assert attempts(job.out) == [None, "ok"]
    same(job.out, whole)


def test_two_nodes_give_the_result_of_one(cluster: Cluster, place: Path) -> None:
    """World size 2 on two nodes, told to stop in between, and on one; against one process see test_distributed."""
    length = "train.steps=1200"
    job = Job(cluster, place / "two", call(place, length), "--nodes=2", force=False)
    job.until(lambda: job.step() > 300)
    cluster.call("scancel", "--signal=USR1", "--batch", job.number)
    assert job.ended() == "COMPLETED", job.text()
    assert attempts(job.out) == ["stopped", "ok"] and job.text().count("forecast: about") == 1
    assert runs.open_run(job.out).provenance["machine"]["world_size"] == 2
    assert "on 2 times 1 threads of" in job.text() and "2 processes of cpu" in job.text()
    same(job.out, straight(place, "one node", length, processes=2))


def test_what_cannot_fit_is_refused_before_it_begins(cluster: Cluster, place: Path) -> None:
    job = Job(cluster, place / "late", call(place, "train.steps=1000000"), "--time=1", force=False)
    assert job.ended() == "FAILED"
    assert "is told to leave; this one has " in job.text() and "ask for --time=" in job.text()
    assert "PCAM_FORCE=1 begins without asking" in job.text() and not job.out.exists(), "nothing was begun"


@pytest.mark.parametrize("script", ["train_ddp.sbatch", "hpo_worker.sbatch"])
def test_called_wrongly_they_say_how(script: str) -> None:
    for environment, told in (
        ({}, "submit it with sbatch"),
        ({"SLURM_SUBMIT_DIR": str(ROOT)}, f"usage: sbatch slurm/{script}"),
    ):
        done = subprocess.run(
            ["bash", ROOT / "slurm" / script],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], **environment},
        )
        assert done.returncode != 0 and told in done.stderr
