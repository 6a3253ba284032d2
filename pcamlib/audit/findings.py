"""A finding: what is wrong, how many, which rows, how sure, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pcamlib.data.patches import Patches

#: Rules that a mask is made of, by what each leaves out; `Patches.rows(clean=...)` applies them.
RULES = {
    "duplicates": "all but the first of each group of equal patches, under the eight symmetries",
    "conflicts": "every patch whose equal carries the other label",
    "near": "all but the first of each group of nearly equal patches",
    "leak": "patches that have an equal or nearly equal one, or the rest of their slide, in another split",
    "labels": "patches whose label is probably wrong",
    "poison": "patches that carry a planted pattern",
}


@dataclass(frozen=True, eq=False)
class Finding:
    """One thing that is wrong with one split.

    Attributes:
        check: dotted name, as in "duplicates.exact".
        split: the split that `rows` and `drop` number.
        what: one sentence with the counts.
        rows: (n,) int64, ascending: every row concerned.
        sure: "certain", "likely" or "possible", and why, as in "certain: every pixel compared".
        advice: what to do, one sentence.
        rule: key of `RULES` whose mask this finding feeds; None when leaving rows out is no remedy.
        drop: (m,) int64, ascending: rows that the rule leaves out, a subset of `rows`.
        details: JSON-able particulars (groups, pairs with their evidence, tables).
    """

    check: str
    split: str
    what: str
    rows: np.ndarray
    sure: str
    advice: str
    rule: str | None = None
    drop: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Split:
    """One split under audit.

    Attributes:
        patches: the opened split.
        columns: what the streaming pass measured, (N, ...) arrays by name.
        slides: (N,) slide names from the meta file; None where there is none.
    """

    patches: Patches
    columns: dict[str, np.ndarray]
    slides: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Name of the split."""
        return self.patches.split

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) uint8 or None."""
        return self.patches.labels

    @cached_property
    def valid(self) -> np.ndarray:
        """(N,) bool: neither NaN nor out of range nor black nor white; other checks look at these rows."""
        return self.patches.valid

    def __len__(self) -> int:
        return len(self.patches)
