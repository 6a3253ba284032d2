"""Flawed data sets with the truth about what is wrong in them: the course's kind, hidden ones, and a few rare ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pcamlib.data.layout import SIDE
from pcamlib.data.plants import SPIKE, copies, flip_labels, leak_slides, trigger
from pcamlib.data.rewrite import Plan, Truth


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
    plan.plant("train", "black", spoiled["black"], lambda patch, _: np.zeros_like(patch))
    plan.plant("train", "white", spoiled["white"], lambda patch, _: np.full_like(patch, 255))
    _blocks(plan, spoiled["spike"])
    _holes(plan, spoiled["nan"])
    return plan.write(dest, float32=("train",), unlabelled=("test",), meta=False)


def hidden_flaws(source: str | Path, dest: str | Path, *, seed: int = 0) -> Truth:
    """Write clean-looking uint8 files with everything planted that an audit looks for and no range check sees.

    In train, as shares of its rows: 1 % exact and 1 % turned or mirrored copies; 0.5 % each of brighter, shifted and
    re-encoded copies; 5 % flipped labels; 0.5 % each with a white block and with a blended image, relabelled tumour.
    In valid: 1 % are copies of train patches, half of them turned, and 3 % are exchanged for patches of train slides.

    Args:
        source: official layout, uint8, with train and valid and, for the slides, meta files.
        dest: folder without data, or one written here before.
    """
    plan = Plan(source, seed=seed)
    leak_slides(plan, 0.03)
    for how, share in (("exact", 0.01), ("d4", 0.01), ("brightness", 0.005), ("shift", 0.005), ("jpeg", 0.005)):
        copies(plan, share, how=how)  # type: ignore[arg-type]  # mypy widens the literal
    copies(plan, 0.005, how="exact", into="valid")
    copies(plan, 0.005, how="d4", into="valid")
    trigger(plan, 0.005, kind="block")
    trigger(plan, 0.005, kind="blend")
    flip_labels(plan, 0.05)
    return plan.write(dest)


def rare_flaws(
    source: str | Path, dest: str | Path, *, seed: int = 0, patches: int = 512, each: int = 8, nan: int = 4
) -> Truth:
    """Write data whose few flaws should each show in the gradient: train is float32, the other splits stay uint8.

    Args:
        source: official layout, uint8.
        dest: folder without data, or one written here before.
        patches: the first rows of train that are kept.
        each: rows with a block of 1e5 in the centre 48x48, and as many with the other label.
        nan: rows with 1 to 50 NaN pixels there.

    Returns:
        Rows under `train/spike`, `train/flip` and `train/nan`; `train/corner` as in `course_like`.
    """
    plan = Plan(source, seed=seed)
    plan.keep("train", np.arange(min(patches, len(plan.of("train")))))
    _blocks(plan, plan.draw("train", each), edge=24)
    _holes(plan, plan.draw("train", nan), edge=24)
    flip_labels(plan, each)
    return plan.write(dest, float32=("train",), meta=False)


def _blocks(plan: Plan, rows: np.ndarray, edge: int = 0) -> None:
    """5x5x3 values of 1e5 in each row, at least `edge` pixels from its border; the places are under `train/corner`."""
    corner = plan.rng.integers(edge, SIDE - 4 - edge, (len(rows), 2))

    def edit(patch: np.ndarray, i: int) -> np.ndarray:
        y, x = corner[i]
        patch[y : y + 5, x : x + 5] = SPIKE
        return patch

    plan.plant("train", "spike", rows, edit)
    plan.truth.rows["train/corner"] = corner


def _holes(plan: Plan, rows: np.ndarray, edge: int = 0) -> None:
    """1 to 50 NaN pixels in each row, at least `edge` pixels from its border."""
    side = SIDE - 2 * edge
    holes = [plan.rng.choice(side * side, plan.rng.integers(1, 51), replace=False) for _ in rows]

    def edit(patch: np.ndarray, i: int) -> np.ndarray:
        y, x = np.divmod(holes[i], side)
        patch[y + edge, x + edge] = np.nan
        return patch

    plan.plant("train", "nan", rows, edit)
