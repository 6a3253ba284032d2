"""What a flaw does to the score: the quick model trained on equal terms with and without the rows concerned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcamlib.audit import quick
from pcamlib.audit.findings import Split
from pcamlib.errors import DataError
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
        seeds: one pair of models each.

    Returns:
        One row a judge: AUC with and without, their difference and its 95 % interval (bootstrap paired over patches,
        mean over seeds), the spread of the difference over seeds, and how many patches, seeds and steps.

    Raises:
        DataError: no labels, or too few rows are left.
    """
    if train.labels is None:
        raise DataError(f"{train.patches.stored.path}: without labels nothing can be trained")
    every = np.flatnonzero(train.valid)
    arms = {"with": every, "without": np.setdiff1d(every, drop)}
    images, labels = train.patches.images, train.labels
    models = {
        (arm, seed): quick.fit(images, labels, rows, steps=steps, seed=seed)
        for seed in seeds
        for arm, rows in arms.items()
    }
    table = []
    for name, (split, rows) in judges.items():
        assert split.labels is not None
        truth, one = split.labels[rows], np.ones((1, len(rows)))
        points: dict[str, list[float]] = {arm: [] for arm in arms}
        draws: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
        for (arm, _), model in models.items():
            probability = quick.predict(model, split.patches.images, rows, views=1)
            points[arm].append(float(metrics.scores(truth, probability, one)["auc"][0]))
            draws[arm].append(metrics.bootstrap(truth, probability)["auc"])
        gaps = np.subtract(points["without"], points["with"])
        spread = np.mean(draws["without"], 0) - np.mean(draws["with"], 0)
        table.append({
            "judged on": name, "patches": len(rows), "left out": len(every) - len(arms["without"]),
            "AUC with": round(float(np.mean(points["with"])), 4),
            "AUC without": round(float(np.mean(points["without"])), 4),
            "difference": round(float(gaps.mean()), 4),
            "95 % of difference": np.nanpercentile(spread, [2.5, 97.5]).round(4).tolist(),
            "sd over seeds": round(float(gaps.std(ddof=1)), 4) if len(seeds) > 1 else None,
            "seeds": len(seeds), "steps": steps,
        })  # fmt: skip
    return table
