"""Do the patches that come in still look like those that the checkpoint was judged on?

    reference = Reference.build(Predictor("best.safetensors"), open_split("DIR", "valid"))
    report = reference.compare(measure(window), probability)     # window: (n, 96, 96, 3) uint8; report.drifted

18 pixel measurements and the model's logit, a window of patches against a stored reference, by three tests: Kolmogorov
and Smirnov's for each feature (Holm), the maximum mean discrepancy (Gretton et al. 2012) and a classifier that tells
both apart. Each has a third of one family-wise level, so a window of the reference's own kind is flagged in at most
`LEVEL` of the cases. The reference is a validation split: on its own training patches a model is surer, and that alone
would be flagged. Its kind are random patches of its slides: one slide, or another mix, is a shift that is truly there.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from scipy.spatial.distance import pdist, squareform
from scipy.special import logit

from pcamlib import sources
from pcamlib.data import measure as pixels
from pcamlib.data.layout import PATCH_SHAPE
from pcamlib.data.patches import Patches, sample, take
from pcamlib.errors import PcamError
from pcamlib.files import atomic_path, digest
from pcamlib.models import Classifier
from pcamlib.training.checkpoint import weights_digest

if TYPE_CHECKING:
    from pcamlib.serving.predict import Predictor

LEVEL = 0.02  # chance of a false alarm a window, all tests together
FEWEST = 20  # patches in a window; a reference has five times as many
OUTLYING = 0.01  # share of the reference's own kind that `outlying` flags
MOST = 8192  # patches kept in a reference: 0.6 MB
PIXELS = (*pixels.MEASURED, *(f"{name}, centre" for name in pixels.CENTRED))
NAMES = (*PIXELS, "logit")

_ABOUT = ("fingerprint", "split", "weights", "synthetic")
_SMALL = 100  # patches: below it the exact p-values of KS
_BLOCK = 256  # patches read at once
_WINDOW, _OTHERS = 500, 1000  # patches at most in the tests that permute
_PERMUTED, _FOLDS = 299, 5
_CLIP = 1e-7  # of a probability
_RIDGE = 1e-3  # on the covariance, where a feature of the reference is constant
_FAR = 5.0  # standard deviations at which a feature is cut off: shares of white and black have long tails


class DriftError(PcamError):
    """A window or a reference that cannot be compared."""


def measure(images: np.ndarray) -> np.ndarray:
    """(N, 96, 96, 3) uint8 -> (N, 18) float32, the columns of `PIXELS`.

    Raises:
        DriftError: patches of another shape or type, or none.
    """
    if images.shape[1:] != PATCH_SHAPE or images.dtype != np.uint8 or len(images) == 0:
        raise DriftError(f"drift is measured on (N, 96, 96, 3) uint8 patches, not {images.shape} {images.dtype}")
    return pixels.observe(0, images, images, images)["values"]


def joined(values: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """(N, 18) measurements and (N,) probabilities -> (N, 19) float32, the logit last."""
    return np.column_stack([values, logit(np.clip(probability, _CLIP, 1 - _CLIP))]).astype(np.float32)


@dataclass(frozen=True)
class Report:
    """What the tests say of one window, JSON-able by `json`.

    Attributes:
        drifted: `p` <= LEVEL.
        p: chance to see as much in any of the three tests without a shift (Bonferroni).
        tests: p-value of each test by name: `ks`, `mmd`, `classifier`.
        features: one a feature, by name, the smallest p first: Kolmogorov-Smirnov `statistic` (0 to 1), `p`,
            `corrected` (Holm), `effect` (difference of the means in the reference's standard deviations).
        mmd: unbiased square of the maximum mean discrepancy, of features in standard deviations.
        auc: out of fold, of the classifier that tells window and reference apart.
        chance: what `auc` is without a shift, 95 % of the permutations.
        n, reference: patches in each.
        synthetic: the reference is.
    """

    drifted: bool
    p: float
    tests: dict[str, float]
    features: dict[str, dict[str, float]]
    mmd: float
    auc: float
    chance: tuple[float, float]
    n: int
    reference: int
    synthetic: bool

    def json(self) -> dict[str, Any]:
        """As plain Python values."""
        return asdict(self)

    def text(self) -> str:
        """A sentence, and the five features that differ most."""
        said = "DRIFT" if self.drifted else "no drift"
        tests = ", ".join(f"{name} {p:.2g}" for name, p in self.tests.items())
        lines = [
            f"{said}: {self.n:,} patches against {self.reference:,}{' synthetic ones' if self.synthetic else ''}, "
            f"p {self.p:.2g} (drift at {LEVEL:g} or less; {tests}); a classifier tells them apart with an AUC of "
            f"{self.auc:.3f} (by chance {self.chance[0]:.3f} to {self.chance[1]:.3f}), MMD^2 {self.mmd:.4f}"
        ]
        for name, one in list(self.features.items())[:5]:
            told = f"corrected p {one['corrected']:.2g}, mean {one['effect']:+.2f} standard deviations"
            lines.append(f"{name:22s} KS {one['statistic']:.3f}, {told}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Reference:
    """Patches that a checkpoint is at home with, measured.

    Attributes:
        values: (M, 19) float32: `PIXELS`, then the logit.
        fingerprint: of the split that they come from.
        split: its name.
        weights: digest of the model that gave the logits.
        synthetic: the patches were generated.
    """

    values: np.ndarray
    fingerprint: str
    split: str
    weights: str
    synthetic: bool

    @classmethod
    def build(cls, predictor: Predictor, patches: Patches, most: int = MOST) -> Reference:
        """From up to `most` patches of a split that the model was not trained on, evenly spaced.

        Raises:
            DriftError: too few patches.
        """
        values = observed(predictor, patches, sample(patches, most))
        return cls(values, patches.fingerprint, patches.split, weights_digest(predictor.model), bool(patches.synthetic))

    def __post_init__(self) -> None:
        _whole(self.values, "the reference", 5 * FEWEST)

    def save(self, path: str | Path) -> None:
        """Write as .npz, atomically."""
        about = {name: getattr(self, name) for name in _ABOUT} | {"features": NAMES, "code": _code()}
        with atomic_path(path) as part, open(part, "wb") as out:
            np.savez(out, allow_pickle=False, values=self.values, about=json.dumps(about))

    @classmethod
    def load(cls, path: str | Path, model: Classifier | None = None) -> Reference:
        """Read what `save` wrote.

        Raises:
            DriftError: missing, damaged, measured by other code, or with another model than `model`.
        """
        again = "make it again: `pcam drift reference`"
        try:
            with np.load(path, allow_pickle=False) as stored:
                values, about = stored["values"], json.loads(str(stored["about"]))
            found = cls(values, **{name: about[name] for name in _ABOUT})
            ours = about["features"] == list(NAMES) and about["code"] == _code()
        except FileNotFoundError:
            raise DriftError(f"{path}: no such reference; `pcam drift reference` makes one") from None
        except Exception as error:  # zipfile and NumPy raise a dozen kinds
            raise DriftError(f"{path}: no whole reference ({' '.join(str(error).split())}); {again}") from None
        if not ours:
            raise DriftError(f"{path}: measured by another version of pcamlib; {again}")
        if model is not None and found.weights != weights_digest(model):
            raise DriftError(f"{path}: made with another checkpoint; {again} with this one")
        return found

    @cached_property
    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each feature; 1 where it is constant."""
        spread = self.values.std(0, dtype=np.float64)
        return self.values.mean(0, dtype=np.float64), np.where(spread > 0, spread, 1.0)

    def _standard(self, values: np.ndarray) -> np.ndarray:
        mean, spread = (part[: values.shape[1]] for part in self._scale)
        return (values - mean) / spread

    def compare(self, values: np.ndarray, probability: np.ndarray | None = None) -> Report:
        """Hold a window against the reference.

        Args:
            values: (n, 18) of `measure`.
            probability: (n,) of the model; without it the logit is left out.

        Raises:
            DriftError: fewer than `FEWEST` patches, another number of features, a NaN.
        """
        window = values if probability is None else joined(values, probability)
        _whole(window, "the window")
        own, spread = self.values[:, : window.shape[1]], self._scale[1][: window.shape[1]]
        # the limit's p-values are too small in small windows (20 patches: .00027 for .0004), exact ones slow in large
        method = "exact" if len(window) < _SMALL else "asymp"
        found = [stats.ks_2samp(one, other, method=method) for one, other in zip(own.T, window.T, strict=True)]
        chance = np.array([test.pvalue for test in found])
        order = np.argsort(chance, kind="stable")
        holm = np.minimum(np.maximum.accumulate(chance[order] * np.arange(len(order), 0, -1)), 1)  # Holm 1979
        effect = (window.mean(0, dtype=np.float64) - own.mean(0, dtype=np.float64)) / spread
        features = {
            NAMES[i]: {"statistic": float(found[i].statistic), "p": float(chance[i]), "corrected": float(corrected),
                       "effect": float(effect[i])}
            for i, corrected in zip(order, holm, strict=True)
        }  # fmt: skip
        # the same window draws the same patches and permutations, another window others
        rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(window).data))
        some = [part[rng.permutation(len(part))[:most]] for part, most in ((window, _WINDOW), (own, _OTHERS))]
        both = self._standard(np.concatenate(some)).clip(-_FAR, _FAR).astype(np.float32)
        first = np.zeros((len(both), 1 + _PERMUTED), np.float32)
        first[: len(some[0])] = 1
        first[:, 1:] = rng.permuted(first[:, 1:], axis=0)
        mmd, auc = _mmd(both, first), _auc(both, first, rng)
        tests = {"ks": float(holm[0]), "mmd": _rank(mmd), "classifier": _rank(auc)}
        p = min(1.0, len(tests) * min(tests.values()))
        low, high = np.quantile(auc[1:], (0.025, 0.975))
        return Report(p <= LEVEL, p, tests, features, float(mmd[0]), float(auc[0]), (float(low), float(high)),
                      len(window), len(own), self.synthetic)  # fmt: skip

    @cached_property
    def _typical(self) -> tuple[np.ndarray, float]:
        """Inverse covariance of the pixel features, and the squared distance that `OUTLYING` of such patches exceed."""
        own = self._standard(self.values[:, : len(PIXELS)])
        inverse = np.linalg.inv(np.cov(own.T) + _RIDGE * np.eye(len(PIXELS)))
        distance, m = _squared(own, inverse), len(own)
        # each from mean and covariance of the others: judged with itself among them, a patch looks too near
        distance *= m**2 * (m - 2) / (m - 1) ** 3 / np.maximum(1 - m * distance / (m - 1) ** 2, 1e-9)
        return inverse, float(np.quantile(distance, 1 - OUTLYING))

    def outlying(self, values: np.ndarray) -> np.ndarray:
        """(n, 18 or 19) -> (n,) bool: pixels unlike nearly all of the reference (Mahalanobis); of its own kind, 1 %."""
        inverse, most = self._typical
        return ~(_squared(self._standard(values[:, : len(PIXELS)]), inverse) <= most)  # a NaN is odd too


