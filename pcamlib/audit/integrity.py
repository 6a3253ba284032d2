"""Integrity: values no picture can hold, and patches that hold no picture; and whether they were placed or are noise.

A spoiled patch is described by its odd pixels: how many values, which value, the box around them, and whether they
fill that box. Noise differs from patch to patch; what was placed repeats: the same block at the same place, or the same
shape anywhere.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.odds import odds_ratio
from pcamlib.audit.stream import Block
from pcamlib.data.convert import FLAGS
from pcamlib.data.layout import SIDE

#: Kinds of odd values, in the order of the columns of "integrity.count".
KINDS = ("nan", "inf", "above", "below")
_LEAST = 8  # equal boxes or solid shapes that noise does not draw


def observe(block: Block) -> dict[str, np.ndarray]:
    """What each row's odd values are.

    Returns:
        "integrity.count": (B, 4) int32, values of each of `KINDS`; "integrity.odd": (B,) int32, their sum;
        "integrity.pixels": (B,) int32, pixels that hold any; "integrity.box": (B, 4) int16, rows and columns of the
        box around them as y0, x0, y1, x1, exclusive, -1 where there is none; "integrity.value": (B,) float32, the most
        frequent odd value, NaN for NaN; "integrity.level": (B,) int16, the grey of a patch that is all one value,
        else -1.
    """
    size = len(block)
    count, pixels = np.zeros((size, len(KINDS)), np.int32), np.zeros(size, np.int32)
    box, value = np.full((size, 4), -1, np.int16), np.zeros(size, np.float32)
    for i in np.flatnonzero(block.flags & (FLAGS["nan"] | FLAGS["range"])):
        raw = block.raw[i]
        masks = np.isnan(raw), np.isinf(raw), (raw > 255) & np.isfinite(raw), (raw < 0) & np.isfinite(raw)
        count[i] = [np.count_nonzero(mask) for mask in masks]
        odd = np.logical_or.reduce(masks)
        y, x = np.nonzero(odd.any(-1))
        pixels[i], box[i] = len(y), (y.min(), x.min(), y.max() + 1, x.max() + 1)
        values, times = np.unique(raw[odd], return_counts=True)  # NaNs count as one value
        value[i] = values[times.argmax()]
    flat, level = block.images.reshape(size, -1), np.full(size, -1, np.int16)
    flat_start = np.flatnonzero((flat[:, :192] == flat[:, :1]).all(1) & ~count.any(1))  # few rows get past this
    constant = flat_start[(flat[flat_start] == flat[flat_start, :1]).all(1)]
    level[constant] = flat[constant, 0]
    return {
        "integrity.count": count,
        "integrity.odd": count.sum(1, dtype=np.int32),
        "integrity.pixels": pixels,
        "integrity.box": box,
        "integrity.value": value,
        "integrity.level": level,
    }


def check(splits: dict[str, Split]) -> list[Finding]:
    """Findings "integrity.nan", "inf", "above", "below", "black", "white" and "constant", by split."""
    found = []
    for split in splits.values():
        count, level = split.columns["integrity.count"], split.columns["integrity.level"]
        for number, kind in enumerate(KINDS):
            if len(rows := np.flatnonzero(count[:, number])):
                found.append(_values(split, splits, kind, rows, count[rows, number]))
        for kind, mask in (
            ("black", (split.patches.flags & FLAGS["black"]) > 0),
            ("white", (split.patches.flags & FLAGS["white"]) > 0),
            ("constant", (level >= 0) & split.valid),
        ):
            if mask.any():
                found.append(_constant(split, splits, kind, np.flatnonzero(mask), level[mask]))
    return found


def _values(split: Split, splits: dict[str, Split], kind: str, rows: np.ndarray, counts: np.ndarray) -> Finding:
    names = {"nan": "NaN", "inf": "infinite values", "above": "values above 255", "below": "values below 0"}
    columns = split.columns
    shape = geometry(columns["integrity.box"][rows], columns["integrity.pixels"][rows])
    value, times = np.unique(columns["integrity.value"][rows], return_counts=True)
    most = value[times.argmax()]
    spread = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
    worth = "" if kind == "nan" else f", most often {most:g}"
    details = {
        "values": {"fewest": int(counts.min()), "most": int(counts.max()), "total": int(counts.sum())},
        "value": float(most) if np.isfinite(most) else str(most),
        **shape,
        **association(split, splits, f"integrity.{kind}"),
    }
    return Finding(
        f"integrity.{kind}",
        split.name,
        f"{len(rows):,} of {len(split):,} patches hold {names[kind]} ({spread} values each{worth}): {shape['verdict']}"
        f"{_associated(details)}",
        rows,
        "certain: every value was read",
        "training leaves these patches out (data.drop); the x file should be repaired where the originals are known",
        details=details,
    )


def _constant(split: Split, splits: dict[str, Split], kind: str, rows: np.ndarray, levels: np.ndarray) -> Finding:
    what = "one grey" if kind == "constant" else f"all {kind}"
    details = {
        "levels": {str(level): times for level, times in Counter(levels.tolist()).most_common(10)},
        **association(split, splits, f"integrity.{kind}"),
    }
    left_out = "must be left out by hand: their bytes are valid" if kind == "constant" else "are left out by data.drop"
    return Finding(
        f"integrity.{kind}",
        split.name,
        f"{len(rows):,} of {len(split):,} patches are {what}{_associated(details)}",
        rows,
        "certain: every value was read",
        f"these patches show no tissue and {left_out}",
        details=details,
    )


def geometry(boxes: np.ndarray, pixels: np.ndarray) -> dict[str, Any]:
    """Whether odd pixels were placed or are noise.

    Args:
        boxes: (n, 4) y0, x0, y1, x1 of each patch, exclusive.
        pixels: (n,) odd pixels in it.

    Returns:
        dict with `verdict` (a phrase), `placed` ("place", "shape" or None), `size` and `place` of the most frequent
        solid box, how many patches have that size and that place, and `filled`, the share whose odd pixels fill their
        box.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    area = size.prod(1, dtype=np.int64)
    solid = (pixels == area) & (area >= 4) & (size < SIDE).all(1)
    result: dict[str, Any] = {
        "verdict": "no shape or place repeats, which is what noise or damage looks like",
        "placed": None, "size": None, "place": None, "same size": 0, "same place": 0,
        "filled": float((pixels == area).mean()),
    }  # fmt: skip
    if solid.any():
        shape, alike = _mode(size[solid])
        if alike >= _LEAST:
            tall, wide = (int(side) for side in shape)
            here = boxes[solid & (size == shape).all(1)]
            result |= {"placed": "shape", "size": [tall, wide], "same size": alike}
            places = len(np.unique(here, axis=0))
            many = _among(alike, len(boxes))
            result["verdict"] = f"{many} hold a solid {tall}x{wide} block, at {places:,} places, so it was put there"
    inside = (size < SIDE).all(1)
    if inside.any():
        place, at = _mode(boxes[inside])
        if at >= _LEAST and at > result["same size"] / 2:
            result |= {"placed": "place", "place": [int(side) for side in place], "same place": at}
            result["verdict"] = f"{_among(at, len(boxes))} are odd in the same box, so it was put there"
    return result


