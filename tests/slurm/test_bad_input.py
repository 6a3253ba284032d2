"""Requests that must be refused, with nothing submitted and a line that helps; the cluster is real."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def refused(cluster: Cluster, login: Callable[..., Any], tmp_path: Path, synthetic_dir: Path) -> Callable[..., str]:
    """`refused("journal", ...)`: what `pcam submit` said; nothing was submitted and no ledger begun."""

    def call(*arguments: str | Path) -> str:
        root = tmp_path / "root"
        before = set(cluster.call("squeue", "--states=all", "-h", "-o", "%i").split())
        code, _, err = login("submit", *arguments, "--root", root, "--data", synthetic_dir)
        assert code == 2 and err.count("\n") == 1 and err.startswith("pcam: "), err
        assert set(cluster.call("squeue", "--states=all", "-h", "-o", "%i").split()) == before
        assert not (root / "runs" / "slurm" / "jobs.jsonl").exists()
        return err

    return call


@pytest.fixture
def scale(tmp_path: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        (tmp_path / "mine.yaml").write_text(text)
        return tmp_path / "mine.yaml"

    return written


def test_an_unknown_site_or_partition(refused: Callable[..., str]) -> None:
    assert "unknown site 'loca'; did you mean 'local'" in refused("journal", "--site", "loca", "--scale", "smoke")
    local = ("journal", "--site", "local", "--scale", "smoke", "--partition")
    assert "unknown partition 'thin'; did you mean 'thin_course'" in refused(*local, "thin")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("memory: 9G", "00_data: asks for memory 9G, but the largest node of thin_course, n1, has 8000M; lower"),
        ("cpus: 4", "00_data: asks for cpus 4, but the largest node of thin_course, n1, has 1"),
        ("gpus: 1", "00_data: asks for gpus 1, but the largest node of gpu_course, n1, has 0"),
        ('time: "03:00:00"', "00_data: asks for time 03:00:00, but the longest job of thin_course may take 02:00:00"),
    ],
)  # fmt: skip
def test_more_than_any_node_has(
    refused: Callable[..., str], scale: Callable[[str], Path], asked: str, message: str
) -> None:
    fits = {"cpus": "1", "memory": "1G"}
    kept = ", ".join(f"{name}: {value}" for name, value in fits.items() if name not in asked)
    path = scale(f"00_data: {{resources: {{{kept}, {asked}}}}}\n")
    said = refused("journal", "--site", "local", "--scale", path)
    assert message in said and str(path) in said


def test_an_unknown_notebook_or_key(refused: Callable[..., str], scale: Callable[[str], Path]) -> None:
    local = ("journal", "--site", "local", "--scale")
    assert "unknown notebook '00_dta'; did you mean '00_data'?" in refused(*local, scale("00_dta: {}"))
    assert "unknown key 'resources.cpu'; did you mean" in refused(*local, scale("00_data: {resources: {cpu: 1}}"))
    assert "unknown scale 'smok'; did you mean 'smoke'?" in refused(*local, "smok")


def test_settings_that_do_not_fit(refused: Callable[..., str], tmp_path: Path) -> None:
    local = ("train", "--site", "local", "--out", tmp_path / "run", "--cpus", "1", "--memory")
    assert "unknown key 'train.epoch'; did you mean 'train.epochs'" in refused(*local, "2G", "train.epoch=1")
    assert "memory='lots'" in refused(*local, "lots")
    assert "needs " in refused(*local, "100M", "--recipe", "mlp", "train.epochs=1"), "the forecast tells it beforehand"
    assert not (tmp_path / "run").exists()


def test_no_slurm_says_how_to_do_without(
    login: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = login("submit", "journal", "--site", "local", "--scale", "smoke", "--root", tmp_path / "root")
    assert code == 2 and "no Slurm on this machine" in err and "without Slurm: `make journal`" in err


def test_a_controller_that_is_away_is_told(cluster: Cluster, login: Callable[..., Any], tmp_path: Path) -> None:
    nobody = tmp_path / "slurm.conf"
    nobody.write_text((cluster.folder / "slurm.conf").read_text().replace("SlurmctldPort=", "SlurmctldPort=9 #"))
    real, cluster.environment["SLURM_CONF"] = cluster.environment["SLURM_CONF"], str(nobody)
    try:
        code, _, err = login("submit", "journal", "--site", "local", "--scale", "smoke", "--root", tmp_path / "root")
    finally:
        cluster.environment["SLURM_CONF"] = real
    assert code == 2 and "Slurm does not answer on this machine" in err and "`make journal`" in err
