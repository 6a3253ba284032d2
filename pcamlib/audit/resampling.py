"""Is cross-validation needed? The variance and bias of six ways to estimate an AUC, measured on a cheap model.

The model is ridge regression on 102 colour and texture features: fitted to 6,000 real patches it reaches an AUC of .825
on 2,000 of valid, so that what it says about the estimators is about patches, not about noise. Each repeat draws half
of the sampled train rows, lets every scheme estimate the AUC from these alone, then looks at the untouched valid split.

Varoquaux, "Cross-validation failure", NeuroImage 2018; Cawley and Talbot, "On over-fitting in model selection", JMLR
2010 (nested); Bouthillier et al., "Accounting for variance in machine learning benchmarks", MLSys 2021.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch.nn import functional

from pcamlib.audit.findings import Split
from pcamlib.data.patches import sample, take
from pcamlib.errors import DataError

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)
_QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
_THUMBNAIL = 48  # columns; then 27 of the whole patch and 27 of its centre
_SUBSETS = (slice(0, 102), slice(48, 102), slice(75, 102))
_CANDIDATES = len(_SUBSETS) * len(ALPHAS)
_DEFAULT = 2  # all features, alpha .01


@torch.inference_mode()
def features(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What a cheap model sees: a 4x4 thumbnail, and of the whole patch and its centre 32x32 colour and texture.

    Mean, standard deviation, five quantiles and the mean step to the next pixel down and right, at half resolution;
    0.7 ms a patch.

    Args:
        images: (N, 96, 96, 3) uint8, may be memory-mapped.
        rows: (n,) rows to look at.

    Returns:
        (n, 102) float32, grey levels.
    """
    parts = [np.empty((0, 102), np.float32)]
    for start in range(0, len(rows), 256):
        block = torch.from_numpy(take(images, rows[start : start + 256])).permute(0, 3, 1, 2).float()
        half = functional.avg_pool2d(block, 2)
        found = [functional.avg_pool2d(half, 12).flatten(1)]
        for view, step in ((half, 2), (half[:, :, 16:32, 16:32], 1)):
            ordered = view[:, :, ::step, ::step].flatten(2).sort(2).values
            places = (_QUANTILES * (ordered.shape[2] - 1)).long()
            down, right = (view.diff(dim=axis).abs().mean((2, 3)) for axis in (2, 3))
            found += [view.mean((2, 3)), view.std((2, 3)), ordered[:, :, places].flatten(1), down, right]
        parts.append(torch.cat(found, 1).numpy())
    return np.concatenate(parts)


