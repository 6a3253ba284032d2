"""The whole audit of a folder: stages, each kept when done, findings for people and machines, and the masks.

    pcam audit DIR
    report = audit("DIR"); print(report.text()); open_split("DIR", "train").rows(clean=True)

Stages rest on the columns of one streaming pass (`measure.py`). Each keeps its findings in the cache under the
fingerprints of the data and its code, so an interrupted audit goes on where it was and a repeated one reads nothing.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pcamlib import seeding, sources
from pcamlib.audit import poison
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.measure import measured
from pcamlib.audit.stages import STAGES, Options, Stage, Subject
from pcamlib.data import convert
from pcamlib.data.patches import mask_path
from pcamlib.errors import DataError, PcamError
from pcamlib.files import digest, read_json, write_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What an audit found.

    Attributes:
        folder: the data.
        data: by split: patches, positives, dtype, fingerprint, whether synthetic.
        findings: in the order of the stages.
        facts: by stage: what was measured whether or not anything is wrong, JSON-able.
        looked: names of the stages that were run.
        seconds: by stage; next to 0 where its result came from the cache.
        subject: the splits themselves with their measurements and copies, for pictures and further questions.
    """

    folder: str
    data: dict[str, dict[str, Any]]
    findings: list[Finding]
    facts: dict[str, dict[str, Any]]
    looked: list[str]
    seconds: dict[str, float]
    subject: Subject

    @property
    def splits(self) -> dict[str, Split]:
        """The audited splits."""
        return self.subject.splits

    def __getitem__(self, check: str) -> list[Finding]:
        """The findings of one check, or of all checks of a stage: `report["duplicates"]`."""
        return [f for f in self.findings if f.check == check or f.check.startswith(f"{check}.")]

    def json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "folder": self.folder,
            "data": self.data,
            "findings": [to_json(finding) for finding in self.findings],
            "facts": self.facts,
            "looked": self.looked,
        }

    def stages(self) -> list[dict[str, Any]]:
        """One row a stage: how many findings, how many rows they concern, and what the first of them says."""
        table = []
        for stage in self.looked:
            found = self[stage]
            rows = {(finding.split, row) for finding in found for row in finding.rows.tolist()}
            first = f"{found[0].split}: {found[0].what}" if found else "nothing found"
            table.append({"stage": stage, "findings": len(found), "patches": len(rows), "first": first})
        return table

    def text(self) -> str:
        """The report for a terminal."""
        kind = "SYNTHETIC data" if any(split["synthetic"] for split in self.data.values()) else "real data"
        sizes = ", ".join(f"{name} {split['patches']:,}" for name, split in self.data.items())
        lines = [f"audit of {self.folder}: {sizes} patches ({kind})"]
        for finding in self.findings:
            lines += ["", f"{finding.check} · {finding.split} · {finding.sure}"]
            lines += textwrap.wrap(finding.what, 116, initial_indent="    ", subsequent_indent="    ")
            if len(finding.rows):
                lines.append(f"    rows {listed(finding.rows)}")
            rule = f" [rule {finding.rule}: {len(finding.drop):,} rows]" if finding.rule else ""
            lines += textwrap.wrap(f"    -> {finding.advice}{rule}", 116, subsequent_indent="       ")
        for name, facts in self.facts.items():
            if "summary" in facts:
                lines += ["", *textwrap.wrap(f"{name}: {facts['summary']}", 114, subsequent_indent="    ")]
        dirty = {finding.check.partition(".")[0] for finding in self.findings}
        quiet = [name for name in self.looked if name not in dirty]
        lines += ["", f"{len(self.findings)} findings; nothing found by: {', '.join(quiet) or 'none of the stages'}"]
        return "\n".join(lines)


def listed(rows: np.ndarray, most: int = 8) -> str:
    """The first row numbers, and how many more there are."""
    more = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return ", ".join(map(str, rows[:most].tolist())) + more


def audit(folder: str | Path, options: Options = Options(), report: Say = print) -> Report:  # noqa: B008 - frozen
    """Audit every split of a folder, and write the masks that `Patches.rows(clean=...)` applies.

    Args:
        folder: official layout, any subset of the splits, any stored form.
        options: which of the longer stages are run, and with what.
        report: told what is being done.

    Raises:
        DataError: a file is missing, damaged, or does not fit the others.
        PcamError: the cache cannot be written.
    """
    with seeding.one_thread():
        return _audit(folder, options, report)


