"""An audit marked against the truth about what was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pcamlib.audit.report import Report
from pcamlib.data.rewrite import Truth

#: Check -> (planted kinds that it should find, kinds that it may find as well); of pairs both ends count.
EXPECTED = {
    "integrity.nan": (("nan",), ()),
    "integrity.above": (("spike",), ()),
    "integrity.black": (("black",), ()),
    "integrity.white": (("white",), ()),
    "duplicates.exact": (("exact", "d4"), ()),
    "duplicates.leak": (("train>valid/exact", "train>valid/d4"), ()),
    "near.copies": (("brightness", "shift", "jpeg"), ()),
    "leakage.slides": (("leaked",), ("train>valid/exact", "train>valid/d4")),  # a copy brings its slide along
    "poison": (("spike", "trigger-block", "trigger-blend", "trigger-spike", "trigger-corner", "trigger-sinusoid"), ()),
    "labels.suspect": (("flip",), ("trigger-block", "trigger-blend")),  # a trigger comes with a wrong label
}


def planted(folder: str | Path) -> Truth | None:
    """The truth that lies beside planted files; None where there is none."""
    path = Path(folder) / "truth.json"
    return Truth.load(path) if path.is_file() else None


def marked(report: Report, truth: Truth) -> list[dict[str, Any]]:
    """One row a check that had something to find: planted, found, missed and extra rows, recall and precision."""
    table = []
    for check, (kinds, allowed) in EXPECTED.items():
        for split in report.data:
            planted, also = _rows(truth, split, kinds), _rows(truth, split, allowed)
            if not len(planted) or (check == "duplicates.leak" and split != "train"):  # named by the earlier split
                continue
            if check == "leakage.slides":  # of a slide in two splits, the rows away from home
                hits = [
                    np.array(f.details["strays"][split], np.int64)
                    for f in report[check]
                    if split in f.details["strays"]
                ]
            else:
                hits = [finding.rows for finding in report[check] if finding.split == split]
            found = np.unique(np.concatenate([np.empty(0, np.int64), *hits]))
            right = np.intersect1d(found, planted)
            extra = np.setdiff1d(found, np.union1d(planted, also))
            table.append({
                "check": check, "split": split, "planted": len(planted), "found": len(right),
                "missed": len(planted) - len(right), "extra": len(extra),
                "recall": round(len(right) / len(planted), 3),
                "precision": round(len(right) / (len(right) + len(extra)), 3) if len(found) else None,
            })  # fmt: skip
    return table


def _rows(truth: Truth, split: str, kinds: tuple[str, ...]) -> np.ndarray:
    """Planted rows of a split; a kind with `>` names the rows of pairs that lie in this split."""
    rows = [np.empty(0, np.int64)]
    for kind in kinds:
        if ">" in kind:
            ends = kind.partition("/")[0].split(">")
            if split in ends and kind in truth.rows:
                rows.append(truth.rows[kind][:, ends.index(split)])
        elif f"{split}/{kind}" in truth.rows:
            rows.append(truth.rows[f"{split}/{kind}"].ravel())
    return np.unique(np.concatenate(rows))
