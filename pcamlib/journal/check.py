"""What still falls short of a journal that can be handed in: open places, and faults.

    pcam journal check [NAME] [--strict] [--jobs] [--json]

A fault is a journal that says something it should not: stale, edited by hand, unproved. An open place is something
not done yet. A note is a box that stays empty by decision. Nothing is changed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pcamlib.errors import EvidenceError, PcamError
from pcamlib.files import digest, read_json, sha256_file
from pcamlib.journal import datalock, form
from pcamlib.journal.boxes import boxes
from pcamlib.journal.claims import Record, parse
from pcamlib.journal.draft import NAMES, SHOWN, template, written
from pcamlib.journal.evidence import find, foundation, load, records
from pcamlib.journal.group import ASKED, read_group
from pcamlib.journal.render import GIT, OPEN, markdown_text, output
from pcamlib.sources import ROOT

REMAKE = "run `make journal`"

TYPED = re.compile(
    r"(?<![\w.,])(?:"
    r"\d+(?:[.,]\d+)?\s?(?:%|per\s?cent\b)"  # 91 %, 0.5 percent
    r"|\d+(?:\.\d+)?(?:[eE][-+]?\d+|\s?[×x]\s?10\^?-?\d*)"  # 1e-3, 3 × 10^-4
    r"|\d*\.\d+(?!\.?\d)"  # 0.91, .91; 1.2.3 is a version
    r"|0,\d+"  # 0,91
    r")"
)
SKIPPED = re.compile(
    r"```.*?```|`[^`\n]*`|\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|<!--.*?-->|\]\([^)\n]*\)|https?://\S+", flags=re.DOTALL
)
DRAFT = re.compile(r"\b(DRAFT|TODO)\b")
IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img[^>]*\ssrc=[\"']([^\"']+)")
ELSEWHERE = re.compile(r"/|~|\\|[A-Za-z]+:|(?:.*/)?\.\.(?:/|$)")


@dataclass(frozen=True)
class Finding:
    """One thing that falls short: its kind, where it is, what is wrong, what to do about it."""

    kind: str
    where: str
    what: str
    do: str

    @property
    def severity(self) -> str:
        """`open` for something not done yet, `note` for what stays so by decision, `fault` for everything else."""
        return {**dict.fromkeys(("question", "group", "draft", "limit", "box"), "open"), "unused": "note"}.get(
            self.kind, "fault"
        )

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}; {self.do}"


def check(root: str | Path = ROOT, name: str = NAMES[0], jobs: bool = False) -> list[Finding]:
    """Everything that falls short in the journal `name` of `root`: faults first, then open places, then notes.

    With `jobs`, evidence that no Slurm job made is a fault too.

    Kinds of fault: `evidence` (no n, no interval, seeds that are one run, an edited file), `stale`, `figure`, `number`
    (typed by hand), `group-file`, `template` (cannot be rendered), `form` (other headings or answers than the blank
    form has), `journal` (not what rendering gives), `image`, and `job` where that is asked for.
    Kinds of open place: `question`, `group`, `draft` (a text that nobody approved), `limit` (an answer longer or
    shorter than its form asks for, or without its images), `box` (of a checklist). Kind of note: `unused`.
    """
    root = Path(root)
    found = [*_evidence(root), *(_jobless(root) if jobs else ()), *_typed(root, name), *_group(root, name)]
    found += [*_drafts(root, name), *(Finding("stale", *told) for told in datalock.findings(root))]
    try:
        expected = markdown_text(name, root)
    except PcamError as error:
        if not any(finding.kind in ("evidence", "group-file") for finding in found):
            found.append(Finding("template", f"journal/templates/{name}.md.j2", str(error), "correct it"))
        expected = ""
    found += [*_questions(expected), *_journal(root, output(name), expected), *_images(root, output(name))]
    found += [*_headings(root, name, expected), *_limits(root, name, expected), *_boxes(root, name)]
    return sorted(dict.fromkeys(found), key=lambda finding: ("fault", "open", "note").index(finding.severity))


def _evidence(root: Path) -> Iterator[Finding]:
    """Entries that are no claims, notebooks that are stale, figures that are not the recorded ones."""
    owner: dict[str, str] = {}
    for path in sorted((root / "journal" / "evidence").glob("*.json")):
        place = f"journal/evidence/{path.name}"
        try:
            content = read_json(path)
            entries = list(content["evidence"])
        except (PcamError, KeyError, TypeError):
            yield Finding("evidence", place, "the file is damaged", REMAKE)
            continue
        whole = True
        for entry in entries:
            try:
                claim = parse(entry)
            except EvidenceError as error:
                whole = False
                yield Finding("evidence", place, str(error), "record it in the notebook, not in this file")
                continue
            if claim.key in owner:
                yield Finding("evidence", place, f"'{claim.key}' is also in {owner[claim.key]}", "rename one of them")
            owner[claim.key] = place
            for file, recorded in claim.files.items():
                if not (root / file).is_file():
                    yield Finding("figure", file, f"missing, but recorded by {path.stem}", REMAKE)
                elif sha256_file(root / file) != recorded:
                    yield Finding("figure", file, f"not the file that {path.stem} made", REMAKE)
        if whole and content.get("digest") != digest(entries):
            yield Finding("evidence", place, "edited by hand", REMAKE)
        if whole:
            yield from _stale(root, path.stem, content)


def _jobless(root: Path) -> Iterator[Finding]:
    """Evidence that no Slurm job made; a damaged file is `_evidence`'s to tell."""
    with suppress(EvidenceError):
        for name, record in records(root).items():
            if not record.job:
                what = f"none of its {len(record.evidence)} claims carries a job id: {name} ran outside Slurm"
                yield Finding("job", f"journal/evidence/{name}.json", what, "`pcam submit journal` runs it in a job")


