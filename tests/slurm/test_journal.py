"""The journal through a real Slurm: what completes, what is left alone, and why a job died.

The jobs of all these tests are submitted at once, each into a root of its own, since two nodes have one CPU each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

from pcamlib.data.synthetic import generate
from pcamlib.jobs import ledger
from pcamlib.journal import evidence
from pcamlib.journal.check import check

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
SMALL = {"cpus": 1, "memory": "2G", "time": "00:05:00"}


class Roots:
    """Journals of two tiny notebooks under way, by name; `pcam` works on the login node."""

    def __init__(self, folder: Path, pcam: Callable[..., Any]) -> None:
        self.folder, self.pcam = folder, pcam
        self.data = folder / "some data"
        generate(self.data, seed=0, sizes={"train": 512, "valid": 256, "test": 256}, report=lambda line: None)

    def submit(self, name: str, epochs: int, *more: str, **resources: Any) -> tuple[int, str, str]:
        """Notebook 00, then 03, into the root NAME."""
        scale = self.folder / f"{name}.yaml"
        first = {"parameters": {"epochs": epochs}, "timeout": 290, "resources": {**SMALL, **resources}}
        second = {"parameters": {"seeds": [0, 1], "limit": 128}, "timeout": 290, "after": ["00_data"]}
        scale.write_text(json.dumps({"00_data": first, "03_gradients": {**second, "resources": SMALL}}))
        options = ("--scale", scale, "--root", self.root(name), "--data", self.data)
        return self.pcam("submit", "journal", "--site", "local", *options, *more)

    def root(self, name: str) -> Path:
        """A path with a space."""
        return self.folder / f"root {name}"

    def ids(self, name: str) -> list[str]:
        """The jobs in the ledger, oldest first."""
        return [entry.id for entry in ledger.read(self.root(name) / "runs" / "slurm")]


@pytest.fixture(scope="module")
def roots(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, login: Callable[..., Any]) -> Roots:
    made = Roots(tmp_path_factory.mktemp("journals"), login)
    for name, epochs, more in (
        ("late", 1_000_000, {"time": "00:01:00"}),
        ("good", 1, {}),
        ("broken", 0, {}),  # passes as an int; the configuration wants at least one epoch
        ("greedy", 1, {"memory": "200M"}),  # importing torch takes more
    ):
        code, out, err = made.submit(name, epochs, **more)
        assert code == 0 and len(made.ids(name)) == 3, (out, err)
    return made


def test_submitting_twice_submits_nothing(roots: Roots) -> None:
    """While the first job runs, and the others wait for it."""
    before = roots.ids("late")
    code, out, _ = roots.submit("late", 1_000_000, time="00:01:00")
    assert code == 0 and out.count("on its way already") == 3 and roots.ids("late") == before


def test_a_notebook_that_a_job_runs_is_not_run_again(cluster: Cluster, roots: Roots) -> None:
    first = roots.ids("late")[0]
    cluster.wait([first], 60, ["RUNNING"])
    logs = roots.root("late") / "runs" / "slurm"
    began = lambda: any("cell 1/" in log.read_text() for log in logs.glob("00_data-*.out"))  # noqa: E731
    cluster.until(began, 60, f"no log in {logs} tells of a cell")
    scale = ("--scale", roots.folder / "late.yaml", "--root", roots.root("late"), "--data", roots.data)
    code, _, err = roots.pcam("notebook", "run", "00", *scale)
    assert code == 2 and "00_data is being run already into" in err and f"job {first}" in err


def test_dry_run_and_refusal_submit_nothing(cluster: Cluster, roots: Roots) -> None:
    before = set(cluster.call("squeue", "--states=all", "-h", "-o", "%i").split())
    code, out, _ = roots.submit("dry", 1, "--dry-run")
    assert code == 0 and "job_00_data=$(sbatch --parsable --job-name=00_data --partition=thin_course" in out
    assert '"--dependency=afterok:$job_00_data" --kill-on-invalid-dep=yes' in out
    assert f"'{roots.root('dry')}'" in out, "quoted, for it has a space"
    assert not roots.root("dry").exists()
    code, _, err = roots.submit("dry", 1, memory="9000M")
    assert code == 2 and "00_data: asks for memory 9000M, but the largest node of thin_course, n1, has 8000M" in err
    assert set(cluster.call("squeue", "--states=all", "-h", "-o", "%i").split()) == before and not roots.ids("dry")


def test_the_journal_is_made(cluster: Cluster, roots: Roots) -> None:
    ids, root = roots.ids("good"), roots.root("good")
    assert cluster.wait(ids, 240) == ["COMPLETED"] * 3
    made = {stem: record.provenance["slurm"] for stem, record in evidence.records(root).items()}
    assert {stem: place["job_id"] for stem, place in made.items()} == {"00_data": ids[0], "03_gradients": ids[1]}
    assert all(place["slurmd_nodename"] in ("n1", "n2") for place in made.values()), made
    assert (root / "JOURNAL.html").is_file()
    assert [str(finding) for finding in check(root, jobs=True) if finding.severity == "fault"] == []
    code, out, _ = roots.submit("good", 1)
    assert code == 0 and "nothing to submit: everything is up to date" in out and roots.ids("good") == ids
    code, out, _ = roots.pcam("jobs", "--root", root)
    assert code == 0 and out.count("COMPLETED") == 3 and "log:" not in out


def test_a_failing_notebook_stops_what_rests_on_it(cluster: Cluster, roots: Roots) -> None:
    assert cluster.wait(roots.ids("broken"), 120) == ["FAILED", "CANCELLED", "CANCELLED"]
    code, out, _ = roots.pcam("jobs", "--root", roots.root("broken"))
    assert code == 0
    assert "code: exit code 2: 00_data, cell " in out and "ConfigError: train.epochs" in out
    assert f"dependency: job {roots.ids('broken')[0]} did not succeed, so this one was never started" in out
    assert "then `pcam submit journal --site local --scale" in out
    assert not evidence.records(roots.root("broken"))


def test_memory_is_told(cluster: Cluster, roots: Roots) -> None:
    cluster.wait(roots.ids("greedy"), 120)
    _, out, _ = roots.pcam("jobs", "--root", roots.root("greedy"))
    assert "memory: killed for memory, used " in out and "asked for 200 MiB" in out
    assert f"raise memory in {roots.folder / 'greedy.yaml'}, then `pcam submit journal" in out


def test_the_time_limit_is_told(cluster: Cluster, roots: Roots) -> None:
    """Last: Slurm looks at limits twice a minute."""
    assert cluster.wait(roots.ids("late"), 180) == ["TIMEOUT", "CANCELLED", "CANCELLED"]
    _, out, _ = roots.pcam("jobs", "--root", roots.root("late"))
    assert "time limit: ended by its time limit of 1:00 (00_data, cell " in out and "stopped by SIGTERM" in out
    assert f"raise time in {roots.folder / 'late.yaml'}, then `pcam submit journal" in out
    assert (roots.root("late") / "runs" / "notebooks" / "00_data.failed.ipynb").is_file()
