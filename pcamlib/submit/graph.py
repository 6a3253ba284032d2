"""A graph of Slurm jobs: planned against what is on its way already, checked, then submitted whole or not at all."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from pcamlib.jobs import ledger, slurm
from pcamlib.jobs.slurm import Request, SlurmError
from pcamlib.jobs.states import queued
from pcamlib.provenance import now
from pcamlib.sources import ROOT

Report = Callable[[str], None]
_WAITS = ("afterok", "afterany")


@dataclass(frozen=True)
class Step:
    """One job of a graph.

    Attributes:
        request: the job, without what it waits for.
        writes: what it makes; two jobs that write the same never run at once.
        after: names of steps before it; `anyhow`: it starts also when one of those failed.
        basis: digest of what the result rests on.
        queues: behind a job that writes the same for another reason; without, that is an error.
        fits: a last check, which costs time; called where the job is about to be submitted.
    """

    request: Request
    writes: Path
    after: tuple[str, ...] = ()
    anyhow: bool = False
    basis: str = ""
    queues: bool = True
    fits: Callable[[], None] | None = None


@dataclass(frozen=True)
class Line:
    """A job for people: `job` is its id; `starts` says when it would start, or that it was on its way already."""

    request: Request
    job: str
    starts: str


def text(lines: Sequence[Line]) -> str:
    """The jobs as a table."""
    if not lines:
        return "nothing to submit: everything is up to date"
    rows = [("name", "job", "waits for", "partition", "cpus", "memory", "gpus", "time", "starts")]
    for line in lines:
        ask, wanted = line.request, line.request.resources
        waits = " ".join(ask.afterok + ask.afterany).replace("$job_", "") or "-"
        rows.append(
            (ask.name, line.job, waits, ask.partition, str(wanted.cpus), wanted.memory, str(wanted.gpus), wanted.time,
             line.starts)
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def submit(steps: Sequence[Step], logs: Path, resume: str, dry_run: bool, report: Report) -> list[Line]:
    """Submit what is not on its way, in the order given; `dry_run` prints the calls instead.

    Args:
        steps: each after those it names.
        logs: folder of the ledger and the logs.
        resume: the command that submits this again.
        dry_run: as above.
        report: told the calls, and what is undone.

    Raises:
        SlurmError: a request that no node can serve, or that Slurm refuses; what was submitted before is cancelled.
    """
    offered = {partition: slurm.nodes(partition) for partition in {step.request.partition for step in steps}}
    with nullcontext() if dry_run else ledger.alone(logs):
        planned = _plan(steps, logs)
        for step, job in planned:
            if not job:
                slurm.refuse(step.request, offered[step.request.partition])
        lines = [Line(step.request, job or "-", _when(step, job)) for step, job in planned]
        if dry_run:
            _print(planned, logs, report)
            return lines
        for step, job in planned:
            if step.fits and not job:
                step.fits()
        ids: dict[str, str] = {}
        try:
            for place, (step, job) in enumerate(planned):
                if not job:
                    waits = {how: tuple(ids.get(job, job) for job in getattr(step.request, how)) for how in _WAITS}
                    request = replace(step.request, **waits)  # type: ignore[arg-type]
                    ids[_variable(step)] = new = slurm.submit(request)
                    ledger.append(logs, _entry(step, request, new, resume))
                    lines[place] = replace(lines[place], request=request, job=new)
        except BaseException as error:
            if ids:
                report(f"{error}\nso that nothing is half done, jobs {' '.join(ids.values())} are cancelled")
                slurm.cancel(list(ids.values()))
            raise
    return lines


def _plan(steps: Sequence[Step], logs: Path) -> list[tuple[Step, str]]:
    """Each step with what it waits for, and the id of the job that does it already, if one lives.

    A job to be has no id yet: `$job_NAME` stands for it.
    """
    known = queued()
    live: dict[str, tuple[ledger.Entry | None, str]] = {}
    for one in ledger.read(logs):
        states = [state.state for state in known.get(one.id, []) if state.name == one.name and not state.ended]
        if states:
            live[one.writes] = (one, "PENDING" if set(states) == {"PENDING"} else "RUNNING")
    planned: list[tuple[Step, str]] = []
    ids: dict[str, str] = {}
    for step in steps:
        needed = tuple(ids[name] for name in step.after if name in ids)
        entry, state = live.get(str(step.writes), (None, ""))
        same = entry and entry.call == step.request.call and set(needed) <= set(entry.waits)
        if entry and same and (state == "PENDING" or entry.basis == step.basis):  # pending: it will read today's code
            ids[step.request.name] = entry.id
            planned.append((replace(step, request=replace(step.request, afterok=entry.waits)), entry.id))
            continue
        if entry and not step.queues:
            raise SlurmError(
                f"{step.writes} is being written by job {entry.id} with other arguments: {shlex.join(entry.call)}; "
                f"choose another --out, or `scancel {entry.id}` first"
            )
        behind = (entry.id,) if entry else ()
        waits = {"afterany": needed + behind} if step.anyhow else {"afterok": needed, "afterany": behind}
        ids[step.request.name] = _variable(step)
        planned.append((replace(step, request=replace(step.request, **waits)), ""))  # type: ignore[arg-type]
    return planned


def _when(step: Step, job: str) -> str:
    if job:
        return "on its way already"
    return "after those" if step.request.afterok or step.request.afterany else slurm.starts(step.request)


def _print(planned: Sequence[tuple[Step, str]], logs: Path, report: Report) -> None:
    """The calls as a shell would make them."""
    report(f"cd {shlex.quote(str(ROOT))}\nmkdir -p {shlex.quote(str(logs))}")
    for step, job in planned:
        if not job:
            words = [f'"{word}"' if "$job_" in word else shlex.quote(word) for word in step.request.command()]
            report(f"{_variable(step)[1:]}=$({' '.join(words)})")


def _entry(step: Step, request: Request, job: str, resume: str) -> ledger.Entry:
    log = request.logs / f"{request.name}-{job}{'_%a' if request.array else ''}.out"
    return ledger.Entry(
        job, request.name, str(step.writes), request.call, step.basis, request.afterok + request.afterany * step.anyhow,
        shlex.join(request.command()), str(log), resume, request.asked, request.site, now(),
    )  # fmt: skip


def _variable(step: Step) -> str:
    return "$job_" + re.sub(r"\W", "_", step.request.name)


def logs_of(root: Path) -> Path:
    """Where the jobs of a root are kept: ledger and logs."""
    return root.resolve() / "runs" / "slurm"
