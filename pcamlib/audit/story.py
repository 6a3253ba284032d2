"""What notebook 02 tells of several audits: tables, and the patches worth looking at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pcamlib.audit import leakage, poison
from pcamlib.audit.figures import Shown
from pcamlib.audit.report import Report

CLASSES = ("normal", "tumour")


def stages(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """One row for each set of files and stage of its audit."""
    return [{"set": name, **row} for name, report in reports.items() for row in report.stages()]


def odd_values(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """One row for each kind of odd patch in each split: how many, what they hold, whether placed, odds ratios."""
    table = []
    for name, report in reports.items():
        for finding in report["integrity"]:
            details = finding.details
            odds = details.get("odds ratio, tumour")
            table.append({
                "set": name, "split": finding.split, "kind": finding.check.partition(".")[2],
                "patches": len(finding.rows), "value": details.get("value"),
                "block": "x".join(map(str, details.get("size") or ())) or None,
                "verdict": details.get("verdict", "no picture"),
                "odds ratio, tumour": None if odds is None else round(odds[0], 2),
                "95 % interval": None if odds is None else [round(bound, 2) for bound in odds[1:]],
            })  # fmt: skip
    none = {"set": ", ".join(reports), "kind": "none", "patches": 0, "verdict": "every value fits a picture"}
    return table or [none]


def odd_patches(report: Report) -> dict[str, list[Shown]]:
    """Some patches of each kind of odd value."""
    return {
        finding.check: [Shown(report.splits[finding.split], int(row), f"row {row}") for row in finding.rows[:10]]
        for finding in report["integrity"]
    }


def copies(report: Report, pairs: int = 5) -> dict[str, list[Shown]]:
    """The first groups of each kind of copy, two patches of each beside each other."""
    lines = {}
    for finding in [*report["duplicates"], *report["near"]]:
        shown = []
        for group in finding.details.get("shown", [])[:pairs]:
            for member in group[:2]:
                split = report.splits[member["split"]]
                label = "" if split.labels is None else f", {CLASSES[split.labels[member['row']]]}"
                shown.append(Shown(split, member["row"], f"{member['split']} {member['row']}{label}"))
        lines[f"{finding.check}\n{finding.split}"] = shown
    return lines


def suspects(report: Report, most: int = 20) -> dict[str, list[Shown]]:
    """The labels that are most probably wrong, the most suspect first, ten a line."""
    lines: dict[str, list[Shown]] = {}
    for finding in report["labels.suspect"]:
        for place, (row, given, probability, _) in enumerate(finding.details["ranked"][:most]):
            title = f"{row}: {CLASSES[given]}?\np(tumour) {probability:.2f}"
            name = f"{finding.split}\n{place // 10 * 10 + 1} to {place // 10 * 10 + 10}"
            lines.setdefault(name, []).append(Shown(report.splits[finding.split], row, title))
    return lines


def poisoned(report: Report, most: int = 10) -> dict[str, list[Shown]]:
    """Some patches of each kind of planted pattern."""
    return {
        f"{finding.check}\n{finding.split}": [
            Shown(report.splits[finding.split], int(row), f"row {row}") for row in finding.rows[:most]
        ]
        for finding in report["poison"]
        if len(finding.rows)
    }


def saving(account: Mapping[str, Any]) -> str:
    """What storing a file as contiguous uint8 would save, in a sentence."""
    size, saves = account["explanations"][0]["measured"], account["saves"]
    if saves < 0.01 * size:
        return "Nothing is to be saved: the file takes one byte a value already, or less."
    return (
        f"Stored as contiguous uint8 it would take {size - saves:,} bytes and save {saves:,}, {saves / size:.0%} of it."
    )


def leaked(report: Report, split: str) -> np.ndarray:
    """(n,) int64: rows of a split that have a copy in another split."""
    mine = report.subject.copies[split]
    others = [copies for name, copies in report.subject.copies.items() if name != split]
    return np.flatnonzero(np.isin(mine, np.concatenate([np.empty(0, np.int64), *others])) & (mine >= 0))


def probes(reports: Mapping[str, Report], seed: int = 0) -> list[dict[str, Any]]:
    """Permutation probes of every set that has train and valid: by copies, and by slides where they are known.

    Of the first set also with copies of a tenth of valid given to train, to show what such a leak would do.
    """
    table = []
    for place, (name, report) in enumerate(reports.items()):
        if {"train", "valid"} - report.splits.keys():
            continue
        groups = {"copies": (report.subject.copies, 0.0)}
        slides = {split: report.splits[split].slides for split in ("train", "valid")}
        if all(known is not None for known in slides.values()):
            groups["slides"] = (slides, 0.0)  # type: ignore[assignment]  # none is None here
        if place == 0:
            groups["copies of 10 % of valid added"] = (report.subject.copies, 0.1)
        for how, (members, planted) in groups.items():
            found = leakage.permutation_probe(report.splits, members, planted=planted, seed=seed)
            table.append({
                "probe": f"{name}: {how}", "AUC": round(found["value"], 4),
                "interval": [round(bound, 4) for bound in found["interval"]], "leak": bool(found["leak"]),
                "patches": found["n"], "shared": round(found["shared"], 3),
            })  # fmt: skip
    return table


def rounded(table: list[dict[str, Any]], digits: int = 4) -> list[dict[str, Any]]:
    """A table for readers: floats rounded, series of values left out."""

    def cell(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, digits)
        return [cell(each) for each in value] if isinstance(value, list) else value

    return [{name: cell(value) for name, value in row.items() if name != "values"} for row in table]


def judges(report: Report) -> dict[str, str]:
    """Digest of the weights of each network that judged labels."""
    return {
        f"{finding.split}, fold {fold}": digest
        for finding in report["labels.suspect"]
        for fold, digest in enumerate(finding.details["weights"])
    }


def verdict(reports: Mapping[str, Report]) -> str:
    """The conclusion about each set of files."""
    return " ".join(f"The set '{name}': {poison.verdict(report.findings)}" for name, report in reports.items())


def backdoors(report: Report) -> list[dict[str, Any]]:
    """What network-based detectors say, beside the attack success rate."""
    return report.facts.get("backdoor", {}).get("table") or [{"pattern": "none suspected"}]
