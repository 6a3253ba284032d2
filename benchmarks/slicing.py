"""Slices: does discovery find a weak one that was planted, and keep still where none was?

    python benchmarks/slicing.py [--json FILE] [--trials 30] [--nulls 100] [--data DIR] [--patches N]
    python benchmarks/slicing.py --data DIR --predictions FILE     # plant on the mistakes of a trained model

Each trial takes real features (synthetic patches without --data), a model that is wrong for 12 % of the patches, more
often where three random features say so, and doubles the mistakes within one or two feature ranges that hold 2 to 10 %
of the patches. The damage is measured before any finder sees it: at least 1.8 and at most 2.5 times the rest with the
same share of tumour, else it is drawn again. Found: of the first five slices one has at least 8 of its 10 typical
patches in the planted one. Without a plant mistakes fall by lot within each class, and any report is false.

Against plain sliceline (all conjunctions of at most two of ten quantile bins, alpha .95, at least 1 % of the patches:
the paper's settings) and a decision tree on the mistakes (leaves of at least 1 %, by their rate), top five of each.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from _rows import arguments, finish, row
from scipy.special import expit
from sklearn.tree import DecisionTreeClassifier

from pcamlib.data.patches import open_split
from pcamlib.data.synthetic import generate
from pcamlib.experiments import discovery, features
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import Bound, Slice, excess
from pcamlib.training.evaluate import Predictions

TOP, TYPICAL = 5, 0.8
Finder = Callable[[Features, Predictions, np.ndarray], Sequence[Slice]]


def model(table: Features, label: np.ndarray, rng: np.random.Generator, spread: float) -> np.ndarray:
    """(N,) bool, 12 % mistakes; `spread` of the difficulty by features, in standard deviations of that by lot."""
    numbers = [i for i, column in enumerate(table.columns) if column.kind == "number"]
    chosen = rng.choice(numbers, 3, replace=False)
    a, b, c = (2 * table.values[:, chosen].argsort(0).argsort(0) / len(table) - 1).T
    hard = np.column_stack([np.sin(np.pi / 2 * a), b, a * c]) @ rng.normal(size=3)
    hard = rng.normal(size=len(table)) + spread * hard / hard.std() + 0.2 * label
    return hard > np.quantile(hard, 0.88)


def plant(
    table: Features, label: np.ndarray, wrong: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) members of a random slice of one or two features, and (N,) mistakes, doubled within it."""
    numbers = [column.name for column in table.columns if column.kind == "number"]
    while True:
        size = rng.uniform(0.02, 0.10)
        width = np.exp(rng.uniform(np.log(size / 0.7), np.log(0.7)))
        widths = [size] if rng.random() < 0.5 else [width, size / width]
        bounds = []
        for name, part in zip(rng.choice(numbers, len(widths), replace=False), widths, strict=True):
            start = rng.uniform(0, 1 - part)
            low, high = np.quantile(table[name], [start, start + part])
            bounds.append(Bound(str(name), float(low), float(high)))
        if any(bound.low >= bound.high for bound in bounds):
            continue  # a feature that is mostly one value
        inside, more = Slice(tuple(bounds)).mask(table), wrong.copy()
        for side in (0, 1):
            here = inside & (label == side)
            right = np.flatnonzero(here & ~wrong)
            more[rng.permutation(right)[: int((here & wrong).sum())]] = True
        damage = excess(inside, label, more)
        if 0.02 <= inside.mean() <= 0.10 and 1.8 <= damage["rate"] / damage["matched"] <= 2.5:
            return inside, more


def predicted(table: Features, label: np.ndarray, wrong: np.ndarray, rng: np.random.Generator) -> Predictions:
    """Predictions with just these mistakes."""
    sure = expit(np.abs(rng.normal(2, 1, len(label))))
    called = (label == 1) ^ wrong
    return Predictions(table.split, table.fingerprint, table.index, label, np.where(called, sure, 1 - sure))


