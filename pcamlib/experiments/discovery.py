"""Slices where a model is wrong more often than elsewhere: one half of the patches proposes, the other confirms.

    table = features.of(open_split("DIR", "valid"))
    found = discover(table.of(predictions), predictions)      # found.slices, found.rows, found.tried

Every range of every feature and of every two features is scored: with 20 features some 8 million slices, of which the
best is 4 standard deviations bad even where mistakes fall by lot. So a proposal must beat the same search on shuffled
mistakes, and what is reported about it comes from the half that had no part in the choice. Then the halves change
places: a weak slice that one half happens to hide is often plain in the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.cluster.vq import kmeans2, vq
from scipy.special import logit

from pcamlib.errors import DataError
from pcamlib.experiments import threshold as thresholds
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import LEAST, Bound, Slice, check, describe, excess, independent
from pcamlib.training.evaluate import Predictions

COARSE, FINE = 20, 100  # quantile bins of a feature, in pairs and alone: pairs of percentiles would take minutes
_CLUSTERS = 12

Bounds = tuple[Bound, ...]


@dataclass(frozen=True, eq=False)
class Discovery:
    """What was found, and what it was found among.

    Attributes:
        slices: confirmed ones, first the one that is surely the worst (lower bound of the excess).
        rows: one a slice, JSON-able: `slices.describe` on the `half` that did not propose it, `p given those before`
            and `p adjusted` (see `discover`), and `typical`, ten rows of the split's file from the middle of the slice.
        half: (N,) 0 or 1, of each patch.
        features: the table searched, with the column "cluster" where an embedding was given.
        tried: how many `patches`, `mistakes`, slices `scanned`, `proposed`, `confirmed`, `reported` (doubles apart);
            the `least` size in a half; `left out`: {feature: why}.
    """

    slices: tuple[Slice, ...]
    rows: list[dict[str, Any]]
    half: np.ndarray
    features: Features
    tried: dict[str, Any]


class Axis(NamedTuple):
    """A feature cut into B bins: (n,) `bin` of each patch, (R, B) float32 `ranges` of neighbouring bins (also of all),
    (R,) their ends `low` and `high`.
    """

    name: str
    bin: np.ndarray
    ranges: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def bounds(self, at: int) -> Bounds:
        """Of one range; none for all bins."""
        low, high = float(self.low[at]), float(self.high[at])
        return () if np.isinf([low, high]).all() else (Bound(self.name, low, high),)


def axis(column: Column, values: np.ndarray, bins: int, least: int) -> Axis:
    """Ranges of a number's quantile bins; of a group or flag the single levels with at least `least` patches."""
    if column.kind == "number":
        # An edge is a value that occurs, so that float32 features and float64 bounds agree about it.
        edges = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf"))
        edges = edges[edges > values.min()]
        ends, inside = np.concatenate([[-np.inf], edges, [np.inf]]), np.arange(len(edges) + 1)
        low, high = np.triu_indices(len(ends), 1)
        ranges = ((inside >= low[:, None]) & (inside < high[:, None])).astype(np.float32)
        return Axis(column.name, np.searchsorted(edges, values, "right"), ranges, ends[low], ends[high])
    levels, code, count = np.unique(values, return_inverse=True, return_counts=True)
    big = np.flatnonzero(count >= least)
    ranges = np.vstack([np.ones(len(levels)), np.eye(len(levels))[big]]).astype(np.float32)
    return Axis(column.name, code, ranges, np.append(-np.inf, levels[big]), np.append(np.inf, levels[big] + 1))


