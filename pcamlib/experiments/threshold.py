"""Where to call a patch tumour: by F-beta, or by what a missed tumour costs against a false alarm.

A threshold chosen and judged on the same patches flatters itself. So each half of the validation patches is judged at
the threshold chosen on the other half, and the counts are added up; the threshold to use is the one chosen on all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pcamlib.training import metrics
from pcamlib.training.decision import Rule, choose, cost, f_beta, sweep
from pcamlib.training.evaluate import Predictions


def halves(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N,) 0 or 1: a random half of the patches of each class."""
    half = np.zeros(len(labels), int)
    for label in (0, 1):
        rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        half[rows[len(rows) // 2 :]] = 1
    return half


def crossed(labels: np.ndarray, probability: np.ndarray, rule: Rule, seed: int = 0) -> tuple[np.ndarray, list[float]]:
    """Calls at thresholds chosen on the other half.

    Returns:
        (N,) bool, and the thresholds chosen on the first and on the second half.
    """
    half = halves(labels, seed)
    chosen = [choose(labels[half == side], probability[half == side], rule) for side in (0, 1)]
    return probability >= np.array(chosen)[1 - half], chosen


class Called(NamedTuple):
    """Calls under one rule: `threshold` is the one to use, `halves` those that the calls were made with."""

    threshold: float
    halves: list[float]
    calls: np.ndarray


def calls(
    predictions: Predictions, calibrated: np.ndarray, beta: float, ratio: float, seed: int = 0
) -> dict[str, Called]:
    """Calls at 0.5, under both rules, and under Bayes' rule on calibrated probabilities, by name.

    Args:
        predictions: of a validation split.
        calibrated: (N,) probabilities, each calibrated without its own half (`calibration.crossed`).
        beta: of F-beta.
        ratio: false alarms that a missed tumour is worth; Bayes' threshold is then 1 / (1 + ratio).
        seed: of the halves.
    """
    label, probability = predictions.label, predictions.probability
    found = {"0.5": Called(0.5, [0.5, 0.5], probability >= 0.5)}
    for name, rule in ((f"F{beta:g}", f_beta(beta)), (f"cost {ratio:g}:1", cost(ratio))):
        made, chosen = crossed(label, probability, rule, seed)
        found[name] = Called(choose(label, probability, rule), chosen, made)
    bayes = 1 / (1 + ratio)
    found["Bayes, calibrated"] = Called(bayes, [bayes, bayes], calibrated >= bayes)
    found["always tumour"] = Called(0.0, [0.0, 0.0], np.ones(len(label), bool))
    return found


def cells(labels: np.ndarray, called: np.ndarray) -> dict[str, int]:
    """Counts `tn`, `fp`, `fn`, `tp`."""
    return metrics.confusion(labels, called.astype(float))


def table(
    labels: np.ndarray, found: Mapping[str, Called], beta: float, ratio: float, resamples: int = 1000
) -> pd.DataFrame:
    """What each rule gives: thresholds, counts, rates, F-beta, cost, and cost minus that of 0.5 (95 % bounds)."""
    draws = np.random.default_rng(0).integers(0, len(labels), (resamples, len(labels)))
    losses = {name: np.where(labels == 1, ratio * ~c.calls, c.calls).astype(float) for name, c in found.items()}
    rows = []
    for name, called in found.items():
        n = cells(labels, called.calls)
        gap = losses[name] - losses["0.5"]
        low, high = np.percentile(gap[draws].mean(1), [2.5, 97.5])
        rows.append({
            "rule": name,
            "threshold": called.threshold,
            "chosen on halves": ", ".join(f"{cut:.3g}" for cut in called.halves),
            "missed": n["fn"],
            "false alarms": n["fp"],
            "sensitivity": n["tp"] / (n["tp"] + n["fn"]),
            "specificity": n["tn"] / (n["tn"] + n["fp"]),
            f"F{beta:g}": 1 - f_beta(beta)(n["tp"], n["fp"], n["tp"] + n["fn"], n["tn"] + n["fp"]),
            "cost a patch": float(losses[name].mean()),
            "cost minus 0.5": float(gap.mean()),
            "95 %": [float(low), float(high)],
        })  # fmt: skip
    return pd.DataFrame(rows)


def curves(predictions: Predictions, found: Mapping[str, Called], most: int = 400) -> dict[str, Any]:
    """Points of the ROC and of the precision-recall curve (at most `most`), and the rules as points on both."""
    label = predictions.label
    _, true, false = sweep(label, predictions.probability)
    keep = np.unique(np.linspace(0, len(true) - 1, most).astype(int))
    true, false, positive = true[keep], false[keep], label.sum()
    series: dict[str, Any] = {
        "sensitivity": true / positive,
        "1 - specificity": false / (len(label) - positive),
        "precision": np.where(true + false > 0, true / np.maximum(true + false, 1), 1.0),
        "prevalence": [float(label.mean())],
    }
    for name, called in found.items():
        n = cells(label, called.calls)
        precision = n["tp"] / max(n["tp"] + n["fp"], 1)
        series[name] = [n["tp"] / positive, n["fp"] / (len(label) - positive), precision]
    return {name: np.asarray(values, float).tolist() for name, values in series.items()}


def plot_curves(series: Mapping[str, Any]) -> Figure:
    """ROC and precision-recall side by side; each rule is a mark at what it gives out of fold."""
    figure, (roc, pr) = plt.subplots(1, 2, figsize=(9.5, 4.2))
    roc.plot(series["1 - specificity"], series["sensitivity"], color="0.35")
    roc.plot([0, 1], [0, 1], color="0.8", lw=0.8, ls=":")
    pr.plot(series["sensitivity"], series["precision"], color="0.35")
    pr.axhline(series["prevalence"][0], color="0.8", lw=0.8, ls=":")
    rules = [name for name in series if name not in ("sensitivity", "1 - specificity", "precision", "prevalence")]
    for name, mark, colour in zip(rules, "osD^x", ("C0", "C1", "C3", "C2", "0.2"), strict=False):
        recall, false, precision = series[name]
        roc.plot(false, recall, mark, color=colour, label=name, ms=8, mfc="none", mew=1.6)
        pr.plot(recall, precision, mark, color=colour, ms=8, mfc="none", mew=1.6)
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC")
    pr.set(xlabel="recall (sensitivity)", ylabel="precision", title="precision and recall", ylim=(0, 1.04))
    roc.legend(frameon=False, fontsize=8, loc="lower right", title="called tumour by", title_fontsize=8)
    figure.tight_layout()
    return figure


def plot_confusion(matrices: Mapping[str, Mapping[str, int]]) -> Figure:
    """Confusion matrices side by side, counts and the share of each row."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(3.3 * len(matrices), 3.1), squeeze=False)
    for axis, (name, n) in zip(axes.flat, matrices.items(), strict=True):
        counts = np.array([[n["tn"], n["fp"]], [n["fn"], n["tp"]]])
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            dark = shares[row, column] > 0.6
            axis.text(column, row, f"{count:,}\n{shares[row, column]:.1%}", ha="center", va="center", size=10,
                      color="white" if dark else "black")  # fmt: skip
        axis.set_xticks([0, 1], ["normal", "tumour"])
        axis.set_yticks([0, 1], ["normal", "tumour"], rotation=90, va="center")
        axis.set(xlabel="called", title=name)
    axes[0, 0].set_ylabel("is")
    figure.tight_layout()
    return figure