def ours(table: Features, predictions: Predictions, wrong: np.ndarray) -> Sequence[Slice]:
    """`discovery.discover`, as it comes."""
    return discovery.discover(table, predictions).slices


def sliceline(table: Features, predictions: Predictions, wrong: np.ndarray) -> Sequence[Slice]:
    """Top five by the score of Sagadeeva & Boehm 2021, of all slices of one or two bins; no statistics."""
    n, scored = len(table), []
    whole = discovery.axis(Column("", "", "group", ""), np.zeros(n), 1, n + 1)
    axes = [discovery.axis(column, table[column.name], 10, 1) for column in table.columns]
    for a, b in [*combinations(axes, 2), *((each, whole) for each in axes)]:
        one, other = ((each.ranges.sum(1) == 1).nonzero()[0] for each in (a, b))  # ranges of one bin
        cells = (a.ranges.shape[1], b.ranges.shape[1])
        tables = [np.bincount(a.bin * cells[1] + b.bin, each, cells[0] * cells[1]) for each in (None, wrong)]
        size, hits = a.ranges[one] @ np.reshape(tables, (2, *cells)) @ b.ranges[other].T
        score = 0.95 * (hits / np.maximum(size, 1) / wrong.mean() - 1) - 0.05 * (n / np.maximum(size, 1) - 1)
        score[size < n / 100] = -np.inf
        for at in np.argsort(-score, axis=None)[:TOP]:
            i, j = np.unravel_index(at, score.shape)
            scored.append((float(score[i, j]), a.bounds(one[i]) + b.bounds(other[j])))
    return [Slice(bounds) for score, bounds in sorted(scored, key=lambda each: -each[0])[:TOP] if score > 0]


