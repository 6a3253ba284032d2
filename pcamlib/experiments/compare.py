"""Is one model better than another on the same patches? DeLong for the AUC, else a paired bootstrap; Holm over all.

Everything is computed from stored predictions. Patches of one slide resemble each other, so intervals and p-values are
too optimistic where slides are few; and a difference smaller than the spread of seeds is said to be none, whatever p.
Where the subject was chosen on the very patches it is compared on, p and interval flatter it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from pcamlib.errors import DataError
from pcamlib.experiments.seeds import LOWER_IS_BETTER
from pcamlib.training import metrics
from pcamlib.training.evaluate import Predictions


def delong(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs of several models on the same patches and their covariance (DeLong 1988, by midranks: Sun & Xu 2014).

    Args:
        labels: (N,) 0 or 1, both present.
        probabilities: (K, N).

    Returns:
        (K,) AUCs and their (K, K) covariance.
    """
    ill, well = probabilities[:, labels == 1], probabilities[:, labels == 0]
    m, n = ill.shape[1], well.shape[1]
    ranks = stats.rankdata(np.concatenate([ill, well], 1), axis=1)  # midranks: ties count half
    above_well = (ranks[:, :m] - stats.rankdata(ill, axis=1)) / n  # share of the well below each ill
    above_ill = 1 - (ranks[:, m:] - stats.rankdata(well, axis=1)) / m  # share of the ill above each well
    covariance = np.atleast_2d(np.cov(above_well)) / m + np.atleast_2d(np.cov(above_ill)) / n
    return above_well.mean(1), covariance


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of (K,) p-values: bounds the chance of any false claim among them."""
    order = np.argsort(p)
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    found = np.empty(len(p))
    found[order] = np.minimum(corrected, 1.0)
    return found


class Judged(NamedTuple):
    """A model's predictions, its metrics, and those of bootstrap resamples: the same patches for every model."""

    predictions: Predictions
    point: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]


def judged(predictions: Predictions, threshold: float = 0.5, resamples: int = metrics.RESAMPLES) -> Judged:
    """Predictions with all their metrics and `resamples` bootstrap draws of each."""
    label, probability = predictions.label, predictions.probability
    point = metrics.scores(label, probability, np.ones((1, len(label))), threshold)
    return Judged(predictions, point, metrics.bootstrap(label, probability, threshold=threshold, resamples=resamples))


def paired(a: Judged, b: Judged, metric: str) -> tuple[float, float, float, float]:
    """Difference a minus b in a metric, both on the same patches: value, 95 % bounds, two-sided p.

    AUC by DeLong; others by the bootstrap, whose p is at least 2 / (resamples + 1).
    """
    gap = float(a.point[metric][0] - b.point[metric][0])
    if metric == "auc":
        _, covariance = delong(a.predictions.label, np.stack([a.predictions.probability, b.predictions.probability]))
        sd = float(np.sqrt(max(np.array([1, -1]) @ covariance @ np.array([1, -1]), 0.0)))
        p = max(float(2 * stats.norm.sf(abs(gap) / sd)), np.finfo(float).tiny) if sd else float(gap == 0)
        return gap, gap - 1.96 * sd, gap + 1.96 * sd, p
    draws = a.draws[metric] - b.draws[metric]
    beyond = min((draws <= 0).sum(), (draws >= 0).sum())
    low, high = np.percentile(draws, [2.5, 97.5])
    return gap, float(low), float(high), float(min(1.0, 2 * (beyond + 1) / (len(draws) + 1)))


def constants(like: Predictions) -> dict[str, Predictions]:
    """What three constant answers would have predicted on these patches."""
    answers = {"always tumour": 1.0, "always normal": 0.0, "prevalence": float(like.label.mean())}
    return {name: replace(like, probability=np.full(len(like.label), value)) for name, value in answers.items()}


def table(
    subject: tuple[str, Predictions], rivals: Mapping[str, Predictions], spread: Mapping[str, float]
) -> pd.DataFrame:
    """One model against each rival and against constants, in every metric that means something for both.

    Args:
        subject: name and predictions of the model in question.
        rivals: predictions of the others by name.
        spread: standard deviation over seeds of each metric to be compared; a difference that two single seeds
            of one model would show (the root of 2 times that) is none.

    Returns:
        Columns rival, metric, difference, interval (95 %), p, p (Holm, over all rows), test, verdict.

    Raises:
        DataError: two predictions are not of the same patches.
    """
    name, mine = subject
    for other, predictions in rivals.items():
        _same_patches(name, mine, other, predictions)
    everyone = {**rivals, **constants(mine)}
    # a prevalence calls nothing; an answer of 0 or 1 has an infinite NLL and the same AUC
    pairs = [(rival, metric) for rival in everyone for metric in spread
             if rival in rivals or (rival == "prevalence") != (metric in ("accuracy", "f1", "f2"))]  # fmt: skip
    # the least p of the bootstrap is 2 / resamples, times the rows after Holm: 50 a row leave .04, which can be shown
    resamples = max(metrics.RESAMPLES, 50 * len(pairs))
    ours = judged(mine, resamples=resamples)
    theirs = {rival: judged(predictions, resamples=resamples) for rival, predictions in everyone.items()}
    rows: list[dict[str, Any]] = []
    for rival, metric in pairs:
        gap, low, high, p = paired(ours, theirs[rival], metric)
        test = "DeLong" if metric == "auc" else "paired bootstrap"
        rows.append({"rival": rival, "metric": metric, "difference": gap, "interval": [low, high], "p": p,
                     "test": test})  # fmt: skip
    for row, p in zip(rows, holm(np.array([row["p"] for row in rows])), strict=True):
        row["p (Holm)"] = float(p)
        row["verdict"] = _verdict(row, p, spread[row["metric"]])
    return pd.DataFrame(rows)


def _verdict(row: Mapping[str, Any], p: float, spread: float) -> str:
    if abs(row["difference"]) <= np.sqrt(2) * spread:  # either side is one seed
        return "none: within the spread of seeds"
    if p >= 0.05:
        return "not shown"
    return "better" if (row["difference"] > 0) != (row["metric"] in LOWER_IS_BETTER) else "worse"


def _same_patches(name: str, mine: Predictions, other: str, theirs: Predictions) -> None:
    what = {
        "split": (mine.split, theirs.split),
        "fingerprint of the patches": (mine.fingerprint, theirs.fingerprint),
        "rows": (len(mine.index), len(theirs.index)),
    }
    for thing, (a, b) in what.items():
        if a != b:
            raise DataError(f"{name} and {other} cannot be compared: {thing} {a} and {b}; evaluate both on one split")
    if not np.array_equal(mine.index, theirs.index):
        raise DataError(f"{name} and {other} cannot be compared: they predict other rows; evaluate both on one split")
