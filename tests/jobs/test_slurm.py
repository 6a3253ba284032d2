"""Sites, the sbatch call, and what is refused before it; answers of Slurm are played by `answers`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pcamlib.jobs import slurm
from pcamlib.jobs.scale import Resources
from pcamlib.jobs.slurm import Node, Request, SlurmError

NODES = [Node("n1", 16, 28_000, 0, 3600.0), Node("n2", 64, 8_000, 4, 3600.0)]


def request(**more) -> Request:
    wanted = Resources(**{"cpus": 1, "memory": "1G", "time": "00:10:00", **more.pop("resources", {})})
    made = {"script": "notebook.sbatch", "arguments": ("01", "--root", "/a b"), "name": "01_twins", "site": "local",
            "partition": "thin", "resources": wanted, "logs": Path("/l %o gs"), "asked": "papermill"}  # fmt: skip
    return Request(**{**made, **more})


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, ...]]]:
    """`answers(stdout, stderr, code)`: what every Slurm command says from now on; returns the list of calls."""

    def played(out: str = "", err: str = "", code: int = 0) -> list[tuple[str, ...]]:
        calls: list[tuple[str, ...]] = []

        def run(command, **options):
            calls.append(tuple(command))
            return subprocess.CompletedProcess(command, code, out, err)

        monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(slurm.subprocess, "run", run)
        return calls

    return played


@pytest.mark.parametrize("name", ["snellius", "local"])
def test_the_sites(name: str) -> None:
    site = slurm.site(name)
    assert (site.partition(0), site.partition(1)) == ("thin_course", "gpu_course")


def test_an_unknown_or_broken_site_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SlurmError, match="unknown site 'snelius'; did you mean 'snellius'"):
        slurm.site("snelius")
    monkeypatch.setattr(slurm, "SITES", tmp_path)
    (tmp_path / "mine.sh").write_text("PCAM_CPU_PARTITION=a\npcam_modules() { :; }\n")
    with pytest.raises(SlurmError, match=r"slurm/sites/mine.sh: .*PCAM_GPU_PARTITION: unbound variable; compare"):
        slurm.site("mine")
    (tmp_path / "mine.sh").write_text("PCAM_CPU_PARTITION=a\nPCAM_GPU_PARTITION=b\n")
    with pytest.raises(SlurmError, match="no function pcam_modules"):
        slurm.site("mine")


def test_the_call() -> None:
    asked = request(afterok=("3", "4"), afterany=("7",), resources={"gpus": 2}, nodes=2)
    assert asked.command() == [
        "sbatch", "--parsable", "--job-name=01_twins", "--partition=thin", "--nodes=2", "--cpus-per-task=1", "--mem=1G",
        "--time=00:10:00", "--gpus-per-node=2", "--dependency=afterok:3:4,afterany:7", "--kill-on-invalid-dep=yes",
        "--output=/l %%o gs/%x-%j.out", "--export=ALL,PCAM_SITE=local", "slurm/notebook.sbatch", "01", "--root", "/a b",
    ]  # fmt: skip
    many = request(array="0-11", exports=(("PCAM_MODEL", "small"),)).command()
    assert "--array=0-11" in many and "--output=/l %%o gs/%x-%A_%a.out" in many
    assert "--export=ALL,PCAM_SITE=local,PCAM_MODEL=small" in many
    assert not any(word.startswith(("--dependency", "--nodes", "--gpus", "--kill")) for word in many)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"resources": {"memory": "90G"}}, "asks for memory 90G, but the largest node of thin, n1, has 28000M"),
        ({"resources": {"cpus": 65}}, "asks for cpus 65, but the largest node of thin, n2, has 64"),
        ({"resources": {"gpus": 8}}, "but the largest node of thin, n2, has 4; lower gpus in papermill"),
        ({"resources": {"time": "02:00:00"}}, "time 02:00:00, but the longest job of thin may take 01:00:00"),
        ({"resources": {"gpus": 1, "memory": "20G"}}, "1 nodes with 1 cpus, 20G and 1 gpus each; thin has 0 of 2"),
        ({"nodes": 3}, "3 nodes with 1 cpus, 1G and 0 gpus each; thin has 2 of 2"),
        ({"exports": (("PCAM_DATA", "/a,b"),)}, "no comma in a variable"),
    ],
)  # fmt: skip
def test_what_no_node_can_serve_is_refused(more: dict, message: str) -> None:
    with pytest.raises(SlurmError) as caught:
        slurm.refuse(request(**more), NODES)
    assert message in str(caught.value) and str(caught.value).startswith("01_twins: ")


def test_what_a_node_can_serve_is_not_refused() -> None:
    assert slurm.refuse(request(resources={"gpus": 4, "cpus": 64, "memory": "7G"}), NODES) is None
    assert slurm.refuse(request(nodes=2), NODES) is None


def test_nodes_are_read(answers: Callable[..., list]) -> None:
    answers(
        "n1|128|229376|gpu:a100:4(S:0-1)|5-00:00:00\nn2|32+|8000+|(null)|infinite\nn3|8|100|gpu:1g.5gb:7,shard:2|30:00\n"
    )
    assert slurm.nodes("gpu") == [
        Node("n1", 128, 229_376, 4, 432_000.0),
        Node("n2", 32, 8000, 0, float("inf")),
        Node("n3", 8, 100, 7, 1800.0),
    ]


def test_an_unknown_partition_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "" if "-p" in command else "thin_course*\ngpu_course\n", "")

    monkeypatch.setattr(slurm, "ask", asked)
    with pytest.raises(SlurmError, match="unknown partition 'thin_corse'; did you mean 'thin_course'"):
        slurm.nodes("thin_corse")


def test_submitting_and_when_it_would_start(answers: Callable[..., list], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answers("12;snellius\n")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "7")
    assert slurm.submit(request()) == "12" and calls[0][:2] == ("sbatch", "--parsable")
    said = "sbatch: Job 3 to start at 2026-11-21T22:00:01 using 1 processors on nodes n1 in partition thin_course\n"
    calls = answers("", said)
    assert slurm.starts(request()) == "2026-11-21T22:00:01" and calls[0][:2] == ("sbatch", "--test-only")
    answers("", "sbatch: error: Batch job submission failed: Invalid account\n", 1)
    with pytest.raises(SlurmError, match=r"01_twins: Slurm refuses it: .*Invalid account; the call was: sbatch --par"):
        slurm.submit(request())
    with pytest.raises(SlurmError, match=r"01_twins: Slurm refuses it: .*Invalid account"):
        slurm.starts(request())
    with pytest.raises(SlurmError, match=r"could not cancel: .*; do it by hand: scancel 1 2"):
        slurm.cancel(["1", "2"])


def test_a_job_asks_for_another_without_its_own_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sinfo").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "sinfo").chmod(0o755)
    for name, value in {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CONF": "/c"}.items():
        monkeypatch.setenv(name, value)
    said = slurm.ask("sinfo").stdout
    assert "SLURM_CONF=/c" in said and "SLURM_JOB_ID" not in said


def test_no_slurm_says_how_to_do_without(answers: Callable[..., list], monkeypatch: pytest.MonkeyPatch) -> None:
    answers("", "sbatch: fatal: Could not establish a configuration source\n", 1)
    with pytest.raises(SlurmError, match=r"Slurm does not answer on this machine .*make journal"):
        slurm.nodes("thin")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        SlurmError, match=r"no Slurm on this machine \(sinfo not found\); without Slurm: `make journal`"
    ):
        slurm.nodes("thin")
