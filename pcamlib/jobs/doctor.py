"""Whether this machine and this environment can run the project; if not, what to do.

    pcam doctor

On a cluster, run it on the login node, and once inside a job: `srun --partition=gpu_course .venv/bin/pcam doctor`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from pcamlib.jobs import doctor_machine as machine
from pcamlib.jobs import doctor_python as python
from pcamlib.jobs.finding import Finding, Place

Check = Callable[[Place], Finding]

CHECKS: tuple[Check, ...] = (
    python.python,
    python.lock,
    python.torch,
    python.kernel,
    python.user_site,
    python.python_path,
    python.libraries,
    python.conda,
    machine.writable,
    machine.locks,
    machine.room,
    machine.shared_memory,
    machine.threads,
    machine.slurm,
    machine.git,
)


def examine(here: Place | None = None, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """What each check finds here, in order; a check that the machine itself stops counts as failed."""
    here = here or Place()
    found = []
    for check in checks:
        try:
            found.append(check(here))
        except OSError as error:
            found.append(Finding("FAIL", check.__name__, f"could not be looked at: {error}"))
    return found


def report(found: Sequence[Finding], as_json: bool = False) -> str:
    """The findings as lines for people, or as a JSON list of `level, what, detail, remedy`."""
    return json.dumps([asdict(one) for one in found], indent=1) if as_json else "\n".join(map(str, found))
