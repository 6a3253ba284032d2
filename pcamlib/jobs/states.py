"""What Slurm knows of jobs: squeue for what lives or ended minutes ago, sacct for the rest where accounting exists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pcamlib.jobs.slurm import SlurmError, ask

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "TIMEOUT")  # fmt: skip
_QUEUE = ("JobArrayID", "Name", "State", "NodeList", "TimeUsed", "TimeLimit", "RestartCnt", "exit_code", "Reason",
          "MinMemory")  # fmt: skip
_ACCOUNT = ("JobID", "JobName", "State", "NodeList", "Elapsed", "Timelimit", "ExitCode", "Reason", "ReqMem",
            "MaxRSS")  # fmt: skip
_UNITS = {"": 2**-20, "K": 2**-10, "M": 1.0, "G": 2.0**10, "T": 2.0**20}  # of MiB


@dataclass(frozen=True)
class State:
    """A job, or one task of an array (`12_3`), as Slurm knows it; memory in MiB, 0 where it says nothing."""

    job: str
    name: str
    state: str
    node: str = ""
    elapsed: str = ""
    limit: str = ""
    restarts: int = 0
    code: int = 0
    signal: int = 0
    reason: str = ""
    asked: float = 0.0
    used: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether it will not run, or run on, any more."""
        return self.state in ENDED or self.reason == "DependencyNeverSatisfied"


def states(ids: Sequence[str]) -> dict[str, list[State]]:
    """State of each job that Slurm still knows, by id; an array has one entry a task.

    Raises:
        SlurmError: no Slurm answers here.
    """
    found = queued()
    past = [job for job in ids if all(state.ended for state in found.get(job, []))]
    if past:  # accounting also tells how much memory was used; without it sacct fails, and squeue's word stands
        done = ask("sacct", "-n", "-P", "-j", ",".join(past), "-o", ",".join(_ACCOUNT))
        for job, tasks in accounted(done.stdout if done.returncode == 0 else "").items():
            known = {state.job: state for state in found.get(job, [])}  # sacct tells no restarts and other reasons
            found[job] = [replace(known.get(task.job, task), used=task.used) for task in tasks]
    return {job: found[job] for job in ids if job in found}


def queued() -> dict[str, list[State]]:
    """This user's jobs that live, or ended so lately that the controller remembers (MinJobAge, often 5 minutes).

    Raises:
        SlurmError: no Slurm answers here.
    """
    done = ask("squeue", "-h", "-r", "--me", "--states=all", "-O", ",".join(f"{field}:|" for field in _QUEUE))
    if done.returncode:  # taken for an empty queue, everything would be submitted twice
        raise SlurmError(f"squeue fails: {done.stderr.strip()}")
    found: dict[str, list[State]] = {}
    for line in done.stdout.splitlines():
        job, name, state, node, elapsed, limit, restarts, code, reason, memory = line.split("|")[: len(_QUEUE)]
        status = int(code)  # as wait() gives it
        found.setdefault(job.split("_")[0], []).append(
            State(job, name, state, node, elapsed, limit, int(restarts), status >> 8, status & 0x7F,
                  "" if reason == "None" else reason, megabytes(memory))
        )  # fmt: skip
    return {job: sorted(tasks, key=_task) for job, tasks in found.items()}


def accounted(text: str) -> dict[str, list[State]]:
    """The answer of sacct: a line a job or task, then one for each of its steps, which hold the memory used."""
    found: dict[str, State] = {}
    for line in text.splitlines():
        job, name, state, node, elapsed, limit, code, reason, asked, used = line.split("|")[: len(_ACCOUNT)]
        whole, _, step = job.partition(".")
        if not step:
            exit_code, _, signal = code.partition(":")
            found[whole] = State(
                whole, name, state.split()[0], "" if node == "None assigned" else node, elapsed, limit,
                0, int(exit_code or 0), int(signal or 0), "" if reason == "None" else reason,
                megabytes(asked),
            )  # fmt: skip
        elif whole in found:
            used_so_far = max(found[whole].used, megabytes(used))
            found[whole] = replace(found[whole], used=used_so_far)
    jobs: dict[str, list[State]] = {}
    for one in sorted(found.values(), key=_task):
        jobs.setdefault(one.job.split("_")[0], []).append(one)
    return jobs


def megabytes(text: str) -> float:
    """MiB of Slurm's `4000M`, `1.5G`, `315204K`; 0 of what is no size."""
    found = re.match(r"([\d.]+)([KMGT]?)", text)
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


def _task(state: State) -> int:
    number = state.job.partition("_")[2]
    return int(number) if number.isdigit() else -1
