"""Slices beside the whole: rates with intervals, what constants score inside, a forest plot of excess errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pcamlib.experiments.discovery import Discovery
from pcamlib.experiments.slices import Slice
from pcamlib.experiments.view import Spec, slice_view
from pcamlib.training.evaluate import Predictions


def beside(found: Discovery, predictions: Predictions, threshold: float = 0.5) -> list[dict[str, Any]]:
    """Every patch, then each slice on the half that confirmed it: size, class mix, rates (95 %, Wilson), constants.

    Errors as `view.slice_view`.
    """
    wholes = [(Slice(), np.ones(len(found.half), bool))]
    parts = [(slice_, found.half == row["half"]) for slice_, row in zip(found.slices, found.rows, strict=True)]
    rows = []
    for slice_, part in wholes + parts:
        view = slice_view(predictions.take(part), found.features.take(part), Spec(threshold, slice_))
        model, tumour, normal = view.answers
        row: dict[str, Any] = {"slice": str(slice_), "n": view.n, "tumour": tumour["accuracy"]}
        for name in ("recall", "specificity"):
            rate = view.rates[name]
            row |= {name: rate.value, f"{name} 95 %": [rate.low, rate.high]}
        row |= {
            "accuracy": model["accuracy"],
            "best constant's accuracy": max(tumour["accuracy"], normal["accuracy"]),
            "F2": model["F2"],
            "always tumour's F2": tumour["F2"],
        }
        rows.append(row)
    return rows


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """What the plot shows, by slice: its error with both bounds, the rest's, the excess with both bounds, n."""
    names = ("error", "rest, matched", "excess", "n")
    return {
        row["slice"]: [*(float(row[name]) for name in names), *row["error 95 %"], *row["excess 95 %"]] for row in rows
    }


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: the error of each slice beside that of the rest, matched. Right: the excess, where 0 is no slice at all.

    Args:
        rows: from `slices.describe`, the worst first.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.4 + 0.42 * len(rows)), sharey=True)
    for place, row in enumerate(rows):
        for axis, name, colour in ((left, "error", "C3"), (right, "excess", "C0")):
            value, (low, high) = row[name], row[f"{name} 95 %"]
            axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
        left.plot(row["rest, matched"], place, "d", color="0.4", label="the rest, same share of tumour")
    right.axvline(0, color="0.6", lw=0.8, ls=":")
    left.set_yticks(range(len(rows)), [f"{row['slice']}\n(n = {row['n']:,})" for row in rows], size=8)
    left.set(ylim=(len(rows) - 0.4, -0.6), xlabel="error inside, 95 %")
    left.legend(*(part[:1] for part in left.get_legend_handles_labels()), frameon=False, fontsize=8)
    right.set(xlabel="error above the rest's, 95 %")
    figure.tight_layout()
    return figure
