"""What mistakes share: features whose values differ between a model's mistakes and its right answers of that class."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from pcamlib.experiments.compare import delong
from pcamlib.experiments.features import Features
from pcamlib.experiments.slices import check
from pcamlib.training.evaluate import Predictions

#: Kind of mistake, and the label of the patches it happens to.
MISTAKES = {"false negatives": 1, "false positives": 0}
LEAST = 5  # mistakes of a kind; with fewer a rank test at .05 can hardly say anything


def contrast(features: Features, predictions: Predictions, threshold: float = 0.5) -> pd.DataFrame:
    """Ordered features and flags, mistakes against right answers of the same class, so that class itself shows nothing.

    Returns:
        A row a kind of mistake and feature, the clearest first: `mistakes` and `right` (how many), `median` of each,
        `higher` (chance that a mistake has the higher value than a right answer, ties half; one half: no difference)
        with its 95 % interval (DeLong), and `q`: the Mann-Whitney p of all rows after Benjamini and
        Hochberg 1995. Constant features, and kinds with fewer than `LEAST` mistakes, have no row.

    Raises:
        DataError: tables that do not belong together, or a threshold outside 0..1.
    """
    check(features, predictions, threshold)
    called = predictions.probability >= threshold
    rows = []
    for kind, label in MISTAKES.items():
        wrong = (predictions.label == label) & (called != label)
        right = (predictions.label == label) & (called == label)
        if min(wrong.sum(), right.sum()) < LEAST:
            continue
        for column in features.columns:
            values = features[column.name].astype(np.float64)  # SciPy keeps the type, and p below 1e-45 would be 0
            a, b = values[wrong], values[right]
            if column.kind == "group" or np.ptp(np.concatenate([a, b])) == 0:
                continue
            area, variance = delong(np.repeat([1, 0], [len(a), len(b)]), np.concatenate([a, b])[None])
            higher, half = float(area[0]), 1.96 * float(np.sqrt(variance[0, 0]))
            rows.append({
                "mistake": kind,
                "feature": column.name,
                "unit": column.unit,
                "mistakes": len(a),
                "right": len(b),
                "median of mistakes": float(np.median(a)),
                "median of right": float(np.median(b)),
                "higher": higher,
                "95 %": [max(0.0, higher - half), min(1.0, higher + half)],
                "q": float(stats.mannwhitneyu(a, b).pvalue),
            })  # fmt: skip
    table = pd.DataFrame(rows)
    if len(table):
        table["q"] = stats.false_discovery_control(table["q"])
        table = table.iloc[np.argsort(-np.abs(table["higher"] - 0.5), kind="stable")].reset_index(drop=True)
    return table


def shared(table: pd.DataFrame, most: int = 3, level: float = 0.05) -> list[str]:
    """One sentence a kind of mistake: what it shares, by the clearest of the features below `level`."""
    said = []
    for kind in MISTAKES:
        rows = table[(table["mistake"] == kind) & (table["q"] < level)] if len(table) else table
        if len(rows):
            words = [
                f"{'more' if row['higher'] > 0.5 else 'less'} {row['feature']}" for _, row in rows[:most].iterrows()
            ]
            said.append(f"{kind} have {', '.join(words)} than right answers of their class")
        else:
            said.append(f"{kind} share nothing that these features show")
    return said