def _among(count: int, total: int) -> str:
    return "all of them" if count == total else f"{count:,} of them"


def _mode(rows: np.ndarray) -> tuple[np.ndarray, int]:
    values, times = np.unique(rows, axis=0, return_counts=True)
    return values[times.argmax()], int(times.max())


def flawed(split: Split, check: str) -> np.ndarray:
    """(N,) bool: rows with the flaw of one of this module's checks."""
    kind = check.partition(".")[2]
    if kind in KINDS:
        return split.columns["integrity.count"][:, KINDS.index(kind)] > 0
    if kind == "constant":
        return (split.columns["integrity.level"] >= 0) & split.valid
    return (split.patches.flags & FLAGS[kind]) > 0


def association(split: Split, splits: dict[str, Split], check: str) -> dict[str, Any]:
    """Odds ratios of a flaw: tumour against normal in this split, and this split against the others."""
    mine = flawed(split, check)
    result: dict[str, Any] = {}
    if split.labels is not None and len(np.unique(split.labels)) == 2:
        result["odds ratio, tumour"] = list(odds_ratio(mine, split.labels == 1))
    if len(splits) > 1:
        every = np.concatenate([flawed(other, check) for other in splits.values()])
        here = np.concatenate([np.full(len(other), other is split) for other in splits.values()])
        result[f"odds ratio, {split.name}"] = list(odds_ratio(every, here))
    return result


def _associated(details: dict[str, Any]) -> str:
    if "odds ratio, tumour" not in details:
        return ""
    ratio, low, high = details["odds ratio, tumour"]
    if low <= 1 <= high:
        return f"; not tied to a class (odds ratio {ratio:.2g}, {low:.2g} to {high:.2g})"
    return f"; tied to {'tumour' if ratio > 1 else 'normal'} (odds ratio {ratio:.2g}, {low:.2g} to {high:.2g})"
