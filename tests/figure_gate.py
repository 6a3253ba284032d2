"""The figure-data gate: what differs between the data of two figures. Pixels are never compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pcamlib.files import read_json
from pcamlib.journal.claims import show


def compare_figures(old: str | Path, new: str | Path, rtol: float = 1e-4) -> list[str]:
    """What differs between the data of two figures: one line for each series, with the first place that differs.

    Args:
        old: a figure's JSON.
        new: the other one.
        rtol: tolerated difference of two numbers, relative to the larger; all else must be equal.
    """
    left, right = (read_json(path)["series"] for path in (old, new))
    lines = []
    for name in {**left, **right}:
        if name not in left or name not in right:
            lines.append(f"series '{name}' is only in the {'new' if name in right else 'old'} figure")
        elif place := _first_difference(left[name], right[name], rtol):
            lines.append(f"series '{name}'{place}")
    return lines


def _first_difference(old: Any, new: Any, rtol: float) -> str:
    """`[place]: old is now new` for the first difference of two nested lists, or nothing."""
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f": {len(old)} entries are now {len(new)}"
        found = ((i, _first_difference(a, b, rtol)) for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next((f"[{i}]{rest}" for i, rest in found if rest), "")
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (old, new)]
    same = math.isclose(old, new, rel_tol=rtol, abs_tol=rtol * 1e-6) if all(numbers) else old == new
    return "" if same else f": {show(old, 6)} is now {show(new, 6)}"