def tree(table: Features, predictions: Predictions, wrong: np.ndarray) -> Sequence[Slice]:
    """Top five leaves of a decision tree on the mistakes, by their rate, above that of all patches."""
    fitted = DecisionTreeClassifier(min_samples_leaf=len(table) // 100, random_state=0).fit(table.values, wrong).tree_
    leaves: list[tuple[float, Slice]] = []

    def walk(node: int, bounds: dict[str, tuple[float, float]]) -> None:
        if fitted.children_left[node] < 0:
            leaves.append((float(fitted.value[node][0][-1]), Slice(tuple(Bound(k, *v) for k, v in bounds.items()))))
            return
        name, cut = table.names[fitted.feature[node]], float(fitted.threshold[node])
        low, high = bounds.get(name, (-np.inf, np.inf))
        walk(fitted.children_left[node], bounds | {name: (low, min(high, cut))})
        walk(fitted.children_right[node], bounds | {name: (max(low, cut), high)})

    walk(0, {})
    return [leaf for rate, leaf in sorted(leaves, key=lambda each: -each[0])[:TOP] if rate > wrong.mean()]


FINDERS: dict[str, Finder] = {"discovery": ours, "sliceline": sliceline, "decision tree": tree}


def planted(
    table: Features, label: np.ndarray, trials: int, first: int, mistakes: Callable[[np.random.Generator], np.ndarray]
) -> dict[str, int]:
    """In how many of the trials each finder has the planted slice among its first five."""
    found = dict.fromkeys(FINDERS, 0)
    for trial in range(first, first + trials):
        rng = np.random.default_rng([trial, 1])
        inside, wrong = plant(table, label, mistakes(rng), rng)
        predictions = predicted(table, label, wrong, rng)
        line = []
        for name, finder in FINDERS.items():
            slices = finder(table, predictions, wrong)
            shares = [float(inside[discovery.typical(slice_, table)].mean()) for slice_ in slices[:TOP]]
            found[name] += max(shares, default=0) >= TYPICAL
            line.append(f"{name} {max(shares, default=0):.1f} of {len(slices)}")
        print(f"  {trial}: {inside.mean():.1%} planted; {', '.join(line)}", flush=True)
    return found


def silent(table: Features, label: np.ndarray, trials: int, first: int, rate: float) -> dict[str, int]:
    """In how many trials without a plant each finder reports nothing."""
    quiet = dict.fromkeys(FINDERS, 0)
    for trial in range(first, first + trials):
        rng = np.random.default_rng([trial, 2])
        wrong = rng.random(len(label)) < np.where(label == 1, 1.2, 0.8) * rate
        predictions = predicted(table, label, wrong, rng)
        reports = {name: len(finder(table, predictions, wrong)) for name, finder in FINDERS.items()}
        quiet = {name: quiet[name] + (not count) for name, count in reports.items()}
        if reports["discovery"]:
            print(f"  {trial}: {reports['discovery']} reported by chance", flush=True)
    return quiet


def seconds(rng: np.random.Generator) -> float:
    """Of one discovery among 32,768 patches with 20 features of noise, a tenth of it shared."""
    values = (rng.normal(size=(32_768, 20)) + rng.normal(size=(32_768, 1)) / 3).astype(np.float32)
    columns = tuple(Column(f"feature {number}", "", "number", "") for number in range(20))
    table = Features("valid", "0" * 64, np.arange(32_768), columns, values)
    label = rng.integers(0, 2, 32_768).astype(np.uint8)
    _, wrong = plant(table, label, model(table, label, rng, 0.35), rng)
    predictions, start = predicted(table, label, wrong, rng), time.perf_counter()
    discovery.discover(table, predictions)
    return time.perf_counter() - start


def measured(data: Path | None, split: str, patches: int | None) -> tuple[Features, np.ndarray]:
    """Features and labels of so many patches of a split; None: all."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            generate(folder, seed=5, sizes={split: patches or 0}, report=lambda line: None)
        opened = open_split(data or folder, split)
        table, label = features.of(opened), opened.labels
    assert label is not None
    some = np.sort(np.random.default_rng(0).permutation(len(table))[:patches])
    return table.take(some), np.asarray(label)[some]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=30, help="with a planted slice")
    parser.add_argument("--nulls", type=int, default=100, help="trials without")
    parser.add_argument("--data", type=Path, help="folder with PCam files; synthetic patches without it")
    parser.add_argument("--split", default="train")
    parser.add_argument("--patches", type=int, default=20_000, help="of the split")
    parser.add_argument("--spread", type=float, default=0.35, help="of difficulty by features; 0: mistakes by lot")
    parser.add_argument("--predictions", type=Path, help="of the split by a trained model: plant on its mistakes")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial; below 1,000 nothing was tuned")
    options = parser.parse_args()
    if options.predictions and not options.data:
        parser.error("--predictions needs --data, the folder with the patches predicted")
    table, label = measured(options.data, options.split, None if options.predictions else options.patches)
    if options.predictions:
        of = Predictions.load(options.predictions)
        table = table.of(of)
        label, real = of.label, (of.probability >= 0.5) != (of.label == 1)
    kind = "synthetic" if options.data is None else "real"
    print(f"{len(label):,} {kind} patches, {len(table.columns)} features: {', '.join(table.names)}", flush=True)

    def mistakes(rng: np.random.Generator) -> np.ndarray:
        return real if options.predictions else model(table, label, rng, options.spread)

    rows = []
    barred = len(label) >= 20_000 and not options.predictions  # what the bars are for
    found = planted(table, label, options.trials, options.first, mistakes)
    quiet = silent(table, label, options.nulls, options.first, 0.12)
    for what, n, share, hits in (
        ("planted, in first five", options.trials, 0.9, found),
        ("no plant, no report", options.nulls, 0.95, quiet),
    ):
        for name, count in hits.items():
            bar = f"VALUE>={share * n:g}" if barred and name == "discovery" and n else ""
            rows.append(row(f"{what}: {name}", count, "trials", n=n, against=f"{len(label):,} {kind} patches", bar=bar))
    took = float(np.median([seconds(np.random.default_rng(number)) for number in range(options.rounds)]))
    rows.append(row("32,768 patches x 20 features", took, "s", n=options.rounds, bar="VALUE<=10"))
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
