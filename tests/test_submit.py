"""What is submitted, what is left alone, and what happens when Slurm says no; Slurm itself is played."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pcamlib import make
from pcamlib.errors import PcamError
from pcamlib.jobs import ledger, slurm, states
from pcamlib.jobs.slurm import SlurmError
from pcamlib.submit import graph, runs
from pcamlib.submit.journal import journal
from pcamlib.training.probe import Forecast

SMALL = {"cpus": 1, "memory": "1G", "time": "00:05:00"}


@dataclass
class Played:
    """A Slurm with one node of a CPU and 8000 MiB that runs nothing; `jobs` holds name and state by id."""

    jobs: dict[str, list[str]] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    refuses: str = ""

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        out, err, code = "", "", 0
        options = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
        if command[0] == "sinfo":
            out = "n1|1|8000|(null)|2:00:00\n" if "-p" in command else "thin_course\n"
            out = "" if "nowhere" in command else out
        elif command[0] == "squeue":
            out = "".join(
                f"{job}|{name}|{state}|n1|0:01|1:00|0|0|None|1G|\n" for job, (name, state) in self.jobs.items()
            )
        elif command[0] == "scancel":
            self.cancelled += command[1:]
        elif "--test-only" in command:
            err = "sbatch: Job 9 to start at 2026-11-21T22:00:01 using 1 processors"
        elif options["job-name"] == self.refuses:
            err, code = "sbatch: error: Invalid account", 1
        else:
            out = str(len(self.jobs) + 1)
            self.jobs[out] = [options["job-name"], "PENDING"]
        return subprocess.CompletedProcess(command, code, out, err)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    made = Played()
    for module in (slurm, states):
        monkeypatch.setattr(module, "ask", made.ask)
    for name in ("PCAM_DATA", "PCAM_COURSE"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def submit(played: Played, synthetic_dir: Path, tmp_path: Path) -> Callable[..., dict[str, graph.Line]]:
    """`submit(epochs=1)`: notebooks 00, then 03 and 04, into a root; lines by name of the job."""

    def submitted(epochs: int = 1, report: Callable[[str], None] = lambda line: None, **more: Any) -> dict:
        scale, after = tmp_path / "a scale.yaml", {"after": ["00_data"], "resources": SMALL}
        first = {"parameters": {"epochs": epochs}, "resources": SMALL}
        scale.write_text(json.dumps({"00_data": first, "03_gradients": after, "04_tracking": after}))
        given = {"root": tmp_path / "root", "data": str(synthetic_dir), "report": report, **more}
        return {line.request.name: line for line in journal("local", str(scale), **given)}

    return submitted


def test_the_whole_graph(submit, played: Played, tmp_path: Path, synthetic_dir: Path) -> None:
    lines = submit()
    assert [line.job for line in lines.values()] == ["1", "2", "3", "4"] == list(played.jobs)
    assert {name: line.request.afterok for name, line in lines.items()} == {
        "00_data": (), "03_gradients": ("1",), "04_tracking": ("1",), "journal": ("1", "2", "3"),
    }  # fmt: skip
    assert lines["00_data"].starts == "2026-11-21T22:00:01" and lines["journal"].starts == "after those"
    table = graph.text(list(lines.values())).splitlines()
    assert table[1].split()[:5] == ["00_data", "1", "-", "thin_course", "1"] and "1 2 3" in table[4]
    entry = ledger.read(tmp_path / "root" / "runs" / "slurm")[1]
    assert (
        entry.waits == ("1",) and entry.writes.endswith("03_gradients.ipynb") and entry.log.endswith("gradients-2.out")
    )
    scale, root = tmp_path / "a scale.yaml", tmp_path / "root"
    more = ("--scale", str(scale), "--root", str(root), "--data", str(synthetic_dir))
    assert entry.call == ("slurm/notebook.sbatch", "03_gradients", *more)
    assert entry.resume.startswith(f"pcam submit journal --site local --scale '{scale}'") and entry.asked == str(scale)


def test_a_second_time_nothing_is_submitted(submit, played: Played) -> None:
    submit()
    played.jobs["1"][1] = "RUNNING"
    again = submit()
    assert len(played.jobs) == 4 and {line.starts for line in again.values()} == {"on its way already"}
    assert again["03_gradients"].request.afterok == ("1",)


def test_what_died_is_submitted_again_and_waits_for_what_lives(submit, played: Played) -> None:
    submit()
    for job, state in {"1": "RUNNING", "2": "CANCELLED", "4": "CANCELLED"}.items():
        played.jobs[job][1] = state
    again = submit()
    assert {name: (line.job, line.request.afterok) for name, line in again.items()} == {
        "00_data": ("1", ()), "03_gradients": ("5", ("1",)), "04_tracking": ("3", ("1",)),
        "journal": ("6", ("1", "5", "3")),
    }  # fmt: skip


def test_what_changed_while_it_runs_runs_again_behind_it(submit, played: Played) -> None:
    submit()
    assert submit(epochs=2)["00_data"].job == "1", "a pending job will read what is then there"
    played.jobs["1"][1] = "RUNNING"
    again = submit(epochs=2)
    first, second, page = again["00_data"], again["03_gradients"], again["journal"]
    assert first.job == "5" and first.request.afterany == ("1",) and first.request.afterok == ()
    assert second.job == "6" and second.request.afterok == ("5",) and second.request.afterany == ("2",)
    assert page.request.afterok == ("5", "6", "7") and page.request.afterany == ("4",)


def test_a_number_that_belongs_to_another_job_now_is_not_ours(submit, played: Played) -> None:
    submit()
    for job in played.jobs.values():
        job[0] = "another"
    assert [line.job for line in submit().values()] == ["5", "6", "7", "8"]


def test_dry_run_prints_calls_that_a_shell_can_make(submit, played: Played, tmp_path: Path) -> None:
    said: list[str] = []
    lines = submit(dry_run=True, report=said.append)
    assert not played.jobs and not (tmp_path / "root").exists() and {line.job for line in lines.values()} == {"-"}
    calls = [line for line in said if line.startswith("job_")]
    script = 'sbatch() { echo $#; echo "$5 $6" >&2; }\n' + "\n".join(calls)
    done = subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and len(calls) == 4, done.stderr


def test_half_a_graph_is_cancelled(submit, played: Played, tmp_path: Path) -> None:
    played.refuses = "04_tracking"
    said: list[str] = []
    with pytest.raises(SlurmError, match="04_tracking: Slurm refuses it: sbatch: error: Invalid account; the call was"):
        submit(report=said.append)
    assert played.cancelled == ["1", "2"] and "jobs 1 2 are cancelled" in said[-1]


def test_what_is_up_to_date_is_not_submitted(submit, played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make.Task, "stale", lambda task: "never run" if task.path.stem == "04_tracking" else "")
    assert {name: line.request.afterok for name, line in submit().items()} == {"04_tracking": (), "journal": ("1",)}
    played.jobs.clear()
    monkeypatch.setattr(make.Task, "stale", lambda task: "")
    assert list(submit()) == ["journal"], "which is still to be written"


def test_what_is_refused_before_anything_is_submitted(
    submit, played: Played, tmp_path: Path, synthetic_dir: Path
) -> None:
    for more, message in (
        ({"partition": "nowhere"}, "unknown partition 'nowhere'; known: thin_course"),
        ({"data": str(tmp_path / "none")}, "no such folder; --data or PCAM_DATA"),
    ):
        with pytest.raises(PcamError, match=message):
            submit(**more)
    with pytest.raises(SlurmError, match="unknown site 'lokal'; did you mean 'local'"):
        journal("lokal", "smoke", root=tmp_path)
    with pytest.raises(PcamError, match="unknown scale 'smok'; did you mean 'smoke'"):
        journal("local", "smok", root=tmp_path)
    with pytest.raises(
        SlurmError, match="asks for memory 28G, but the largest node of thin_course, n1, has 8000M; lower"
    ):
        journal("local", "course", root=tmp_path / "root", report=lambda line: None, data=str(synthetic_dir))
    assert not played.jobs


def test_training_is_forecast_submitted_once_and_defended(
    played: Played, synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecast = Forecast(60.0, 50.0, 70.0, 1.0, 2.0, 2**28, 0, "1 threads of X")
    monkeypatch.setattr(runs, "probe", lambda config, data: forecast)
    said: list[str] = []

    def train(*overrides: str, **more: Any) -> list[graph.Line]:
        given = {"data": str(synthetic_dir), "root": tmp_path, "report": said.append, **more}
        return runs.train("local", "mlp", overrides, tmp_path / "a run", SMALL, **given)

    (line,) = train("train.epochs=1")
    assert line.job == "1" and "forecast: about 60 s" in said[0]
    run = str(tmp_path / "a run")
    assert line.request.call == (
        "slurm/train_ddp.sbatch", run, "--recipe", "mlp", "--data", str(synthetic_dir.resolve()), "train.epochs=1"
    )  # fmt: skip
    assert train("train.epochs=1")[0].starts == "on its way already" and len(played.jobs) == 1
    with pytest.raises(SlurmError, match=r"is being written by job 1 with other arguments: .*scancel 1"):
        train("train.epochs=2")
    with pytest.raises(PcamError, match=r"did you mean 'train.epochs'"):
        train("train.epoch=2")
    played.jobs.clear()
    with pytest.raises(SlurmError, match="2 nodes with 1 cpus, 1G and 0 gpus each; thin_course has 1 of 1"):
        train("train.epochs=1", nodes=2)
    forecast = Forecast(60.0, 50.0, 70.0, 1.0, 2.0, 2**33, 0, "1 threads of X")
    with pytest.raises(PcamError, match=r"needs 8.0 GiB of memory, the job has 1.0"):
        train("train.epochs=1")
    assert not played.jobs
    (line,) = train("train.epochs=1", force=True)
    assert line.request.exports == (("PCAM_FORCE", "1"),) and list(played.jobs) == ["1"]
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "SUCCESS").touch()
    assert train("train.epochs=1") == [] and "finished; nothing to submit" in said[-1]


def test_a_search_is_an_array_and_an_end(played: Played, synthetic_dir: Path, tmp_path: Path) -> None:
    def search(**more: Any) -> list[graph.Line]:
        given = {"data": str(synthetic_dir), "root": tmp_path, "report": lambda line: None, **more}
        return runs.hpo("local", "smoke", tmp_path / "hpo", 12, SMALL, **given)

    assert [line.job for line in search(dry_run=True)] == ["-", "-"] and not (tmp_path / "hpo").exists()
    tasks, end = search()
    assert (tasks.request.array, tasks.request.arguments) == (
        "0-11",
        (str(tmp_path / "hpo"), str(synthetic_dir.resolve())),
    )
    assert (
        end.request.afterany == ("1",) and end.request.afterok == () and end.request.arguments[:2] == ("hpo", "smoke")
    )
    assert (tmp_path / "hpo" / "study.json").is_file(), "begun here, so that every worker finds it"
    assert {line.starts for line in search()} == {"on its way already"} and len(played.jobs) == 2


def test_a_benchmark_is_an_array_over_batch_sizes(played: Played, synthetic_dir: Path, tmp_path: Path) -> None:
    given = {"data": str(synthetic_dir), "root": tmp_path, "report": lambda line: None}
    (line,) = runs.benchmark("local", "small", SMALL, **given)
    assert line.request.array == "0-4%1"
    assert dict(line.request.exports) == {
        "PCAM_BATCH_SIZES": "1 8 32 128 512", "PCAM_MODEL": "small", "PCAM_DATA": str(synthetic_dir.resolve()),
    }  # fmt: skip
    assert runs.benchmark("local", "small", SMALL, **given)[0].starts == "on its way already" and len(played.jobs) == 1
    resume = ledger.read(tmp_path / "runs" / "slurm")[0].resume
    assert resume.endswith(f"--cpus 1 --memory 1G --time 00:05:00 --gpus 0 --root {tmp_path}"), "the same again"
    (other,) = runs.benchmark("local", "large", SMALL, **given)
    assert other.job == "2" and other.request.afterany == ()
