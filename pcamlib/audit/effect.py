"""What a flaw does to the score: the quick model trained on equal terms with and without the rows concerned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from pcamlib import seeding
from pcamlib.audit import quick
from pcamlib.audit.findings import Split
from pcamlib.errors import DataError
from pcamlib.models import Classifier
from pcamlib.training import metrics


def with_and_without(
    train: Split,
    judges: Mapping[str, tuple[Split, np.ndarray]],
    drop: np.ndarray,
    *,
    steps: int,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[dict[str, Any]]:
    """Train on all valid rows, and on those without `drop`, for equally many steps; judge both on the same patches.

    Args:
        train: what is learned from, with labels.
        judges: by name, a split and the rows of it that judge.
        drop: (n,) rows of `train` to leave out.
        steps: batches of 64.
        seeds: one pair of models each; at least two.

    Returns:
        One row a judge: AUC with and without, their difference and its 95 % interval, and how many patches, seeds and
        steps. The interval knows both chances: which patches judge (bootstrap, paired), and which seed trained (t).

    Raises:
        DataError: no labels, or too few rows are left.
    """
    if train.labels is None:
        raise DataError(f"{train.patches.stored.path}: without labels nothing can be trained")
    every = np.flatnonzero(train.valid)
    arms = {"with": every, "without": np.setdiff1d(every, drop)}
    labels, images = train.labels[every], quick.shrink(train.patches.images, every)

    def taught(pair: tuple[str, int]) -> Classifier:
        return quick.fit(images, labels, np.searchsorted(every, arms[pair[0]]), steps=steps, seed=pair[1])

    pairs = list(itertools.product(arms, seeds))
    with seeding.workers() as pool:
        models = dict(zip(pairs, pool.map(taught, pairs), strict=True))
    table = []
    for name, (split, rows) in judges.items():
        assert split.labels is not None
        truth, one, seen = split.labels[rows], np.ones((1, len(rows))), quick.shrink(split.patches.images, rows)
        points: dict[str, list[float]] = {arm: [] for arm in arms}
        draws: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
        for (arm, _), model in models.items():
            probability = quick.predict(model, seen, views=1)
            points[arm].append(float(metrics.scores(truth, probability, one)["auc"][0]))
            draws[arm].append(metrics.bootstrap(truth, probability)["auc"])
        gaps = np.subtract(points["without"], points["with"])
        spread = np.mean(draws["without"], 0) - np.mean(draws["with"], 0)
        chance = stats.t.ppf(0.975, len(seeds) - 1) * gaps.std(ddof=1) / len(seeds) ** 0.5
        half = float(np.hypot(1.96 * np.nanstd(spread), chance))
        table.append({
            "judged on": name, "patches": len(rows), "left out": len(every) - len(arms["without"]),
            "AUC with": round(float(np.mean(points["with"])), 4),
            "AUC without": round(float(np.mean(points["without"])), 4),
            "difference": round(float(gaps.mean()), 4),
            "95 % of difference": [round(float(gaps.mean()) - half, 4), round(float(gaps.mean()) + half, 4)],
            "seeds": len(seeds), "steps": steps,
        })  # fmt: skip
    return table
