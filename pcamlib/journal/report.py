"""What `pcam journal check` says, as text or JSON: of a journal here, or of a filled form anywhere."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from pcamlib.errors import EvidenceError, nearest
from pcamlib.journal import form
from pcamlib.journal.check import check
from pcamlib.journal.draft import NAMES
from pcamlib.journal.evidence import find
from pcamlib.journal.render import output


def report(
    root: Path, name: str, template: str, *, strict: bool = False, jobs: bool = False, as_json: bool = False
) -> tuple[str, bool]:
    """What falls short in the journal `name`; where `name` is a file, in that filled copy of the form `template`.

    Returns:
        a text, with a table of verdicts where the form states limits, and whether something is wrong.

    Raises:
        EvidenceError: no such journal, form or file, or a form without limits.
    """
    path = Path(name)
    if path.suffix.lower() == ".md" or name != path.name or (name not in NAMES and path.is_file()):
        limits = _limits(root, template)
        if not limits:
            raise EvidenceError(f"{template} states no limits to hold a file against; `--template dtu_exam` does")
        judgement = form.judge(form.read(path), limits)
        text = json.dumps({"findings": [], "form": judgement.plain()}, indent=1) if as_json else judgement.table()
        return text, not judgement.ok
    limits, rendered = _limits(root, name), root / output(name)
    of_form = form.judge(form.read(rendered), limits) if limits and rendered.is_file() else None
    found = check(root, name, jobs)
    failed = any(finding.severity == "fault" or (strict and finding.severity == "open") for finding in found)
    if as_json:
        findings = [{"severity": finding.severity, **asdict(finding)} for finding in found]
        return json.dumps({"findings": findings, "form": of_form and of_form.plain()}, indent=1), failed
    counts = Counter(finding.severity for finding in found)
    said = [*map(str, found), *([of_form.table()] if of_form else [])]
    return "\n".join([*said, f"{counts['fault']} faults, {counts['open']} open places"]), failed


def _limits(root: Path, name: str) -> dict[int, tuple[form.Limits | None, form.Limits | None]]:
    """The limits that a blank form states."""
    blank = find(root, f"journal/templates/{name}.md")
    if not blank.is_file():
        raise EvidenceError(f"there is no journal or form '{name}'{nearest(name, NAMES)}")
    return form.limits(form.read(blank))
