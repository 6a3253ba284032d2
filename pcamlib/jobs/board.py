"""What became of the jobs that were submitted from here: the ledger, Slurm's word, and for the dead the reason.

pcam jobs [--all]
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pcamlib.jobs.causes import Cause, cause, log_of, tail
from pcamlib.jobs.ledger import Entry, read
from pcamlib.jobs.slurm import SlurmError
from pcamlib.jobs.states import State, states

LAST = 5  # lines of a dead job's log that are shown


@dataclass(frozen=True)
class Row:
    """A job or one task of an array; `cause` and the `last` lines of its log where it died."""

    entry: Entry
    state: State
    cause: Cause | None = None
    last: tuple[str, ...] = ()
    log: Path = Path()


def rows(folder: Path, everything: bool = False) -> tuple[list[Row], str]:
    """The newest job for each thing that is made, or every job in the ledger of a folder.

    Returns:
        the rows, oldest first, and why Slurm could not be asked, empty where it could.
    """
    entries = read(folder)
    if not everything:
        entries = list({entry.writes: entry for entry in entries}.values())
    unable, known = "", {}
    if entries:
        try:
            known = states([entry.id for entry in entries])
        except SlurmError as error:
            unable = str(error)
    found = []
    for entry in entries:
        tasks = [state for state in known.get(entry.id, []) if state.name == entry.name]  # numbers are used again
        found += [_row(entry, state) for state in tasks or _from_logs(entry)]
    return found, unable


def text(found: Iterable[Row]) -> str:
    """The rows as a table, below each dead job why it died, its last words, and what to do."""
    lines = [f"{'job':9s} {'name':22s} {'state':14s} {'node':8s} {'elapsed':>10s} {'restarts':>8s}"]
    for row in found:
        state = row.state
        lines.append(
            f"{state.job:9s} {row.entry.name:22s} {state.state:14s} {state.node:8s} {state.elapsed:>10s} "
            f"{state.restarts:8d}  {'' if state.ended else state.reason}".rstrip()
        )
        if row.cause:
            lines += [f"    {row.cause.kind}: {row.cause.what}", *(f"    | {line}" for line in row.last)]
            lines += [f"    log: {row.log}", f"    {row.cause.do}"]
    return "\n".join(lines)


def _row(entry: Entry, state: State) -> Row:
    log = log_of(entry, state.job)
    said = tail(log)
    why = cause(state, said, entry)
    if state.state == "UNKNOWN":
        end = "its log tells no end" if log.is_file() else "it left no log: it was never started"
        why = Cause("unknown", f"Slurm no longer knows it, and {end}", f"`{entry.resume}`")
    last = tuple(line[:300] for line in said.splitlines() if line.strip())[-LAST:] if why else ()
    return Row(entry, state, why, last, log)


def _from_logs(entry: Entry) -> list[State]:
    """The states of a job that Slurm forgot, or of an array's tasks, as their logs tell them."""
    jobs, (before, array, after) = [entry.id], Path(entry.log).name.partition("%a")
    if array:
        names = sorted(path.name for path in Path(entry.log).parent.glob(f"{before}*{after}"))
        jobs = [f"{entry.id}_{name[len(before) : -len(after)]}" for name in names] or jobs
    found = []
    for job in jobs:
        ends = re.findall(r"ended with exit code (\d+)$", tail(log_of(entry, job)), re.MULTILINE)
        state = ("FAILED" if int(ends[-1]) else "COMPLETED") if ends else "UNKNOWN"
        found.append(State(job, entry.name, state, code=int(ends[-1]) if ends else 0))
    return found