def auc(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, ties half; NaN with one class.

    Args:
        labels: (..., n) 0 or 1.
        scores: (..., n), of the same shape or one that broadcasts.
    """
    ranks, positive = rankdata(scores, axis=-1), labels.sum(-1).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        below = (ranks * labels).sum(-1) - positive * (positive + 1) / 2
        return below / (positive * (labels.shape[-1] - positive))


def folds(rng: np.random.Generator, labels: np.ndarray, count: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(n,) number of the fold of each row: the class mix kept; with groups, no group in two folds and sizes alike."""
    order = rng.permutation(len(labels))
    fold = np.empty(len(labels), np.int64)
    if groups is None:
        fold[order[np.argsort(labels[order], kind="stable")]] = np.arange(len(labels)) % count
        return fold
    _, member, size = np.unique(groups, return_inverse=True, return_counts=True)
    load, home = np.zeros(count), np.empty(len(size), np.int64)
    for group in np.argsort(-size[shuffled := rng.permutation(len(size))], kind="stable"):
        home[shuffled[group]] = load.argmin()
        load[load.argmin()] += size[shuffled[group]]
    return home[member]


def ridge(fit: np.ndarray, labels: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Scores of ridge regression at each of `ALPHAS` (times n), features standardised on `fit`.

    Args:
        fit: (n, d) features to learn from.
        labels: (n,) 0 or 1.
        seen: (m, d) features to score.

    Returns:
        (len(ALPHAS), m) float64.
    """
    mean, scale = fit.mean(0), np.maximum(fit.std(0), 1e-3)
    known, new = (fit - mean) / scale, (seen - mean) / scale
    values, vectors = np.linalg.eigh((known.T @ known).astype(np.float64))  # one decomposition serves every alpha
    target = vectors.T @ (known.T @ (labels - labels.mean()))
    shrink = 1 / (np.maximum(values, 0) + np.array(ALPHAS)[:, None] * len(fit))
    return (target * shrink) @ vectors.T @ new.T


@dataclass(frozen=True)
class _Sample:
    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None

    def __getitem__(self, rows: np.ndarray) -> _Sample:
        groups = None if self.groups is None else self.groups[rows]
        return _Sample(self.features[rows], self.labels[rows], groups)

    def split(self, rng: np.random.Generator, count: int, grouped: bool) -> Iterator[tuple[_Sample, _Sample]]:
        fold = folds(rng, self.labels, count, self.groups if grouped else None)
        for number in range(count):
            yield self[fold != number], self[fold == number]


def _aucs(fit: _Sample, seen: _Sample, every: bool = True) -> np.ndarray:
    """AUC on `seen` of each candidate, (subsets * alphas,); of the default one alone: (1,)."""
    if not every:
        return auc(seen.labels, ridge(fit.features, fit.labels, seen.features)[[_DEFAULT]])
    scores = [ridge(fit.features[:, part], fit.labels, seen.features[:, part]) for part in _SUBSETS]
    return auc(seen.labels, np.concatenate(scores))


def _hold_out(data: _Sample, rng: np.random.Generator, k: int, times: int) -> float:
    return float(np.nanmean([_aucs(*next(data.split(rng, k, False)), every=False) for _ in range(times)]))


def _k_fold(data: _Sample, rng: np.random.Generator, k: int, grouped: bool) -> float:
    return float(np.nanmean([_aucs(fit, seen, every=False) for fit, seen in data.split(rng, k, grouped)]))


def _selection(data: _Sample, rng: np.random.Generator, k: int, grouped: bool = False) -> np.ndarray:
    return np.nanmean([_aucs(fit, seen) for fit, seen in data.split(rng, k, grouped)], axis=0)


def _nested(data: _Sample, rng: np.random.Generator, k: int, grouped: bool) -> float:
    chosen = []
    for fit, seen in data.split(rng, k, grouped):
        best = int(_selection(fit, rng, k, grouped).argmax())
        chosen.append(_aucs(fit, seen)[best])
    return float(np.nanmean(chosen))


def reflection(
    train: Split, valid: Split | None = None, *, k: int = 5, repeats: int = 20, most: int = 3000, seed: int = 0
) -> list[dict[str, Any]]:
    """What each way of estimating an AUC promises, how far it scatters, and what the valid split then says.

    Args:
        train: with labels; slides give the grouped rows.
        valid: with labels; None leaves the columns that compare with it empty.
        k: folds.
        repeats: draws of half of the sampled rows, each with its own partition.
        most: train rows sampled, and valid rows.
        seed: of draws and partitions.

    Returns:
        One dict a scheme: `scheme`; `n`, patches of a draw; `estimate`, mean over the repeats; `sd` over them; `bias`,
        estimate minus the AUC on valid of the same model refitted on all rows of that draw, with its 95 % `interval`
        (which knows the sizes of train and valid, in slides where they are known); `rmse`, root mean square of that
        difference; `fits` and CPU `seconds` of one estimate; `values`, the estimates. Unknown values are None. The
        last row is valid itself, whose `sd` counts the draw and the size of valid.

    Raises:
        DataError: no labels, or fewer than 4 * k * k sampled train rows of a class.
    """
    pool, away = _sample(train, most), None if valid is None else _sample(valid, most)
    n, fewest = len(pool.labels) // 2, int(min(pool.labels.sum(), (1 - pool.labels).sum()))
    if fewest < 4 * k * k:  # so that a fold of a fold of half the rows holds about two
        raise DataError(f"{train.name}: {fewest} usable patches of a class; nested {k}-fold needs {4 * k * k}")
    schemes: dict[str, tuple[Any, int, bool, bool]] = {  # how, fits, whether it selects, whether it needs slides
        "hold-out": (lambda d, r: _hold_out(d, r, k, 1), 1, False, False),
        f"hold-out, {k} times": (lambda d, r: _hold_out(d, r, k, k), k, False, False),
        f"{k}-fold": (lambda d, r: _k_fold(d, r, k, False), k, False, False),
        f"{k}-fold by slide": (lambda d, r: _k_fold(d, r, k, True), k, False, True),
        f"best of {_CANDIDATES} by {k}-fold": (lambda d, r: _selection(d, r, k).max(), k * _CANDIDATES, True, False),
        f"nested {k}-fold": (lambda d, r: _nested(d, r, k, False), k * (k * _CANDIDATES + 1), True, False),
        f"nested {k}-fold by slide": (lambda d, r: _nested(d, r, k, True), k * (k * _CANDIDATES + 1), True, True),
    }
    usable = pool.groups is not None and all(len(set(pool.groups[pool.labels == one])) >= 2 * k for one in (0, 1))
    found: dict[str, list[float]] = {name: [] for name in schemes}
    spent = dict.fromkeys(schemes, 0.0)
    targets: list[tuple[float, float]] = []
    for number in range(repeats):
        rng = np.random.default_rng([seed, number])
        data = pool[rng.permutation(len(pool.labels))[:n]]
        for name, (estimate, _, _, by_slide) in schemes.items():
            if usable or not by_slide:
                began = time.process_time()
                found[name].append(float(estimate(data, np.random.default_rng([seed, number, 1]))))
                spent[name] += time.process_time() - began
        if away is not None:
            there = _aucs(data, away)
            best = int(_selection(data, np.random.default_rng([seed, number, 1]), k).argmax())
            targets.append((float(there[_DEFAULT]), float(there[best])))
    errors = (0.0, 0.0) if away is None else _errors(pool, away, k, seed)
    rows = [
        _row(name, n, found[name], [pair[selects] for pair in targets], errors, fits, spent[name] / repeats)
        for name, (_, fits, selects, _) in schemes.items()
    ]
    if away is not None:
        rows.append(_row("valid split", len(away.labels), [pair[0] for pair in targets], [], errors, 1, 0.0))
        rows[-1].update(sd=float(np.hypot(rows[-1]["sd"], errors[0])), seconds=None)
    return rows


def _sample(split: Split, most: int) -> _Sample:
    rows = sample(split.patches, most)
    if split.labels is None or len(set(split.labels[rows].tolist())) < 2:
        raise DataError(f"{split.name}: an AUC needs labels of both classes")
    groups = None if split.slides is None else split.slides[rows]
    return _Sample(features(split.patches.images, rows), split.labels[rows].astype(np.float64), groups)


def _standard_error(data: _Sample, scores: np.ndarray, seed: int) -> float:
    """Standard deviation of an AUC when its rows are drawn again: by slides where known, else by patches."""
    _, member = np.unique(np.arange(len(scores)) if data.groups is None else data.groups, return_inverse=True)
    members = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    rng, found = np.random.default_rng(seed), []
    for _ in range(200):
        rows = np.concatenate([members[group] for group in rng.integers(0, len(members), len(members))])
        found.append(auc(data.labels[rows], scores[rows]))
    return float(np.nanstd(found))


def _errors(pool: _Sample, away: _Sample, k: int, seed: int) -> tuple[float, float]:
    """Standard errors of the AUC on valid, and out of fold on the pool."""
    outside = np.empty(len(pool.labels))
    fold = folds(np.random.default_rng(seed), pool.labels, k)
    for number in range(k):
        fit, seen = pool[fold != number], pool[fold == number]
        outside[fold == number] = ridge(fit.features, fit.labels, seen.features)[_DEFAULT]
    scores = ridge(pool.features, pool.labels, away.features)[_DEFAULT]
    return _standard_error(away, scores, seed), _standard_error(pool, outside, seed)


def _row(
    name: str, n: int, values: list[float], targets: list[float], errors: tuple[float, float], fits: int, seconds: float
) -> dict[str, Any]:
    if not np.isfinite(values).all():  # slides of one class each can leave every fold without an AUC
        values = []
    row = {"scheme": name, "n": n, **dict.fromkeys(("estimate", "sd", "bias", "interval", "rmse")), "fits": fits,
           "seconds": None, "values": values}  # fmt: skip
    if values:
        row.update(estimate=float(np.mean(values)), sd=float(np.std(values, ddof=1)), seconds=seconds)
    if values and targets:
        gap = np.subtract(values, targets)
        bias, half = float(gap.mean()), 1.96 * math.hypot(gap.std(ddof=1) / len(gap) ** 0.5, *errors)
        row.update(bias=bias, interval=[bias - half, bias + half], rmse=float((gap**2).mean() ** 0.5))
    return row


def recommend(table: list[dict[str, Any]]) -> str:
    """What to do, in sentences chosen by the numbers of a `reflection`."""
    once, _, plain, grouped, chosen, nested, _, *valid = table
    said = [
        f"One hold-out scatters by {once['sd']:.4f} (sd of the AUC over {len(once['values'])} draws), "
        f"{plain['scheme']} by {plain['sd']:.4f} for {plain['fits']} times the fits."
    ]
    low, high = _gap(plain, grouped)
    if not grouped["values"]:
        said.append("Slides are unknown, so how much patches of one slide flatter the folds is unknown too.")
    elif low > 0:
        said.append(f"Folds that cut slides promise {low:.4f} to {high:.4f} too much: keep slides whole.")
    else:
        said.append(f"Keeping slides whole changes the estimate by {low:.4f} to {high:.4f}: no slide effect is seen.")
    low, high = _gap(chosen, nested)
    flatters = low > 0 and high > plain["sd"] / 2
    said.append(
        f"Choosing and scoring on the same folds flatters by {low:.4f} to {high:.4f}: nesting, {nested['fits']} fits, "
        + ("is worth it." if flatters else f"buys less than half of the scatter of {plain['scheme']}.")
    )
    best = grouped if grouped["values"] else plain
    if not valid:
        return " ".join([*said, f"Without a valid split, report {best['scheme']}."])
    (valid_row,) = valid
    said.append(f"The valid split scatters by {valid_row['sd']:.4f} for one fit.")
    low, high = best["interval"]
    if low > 0 or high < 0:
        side = "above" if low > 0 else "below"
        said.append(
            f"{best['scheme']} lies {side} it by {abs(best['bias']):.4f} ({low:.4f} to {high:.4f}): trust valid."
        )
    elif valid_row["sd"] <= 2 * best["sd"]:
        said.append("Cross-validation is not needed here: choose on valid, report on test.")
    else:
        said.append(f"Valid is small: choose by {best['scheme']}, and report on test.")
    return " ".join(said)


def _gap(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """95 % interval of the mean difference of two schemes over the same draws; zeros where one has none."""
    if not (one["values"] and other["values"]):
        return 0.0, 0.0
    gap = np.subtract(one["values"], other["values"])
    half = 1.96 * float(gap.std(ddof=1)) / len(gap) ** 0.5
    return float(gap.mean()) - half, float(gap.mean()) + half