def surplus(wrong: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many standard deviations more mistakes than expected (by Anscombe's root, which does not flatter few)."""
    return 2 * (np.sqrt(wrong + 0.375) - np.sqrt(expected + 0.375))


class Half:
    """The exploring half and the search over its features.

    Attributes:
        wrong: (n,) float32 mistakes.
        scanned: how many slices were scored.
    """

    def __init__(self, features: Features, label: np.ndarray, wrong: np.ndarray, least: int) -> None:
        self.features, self.label, self.least, self.scanned = features, label, least, 0
        self.wrong = wrong.astype(np.float32)
        self.coarse, self.fine = (
            [axis(c, features[c.name], bins, least) for c in features.columns] for bins in (COARSE, FINE)
        )
        self.whole = axis(Column("", "", "group", ""), np.zeros(len(label)), 1, len(label) + 1)

    def shuffled(self, times: int, seed: int) -> np.ndarray:
        """(times, n) float32: the mistakes, shuffled within each class."""
        rng, many = np.random.default_rng([seed, 2]), np.tile(self.wrong, (times, 1))
        for side in np.unique(self.label):
            many[:, self.label == side] = rng.permuted(many[:, self.label == side], axis=1)
        return many

    def rate(self, stratum: np.ndarray) -> np.ndarray:
        """(n,) float32: the share of mistakes among the patches of the same stratum, such as the class."""
        return (np.bincount(stratum, self.wrong) / np.maximum(np.bincount(stratum), 1)).astype(np.float32)[stratum]

    def allowed(self, n: np.ndarray) -> np.ndarray:
        """A slice is no crumb, and the smaller part: the larger one is what a good slice leaves over."""
        return (n >= self.least) & (n <= len(self.label) / 2)

    def scan(self, wrong: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, list[list[Bounds]]]:
        """The worst slices of one feature and of two.

        Args:
            wrong: (S, n) mistakes, S times.
            expected: (n,) of them in each patch.

        Returns:
            (S, 2) scores and their slices.
        """
        scores = np.zeros((len(wrong), 2))
        worst: list[list[Bounds]] = [[(), ()] for _ in wrong]
        self.scanned = 0
        weights = np.vstack([np.ones_like(expected), expected, wrong])
        for a, b in [*((each, self.whole) for each in self.fine), *combinations(self.coarse, 2)]:
            cells, pair = (a.ranges.shape[1], b.ranges.shape[1]), int(b is not self.whole)
            tables = [np.bincount(a.bin * cells[1] + b.bin, each, cells[0] * cells[1]) for each in weights]
            n, usual, *hits = a.ranges @ np.reshape(tables, (-1, *cells)).astype(np.float32) @ b.ranges.T
            allowed = self.allowed(n)
            self.scanned += int(allowed.sum())
            for s, each in enumerate(hits):
                score = np.where(allowed, surplus(each, usual), -np.inf)
                if score.max() > scores[s, pair]:
                    i, j = np.unravel_index(np.argmax(score), score.shape)
                    scores[s, pair], worst[s][pair] = score[i, j], a.bounds(int(i)) + b.bounds(int(j))
        return scores, worst

    def fit(self, bounds: Bounds, expected: np.ndarray, simpler: float) -> Bounds:
        """The slice with edges moved to the percentiles that fit best; a bound must add more than `simpler`."""
        for _ in range(3):
            for name in [bound.feature for bound in bounds]:
                fine = self.fine[self.features.names.index(name)]
                rest = tuple(bound for bound in bounds if bound.feature != name)
                inside = Slice(rest).mask(self.features)
                n, hits, usual = (
                    fine.ranges @ np.bincount(fine.bin[inside], weights[inside], fine.ranges.shape[1])
                    for weights in (np.ones(len(inside)), self.wrong, expected)
                )
                score = np.where(self.allowed(n), surplus(hits, usual), -np.inf)
                score[np.isinf(fine.low) & np.isinf(fine.high)] += simpler
                bounds = rest + fine.bounds(int(np.argmax(score)))
        return bounds

    def propose(self, most: int, shuffled: np.ndarray) -> Iterator[tuple[float, Slice]]:
        """Up to `most` slices, each the worst of what those before it leave unexplained, and by how many standard
        deviations it beats the worst that the same search finds in `shuffled` (S, n) mistakes.
        """
        stratum, expected = self.label, self.rate(self.label)
        floor = self.scan(shuffled, expected)[0].max(0)
        for _ in range(most):
            scores, worst = self.scan(self.wrong[None], expected)
            above = scores[0] - floor
            if above.max() <= 0:
                return
            found = Slice(self.fit(worst[0][int(np.argmax(above))], expected, floor[1] - floor[0]))
            yield float(above.max()), found
            stratum = np.unique(2 * stratum + found.mask(self.features), return_inverse=True)[1]
            expected = self.rate(stratum)


def discover(
    features: Features,
    predictions: Predictions,
    *,
    threshold: float = 0.5,
    embedding: np.ndarray | None = None,
    most: int = 10,
    least: int | None = None,
    shuffles: int = 5,
    q: float = 0.05,
    seed: int = 0,
) -> Discovery:
    """Slices of one or two features in which a model makes more mistakes than elsewhere with the same share of tumour.

    One after the other, the worst slice of what those before it leave unexplained is proposed. On the other half it
    must hold more mistakes than its class has elsewhere, by an exact test, and also than its class has in the same
    slices before it (`p given those before`): no slice is reported for what it shares with a worse one. The larger p is
    adjusted (Benjamini & Hochberg 1995) and, as there are two halves, doubled. No mistakes, or none beyond chance:
    nothing is reported. (Sliceline, Sagadeeva & Boehm 2021, ranks by rate and size and has no such test.)

    Args:
        features: of the predictions' patches, in their order (`Features.of`). With a column "slide" each half holds
            whole slides, so that what is confirmed holds for other slides.
        embedding: (N, D), of the patches in the model; its clusters are searched as a feature "cluster".
        most: slices proposed by a half, and reported, at most.
        least: patches of a slice in a half; None: 1 % of the half, `LEAST` at least.
        shuffles: of the mistakes; a proposal beats the worst slice found in any of them.
        q: share of the reported slices that may be there by chance.
        seed: of the halves, the shuffles and the clusters.

    Raises:
        DataError: tables that do not belong together, a feature that is the prediction or the label, a threshold
            outside 0..1, too few patches for two halves, an embedding of another shape.
    """
    check(features, predictions, threshold)
    independent(features, predictions, threshold)
    label = predictions.label.astype(int)
    wrong = (predictions.probability >= threshold) != (label == 1)
    half, left_out = halves(features, label, seed)
    least = least or max(LEAST, len(label) // 200)
    if min(np.bincount(half, minlength=2)) < 4 * least:
        raise DataError(
            f"{len(label):,} patches in halves of {np.bincount(half).tolist()}: {4 * least} in each half are the least "
            f"where a slice of {least} is to be a small part of it"
        )
    distance = np.zeros(len(label))
    if embedding is not None:
        features, distance = clustered(features, predictions, embedding, seed)
    left_out |= {c.name: "the same everywhere" for c in features.columns if np.ptp(features[c.name]) == 0}
    searched = [i for i, name in enumerate(features.names) if name not in left_out]
    columns = tuple(features.columns[i] for i in searched)
    found: list[tuple[float, Slice, dict[str, Any]]] = []
    tried: dict[str, Any] = {"patches": len(label), "mistakes": int(wrong.sum()), "scanned": 0, "proposed": 0}
    for side in (0, 1):
        first, second = np.flatnonzero(half == side), np.flatnonzero(half != side)
        table = replace(features.take(first), columns=columns, values=features.values[first][:, searched])
        exploring, rest = Half(table, label[first], wrong[first], least), features.take(second)
        theirs = {name: getattr(predictions, name)[second] for name in ("index", "label", "probability")}
        stratum, tested = label[second], []
        for score, slice_ in exploring.propose(most, exploring.shuffled(shuffles, seed)):
            inside = slice_.mask(rest)
            if inside.sum() >= max(least // 2, LEAST):  # blind to the mistakes, so no choice that needs correction
                row = describe(slice_, rest, replace(predictions, **theirs), threshold)
                row["p given those before"] = excess(inside, stratum, wrong[second])["p"]
                tested.append((score, slice_, row))
                stratum = np.unique(2 * stratum + inside, return_inverse=True)[1]
        p = [max(row["p"], row["p given those before"]) for *_, row in tested]
        fair = np.minimum(1, 2 * stats.false_discovery_control(p)) if p else p  # twice: there are two halves
        found += [
            (score, slice_, row | {"p adjusted": float(adjusted), "half": 1 - side})
            for (score, slice_, row), adjusted in zip(tested, fair, strict=True) if adjusted <= q
        ]  # fmt: skip
        tried["scanned"] += exploring.scanned
        tried["proposed"] += len(tested)
    kept: list[tuple[Slice, dict[str, Any]]] = []
    for _, slice_, row in sorted(found, key=lambda each: -each[0]):
        mask = slice_.mask(features)
        if all((mask & (other := better.mask(features))).sum() < (mask | other).sum() / 3 for better, _ in kept):
            kept.append((slice_, row | {"typical": features.index[typical(slice_, features, distance)].tolist()}))
    kept = sorted(kept, key=lambda each: -each[1]["excess 95 %"][0])[:most]
    tried |= {"confirmed": len(found), "reported": len(kept), "least": least, "left out": left_out}
    return Discovery(tuple(slice_ for slice_, _ in kept), [row for _, row in kept], half, features, tried)


def halves(features: Features, label: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, str]]:
    """(N,) 0 or 1, blind to the mistakes, and what can be no slice then: whole slides go to one half if known."""
    if "slide" not in features.names or np.ptp(features["slide"]) == 0:
        return thresholds.halves(label, seed), {}
    _, slide = np.unique(features["slide"], return_inverse=True)
    count = np.array([np.bincount(slide[label == side], minlength=slide.max() + 1) for side in (0, 1)]).T
    side, totals = np.zeros(len(count), int), np.zeros((2, 2))
    order = np.random.default_rng([seed, 2]).permutation(len(count))
    for each in order[np.argsort(-count[order].sum(1), kind="stable")]:  # large ones first, each where it evens out
        side[each] = np.argmin(totals @ count[each])
        totals[side[each]] += count[each]
    return side[slide], {"slide": "each slide lies in one half, so none could be confirmed"}


def clustered(
    features: Features, predictions: Predictions, embedding: np.ndarray, seed: int
) -> tuple[Features, np.ndarray]:
    """The table with a group "cluster", and each patch's distance (N,) from the middle of its own.

    What the embedding says of certainty is regressed away first: that uncertain patches are wrong is no finding.
    """
    if embedding.ndim != 2 or len(embedding) != len(features) or not np.isfinite(embedding).all():
        raise DataError(f"embedding {embedding.shape}: ({len(features)}, D) finite values are meant, one row a patch")
    certain = logit(np.clip(predictions.probability, 1e-7, 1 - 1e-7))
    known = np.column_stack([np.ones_like(certain), certain, np.abs(certain)])
    left = embedding - known @ np.linalg.lstsq(known, embedding, rcond=None)[0]
    left /= np.maximum(left.std(0), 1e-9)
    middles, _ = kmeans2(left, _CLUSTERS, iter=30, minit="++", rng=np.random.default_rng(seed))
    cluster, distance = vq(left, middles)
    about = Column("cluster", "", "group", "patches that look alike to the model, its certainty apart")
    values = np.column_stack([features.values, cluster]).astype(np.float32)
    return replace(features, columns=(*features.columns, about), values=values), distance


def typical(slice_: Slice, features: Features, distance: np.ndarray | None = None, most: int = 10) -> np.ndarray:
    """(<= most,) positions of the members nearest the middle of the slice: the median of every bounded feature.

    Args:
        distance: (N,) from the middle of the own cluster; without it the members of a group are alike.
    """
    members = np.flatnonzero(slice_.mask(features))
    depth = np.ones(len(members))
    for bound in slice_.bounds:
        values = features[bound.feature][members]
        kind = features.columns[features.names.index(bound.feature)].kind
        if kind == "number":
            rank = (stats.rankdata(values) - 0.5) / len(members)
            depth = np.minimum(depth, 1 - np.abs(2 * rank - 1))
        elif bound.feature == "cluster" and distance is not None:
            depth = np.minimum(depth, 1 - stats.rankdata(distance[members]) / len(members))
    return members[np.argsort(-depth, kind="stable")[:most]]
