"""Do probabilities mean what they say? Reliability, and temperature scaling fitted on one half, shown on the other.

One temperature divides every logit (Guo et al. 2017): the order of the patches, and so the AUC, stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pcamlib.experiments.threshold import halves
from pcamlib.training import metrics
from pcamlib.training.decision import scaled, temperature


def crossed(labels: np.ndarray, probability: np.ndarray, seed: int = 0) -> tuple[np.ndarray, list[float]]:
    """(N,) probabilities, each scaled by the temperature of the other half, and both temperatures."""
    half = halves(labels, seed)
    found = [temperature(labels[half == side], probability[half == side]) for side in (0, 1)]
    return scaled(probability, np.array(found)[1 - half]), found


def table(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
    """NLL and ECE before and after, and the difference with its 95 % interval (bootstrap paired over patches)."""
    one = np.ones((1, len(labels)))
    point = [metrics.scores(labels, p, one) for p in (before, after)]
    draws = [metrics.bootstrap(labels, p) for p in (before, after)]
    rows = []
    for name in ("nll", "ece", "auc"):
        low, high = np.percentile(draws[1][name] - draws[0][name], [2.5, 97.5])
        first, second = (float(p[name][0]) for p in point)
        rows.append({"metric": name, "before": first, "after": second, "difference": second - first,
                     "95 %": [float(low), float(high)]})  # fmt: skip
    return pd.DataFrame(rows)


def reliability(labels: np.ndarray, probability: np.ndarray) -> dict[str, list[float]]:
    """Bins of equal width that hold patches: mean probability, share of tumour, number of patches."""
    bins = np.minimum((probability * metrics.ECE_BINS).astype(int), metrics.ECE_BINS - 1)
    count = np.bincount(bins, minlength=metrics.ECE_BINS)
    kept = count > 0
    means = [np.bincount(bins, values, metrics.ECE_BINS)[kept] / count[kept] for values in (probability, labels)]
    return {"said": means[0].tolist(), "is": means[1].tolist(), "patches": count[kept].tolist()}


def plot(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Reliability diagrams side by side, with binomial 95 % bars; on the diagonal a probability means what it says."""
    figure, axes = plt.subplots(2, len(curves), figsize=(4.3 * len(curves), 4.8), sharex=True, squeeze=False,
                                height_ratios=(3, 1), sharey="row")  # fmt: skip
    for (top, bottom), (name, curve) in zip(axes.T, curves.items(), strict=True):
        said, share, count = (np.array(curve[key]) for key in ("said", "is", "patches"))
        bar = 1.96 * np.sqrt(np.maximum(share * (1 - share), 0.25 / count) / count)
        top.plot([0, 1], [0, 1], color="0.7", lw=0.8, ls=":")
        top.errorbar(said, share, bar, fmt="o-", color="C0", ms=4, lw=1, capsize=2)
        bottom.bar(said, count, width=0.05, color="0.6")
        top.set(title=name, ylim=(-0.05, 1.05))
        bottom.set_xlabel("probability of tumour")
    axes[0, 0].set_ylabel("share that is tumour")
    axes[1, 0].set_ylabel("patches")
    figure.tight_layout()
    return figure