def _stale(root: Path, notebook: str, content: Any) -> Iterator[Finding]:
    place = f"journal/evidence/{notebook}.json"
    try:
        record = Record.model_validate_json(json.dumps(content))
        now = foundation(root, notebook)
    except ValueError:
        yield Finding("evidence", place, "does not say what it rests on", REMAKE)
        return
    except EvidenceError as error:
        yield Finding("stale", place, str(error), "delete the file, or bring the notebook back")
        return
    if record.notebook != notebook:
        yield Finding("evidence", place, f"is the evidence of {record.notebook}", "give the file its name back")
    then = record.provenance["sources"]
    for file in sorted({**then, **now["sources"]}):
        if then.get(file) != now["sources"].get(file):
            verb = "is new" if file not in then else "is gone" if file not in now["sources"] else "changed"
            yield Finding("stale", place, f"{file} {verb} since {notebook} ran", REMAKE)
    if record.provenance["lock"] != now["lock"]:
        yield Finding("stale", place, f"requirements.lock changed since {notebook} ran", REMAKE)


def _typed(root: Path, name: str) -> Iterator[Finding]:
    """Numbers typed by hand in prose and template, with file and line; those of the form itself left aside."""
    blank = find(root, f"journal/templates/{name}.md")
    asked = set(blank.read_text(encoding="utf-8").splitlines()) if blank.is_file() else set()
    for path in [*written(root, name), template(root, name)]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        bare = SKIPPED.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)  # keeps line numbers
        for number, (line, whole) in enumerate(zip(bare.splitlines(), text.splitlines(), strict=True), 1):
            for match in () if whole in asked else TYPED.finditer(line):
                place = f"journal/{path.parent.name}/{path.name}:{number}"
                do = "quote evidence with {{ value(...) }}, or put it in backticks if it is no result"
                yield Finding("number", place, f"'{match[0].strip()}' is typed by hand", do)


def _group(root: Path, name: str) -> Iterator[Finding]:
    place = "journal/group.yaml"
    try:
        group = read_group(root)
    except PcamError as error:
        yield Finding("group-file", place, str(error).removeprefix(f"{place}: "), "correct it")
        return
    for field in ASKED.get(name, ()):
        if getattr(group, field) == "":
            yield Finding("group", place, f"{field} is empty", "fill it in")
    if not any(member.name for member in group.members):
        yield Finding("group", place, "no member is named", "fill in names and ids")
    for member in group.members:
        if member.name and not member.id:
            yield Finding("group", place, f"{member.name} has no id", "fill it in")


def _drafts(root: Path, name: str) -> Iterator[Finding]:
    """Texts that people began, or took over and did not approve."""
    for path in written(root, name):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := DRAFT.search(line):
                yield Finding("draft", f"journal/prose/{path.name}:{number}", f"says {match[0]}", "finish it")