def _code() -> str:
    return digest(sources.digests(Path(pixels.__file__)))


def _whole(values: np.ndarray, what: str, fewest: int = FEWEST) -> None:
    """Raises DriftError where values are too few, too narrow or not finite."""
    if values.ndim != 2 or values.shape[1] not in (len(PIXELS), len(NAMES)):
        raise DriftError(f"{what} has values of {values.shape}, not (n, {len(PIXELS)}); measure it with drift.measure")
    if len(values) < fewest:
        raise DriftError(f"{what} has {len(values)} patches; give {fewest} or more, better 500")
    odd = np.argwhere(~np.isfinite(values))
    if len(odd):
        raise DriftError(f"{what} has no finite '{NAMES[odd[0][1]]}' in row {odd[0][0]}; leave the row out")


def _squared(values: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    return np.einsum("ij,jk,ik->i", values, inverse, values)


def _rank(drawn: np.ndarray) -> float:
    """p-value of the first of exchangeable numbers, large ones telling (Phipson & Smyth 2010)."""
    return float((drawn >= drawn[0]).mean())


def _mmd(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Unbiased squared MMD, RBF as wide as the median distance, of each column's parting; (P,) of (N, F) and (N, P)."""
    distance = pdist(values, "sqeuclidean")
    kernel = np.exp(-squareform(distance).astype(np.float32) / max(np.median(distance), 1e-12))
    np.fill_diagonal(kernel, 0)
    n, m = first[:, 0].sum(), (1 - first[:, 0]).sum()
    within, touching = ((kernel @ first) * first).sum(0, dtype=np.float64), kernel.sum(1, dtype=np.float64) @ first
    across = touching - within
    rest = kernel.sum(dtype=np.float64) - touching - across
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * across / (n * m)


def _auc(values: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Out-of-fold AUC of a least-squares classifier on features and their squares; (P,) of (N, F) and (N, P).

    All permutations share each fold's normal equations, so 300 fits cost as much as one.
    """
    inputs = np.column_stack([np.ones(len(values)), values, values**2 / _FAR]).astype(np.float64)
    fold, total, known = rng.permutation(len(values)) % _FOLDS, np.zeros(first.shape[1]), np.zeros(first.shape[1])
    for number in range(_FOLDS):
        train, test = inputs[fold != number], inputs[fold == number]
        ridge = np.eye(inputs.shape[1]) * 1e-3 * len(train)
        ranks = stats.rankdata(test @ np.linalg.solve(train.T @ train + ridge, train.T @ first[fold != number]), axis=0)
        ones = first[fold == number].sum(0, dtype=np.float64)
        hits = (ranks * first[fold == number]).sum(0) - ones * (ones + 1) / 2
        pairs = ones * (len(test) - ones)  # none where a fold of a small window has patches of one kind alone
        total += hits / np.maximum(pairs, 1)
        known += pairs > 0
    return total / np.maximum(known, 1)


def observed(
    predictor: Predictor, patches: Patches, rows: np.ndarray, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """(N, 19) values of some rows of a split, the pixels changed first where `change` is given.

    Raises:
        DriftError: no rows.
    """
    parts = []
    for start in range(0, max(len(rows), 1), _BLOCK):
        images = take(patches.images, rows[start : start + _BLOCK])
        images = change(images) if change else images
        parts.append(joined(measure(images), predictor.probability(images)))
    return np.concatenate(parts)
