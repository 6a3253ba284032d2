"""Why a job died, from what Slurm says and what the job itself said last: time limit, memory, node, code, and so on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pcamlib.jobs.ledger import Entry
from pcamlib.jobs.states import State

TAIL = 64 * 1024  # bytes of a log that are looked at
STOPPED = 75  # exit code of a command that saved its state and stopped on request
#: Who says that memory ran out: slurmstepd that watches it, the kernel's killer, our notebook front, Python, torch.
_MEMORY = re.compile(
    r"xceeded (?:job |step )?memory limit|oom[-_]kill|Out Of Memory|the kernel was killed \(signal 9\)|"
    r"^MemoryError|: MemoryError|can't allocate memory|CUDA out of memory|OutOfMemoryError", re.MULTILINE
)  # fmt: skip
_WATCHED = re.compile(r"exceeded memory limit \((\d+) > (\d+)\)")  # bytes
_MESSAGE = re.compile(r"^(?:pcam: (?P<ours>.+)|(?P<bare>[A-Za-z_.]*(?:Error|Exception)\b.*))$", re.MULTILINE)
_CELL = re.compile(r"^(?:pcam: )?(\S+, (?:cell \d+|before its first cell): .+)$", re.MULTILINE)


@dataclass(frozen=True)
class Cause:
    """Why a job did not succeed: a word for it, what happened, and what to do about it."""

    kind: str
    what: str
    do: str


def log_of(entry: Entry, job: str) -> Path:
    """The log of a job or of one task of an array (`12_3`)."""
    pattern = Path(entry.log)
    return pattern.with_name(pattern.name.replace("%a", job.partition("_")[2]))


def tail(path: Path) -> str:
    """What the last attempt of a job said, at most the last 64 KiB; empty where there is no log."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        text = file.read().decode(errors="replace")
    return re.split(r"^\S+ \S+: job \d+ on .* start \d+$", text, flags=re.MULTILINE)[-1]  # common.sh begins so


def cause(state: State, said: str, entry: Entry) -> Cause | None:
    """Why the job ended as it did; None for one that lives, was never heard of again, or completed.

    Args:
        state: what Slurm knows.
        said: the end of its log, see `tail`.
        entry: its line in the ledger.
    """
    if state.state == "COMPLETED" or not state.ended:
        return None
    place = _CELL.findall(said)
    where = f" ({place[-1]})" if place else ""
    do = f"`{entry.resume}`"
    if state.reason in ("DependencyNeverSatisfied", "Dependency"):  # in squeue's word, and in sacct's
        kind, do = "dependency", f"mend that one, then {do}"
        what = f"job {' or '.join(entry.waits) or 'that it waited for'} did not succeed, so this one was never started"
    elif state.state in ("TIMEOUT", "DEADLINE"):
        kind, do = "time limit", f"raise time in {entry.asked}, then {do}"
        what = f"ended by its time limit of {state.limit}{where}"
    elif state.state in ("NODE_FAIL", "BOOT_FAIL"):
        kind, what = "node", f"node {state.node or '(none)'} failed under it"
    elif state.state == "PREEMPTED":
        kind, what = "preempted", "had to make room for a job that comes first"
    elif state.state == "OUT_OF_MEMORY" or _MEMORY.search(said):
        kind, what, do = "memory", _memory(state, said) + where, f"raise memory in {entry.asked}, then {do}"
    elif state.state == "CANCELLED":
        kind, what = "cancelled", f"cancelled, by a person or the site{where}"
    elif state.code == STOPPED:
        kind, what, do = "stopped", "stopped when it was asked to, its state is saved", f"{do} goes on from there"
    elif state.code == 128 + 9 or state.signal == 9:
        kind, do = "memory", f"raise memory in {entry.asked}, then {do}"
        what = "killed (signal 9), and nobody says by whom: on a cluster mostly for memory"
    else:
        kind, what, do = "code", f"exit code {state.code}: {_message(said)}", f"mend that, then {do}"
    return Cause(kind, what, do)


def _memory(state: State, said: str) -> str:
    """How much was used and asked for, as far as anybody says."""
    if "CUDA out of memory" in said:
        return "ran out of the GPU's memory"
    watched = _WATCHED.findall(said)
    used, asked = (int(part) / 2**20 for part in watched[-1]) if watched else (state.used, state.asked)
    parts = [f"used {used:,.0f} MiB" if used else "", f"asked for {asked:,.0f} MiB" if asked else ""]
    return "killed for memory" + "".join(f", {part}" for part in parts if part)


def _message(said: str) -> str:
    """The line in which a command of ours, or Python, said what was wrong; else the last line."""
    found = [match["ours"] or match["bare"] for match in _MESSAGE.finditer(said)]
    lines = [line for line in said.splitlines() if line.strip() and "ended with exit code" not in line]
    return (found or lines or ["it said nothing"])[-1].strip()
