"""The jobs that were submitted from here: `runs/slurm/jobs.jsonl`, one line each, beside their logs.

Slurm forgets a job; this does not. It is also how a second `pcam submit` knows what is on its way already.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pcamlib.errors import PcamError
from pcamlib.files import disk_errors


@dataclass(frozen=True)
class Entry:
    """One submitted job.

    Attributes:
        id: Slurm's number.
        name: of the job.
        writes: the file or folder that it makes; two jobs with the same must not run at once.
        call: script and arguments.
        basis: digest of what the result rests on, as it was when the job was submitted.
        waits: ids of the jobs that must succeed before.
        command: the whole sbatch call.
        log: its output; `%a` stands for the task of an array.
        resume: the command that submits it again, or what is left of it.
        asked: where its time and memory are set.
        site: as in slurm/sites.
        submitted: UTC, ISO 8601.
    """

    id: str
    name: str
    writes: str
    call: tuple[str, ...]
    basis: str
    waits: tuple[str, ...]
    command: str
    log: str
    resume: str
    asked: str
    site: str
    submitted: str


def read(folder: Path) -> list[Entry]:
    """Every job in the ledger of a folder, oldest first; none where there is no ledger.

    Of two lines with one id the later stands: a Slurm that was set up anew counts from 1 again.

    Raises:
        PcamError: a line that is no job.
    """
    path = folder / "jobs.jsonl"
    found: dict[str, Entry] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], start=1):
        try:
            fields = json.loads(line)
            entry = Entry(**{**fields, "call": tuple(fields["call"]), "waits": tuple(fields["waits"])})
        except (ValueError, TypeError, KeyError):
            raise PcamError(
                f"{path}, line {number}: damaged; delete that line (squeue shows which job it was)"
            ) from None
        found.pop(entry.id, None)
        found[entry.id] = entry
    return list(found.values())


def append(folder: Path, entry: Entry) -> None:
    """Add a job; the line is on disk when this returns."""
    path = folder / "jobs.jsonl"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(json.dumps(asdict(entry)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second submission waiting: of two at once each would find nothing on its way and submit everything."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "jobs.lock").touch()
    with open(folder / "jobs.lock", "w") as lock:
        with suppress(OSError):  # no locks on this disk: two submissions in one second are rare
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
