"""The journals as Slurm jobs: a stale notebook each, after those it needs, and last one that renders and checks.

pcam submit journal --site snellius --scale course [--dry-run]

Data are made or fingerprinted here, on the login node; what is fresh or on its way already is left alone.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from pcamlib import make
from pcamlib.data.folder import data_folder
from pcamlib.files import digest
from pcamlib.jobs import slurm
from pcamlib.jobs.scale import Resources
from pcamlib.jobs.slurm import Request
from pcamlib.journal.check import check
from pcamlib.journal.draft import NAMES
from pcamlib.sources import ROOT
from pcamlib.submit.graph import Line, Report, Step, logs_of, submit


def journal(
    site: str, scale: str, *, root: Path = ROOT, data: str | None = None, partition: str | None = None,
    dry_run: bool = False, report: Report = print,
) -> list[Line]:  # fmt: skip
    """Submit the stale notebooks of a scale, each after those it needs, and last a job that renders and checks.

    Returns:
        a line for each job; none where nothing is left to do.

    Raises:
        PcamError: unknown site, partition or scale, a request that no node can serve, no Slurm; nothing is submitted.
    """
    place, root = slurm.site(site), root.resolve()
    slurm.nodes(partition or place.cpu)  # a Slurm that does not answer is told before data are made
    of_its_own = scale.endswith((".yaml", ".yml"))
    where = str(Path(scale).resolve()) if of_its_own else scale
    tasks = make.tasks(scale, root, data, report)
    chosen = data or os.environ.get("PCAM_DATA")
    more = ("--root", str(root), *(("--data", str(data_folder(data).resolve())) if chosen else ()))
    goes = ("--partition", partition) if partition else ()
    again = ["pcam", "submit", "journal", "--site", site, "--scale", where, *more, *goes]
    steps, asked = [], where if of_its_own else f"papermill_jobs/{scale}.yaml"

    def request(script: str, job: str, arguments: Sequence[str], resources: Resources) -> Request:
        goes = partition or place.partition(resources.gpus)
        return Request(script, tuple(arguments), job, site, goes, resources, logs_of(root), asked)

    for stem, task in tasks.items():
        if stale := task.stale():
            report(f"{stem}  stale: {stale}")
            job = request("notebook.sbatch", stem, (stem, "--scale", where, *more), task.job.resources)
            steps.append(Step(job, task.output, tuple(task.job.after), basis=digest(task.stamp())))
        else:
            report(f"{stem}  up to date")
    if steps or any(finding.kind == "journal" for name in NAMES for finding in check(root, name)):
        small = Resources(cpus=1, memory="2G", time="00:10:00")
        page = request("journal.sbatch", "journal", ("--root", str(root)), small)
        steps.append(Step(page, root / "JOURNAL.md", tuple(step.request.name for step in steps)))
    return submit(steps, logs_of(root), shlex.join(again), dry_run, report)
