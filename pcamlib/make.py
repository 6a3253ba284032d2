"""The journals by one call: data, stale notebooks, evidence, JOURNAL.md and its siblings, and what is still open."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcamlib import files
from pcamlib.data.folder import course_folder, data_folder
from pcamlib.data.patches import open_split
from pcamlib.errors import NotebookError, RunError, nearest
from pcamlib.experiments.explore import opened
from pcamlib.jobs import freshness, parameters, scale
from pcamlib.jobs import notebook as front
from pcamlib.journal import check, datalock, evidence, render
from pcamlib.journal.draft import NAMES
from pcamlib.locks import held
from pcamlib.sources import ROOT

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


@dataclass(frozen=True)
class Task:
    """One notebook of a journal: what it is run with, where to, and what its result rests on beside code."""

    path: Path
    job: scale.Job
    parameters: dict[str, Any]
    output: Path
    data: dict[str, str]

    def stamp(self) -> dict[str, Any]:
        """What a run rests on now; see `freshness`."""
        return freshness.stamp(self.path, parameters.validate_parameters(self.path, self.parameters), self.data)

    def stale(self) -> str:
        """Why it must run, empty where nothing changed since it did."""
        fresh, reason = freshness.is_fresh(self.output, self.stamp())
        return "" if fresh else reason


def _task(
    path: Path, job: scale.Job, root: Path, inputs: dict[str, Any], prints: dict[str, str], more: dict[str, Any]
) -> Task:
    declared = parameters.declared_parameters(path)
    given = {name: value for name, value in {**inputs, "root": str(root)}.items() if name in declared}
    if "slices" in declared:  # what people named in the explorer is an input of the notebook that measures it
        named = evidence.find(root, declared["slices"][1])
        prints = prints | {named.name: files.sha256_file(named) if named.is_file() else "none"}
    if "benchmarks" in declared:  # and so is what jobs measured of the one that shows it
        measured = sorted((ROOT / declared["benchmarks"][1]).glob("*.json"))
        prints = prints | {f"benchmark {path.name}": files.sha256_file(path) for path in measured}
    if "handed_in" in declared:  # and what the final checklist tries
        tried = {path for pattern in declared["handed_in"][1] for path in ROOT.glob(pattern)}
        prints = prints | {f"file {path.relative_to(ROOT)}": files.sha256_file(path) for path in sorted(tried)}
    return Task(path, job, {**given, **job.parameters, **more}, root / "runs" / "notebooks" / path.name, prints)


def tasks(scale_name: str, root: Path, data: str | None, report: Report) -> dict[str, Task]:
    """The notebooks of a scale in the order in which they run; patches are made, or their fingerprints taken.

    Raises:
        ConfigError: an unknown or wrong scale.
        DataError: no such data.
    """
    jobs = scale.load(scale_name)
    inputs, prints = _inputs(data, report)
    return {stem: _task(front.find(stem), job, root.resolve(), inputs, prints, {}) for stem, job in jobs.items()}


@contextmanager
def _alone(output: Path, report: Report) -> Iterator[Callable[[], None]]:
    """Hold an output against other processes, also on other hosts; yields a check that it is still held."""
    with ExitStack() as stack:
        try:
            with files.disk_errors(output):
                still_ours = stack.enter_context(held(output.with_name(f".{output.stem}.held"), report))
        except RunError as error:
            who = str(error).rpartition(" (")[2].rstrip(")")
            raise NotebookError(
                f"{output.stem} is being run already into {output.parent}: wait for it ({who})"
            ) from None
        yield still_ours


def _execute(task: Task, root: Path, force: bool, report: Report) -> front.Outcome:
    path, output = task.path, task.output
    if force:
        output.with_name(f"{output.name}.json").unlink(missing_ok=True)  # the stamp of its last run

    def products() -> list[Path]:
        still_ours()
        made = evidence.records(root)
        if path.stem not in made:
            raise NotebookError(f"{path.stem}: ran to its end but left no evidence under {root}")
        claims = made[path.stem].evidence
        files = [root / file for claim in claims for file in claim.files]
        return [root / "journal" / "evidence" / f"{path.stem}.json", *files]

    with _alone(output, report) as still_ours:
        return front.run_if_stale(
            path,
            task.parameters,
            output,
            timeout=task.job.timeout,
            data=task.data,
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
    root = root.resolve()
    outcome = _execute(_task(path, jobs[path.stem], root, inputs, prints, more), root, force, report)
    report(f"executed notebook: {outcome.output}")
    return outcome


def journal(
    scale_name: str,
    *,
    root: Path,
    data: str | None = None,
    report: Report = front.say,
) -> list[Path]:
    """Execute the stale notebooks of a scale, render all journals, check them; returns their paths.

    Raises:
        NotebookError: a notebook failed; the journals stay as they were.
    """
    begun = time.monotonic()
    root = root.resolve()
    for task in tasks(scale_name, root, data, report).values():
        _execute(task, root, False, report)
    made = [render.render(name, root) for name in NAMES]
    datalock.write(root)
    told: set[str] = set()  # what is wrong with the evidence is wrong in each journal
    for name, (markdown, page) in zip(NAMES, made, strict=True):
        found = check.check(root, name)
        for fault in [str(finding) for finding in found if finding.severity == "fault" and str(finding) not in told]:
            told.add(fault)
            report(fault)
        counts = Counter(finding.severity for finding in found)
        report(f"journal: {markdown}\nas a page: {page}")
        lists = f"`pcam journal check {name}` lists them"
        report(f"{counts['open']} places still open ({lists}), {counts['fault']} faults")
    report(f"in {time.monotonic() - begun:.0f} s")
    return [markdown for markdown, _ in made]
