"""Drift: how far shifts lower the AUC, at which strength windows are flagged, how often without a shift.

    python benchmarks/drift.py --data DIR --checkpoint FILE [--json FILE] [--windows 100] [--shifted 20]

Windows of 500 random patches of the valid split, the reference of each all the others: windows overlap each other, none
its reference. Unshifted therefore means the same slides and the same share of tumour. What else would be flagged
stands below: the valid split against a reference of the train split, and rows as they follow each other in the file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _rows import arguments, finish, row

from pcamlib import seeding
from pcamlib.data.patches import open_split, sample
from pcamlib.data.slides import read_slides
from pcamlib.serving.drift import PIXELS, Reference, observed
from pcamlib.serving.predict import Predictor
from pcamlib.serving.shifts import HARM, earliest, study


def table(found: Sequence[Mapping[str, Any]]) -> None:
    """Every strength, on the terminal."""
    columns = ("auc", "auc 95 %", "fall", "fall 95 %", "flagged", "ks", "mmd", "classifier")
    print(f"{'shift':6s} {'strength':>8s} {'unit':8s} " + " ".join(f"{name:>14s}" for name in columns))
    for one in found:
        cells = (", ".join(f"{v:.3f}" for v in np.atleast_1d(one[name])) for name in columns)
        print(f"{one['shift']:6s} {one['strength']:8g} {one['unit']:8s} " + " ".join(f"{cell:>14s}" for cell in cells))


def summary(found: Sequence[Mapping[str, Any]], against: str) -> list[dict[str, Any]]:
    """False alarms, and how far the AUC has fallen when a shift is flagged."""
    none = found[0]
    alarms, bar = round(none["flagged"] * none["windows"]), f"VALUE<={0.05 * none['windows']:g}"
    rows = [row("no shift: false alarms", alarms, "windows", n=none["windows"], against=against, bar=bar)]
    for one in earliest(found):
        value, at = np.nan, "never"
        if one["strength"] is not None:
            value, at = one["fall"], f"from {one['strength']:g} {one['unit']} on"
        at += f"; falls by {HARM:g} at {one[f'falls by {HARM:g} at'] or 'none of these'}"
        name = f"{one['shift']}: AUC's fall where 95 % are flagged"
        rows.append(row(name, value, "AUC", n=found[-1]["windows"], bar=f"VALUE<={HARM:g}", against=at))
    return rows


def elsewhere(values: np.ndarray, slides: np.ndarray | None, other: np.ndarray, size: int) -> list[dict[str, Any]]:
    """What is flagged though nobody shifted it, and what is outlying.

    Args:
        values: of the valid split, in the file's order.
        slides: of its rows, where they are known.
        other: values of the train split.
        size: of a window.
    """
    rng = np.random.default_rng(0)
    draws = [values[rng.permutation(len(values))[:size]] for _ in range(20)]
    learned = known(other)
    drifted = {
        "valid windows, a reference of train": [learned.compare(window) for window in draws],
        "  without the logit": [learned.compare(window[:, : len(PIXELS)]) for window in draws],
        "rows in the file's order": [
            known(np.delete(values, np.s_[at : at + size], 0)).compare(values[at : at + size])
            for at in range(0, len(values) - size + 1, size)
        ],
        "one slide against the others": [
            known(values[slides != name]).compare(values[slides == name])
            for name in np.unique(slides if slides is not None else [])
            if min((slides == name).sum(), (slides != name).sum() - 100) >= 50
        ],
    }
    rows = [
        row(name, float(np.mean([one.drifted for one in reports])), "share", n=len(reports), against="flagged")
        for name, reports in drifted.items()
        if reports
    ]
    parts = [rng.permutation(len(values)) for _ in range(20)]
    third = len(values) // 3
    odd = [known(values[part[third:]]).outlying(values[part[:third]]).mean() for part in parts]
    return [*rows, row("outlying, of the reference's own kind", float(np.mean(odd)), "share", n=20)]


def known(values: np.ndarray) -> Reference:
    """A reference that is never stored."""
    return Reference(values, "", "", "", False)


def speed(values: np.ndarray, size: int, rounds: int) -> dict[str, Any]:
    """CPU time, summed over the cores."""
    reference = known(values[size:])
    seconds = []
    for number in range(rounds):
        begun = time.process_time()
        reference.compare(np.roll(values[:size], number, 0))
        seconds.append(time.process_time() - begun)
    return row(f"compare {size} patches", float(np.median(seconds)), "CPU s", n=rounds, bar="VALUE<=1")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with PCam files")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.safetensors of a run")
    parser.add_argument("--windows", type=int, default=100, help="without a shift")
    parser.add_argument("--shifted", type=int, default=20, help="windows of each strength")
    parser.add_argument("--size", type=int, default=500, help="patches a window")
    parser.add_argument("--seed", type=int, default=0, help="of the windows")
    options = parser.parse_args()
    seeding.set_threads(None)
    predictor, size = Predictor(options.checkpoint), options.size
    train, valid = (open_split(options.data, split) for split in ("train", "valid"))
    kind = "synthetic" if valid.synthetic else "real"
    wanted = {"windows": options.windows, "shifted": options.shifted, "size": size, "seed": options.seed}
    found = study(predictor, valid, report=lambda line: print(f"  {line}", flush=True), **wanted)
    table(found)
    rows = summary(found, f"windows of {size}, {kind} patches")
    chosen = sample(valid, 3000)
    values, other = observed(predictor, valid, chosen), observed(predictor, train, sample(train, 3000))
    slides = read_slides(options.data, "valid", len(valid))
    rows += elsewhere(values, None if slides is None else slides[chosen], other, size)
    return finish([*rows, speed(values, size, options.rounds)], options.json)


if __name__ == "__main__":
    sys.exit(main())
