"""A slice of the patches, defined by what can be seen of them, and how wrong a model is inside it.

    dim = Slice((Bound("brightness", high=0.55),))
    rows = describe(dim, table, predictions, threshold=0.5)

A slice is never defined by the prediction or the label: "patches that the model gets wrong" is no finding. And since
the share of tumour differs between slices, the errors of a slice are compared with those that the other patches would
make with the slice's own share of tumour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from pcamlib.errors import DataError
from pcamlib.experiments.features import Features
from pcamlib.training.evaluate import Predictions

LEAST = 20  # patches: with fewer, an error rate's 95 % interval is wider than .4

_FORBIDDEN = ("label", "prediction", "predicted", "probability", "logit", "confidence", "error", "correct", "loss", "y")


class Bound(NamedTuple):
    """Values of a feature from `low` (with it) to `high` (without it); a group or flag g is g to g + 1."""

    feature: str
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        low, high = (f"{end:,.0f}" if 1000 <= abs(end) < math.inf else f"{end:.3g}" for end in (self.low, self.high))
        if self.high == self.low + 1 and float(self.low).is_integer():
            return f"{self.feature} {low}"
        if math.isinf(self.low) and math.isinf(self.high):
            return f"any {self.feature}"
        if math.isinf(self.low):
            return f"{self.feature} < {high}"
        if math.isinf(self.high):
            return f"{self.feature} >= {low}"
        return f"{self.feature} {low} to {high}"


@dataclass(frozen=True)
class Slice:
    """Patches within all bounds; no bound: every patch."""

    bounds: tuple[Bound, ...] = ()

    def mask(self, features: Features) -> np.ndarray:
        """(N,) bool.

        Raises:
            DataError: an unknown feature; one that is the prediction or the label; an empty range.
        """
        inside = np.ones(len(features), bool)
        for bound in self.bounds:
            allowed(bound.feature)
            if not bound.low < bound.high:
                raise DataError(f"slice: {bound.feature} from {bound.low:g} to {bound.high:g} holds nothing")
            values = features[bound.feature]
            inside &= (values >= bound.low) & (values < bound.high)
        return inside

    def __str__(self) -> str:
        return " and ".join(map(str, self.bounds)) or "every patch"


def allowed(feature: str) -> None:
    """DataError where a feature's name says that it is the prediction or the label."""
    words = feature.lower().replace(".", " ").replace("_", " ").split()
    if found := [word for word in words if word in _FORBIDDEN]:
        raise DataError(
            f"a slice may not be defined by '{feature}': its {found[0]} is what the slice is judged by, so such a "
            "slice is wrong by construction; use what can be seen of a patch before it is predicted"
        )


def independent(features: Features, predictions: Predictions, threshold: float = 0.5) -> None:
    """DataError where a feature is the label, the prediction or the mistake under another name, whatever its name.

    A feature is so where it tells tumour from normal, calls or mistakes apart without a mistake of its own, or orders
    the patches as the probability or the certainty does (rank correlation above .98).
    """
    label, probability = predictions.label == 1, predictions.probability
    called = probability >= threshold
    sides = {"label": label, "prediction": called, "mistake": called != label}
    orders = {"prediction": probability, "certainty": np.abs(probability - 0.5)}
    ranks = {what: stats.rankdata(order) for what, order in orders.items() if np.ptp(order) > 0}
    for column in features.columns:
        allowed(column.name)
        values = features[column.name]
        if column.kind == "group" or np.ptp(values) == 0:
            continue
        found = [what for what, side in sides.items() if _apart(values[side], values[~side])]
        rank = stats.rankdata(values)
        found += [what for what, order in ranks.items() if abs(np.corrcoef(rank, order)[0, 1]) > 0.98]
        if found:
            raise DataError(
                f"feature '{column.name}' is the {found[0]} under another name: it orders or parts the patches as that "
                "does; leave it out, a slice by it is wrong by construction"
            )


def _apart(one: np.ndarray, other: np.ndarray) -> bool:
    """All values of one lie below all of the other; ten of each do so by chance once in 100,000."""
    return min(len(one), len(other)) >= 10 and bool(one.max() < other.min() or other.max() < one.min())


