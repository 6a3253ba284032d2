"""Benchmark jobs on a real Slurm: an array leaves a file a task, and the journal's table names the jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster

from pcamlib.experiments import benchmark
from pcamlib.sources import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def submit(cluster: Cluster, out: Path, data: Path, partition: str, array: str) -> str:
    """Submit two small batch sizes; the number of the array."""
    exports = f"ALL,PCAM_SITE=local,PCAM_DATA={data},PCAM_BENCHMARKS={out},PCAM_BATCH_SIZES=1 4,PCAM_SECONDS=0.5"
    return cluster.call(
        "sbatch", "--parsable", f"--partition={partition}", f"--array={array}", "--cpus-per-task=1", "--mem=1500M",
        f"--output={out.parent}/%x-%A_%a.out", f"--export={exports}", "slurm/benchmark.sbatch", cwd=ROOT,
    )  # fmt: skip


def test_an_array_of_batch_sizes_fills_the_table(cluster: Cluster, synthetic_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a place" / "benchmarks"
    out.parent.mkdir()
    thin = submit(cluster, out, synthetic_dir, "thin_course", "0-1%1")
    gpu = submit(cluster, out, synthetic_dir, "gpu_course", "0")
    tasks = [f"{thin}_0", f"{thin}_1", f"{gpu}_0"]
    states = cluster.wait(tasks, 240)
    assert states == ["COMPLETED"] * 3, "\n".join(path.read_text() for path in out.parent.glob("*.out"))
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{task}.json" for task in tasks)
    results = benchmark.read(out)
    assert sorted((found.partition, found.batch_size) for found in results) == [
        ("gpu_course", 1), ("thin_course", 1), ("thin_course", 4),
    ]  # fmt: skip
    assert all(found.provenance["slurm"]["slurmd_nodename"] in ("n1", "n2") for found in results)
    first, second = benchmark.jobs(results)
    (one,) = (found for found in results if (found.partition, found.batch_size) == ("thin_course", 1))
    assert (first["Job ID"], first["site"], first["threads"]) == (one.job, "local", 1)
    assert second["Job ID"] is None and second["why"].endswith("ran there on a CPU, not on a GPU")


def test_a_task_without_a_batch_size_says_how_to_submit(cluster: Cluster, synthetic_dir: Path, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path / "benchmarks", synthetic_dir, "thin_course", "2")
    assert cluster.wait([f"{number}_2"], 120) == ["FAILED"]
    (log,) = tmp_path.glob("*.out")
    assert "array task 2, but there are 2 batch sizes: submit with --array=0-1%1" in log.read_text()
