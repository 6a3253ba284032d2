"""The course's kind of data: a modified training set, with the truth about what is wrong in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pcamlib.data.layout import SIDE
from pcamlib.data.rewrite import Plan, Truth

SPIKE = 1e5  # the course's file: 75 such values a patch, so presumably 5 x 5 pixels in three channels


def course_like(
    source: str | Path,
    dest: str | Path,
    *,
    seed: int = 0,
    positives: float = 0.2,
    black: float = 0.0725,
    white: float = 0.0675,
    spike: float = 0.033,
    nan: float = 0.03,
) -> Truth:
    """Write the course's kind of data: train is spoiled float32, valid and test are clean uint8, test has no labels.

    Args:
        source: official layout, uint8.
        dest: folder without data, or one written here before.
        positives: share of the train positives that is kept, beside all negatives.
        black: share of the kept rows set to 0; `white`: to 255; `spike`: with 5x5x3 values of 1e5 somewhere;
            `nan`: with 1 to 50 NaN pixels. The defaults are counts in the course's 157,286 patches.

    Returns:
        Rows under `train/black`, `white`, `spike`, `nan`; `train/kept`: the source row of each row; `train/corner`:
        (n, 2) y and x of the block in each row of `train/spike`.
    """
    plan = Plan(source, seed=seed)
    found = np.flatnonzero(plan.of("train") == 1)
    kept = plan.rng.choice(found, round(positives * len(found)), replace=False)
    rows = np.sort(np.concatenate([np.flatnonzero(plan.labels["train"] == 0), kept]))
    plan.keep("train", rows)
    plan.truth.rows["train/kept"] = rows
    shares = {"black": black, "white": white, "spike": spike, "nan": nan}
    spoiled = {kind: plan.draw("train", share) for kind, share in shares.items()}
    corner = plan.rng.integers(0, SIDE - 4, (len(spoiled["spike"]), 2))
    holes = [plan.rng.choice(SIDE * SIDE, plan.rng.integers(1, 51), replace=False) for _ in spoiled["nan"]]

    def spiked(patch: np.ndarray, i: int) -> np.ndarray:
        y, x = corner[i]
        patch[y : y + 5, x : x + 5] = SPIKE
        return patch

    def holed(patch: np.ndarray, i: int) -> np.ndarray:
        patch.reshape(-1, 3)[holes[i]] = np.nan
        return patch

    plan.plant("train", "black", spoiled["black"], lambda patch, _: np.zeros_like(patch))
    plan.plant("train", "white", spoiled["white"], lambda patch, _: np.full_like(patch, 255))
    plan.plant("train", "spike", spoiled["spike"], spiked)
    plan.plant("train", "nan", spoiled["nan"], holed)
    plan.truth.rows["train/corner"] = corner
    return plan.write(dest, float32=("train",), unlabelled=("test",), meta=False)