def wilson(hits: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); 0 to 1 where n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, square = hits / n, z * z / n
    middle, half = share + square / 2, z * math.sqrt((share * (1 - share) + square / 4) / n)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def excess(inside: np.ndarray, label: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """How many more mistakes a slice has than the rest would make with its share of tumour.

    Args:
        inside, wrong: (N,) bool.
        label: (N,) 0 or 1, or any other whole numbers within which patches are compared.

    Returns:
        `rate` inside; `matched`: the rest's, weighted to the slice's share of tumour; `excess`, their difference, with
        `low` and `high` (95 %, Newcombe's hybrid score bounds within each class); `p`, one-sided and exact: the
        probability of as many mistakes inside if the mistakes of each class fell on its patches by lot (the sum of two
        hypergeometric counts). NaN where the rest has no patch of a class that the slice has.
    """
    n, got = int(inside.sum()), int(wrong[inside].sum())
    rate, matched, down, up, lot = got / max(n, 1), 0.0, 0.0, 0.0, np.ones(1)
    for side in np.unique(label[inside]):
        here, there = inside & (label == side), ~inside & (label == side)
        m, k = int(here.sum()), int(there.sum())
        a, b, share = int(wrong[here].sum()), int(wrong[there].sum()), m / n
        other = b / k if k else math.nan
        matched += share * other
        (low, high), (below, above) = wilson(a, m), wilson(b, k)
        down += share**2 * ((a / m - low) ** 2 + (above - other) ** 2)
        up += share**2 * ((high - a / m) ** 2 + (other - below) ** 2)
        counts = np.arange(min(m, a + b) + 1)
        lot = np.convolve(lot, np.exp(stats.hypergeom.logpmf(counts, m + k, a + b, m)))  # `pmf` takes 500 times as long
    difference = rate - matched
    return {
        "rate": rate,
        "matched": matched,
        "excess": difference,
        "low": difference - math.sqrt(down),
        "high": difference + math.sqrt(up),
        "p": float(min(1.0, lot[got:].sum())),
    }


def describe(slice_: Slice, features: Features, predictions: Predictions, threshold: float = 0.5) -> dict[str, Any]:
    """One slice in numbers: size, class mix, rates with intervals, the rest matched, and what constants score inside.

    Args:
        features: of the predictions' patches, in their order (`Features.of`).

    Returns:
        JSON-able; None for what is not defined, such as recall without tumour, or a rest without one of the classes.

    Raises:
        DataError: tables that do not belong together, fewer than `LEAST` patches, a threshold outside 0..1.
    """
    check(features, predictions, threshold)
    inside = slice_.mask(features)
    n = int(inside.sum())
    if n < LEAST:
        raise DataError(f"slice '{slice_}' holds {n} of {len(inside):,} patches; fewer than {LEAST} say nothing")
    label, called = predictions.label.astype(int), predictions.probability >= threshold
    wrong = called != label
    positive, missed = int(label[inside].sum()), int((wrong & inside & (label == 1)).sum())
    alarms = int((wrong & inside & (label == 0)).sum())
    found = excess(inside, label, wrong)
    hits, compared = positive - missed, not math.isnan(found["matched"])
    return {
        "slice": str(slice_),
        "n": n,
        "share": n / len(inside),
        "tumour": positive / n,
        "error": found["rate"],
        "error 95 %": list(wilson(missed + alarms, n)),
        "rest, matched": found["matched"] if compared else None,
        "excess": found["excess"] if compared else None,
        "excess 95 %": [found["low"], found["high"]] if compared else None,
        "p": found["p"],
        "recall": hits / positive if positive else None,
        "recall 95 %": list(wilson(hits, positive)),
        "specificity": 1 - alarms / (n - positive) if n > positive else None,
        "F2": 5 * hits / (5 * hits + 4 * missed + alarms) if positive + alarms else None,
        "always tumour F2": 5 * positive / (4 * positive + n) if positive else None,
        "best constant error": min(positive, n - positive) / n,
    }


def check(features: Features, predictions: Predictions, threshold: float) -> None:
    """DataError where features and predictions are not of the same rows, or the threshold is no probability."""
    if not 0 <= threshold <= 1:
        raise DataError(f"threshold {threshold:g}: a probability from 0 to 1 is meant")
    if features.fingerprint != predictions.fingerprint or not np.array_equal(features.index, predictions.index):
        raise DataError(
            f"{len(features):,} features and {len(predictions.index):,} predictions are not of the same patches in the "
            "same order; use Features.of(predictions)"
        )


def named(bounds: Iterable[tuple[str, float, float]]) -> Slice:
    """A slice from plain tuples, as they are stored."""
    return Slice(tuple(Bound(*bound) for bound in bounds))