def _audit(folder: str | Path, options: Options, report: Say) -> Report:
    begun = time.monotonic()
    splits = measured(folder, report)
    seconds = {"reading": time.monotonic() - begun}
    basis = [
        [split.patches.fingerprint, str(split.patches.stored), None if split.slides is None else split.slides.tolist()]
        for split in splits.values()
    ]
    home = convert.cache_dir(next(iter(splits.values())).patches.stored.path)
    subject = Subject(splits, options)
    found: dict[str, list[Finding]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        if not stage.wanted(options):
            continue
        begun = time.monotonic()
        kept = _kept(home, folder, stage, [*basis, stage.settings(options)])
        result = None
        with suppress(PcamError):  # there is none, or it is damaged: it is made again
            result = read_json(kept)
        if result is None:
            report(f"audit: {stage.name}")
            new, about = stage.run(subject)
            result = {"findings": [to_json(finding) for finding in new], "facts": about}
            for old in kept.parent.glob(f"{kept.stem.rpartition('-')[0]}-*.json"):
                if old != kept:
                    old.unlink(missing_ok=True)
            write_json(kept, result)
        found[stage.name] = [from_json(finding) for finding in result["findings"]]
        facts[stage.name] = result["facts"]
        seconds[stage.name] = time.monotonic() - begun
    findings = [finding for stage in found.values() for finding in stage]
    if "poison" in facts:
        facts["poison"] = {"summary": poison.verdict(findings)}
    _masks(splits, [stage for stage in STAGES if stage.name in found], findings)
    return Report(
        str(folder),
        {name: _about(split) for name, split in splits.items()},
        findings,
        {name: fact for name, fact in facts.items() if fact},
        list(found),
        seconds,
        subject,
    )


def _kept(home: Path, folder: str | Path, stage: Stage, basis: list[Any]) -> Path:
    """Where a stage's result lies: another folder, data, code or setting is another file."""
    code = sources.digests(Path(__file__).with_name("stages.py"))
    where = digest(str(Path(folder).resolve()))[:8]
    return home / f"audit-{where}-{stage.name}-{digest([basis, code])[:16]}.json"


def _about(split: Split) -> dict[str, Any]:
    labels = split.labels
    return {
        "patches": len(split),
        "positive": None if labels is None else int(labels.sum()),
        "dtype": str(split.patches.stored.dtype),
        "fingerprint": split.patches.fingerprint,
        "synthetic": split.patches.synthetic is not None,
        "slides": None if split.slides is None else len(np.unique(split.slides)),
    }


def _masks(splits: dict[str, Split], stages: Iterable[Stage], findings: list[Finding]) -> None:
    """Rows to leave out by rule, beside each split's scan; a rule that was looked for in vain is an empty list."""
    rules = [rule for stage in stages for rule in stage.rules]
    files = [split.patches.stored.path for split in splits.values()]
    files += [path for file in files if (path := file.with_name(file.name.replace("_x.", "_y."))).is_file()]
    beside = {str(path): convert.entry(path).name for path in files}
    for split in splits.values():
        mine = {
            rule: sorted({row for f in findings if f.rule == rule and f.split == split.name for row in f.drop.tolist()})
            for rule in dict.fromkeys(rules)
        }
        with suppress(DataError):  # rules of an earlier audit of the same files that this one did not look for
            mine = {**split.patches.audited, **mine}
        about = {"fingerprint": split.patches.fingerprint, "beside": beside, "rules": mine}
        write_json(mask_path(split.patches.stored), about)


def to_json(finding: Finding) -> dict[str, Any]:
    """A finding as JSON-able dict."""
    values = {f.name: getattr(finding, f.name) for f in fields(finding)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def from_json(values: dict[str, Any]) -> Finding:
    """What `to_json` took apart."""
    arrays = {name: np.array(values[name], np.int64) for name in ("rows", "drop")}
    return Finding(**{**values, **arrays})
