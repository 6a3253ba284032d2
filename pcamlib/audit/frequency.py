"""Single patches with a strange spectrum: the frequency detector of Zeng et al. (ICCV 2021), a second opinion.

    detection = detect(split)         # detection.rows, detection.tpr, detection.text

A classifier learns to tell the patches of a split from copies that are spoiled here (blocks, pasted parts, noise,
blends, shadows), and names the rows that look spoiled. It looks at one patch at a time, where `patterns.py` asks what
many share, and adds next to nothing to the rules. Of 30 rows planted among 6,000 real ones (seeds 0 and 1) it finds, at
false rates of .001 / .01: noise blend of 20 or 10 % 1 / 1, of 5 % 0 / .52; white 5x5 block .02 / .05, corner 0 / .02,
waves of 16 levels 0 / .04, the rules' own ground; and of what they miss: one warp of a pixel .14 / .62, another for
each patch .02 / .50, noise of 12 levels of each patch's own 0 / .22. At its own threshold .0013 and .0022 of clean
patches are named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from sklearn.ensemble import HistGradientBoostingClassifier
from torch.nn import functional

from pcamlib.audit.findings import Split
from pcamlib.audit.patterns import CHANNELS
from pcamlib.data.layout import SIDE

KINDS = ("block", "paste", "noise", "blend", "shadow")
LEAST = 2000  # valid rows: of 1,000 generated ones none passed the threshold, not even a 30 % noise blend
FPR = 0.001
_BLOCK, _STRIDE = 8, 4  # of the local DCT; one DCT of the whole patch dilutes what is small
_TAIL = (0.90, 0.97)  # quantiles that a few per cent of poisoned rows leave alone
_COPIES = 2  # spoiled copies of each patch
_ROUNDS, _DOUBTED = 2, 0.03  # times that the worst rows are left out, and their share


@dataclass(frozen=True, eq=False)
class Detection:
    """What the detector says of one split.

    Attributes:
        rows: (n,) int64, ascending: rows that look spoiled.
        threshold: of the score, in distances from the median of all rows to their 0.9 quantile; None: not
            judged.
        tpr: share found of the spoiled copies that the classifier was not trained on, by kind of `KINDS`.
        fpr: share of clean rows that the threshold aims at.
        n: rows scored.
        text: one sentence.
    """

    rows: np.ndarray
    threshold: float | None
    tpr: dict[str, float]
    fpr: float
    n: int
    text: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"rows": self.rows.tolist()}


def _kernels() -> torch.Tensor:
    basis = torch.from_numpy(dct(np.eye(_BLOCK), norm="ortho", axis=0)).float()
    return torch.einsum("ij,kl->ikjl", basis, basis).reshape(-1, 1, _BLOCK, _BLOCK)


def features(images: np.ndarray) -> np.ndarray:
    """Log sizes of the DCT of overlapping 8x8 blocks, grey and red less blue.

    Args:
        images: (n, 96, 96, 3) uint8.

    Returns:
        (n, 262) float32; by channel: the mean of each of 64 coefficients over the blocks, its largest, and the mean
        over the coefficients in the busiest, fourth busiest and quietest block.
    """
    kernels, weights = _kernels(), torch.tensor(list(CHANNELS.values()))
    parts = [torch.empty(0, len(CHANNELS) * (2 * _BLOCK**2 + 3))]
    for start in range(0, len(images), 32):
        seen = (torch.from_numpy(images[start : start + 32]).float() @ weights.T).permute(0, 3, 1, 2)
        sizes = functional.conv2d(seen.reshape(-1, 1, SIDE, SIDE), kernels, stride=_STRIDE).abs_().log1p_().flatten(2)
        busy = sizes.mean(1)
        top = busy.topk(4, 1).values[:, [0, 3]]
        found = torch.cat([sizes.mean(2), sizes.amax(2), top, busy.amin(1, keepdim=True)], 1)
        parts.append(found.view(-1, parts[0].shape[1]))
    return torch.cat(parts).numpy()


def _window(rng: np.random.Generator, least: int, most: int) -> tuple[slice, slice]:
    height, width = rng.integers(least, most + 1, 2)
    y, x = rng.integers(0, SIDE + 1 - height), rng.integers(0, SIDE + 1 - width)
    return slice(y, y + height), slice(x, x + width)


def spoil(patch: np.ndarray, other: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """A copy of a (96, 96, 3) uint8 patch, spoiled in one of the ways of `KINDS` with random size and strength."""
    spoiled = patch.astype(np.float32)
    if kind == "block":
        colour = rng.choice([0, 255]) if rng.random() < 0.5 else rng.integers(0, 256, 3)
        spoiled[_window(rng, 3, 16)] = colour
    elif kind == "paste":
        y, x = window = _window(rng, 6, 32)
        down, right = rng.integers(0, SIDE + 1 - y.stop + y.start), rng.integers(0, SIDE + 1 - x.stop + x.start)
        spoiled[window] = other[down : down + y.stop - y.start, right : right + x.stop - x.start]
    elif kind == "noise":
        colours = 3 if rng.random() < 0.5 else 1
        spoiled += rng.uniform(5, 40) * rng.uniform(-1, 1, (SIDE, SIDE, colours)).astype(np.float32)
    elif kind == "blend":
        spoiled += rng.uniform(0.1, 0.4) * (other - spoiled)
    else:
        down, right = np.mgrid[:SIDE, :SIDE] - rng.uniform(16, 80, (2, 1, 1))
        angle = rng.uniform(0, 2 * np.pi)
        spoiled[down * np.sin(angle) + right * np.cos(angle) > 0] *= rng.uniform(0.3, 0.8)
    return np.clip(np.rint(spoiled), 0, 255).astype(np.uint8)


def _spoiled(images: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features of `_COPIES` spoiled copies of each patch, and the number of each one's kind."""
    kinds = np.arange(_COPIES * len(images)) % len(KINDS)
    others = rng.integers(0, len(images), len(kinds))
    parts = [
        features(np.stack([spoil(images[i % len(images)], images[others[i]], KINDS[kinds[i]], rng) for i in chosen]))
        for chosen in np.array_split(np.arange(len(kinds)), -(-len(kinds) // 256))
    ]
    return np.concatenate(parts), kinds


def _tail(scores: np.ndarray) -> float:
    """The 1 - `FPR` quantile of the clean rows: an exponential tail through two quantiles that poison leaves alone.

    The quantile itself would lie among the poisoned rows: half a percent of them are five times what it lets pass.
    """
    low, high = np.quantile(scores, _TAIL)
    (a, b), end = np.log1p(-np.array(_TAIL)), np.log(FPR)
    return float(low + (high - low) * (a - end) / (a - b))


def _fit(clean: np.ndarray, spoiled: np.ndarray, seed: int) -> HistGradientBoostingClassifier:
    """Leaves of at least a 45th of all, and few trees: it must not learn single rows, as poison is taught as clean."""
    truth = np.repeat([0, 1], [len(clean), len(spoiled)])
    model = HistGradientBoostingClassifier(
        max_iter=60, max_leaf_nodes=15, max_bins=63, early_stopping=False, min_samples_leaf=max(4, len(truth) // 45),
        random_state=seed,
    )  # fmt: skip
    return model.fit(np.concatenate([clean, spoiled]), truth)


def scores(split: Split, *, seed: int = 0, most: int = 3000) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each half of the valid rows is scored by a classifier that learned from up to `most` rows of the other half.

    Twice, the rows that look worst to the other half's classifier are left out, and both learn again: without it half
    a percent of rows with a 10 % noise blend is learned as clean, and 10 % of them are found instead of all.

    Returns:
        valid rows; their scores, in distances from the half's median to its 0.9 quantile; the same of spoiled copies
        of the rows learned from, scored by the other classifier; the number of each copy's kind.
    """
    rng, images = np.random.default_rng(seed), split.patches.images
    rows = np.flatnonzero(split.valid)
    half = rng.permutation(len(rows)) % 2
    clean, copies, kinds = [], [], []
    for side in (0, 1):
        own = images[np.sort(rng.permutation(rows[half == side])[:most])]
        clean.append(features(own))
        spoiled, kind = _spoiled(own, rng)
        copies.append(spoiled)
        kinds.append(kind)
    models = [_fit(clean[side], copies[side], seed) for side in (0, 1)]
    for _ in range(_ROUNDS):
        odds = [models[1 - side].decision_function(clean[side]) for side in (0, 1)]
        trusted = [clean[side][odds[side] <= np.quantile(odds[side], 1 - _DOUBTED)] for side in (0, 1)]
        models = [_fit(trusted[side], copies[side], seed) for side in (0, 1)]
    found, seen = np.zeros(len(rows)), []
    for side, model in enumerate(models):
        there = np.flatnonzero(half != side)
        for chosen in np.array_split(there, -(-len(there) // 1024)):
            found[chosen] = model.decision_function(features(images[rows[chosen]]))
        middle, high = np.quantile(found[there], (0.5, 0.9))
        unit = max(high - middle, 1e-9)
        found[there] = (found[there] - middle) / unit
        seen.append((model.decision_function(copies[1 - side]) - middle) / unit)
    return rows, found, np.concatenate(seen), np.concatenate(kinds[::-1])


def detect(split: Split, *, seed: int = 0, most: int = 3000) -> Detection:
    """Name the valid rows that look spoiled; none, and a sentence, where fewer than `LEAST` are valid.

    Args:
        split: looked at without its labels.
        seed: of the halves and of what is spoiled.
        most: rows that each of two classifiers learns from.
    """
    count = int(split.valid.sum())
    if count < LEAST:
        text = f"{count:,} valid patches are too few for the frequency detector, which needs {LEAST}"
        return Detection(np.empty(0, np.int64), None, {}, FPR, count, text)
    rows, found, copies, kinds = scores(split, seed=seed, most=most)
    threshold = _tail(found)
    named = rows[found > threshold]
    tpr = {kind: float(np.mean(copies[kinds == i] > threshold)) for i, kind in enumerate(KINDS)}
    text = (
        f"the frequency detector names {len(named):,} of {count:,} patches, where about {FPR * count:.0f} would be "
        f"named by chance; it finds {np.mean(list(tpr.values())):.0%} of what it spoiled itself"
    )
    return Detection(named, threshold, tpr, FPR, count, text)
