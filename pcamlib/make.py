"""The whole journal by one call: data, stale notebooks, evidence, JOURNAL.md, and what is still open."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pcamlib import files
from pcamlib.data.folder import course_folder, data_folder
from pcamlib.data.patches import open_split
from pcamlib.errors import NotebookError, nearest
from pcamlib.experiments.explore import opened
from pcamlib.jobs import notebook as front
from pcamlib.jobs import parameters, scale
from pcamlib.journal import check, evidence, render

Report = Callable[[str], None]


def _inputs(data: str | None, report: Report) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters that say which data a notebook reads, and their fingerprints."""
    folder = data_folder(data, report)
    course = course_folder(folder)
    report(f"data: {folder} ({'SYNTHETIC' if open_split(folder, 'train').synthetic else 'real patches'})")
    prints = {split: patches.fingerprint for split, patches in opened(folder).items()}
    if course:
        prints |= {f"course {split}": patches.fingerprint for split, patches in opened(course).items()}
    return {"data_dir": str(folder.resolve()), "course_dir": str(course.resolve()) if course else ""}, prints


def _execute(
    path: Path, job: scale.Job, root: Path, inputs: dict[str, Any], prints: dict[str, str], more: dict[str, Any],
    force: bool, report: Report,
) -> front.Outcome:  # fmt: skip
    declared = parameters.declared_parameters(path)
    given = {name: value for name, value in {**inputs, "root": str(root)}.items() if name in declared}
    if "slices" in declared:  # what people named in the explorer is an input of the notebook that measures it
        named = evidence.find(root, declared["slices"][1])
        prints = prints | {named.name: files.sha256_file(named) if named.is_file() else "none"}
    output = root / "runs" / "notebooks" / path.name
    if force:
        output.with_name(f"{output.name}.json").unlink(missing_ok=True)  # the stamp of its last run

    def products() -> list[Path]:
        made = evidence.records(root)
        if path.stem not in made:
            raise NotebookError(f"{path.stem}: ran to its end but left no evidence under {root}")
        claims = made[path.stem].evidence
        files = [root / file for claim in claims for file in claim.files]
        return [root / "journal" / "evidence" / f"{path.stem}.json", *files]

    return front.run_if_stale(
        path,
        {**given, **job.parameters, **more},
        output,
        timeout=job.timeout,
        data=prints,
        products=products,
        report=report,
    )


def notebook(
    name: str,
    scale_name: str,
    *,
    root: Path,
    data: str | None = None,
    assignments: Sequence[str] = (),
    force: bool = False,
    report: Report = front.say,
) -> front.Outcome:
    """Execute one notebook at a scale, unless nothing it rests on changed.

    Raises:
        NotebookError: unknown notebook, a parameter that does not fit, or the notebook failed.
    """
    path = front.find(name)
    jobs = scale.load(scale_name)
    if path.stem not in jobs:
        raise NotebookError(f"{path.stem} has no job at scale {scale_name}{nearest(path.stem, jobs)}")
    more = parameters.parse_assignments(path, assignments)
    for reserved, option in (("data_dir", "--data DIR"), ("course_dir", "PCAM_COURSE=DIR"), ("root", "--root DIR")):
        if reserved in more:  # their fingerprints decide what is stale
            raise NotebookError(f"{path.stem}: parameter {reserved} is set by {option} here, not by -p")
    parameters.validate_parameters(path, {**jobs[path.stem].parameters, **more})  # before any data are made
    inputs, prints = _inputs(data, report)
    outcome = _execute(path, jobs[path.stem], root.resolve(), inputs, prints, more, force, report)
    report(f"executed notebook: {outcome.output}")
    return outcome


def journal(
    scale_name: str,
    *,
    root: Path,
    data: str | None = None,
    name: str = "assignment_2",
    report: Report = front.say,
) -> Path:
    """Execute the stale notebooks of a scale, render, check; returns the path of the journal.

    Raises:
        NotebookError: a notebook failed; the journal stays as it was.
    """
    begun = time.monotonic()
    root = root.resolve()
    jobs = scale.load(scale_name)
    inputs, prints = _inputs(data, report)
    for stem, job in jobs.items():
        _execute(front.find(stem), job, root, inputs, prints, {}, False, report)
    markdown, page = render.render(name, root)
    found = check.check(root, name)
    counts = Counter(finding.severity for finding in found)
    for finding in found:
        if finding.severity == "fault":
            report(str(finding))
    report(f"{counts['open']} places still open (`pcam journal check` lists them), {counts['fault']} faults")
    report(f"journal: {markdown}\nas a page: {page}\nin {time.monotonic() - begun:.0f} s")
    return markdown
