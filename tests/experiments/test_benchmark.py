"""A job's result is a file; the table of the journal is made of such files, and of nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from pcamlib.cli.benchmark import commands
from pcamlib.errors import ConfigError, PcamError
from pcamlib.experiments import benchmark, roofline, throughput


@pytest.fixture
def quick(monkeypatch):
    """Ceilings that cost no time."""
    found = roofline.Ceilings("cpu", 1, {"memory": 1e12}, dict.fromkeys(roofline.DTYPES, 1e13))
    monkeypatch.setattr(roofline, "ceilings", lambda device: found)
    for name in ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "PCAM_SITE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stored(synthetic_dir, quick, monkeypatch):
    """Write a result under a name: `stored(path, partition, job)`."""
    first = benchmark.measure(synthetic_dir, seconds=0.1)

    def store(path, partition, job, device="cpu", site="snellius", **changes):
        machine = {**first.provenance["machine"], "device": device, "device_name": f"a {device}"}
        slurm = {"job_partition": partition, "job_id": job} if job else {}
        place = {**first.provenance, "machine": machine, "slurm": slurm}
        made = first.model_copy(update={"provenance": place, "site": site, **changes})
        path.parent.mkdir(exist_ok=True)
        path.write_text(made.model_dump_json())
        return made

    return store


def test_a_result_names_its_job_and_comes_back_from_its_file(synthetic_dir, quick, monkeypatch, tmp_path):
    for name, value in {"JOB_ID": "41", "JOB_PARTITION": "thin_course", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PCAM_SITE", "local")
    out = tmp_path / "runs" / "41_3.json"
    told = CliRunner().invoke(
        commands, ["--data", str(synthetic_dir), "--batch-size", "4", "--seconds", "0.1", "--out", str(out)]
    )
    assert told.exit_code == 0, told.output
    assert "small model, batch 4, CPU Only (" in told.output and "job 41 in thin_course" in told.output
    (found,) = benchmark.read(out.parent)
    assert (found.job, found.partition, found.site, found.batch_size) == ("41", "thin_course", "local", 4)
    assert found.provenance["slurm"]["array_task_id"] == "3" and found.provenance["threads"] >= 1
    assert {(row.what, row.precision) for row in found.rows} >= {("loader only", ""), benchmark.STAGE}
    assert found.flops == 56_033_792 and found.why == "" and len(found.load) == 2
    assert [entry.name for entry in out.parent.iterdir()] == ["41_3.json"]


def test_the_table_asks_for_each_partition_and_invents_nothing(stored, tmp_path):
    assert [row["why"] for row in benchmark.jobs(benchmark.read(tmp_path / "none"))] == ["no job has measured it"] * 2
    stored(tmp_path / "r" / "a.json", "thin_course", "12")
    thin, gpu = benchmark.jobs(benchmark.read(tmp_path / "r"))
    assert (thin["Partition"], thin["Node Type"], thin["Job ID"]) == ("`thin_course`", "CPU Only (a cpu)", "12")
    assert thin["Throughput (img/s)"] == f"{thin['img/s']:,.0f}" and thin["why"] == ""
    assert gpu["Node Type"] == "GPU" and gpu["Job ID"] is None and gpu["Throughput (img/s)"] is None


def test_a_cpu_never_stands_for_a_gpu(stored, tmp_path):
    stored(tmp_path / "r" / "a.json", "gpu_course", "13")
    gpu = benchmark.jobs(benchmark.read(tmp_path / "r"))[1]
    assert gpu["Job ID"] is None and gpu["why"] == "job 13: ran there on a CPU, not on a GPU"
    stored(tmp_path / "r" / "b.json", "gpu_course", "14", device="cuda")
    gpu = benchmark.jobs(benchmark.read(tmp_path / "r"))[1]
    assert (gpu["Node Type"], gpu["Job ID"]) == ("GPU (a cuda)", "14")


def test_without_a_job_nothing_is_entered(stored, tmp_path):
    stored(tmp_path / "r" / "a.json", "", "")
    results = benchmark.read(tmp_path / "r")
    assert len(results) == 1 and all(row["Job ID"] is None for row in benchmark.jobs(results))
    assert benchmark.table(results) == []


def test_the_newest_counts_and_the_test_cluster_counts_last(stored, tmp_path):
    stored(tmp_path / "r" / "new.json", "thin_course", "22", made="2026-02-02")
    stored(tmp_path / "r" / "old.json", "thin_course", "21", made="2026-01-01")
    stored(tmp_path / "r" / "zlocal.json", "thin_course", "99", made="2026-03-03", site="local")
    assert benchmark.jobs(benchmark.read(tmp_path / "r"))[0]["Job ID"] == "22"
    for name in ("new", "old"):
        (tmp_path / "r" / f"{name}.json").unlink()
    assert benchmark.jobs(benchmark.read(tmp_path / "r"))[0]["site"] == "local"


def test_other_partitions_and_sizes_have_rows_of_their_own(stored, tmp_path):
    stored(tmp_path / "r" / "a.json", "rome", "31")
    stored(tmp_path / "r" / "b.json", "rome", "32", batch_size=64)
    results = benchmark.read(tmp_path / "r")
    assert [row["Partition"] for row in benchmark.jobs(results)] == ["`thin_course`", "`gpu_course`", "`rome`"]
    assert [(row["batch size"], row["Job ID"]) for row in benchmark.table(results)] == [(1, "31"), (64, "32")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], r"a\.json: no result of `pcam benchmark` \(Invalid JSON"),
        (lambda text: "[]", r"no result of `pcam benchmark` \(Input should be an object"),
        (lambda text: json.dumps({**json.loads(text), "batch_size": "1"}), r"should be a valid integer\); delete it"),
        (lambda text: json.dumps({**json.loads(text), "provenance": {}}), r"\(no 'slurm'\)"),
    ],
)
def test_a_damaged_file_is_named(stored, tmp_path, change, message):
    path = tmp_path / "r" / "a.json"
    stored(path, "thin_course", "1")
    path.write_text(change(path.read_text()))
    with pytest.raises(PcamError, match=message):
        benchmark.read(path.parent)


def test_running_out_of_memory_is_a_result(synthetic_dir, quick, monkeypatch):
    monkeypatch.setattr(throughput, "stages", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    found = benchmark.measure(synthetic_dir, size=8)
    assert (found.rows, found.floor, found.why) == ([], None, "out of memory")
    assert benchmark.text(found).endswith("\nout of memory")


def test_bad_options_are_told_before_anything_is_measured(synthetic_dir):
    for wrong in ({"size": 0}, {"seconds": 0.0}):
        with pytest.raises(ConfigError, match="both must be above 0"):
            benchmark.measure(synthetic_dir, **wrong)
    with pytest.raises(ConfigError, match="unknown model 'big'"):
        benchmark.measure(synthetic_dir, model="big")
