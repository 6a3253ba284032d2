"""Backdoors seen through a model: attack success rate, spectral signatures, activation clustering.

    for verdict in inspect(train, valid, poison.check({"train": train})):
        print(verdict.success, verdict.row())

Both detectors look at what the last layer sees. Where the attack success rate is not far above the share without the
stamp, their silence means nothing, so `Verdict` carries it beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from pcamlib.audit import quick
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.poison import Mark
from pcamlib.data.layout import SIDE
from pcamlib.data.patches import take
from pcamlib.errors import DataError
from pcamlib.models import Classifier

Stamp = Callable[[np.ndarray], np.ndarray]
#: Checks whose pattern can be put on a patch.
STAMPABLE = ("poison.mark", "poison.pattern", "poison.wave")
_LEARNED = 0.2  # more of the other class that must go to the target once stamped


@dataclass(frozen=True)
class Success:
    """Attack success rate on clean patches of the other class.

    Attributes:
        stamped: share that the model gives to the target with the stamp.
        plain: the same share without it.
        n: patches.
    """

    stamped: float
    plain: float
    n: int

    @property
    def learned(self) -> bool:
        """Whether the stamp moves enough patches for a model-based detector to have something to see."""
        return self.stamped - self.plain >= _LEARNED

    def __str__(self) -> str:
        return f"attack success rate {self.stamped:.2f}, without the stamp {self.plain:.2f} (n = {self.n:,})"


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a trained network shows of one suspected pattern.

    Attributes:
        suspect: the finding.
        target: class that its carriers mostly have.
        success: of the stamp; where it is not learned, the detectors have nothing to see.
        spectral: rows of the target class that spectral signatures would remove.
        clustering: rows of the smaller cluster.
        silhouette: of the two clusters, -1..1; Chen et al. take clusters below about 0.10 to 0.15 for a clean class.
    """

    suspect: Finding
    target: int
    success: Success
    spectral: np.ndarray
    clustering: np.ndarray
    silhouette: float

    def row(self) -> dict[str, Any]:
        """As a row of a table: the attack's success first, then the share of the carriers that each detector names."""
        carriers = self.suspect.rows
        return {
            "pattern": self.suspect.check, "carriers": len(carriers), "target class": self.target,
            "success with stamp": round(self.success.stamped, 3), "without": round(self.success.plain, 3),
            "stamped patches": self.success.n, "learned": self.success.learned,
            "spectral signatures": round(float(np.isin(carriers, self.spectral).mean()), 3),
            "named by them": len(self.spectral),
            "activation clustering": round(float(np.isin(carriers, self.clustering).mean()), 3),
            "in its cluster": len(self.clustering), "silhouette": round(self.silhouette, 2),
        }  # fmt: skip


