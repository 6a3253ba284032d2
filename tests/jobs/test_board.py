"""What Slurm says of jobs, and why they died; the texts are those of a Slurm 22.05 with accounting."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pcamlib.jobs import board, ledger, states
from pcamlib.jobs.causes import cause, tail
from pcamlib.jobs.ledger import Entry
from pcamlib.jobs.slurm import SlurmError
from pcamlib.jobs.states import State, accounted

SACCT = """1|code|FAILED|n1|00:00:00|00:01:00|3:0|None|100M|
1.batch|batch|FAILED|n1|00:00:00||3:0|||
2|dep|CANCELLED|None assigned|00:00:00|00:01:00|0:0|Dependency|100M|
3|mem|FAILED|n2|00:00:01|00:01:00|0:9|None|100M|
3.batch|batch|CANCELLED by 0|n2|00:00:01||0:9|||170048K
5|time|TIMEOUT|n2|00:01:21|00:01:00|0:0|None|100M|
5.batch|batch|CANCELLED|n2|00:01:21||0:15|||3256K
6|canc|CANCELLED by 0|n1|00:00:23|00:01:00|0:0|None|100M|
6.batch|batch|FAILED|n1|00:00:23||15:0|||2992K
7|use|COMPLETED|n1|00:00:08|00:01:00|0:0|None|100M|
7.batch|batch|COMPLETED|n1|00:00:08||0:0|||76304K
4_0|arr|COMPLETED|n1|00:00:00|00:01:00|0:0|None|100M|
4_0.batch|batch|COMPLETED|n1|00:00:00||0:0|||
4_1|arr|FAILED|n1|00:00:00|00:01:00|1:0|None|100M|
4_1.batch|batch|FAILED|n1|00:00:00||1:0|||
4_2|arr|FAILED|n1|00:00:00|00:01:00|2:0|None|100M|
4_2.batch|batch|FAILED|n1|00:00:00||2:0|||
"""
SQUEUE = """2|dep|CANCELLED||0:00|1:00|0|0|DependencyNeverSatisfied|100M|
4_1|arr|RUNNING|n1|0:03|1:00|1|0|None|100M|
4_0|arr|FAILED|n1|0:00|1:00|0|256|NonZeroExitCode|100M|
9|late|PENDING||0:00|1:00|0|0|Priority|1.50G|
"""
HEAD = "21:35:19 00_data: job 12 on n1, 1 threads, start 0\n"
CELL = "00_data, cell 3: ValueError: no tissue; what it got to: /r/00_data.failed.ipynb"


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return Entry("12", "00_data", "/r/00_data.ipynb", ("slurm/notebook.sbatch", "00_data"), "ab", ("3", "4"), "sbatch",
                 str(tmp_path / "00_data-12.out"), "pcam submit journal", "smoke.yaml", "local", "")  # fmt: skip


@pytest.fixture
def slurm_says(monkeypatch: pytest.MonkeyPatch):
    """`slurm_says(squeue, sacct)`: None stands for a Slurm without accounting."""

    def played(squeue: str = "", sacct: str | None = None) -> None:
        def ask(*command: str) -> subprocess.CompletedProcess[str]:
            if command[0] == "squeue":
                return subprocess.CompletedProcess(command, 0, squeue, "")
            asked = tuple(command[command.index("-j") + 1].split(","))
            lines = [line for line in (sacct or "").splitlines() if re.split(r"[._|]", line)[0] in asked]
            return subprocess.CompletedProcess(command, int(sacct is None), "\n".join(lines), "accounting is disabled")

        monkeypatch.setattr(states, "ask", ask)

    return played


def test_accounting_is_read() -> None:
    found = accounted(SACCT)
    assert {job: [task.state for task in tasks] for job, tasks in found.items()} == {
        "1": ["FAILED"], "2": ["CANCELLED"], "3": ["FAILED"], "4": ["COMPLETED", "FAILED", "FAILED"], "5": ["TIMEOUT"],
        "6": ["CANCELLED"], "7": ["COMPLETED"],
    }  # fmt: skip
    assert found["1"][0].code == 3 and found["3"][0].signal == 9 and found["5"][0].limit == "00:01:00"
    assert [task.job for task in found["4"]] == ["4_0", "4_1", "4_2"]
    assert found["7"][0].used == pytest.approx(76304 / 1024) and found["7"][0].asked == 100.0, "of its batch step"


def test_the_queue_comes_first_and_accounting_adds_what_it_alone_knows(slurm_says) -> None:
    slurm_says(SQUEUE, SACCT)
    found = states.states(["2", "4", "7", "9", "11"])
    assert list(found) == ["2", "4", "7", "9"]
    assert found["2"][0].reason == "DependencyNeverSatisfied" and found["7"][0].state == "COMPLETED"
    assert [(task.job, task.code, task.restarts) for task in found["4"]] == [("4_0", 1, 0), ("4_1", 0, 1)]
    assert found["9"][0].asked == 1536.0 and not found["9"][0].ended
    slurm_says(SQUEUE)
    assert list(states.states(["2", "7"])) == ["2"], "without accounting an old job is forgotten"


@pytest.mark.parametrize(
    ("state", "said", "kind", "what"),
    [
        ({"state": "FAILED", "code": 2}, f"pcam: {CELL}\n", "code", f"exit code 2: {CELL}"),
        ({"state": "FAILED", "code": 1}, "Traceback\n  x\nKeyError: 'a'\n", "code", "exit code 1: KeyError: 'a'"),
        ({"state": "FAILED", "code": 127}, "x: not found\n", "code", "exit code 127: x: not found"),
        ({"state": "FAILED", "code": 2}, "", "code", "exit code 2: it said nothing"),
        ({"state": "TIMEOUT", "limit": "1:00"}, "", "time limit", "ended by its time limit of 1:00"),
        ({"state": "TIMEOUT", "limit": "1:00"}, "00_data, cell 4: stopped by SIGTERM\n", "time limit", "cell 4"),
        ({"state": "NODE_FAIL", "node": "n2"}, "", "node", "node n2 failed under it"),
        ({"state": "PREEMPTED"}, "", "preempted", "make room"),
        ({"state": "CANCELLED"}, "", "cancelled", "cancelled, by a person or the site"),
        ({"state": "CANCELLED", "reason": "DependencyNeverSatisfied"}, "", "dependency", "job 3 or 4 did not succeed"),
        ({"state": "CANCELLED", "reason": "Dependency"}, "", "dependency", "never started"),
        ({"state": "PENDING", "reason": "DependencyNeverSatisfied"}, "", "dependency", "never started"),
        ({"state": "FAILED", "code": 75}, "", "stopped", "its state is saved"),
        # memory: a cgroup, a watching slurmstepd, the kernel's killer at the notebook's kernel or at us, Python, torch
        ({"state": "OUT_OF_MEMORY", "used": 90.0, "asked": 100.0}, "", "memory", "used 90 MiB, asked for 100 MiB"),
        ({"state": "FAILED", "signal": 9}, "slurmstepd: error: StepId=6.batch exceeded memory limit "
         "(329773056 > 104857600), being killed\n", "memory", "used 314 MiB, asked for 100 MiB"),
        ({"state": "CANCELLED"}, "slurmstepd: error: Exceeded job memory limit\n", "memory", "killed for memory"),
        ({"state": "FAILED", "code": 1}, "slurmstepd: error: Detected 1 oom_kill event in StepId=6.batch.\n",
         "memory", "killed for memory"),
        ({"state": "FAILED", "code": 2}, "pcam: 00_data, cell 3: the kernel was killed (signal 9): usually\n",
         "memory", "(00_data, cell 3: the kernel was killed"),
        ({"state": "FAILED", "code": 137}, "", "memory", "killed (signal 9)"),
        ({"state": "FAILED", "code": 3}, "MemoryError\n", "memory", "killed for memory"),
        ({"state": "FAILED", "code": 3}, "torch.OutOfMemoryError: CUDA out of memory. Tried\n", "memory", "the GPU's"),
    ],
)  # fmt: skip
def test_why_it_died(entry: Entry, state: dict, said: str, kind: str, what: str) -> None:
    found = cause(State("12", "00_data", **state), said, entry)
    assert found and found.kind == kind and what in found.what
    assert "`pcam submit journal`" in found.do
    assert {"memory": "raise memory in smoke.yaml", "time limit": "raise time in smoke.yaml"}.get(kind, "") in found.do


@pytest.mark.parametrize("state", ["COMPLETED", "RUNNING", "PENDING", "COMPLETING"])
def test_who_lives_or_succeeded_did_not_die(entry: Entry, state: str) -> None:
    assert cause(State("12", "00_data", state), "MemoryError\n", entry) is None


def test_only_the_last_start_of_a_job_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"{HEAD}MemoryError\n{HEAD.replace('start 0', 'start 1')}pcam: no such file\n")
    assert tail(log).strip() == "pcam: no such file"
    assert tail(tmp_path / "none") == ""


def test_the_board(entry: Entry, tmp_path: Path, slurm_says) -> None:
    earlier = replace(entry, id="11", log=str(tmp_path / "none.out"))
    array = replace(entry, id="4", name="arr", writes="/r/hpo", log=str(tmp_path / "arr-4_%a.out"))
    for each in (earlier, entry, array):
        ledger.append(tmp_path, each)
    (tmp_path / "00_data-12.out").write_text(f"{HEAD}\npcam: {CELL}\n21:35:30 00_data: ended with exit code 2\n")
    (tmp_path / "arr-4_0.out").write_text("pcam: no such study\n")
    slurm_says(SQUEUE + "12|00_data|FAILED|n1|0:11|5:00|0|512|NonZeroExitCode|2G|\n")
    rows, unable = board.rows(tmp_path)
    assert [row.state.job for row in rows] == ["12", "4_0", "4_1"] and not unable, (
        "the earlier job of the same is left out"
    )
    shown = board.text(rows)
    assert f"code: exit code 2: {CELL}" in shown and f"log: {entry.log}" in shown and "| pcam: no such study" in shown
    assert [row.state.job for row in board.rows(tmp_path, everything=True)[0]] == ["11", "12", "4_0", "4_1"]
    forgotten = board.rows(tmp_path, everything=True)[0][0]
    assert forgotten.state.state == "UNKNOWN" and forgotten.cause and "never started" in forgotten.cause.what


def test_a_job_that_slurm_forgot_is_known_by_its_log(entry: Entry, tmp_path: Path, slurm_says, monkeypatch) -> None:
    ledger.append(tmp_path, entry)
    log = Path(entry.log)
    for end, state, kind in (("ended with exit code 0\n", "COMPLETED", None), ("", "UNKNOWN", "unknown"),
                             (f"pcam: {CELL}\nx: ended with exit code 2\n", "FAILED", "code")):  # fmt: skip
        log.write_text(HEAD + "21:35:30 00_data: " * bool(end) + end)
        for told in ("", "12|another_name|RUNNING|n1|0:11|5:00|0|0|None|2G|\n"):  # the number belongs to a job of now
            slurm_says(told)
            (row,), unable = board.rows(tmp_path)
            assert (row.state.state, row.cause.kind if row.cause else None, unable) == (state, kind, "")

    def none(*command: str) -> None:
        raise SlurmError("no Slurm on this machine")

    monkeypatch.setattr(states, "ask", none)
    (row,), unable = board.rows(tmp_path)
    assert row.state.state == "FAILED" and unable == "no Slurm on this machine"


def test_an_array_that_slurm_forgot(entry: Entry, tmp_path: Path, slurm_says) -> None:
    ledger.append(tmp_path, replace(entry, log=str(tmp_path / "arr-12_%a.out")))
    for task, code in ((0, 0), (1, 2)):
        (tmp_path / f"arr-12_{task}.out").write_text(
            f"MemoryError\n21:35:19 arr: job 3{task} on n1, 1 threads, start 1\nx: ended with exit code {code}\n"
        )
    slurm_says()
    found, _ = board.rows(tmp_path)
    assert [(row.state.job, row.state.state) for row in found] == [("12_0", "COMPLETED"), ("12_1", "FAILED")]
    assert found[1].cause and found[1].cause.kind == "code", "of its last start, not of the one before"


def test_a_queue_that_cannot_be_read_is_not_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(["squeue"], 1, "", "slurm_load_jobs error: Zero Bytes were transmitted\n")
    monkeypatch.setattr(states, "ask", lambda *command: failed)
    with pytest.raises(SlurmError, match="squeue fails: slurm_load_jobs error"):
        states.queued()


def test_no_jobs_at_all(tmp_path: Path) -> None:
    assert board.rows(tmp_path) == ([], "")