def _questions(text: str) -> Iterator[Finding]:
    """Open places and drafts in the rendered journal, by question and item."""
    question, item = "head", ""
    for line in text.splitlines():
        if heading := re.match(r"###? (.+)", line):
            question, item = heading[1].partition(":")[0], ""
            if part := re.search(r": (Part \d+)", line):
                question += f", {part[1]}"
        elif match := re.match(r"(\d+\. )\*\*(.+?):?\*\*", line):
            item = f", {match[1]}{match[2]}"
        if line.startswith(f"> {OPEN}"):
            reason, _, place = line.removeprefix(f"> {OPEN} ").partition(" Write it in ")
            do = f"write it in {place.strip('`.')}" if place else "run what records it"
            yield Finding("question", f"{question}{item}", reason.rstrip("."), do)
        if line.startswith(f"> {SHOWN}"):
            place = line.rpartition(" ")[2].rstrip("`.")
            do = f"`pcam journal draft {place}` puts it into journal/prose, where you edit or approve it"
            yield Finding("draft", f"{question}{item}", "follows the measured facts, and nobody approved it", do)
        for missing in re.findall(r"\*\*\[not answered yet: (.+?)\]\*\*", line):
            yield Finding("question", f"{question}{item}", missing, "record it in a notebook, or correct the key")


def _journal(root: Path, file: str, expected: str) -> Iterator[Finding]:
    """Whether a journal's file is what rendering gives now, what is taken from git left aside."""
    path = root / file
    if not path.is_file():
        yield Finding("journal", file, "missing", REMAKE)
        return
    if not expected:
        return
    here, there = (_comparable(text) for text in (path.read_text(encoding="utf-8"), expected))
    same = next(
        (i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a[1] != b[1]), min(len(here), len(there))
    )
    if same == len(here) == len(there):
        return
    number, found = here[same] if same < len(here) else (here[-1][0] if here else 1, "(nothing)")
    wanted = there[same][1] if same < len(there) else "(nothing)"
    what = f"reads '{found[:60]}' where the evidence gives '{wanted[:60]}'"
    yield Finding("journal", f"{file}:{number}", what, f"{REMAKE}; write answers in journal/prose")


def _limits(root: Path, name: str, text: str) -> Iterator[Finding]:
    """Answers that fall short of what the form asks for, where it does."""
    blank = find(root, f"journal/templates/{name}.md")
    limits = form.limits(form.read(blank)) if text and blank.is_file() else {}
    if not limits:
        return
    judgement = form.judge(text, limits)
    yield from (Finding("form", output(name), said, "take it out of journal/prose") for said in judgement.problems)
    for verdict in judgement.questions:
        if verdict.problems:
            do = "only a person can change that: write the answer, or hand it in so"
            yield Finding("limit", f"Question {verdict.question}", "; ".join(verdict.problems), do)


def _headings(root: Path, name: str, text: str) -> Iterator[Finding]:
    """The first heading that the blank form has not, or has elsewhere: prose may add none."""
    blank = find(root, f"journal/templates/{name}.md")
    if text and blank.is_file():
        pairs = zip_longest(*map(_outlined, (text, form.read(blank))), fillvalue="the end")
        for found, wanted in pairs:
            if found != wanted:
                what = f"'{found}' stands where the form has '{wanted}'"
                yield Finding("form", output(name), what, "leave its headings as they are; journal/prose may add none")
                return


def _outlined(text: str) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if line.startswith("#")]


def _boxes(root: Path, name: str) -> Iterator[Finding]:
    """Boxes of a checklist that no check ticks; what is damaged is told by `_evidence` and by rendering."""
    with suppress(PcamError):
        for key, box in boxes(root, name, load(root)).items():
            if not box.ticked:
                kind, do = ("unused", "leave it empty") if box.decided else ("box", "do it, or leave it empty")
                yield Finding(kind, f"checklist, {key}", box.why, do)


def _comparable(text: str) -> list[tuple[int, str]]:
    """Numbered lines that are not empty and not taken from git."""
    text = re.sub(f"{GIT[0]}.*?{GIT[1]}", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _images(root: Path, file: str) -> Iterator[Finding]:
    """Images that a journal shows and that are missing, or lie outside the repository."""
    path = root / file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    code = r"```.*?```|`[^`\n]*`"
    text = re.sub(code, lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)  # keeps line numbers
    for number, line in enumerate(text.splitlines(), 1):
        for match in IMAGE.finditer(line):
            image = match[1] or match[2]
            if ELSEWHERE.match(image):
                do = "put the file into assets/ and write assets/NAME"
                yield Finding("image", f"{file}:{number}", f"{image} is no path inside the repository", do)
            elif not (root / image).is_file():
                yield Finding("image", f"{file}:{number}", f"{image} is missing", f"add the file, or {REMAKE}")