def picture(split: Split, rows: np.ndarray) -> np.ndarray:
    """What patches share: their mean less the mean of up to 2,048 others of their classes, without what is noise.

    Each Fourier coefficient is shrunk by the power that chance alone would give the difference (Wiener).

    Returns:
        (96, 96, 3) float32 grey levels, to be added to a patch.
    """
    carries = np.zeros(len(split), bool)
    carries[rows] = True
    others = np.flatnonzero(split.valid & ~carries)
    if split.labels is not None:
        others = others[np.isin(split.labels[others], split.labels[rows])]
    others = others[np.linspace(0, len(others) - 1, min(2048, len(others))).astype(np.int64)]
    mean, power = [], np.zeros((SIDE, SIDE // 2 + 1, 3))
    for chosen in (rows[:2048], others):
        total = np.zeros((SIDE, SIDE, 3))
        for start in range(0, len(chosen), 128):
            block = take(split.patches.images, chosen[start : start + 128])
            total += block.sum(0, dtype=np.float64)
            if chosen is others:
                power += (np.abs(np.fft.rfft2(block - block.mean((1, 2), keepdims=True), axes=(1, 2))) ** 2).sum(0)
        mean.append(total / max(len(chosen), 1))
    found = np.fft.rfft2(mean[0] - mean[1], axes=(0, 1))
    noise = power / max(len(others), 1) * (1 / max(len(rows), 1) + 1 / max(len(others), 1))
    shrink = np.clip(1 - 3 * noise / np.maximum(np.abs(found) ** 2, 1e-9), 0, 1)
    return np.fft.irfft2(found * shrink, s=(SIDE, SIDE), axes=(0, 1)).astype(np.float32)


def stamp_of(finding: Finding, split: Split) -> Stamp:
    """How to put the pattern of a finding of `poison.check` on (n, 96, 96, 3) uint8 patches.

    Raises:
        DataError: nothing that can be stamped, as a block of odd values.
    """
    details = finding.details
    if finding.check == "poison.mark":
        place = details["place"] and (int(details["place"][0]), int(details["place"][1]))
        return Mark(np.array(details["content"], np.uint8), np.array(details["mask"], bool), place).stamp
    if finding.check not in ("poison.pattern", "poison.wave") or not len(finding.rows):
        raise DataError(f"{finding.check}: holds no pattern that can be put on a patch")
    added = picture(split, finding.rows)
    return lambda images: np.clip(np.rint(images + added), 0, 255).astype(np.uint8)


def success(model: Classifier, split: Split, stamp: Stamp, *, target: int = 1, most: int = 1000) -> Success:
    """Stamp up to `most` valid patches that are not of class `target`, and see where the model puts them.

    Raises:
        DataError: the split has no labels, or no valid patch of the other class.
    """
    if split.labels is None:
        raise DataError(f"{split.name}: has no labels; the attack success rate needs clean patches of a known class")
    rows = np.flatnonzero(split.valid & (split.labels != target))[:most]
    if not len(rows):
        raise DataError(f"{split.name}: no valid patch outside class {target}")
    images = take(split.patches.images, rows)
    share = [float(np.mean((quick.predict(model, seen, views=1) >= 0.5) == bool(target)))
             for seen in (stamp(images), images)]  # fmt: skip
    return Success(share[0], share[1], len(rows))


def spectral_signatures(features: np.ndarray, expected: float) -> np.ndarray:
    """Positions of the 1.5 x `expected` share that lie farthest along the leading direction (Tran et al. 2018).

    Args:
        features: (n, d) of one class.
        expected: share of poisoned rows to reckon with, 0..1.
    """
    if len(features) < 2:
        return np.empty(0, np.int64)
    centred = features - features.mean(0)
    leading = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    scores = (centred @ leading) ** 2
    return np.sort(np.argsort(-scores, kind="stable")[: int(np.ceil(1.5 * expected * len(features)))])


def activation_clustering(features: np.ndarray) -> tuple[np.ndarray, float]:
    """Two clusters of ten components (Chen et al. 2018): positions of the smaller, and the silhouette.

    Fewer than 20 rows are not clustered: an empty array and 0.
    """
    if len(features) < 20:
        return np.empty(0, np.int64), 0.0
    reduced = PCA(min(10, *features.shape), random_state=0).fit_transform(features)
    cluster = KMeans(2, n_init=4, random_state=0).fit_predict(reduced)
    if cluster.min() == cluster.max():
        return np.empty(0, np.int64), 0.0
    score = float(silhouette_score(reduced, cluster, sample_size=min(2000, len(reduced)), random_state=0))
    return np.flatnonzero(cluster == np.bincount(cluster).argmin()), score


def inspect(
    train: Split, valid: Split, suspects: Sequence[Finding], *, steps: int = 400, seed: int = 0
) -> list[Verdict]:
    """Train the quick CNN on `train` as it is, and look into it for the backdoor that each suspect would be.

    Args:
        train: split under suspicion; `valid`: split for the attack success rate.
        suspects: findings of `poison.check` in `train`; those whose pattern can be stamped are looked for.
        steps: batches of 64; 400 take about 12 s of one core.

    Returns:
        One verdict a suspect that can be stamped; a backdoor's target is the class that most of its carriers have.

    Raises:
        DataError: a split has no labels, or too few valid patches.
    """
    if train.labels is None:
        raise DataError(f"{train.name}: has no labels; nothing can be trained on it")
    stampable = [f for f in suspects if f.split == train.name and f.check in STAMPABLE and len(f.rows)]
    if not stampable:
        return []
    rows = np.flatnonzero(train.valid)
    images, labels = quick.shrink(train.patches.images, rows), train.labels[rows]
    model = quick.fit(images, labels, steps=steps, seed=seed)
    found = []
    for suspect in stampable:
        target = int(train.labels[suspect.rows].mean() >= 0.5)
        own = rows[labels == target]
        features = quick.embed(model, images, np.flatnonzero(labels == target))
        spectral = own[spectral_signatures(features, float(np.isin(own, suspect.rows).mean()))]
        clustered, silhouette = activation_clustering(features)
        reached = success(model, valid, stamp_of(suspect, train), target=target)
        found.append(Verdict(suspect, target, reached, spectral, own[clustered], silhouette))
    return found
