"""Named shifts of patches, from barely there to gross: how far the model falls, how early drift is flagged.

    shifted = SHIFTS["blur"](patches, 0.5)               # (N, 96, 96, 3) uint8 -> the same, blurred by 0.5 pixels
    rows = study(Predictor("best.safetensors"), open_split("DIR", "valid"))
    plot(rows)

Unshifted means random patches of the same slides with the same share of tumour. Windows overlap each other, none its
reference. A change of what tumour looks like that neither the measurements nor the logit show is not seen.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage, stats
from scipy.special import expit

from pcamlib.data.augment import random_stain
from pcamlib.data.patches import Patches, sample
from pcamlib.serving.drift import LEVEL, DriftError, Reference, observed
from pcamlib.training import metrics

if TYPE_CHECKING:
    from pcamlib.serving.predict import Predictor

log = logging.getLogger(__name__)
HARM = 0.02  # a fall of the AUC that should not come unannounced
_CHUNK = 256  # patches at once: optical densities are float32
_RESAMPLES = 300


@dataclass(frozen=True)
class Shift:
    """One way in which patches change.

    Attributes:
        apply: ((N, 96, 96, 3) uint8, strength) -> (N, 96, 96, 3) uint8, the input untouched.
        strengths: worth a look, in the order of severity.
        unit: of a strength.
        about: what it stands for.
    """

    apply: Callable[[np.ndarray, float], np.ndarray]
    strengths: tuple[float, ...]
    unit: str
    about: str

    def __call__(self, images: np.ndarray, strength: float) -> np.ndarray:
        """Shifted copies, a block at a time."""
        out = np.empty_like(images)
        for start in range(0, len(images), _CHUNK):
            out[start : start + _CHUNK] = self.apply(images[start : start + _CHUNK], strength)
        return out

    def spread(self, count: int) -> tuple[float, ...]:
        """`count` of the strengths, the weakest and the strongest among them; all where there are no more."""
        at = np.linspace(0, len(self.strengths) - 1, min(count, len(self.strengths))).round().astype(int)
        return tuple(self.strengths[i] for i in at)


def _stain(images: np.ndarray, strength: float) -> np.ndarray:
    """Haematoxylin times 1 + strength, eosin times 1 - strength; the rest stays."""
    draws = np.tile([1.0, 0.0, 0.5, 0.5, 0.5, 0.5], (len(images), 1))  # ends of `random_stain`'s range
    return random_stain(torch.from_numpy(np.ascontiguousarray(images)), draws, strength / 2).numpy()


def _blur(images: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0)).round().astype(np.uint8)


def _jpeg(images: np.ndarray, quality: float) -> np.ndarray:
    def again(image: np.ndarray) -> np.ndarray:
        packed = io.BytesIO()
        Image.fromarray(image).save(packed, "JPEG", quality=int(quality))
        return np.asarray(Image.open(packed))

    return np.stack([again(image) for image in images])


def _table(levels: np.ndarray, images: np.ndarray) -> np.ndarray:
    return (255 * levels).round().clip(0, 255).astype(np.uint8)[images]


def _gamma(images: np.ndarray, exponent: float) -> np.ndarray:
    return _table((np.arange(256) / 255) ** exponent, images)


def _light(images: np.ndarray, factor: float) -> np.ndarray:
    return _table(np.arange(256) / 255 * factor, images)


#: By name. Each begins where the area under the curve does not move yet.
SHIFTS = {
    "stain": Shift(_stain, (0.05, 0.1, 0.2, 0.3, 0.4), "share", "more haematoxylin, less eosin: another laboratory"),
    "blur": Shift(_blur, (0.3, 0.4, 0.5, 0.75, 1.0, 1.5), "pixels", "Gaussian, standard deviation: out of focus"),
    "jpeg": Shift(_jpeg, (90, 75, 60, 40, 20, 10, 5), "quality", "compressed again, colours at half resolution"),
    "gamma": Shift(_gamma, (1.05, 1.1, 1.2, 1.4, 1.8), "exponent", "another tone curve, darker: another scanner"),
    "light": Shift(_light, (0.97, 0.94, 0.9, 0.8, 0.7), "factor", "less light, the white of the glass with it"),
}


def study(
    predictor: Predictor,
    patches: Patches,
    *,
    strengths: Mapping[str, Sequence[float]] | None = None,
    windows: int = 100,
    shifted: int = 20,
    size: int = 500,
    most: int = 3000,
    seed: int = 0,
    report: Callable[[str], None] = log.info,
) -> list[dict[str, Any]]:
    """Shift a split in every way; a window is drawn at random, its reference is all the other patches, as stored.

    Args:
        predictor: whose AUC falls.
        patches: a labelled split that it was not trained on.
        strengths: by name of `SHIFTS`; None: all of them.
        windows: without a shift, to count false alarms.
        shifted: windows of each strength.
        size: patches a window.
        most: patches of the split, evenly spaced.
        seed: of the windows.
        report: told about each row.

    Returns:
        A row without shift, then one a strength: `shift`, `strength`, `unit`, `auc`, its `fall` (paired bootstrap over
        patches), `flagged` (share of `windows`), each with bounds in `NAME 95 %`; and `ks`, `mmd`, `classifier`: the
        share that each test alone would have flagged.

    Raises:
        DriftError: no labels, or too few patches for windows and reference.
    """
    if patches.labels is None:
        raise DriftError(f"{patches.stored.path}: no labels, so no AUC to fall; take a split that has them")
    rows, rng = sample(patches, most), np.random.default_rng(seed)
    label, found = patches.labels[rows], list[dict[str, Any]]()
    wanted = {name: shift.strengths for name, shift in SHIFTS.items()} if strengths is None else strengths
    steps = [("none", 0.0), *((name, value) for name, values in wanted.items() for value in values)]
    own = before = np.empty(0)
    for name, strength in steps:
        change = None if name == "none" else partial(SHIFTS[name], strength=strength)
        values = observed(predictor, patches, rows, change)
        own = values if name == "none" else own
        probability = expit(values[:, -1].astype(np.float64))
        auc = float(metrics.scores(label, probability, np.ones((1, len(label))))["auc"][0])
        draws = metrics.bootstrap(label, probability, resamples=_RESAMPLES)["auc"]  # of the same patches every time
        before = draws if name == "none" else before
        reports = []
        for _ in range(windows if name == "none" else shifted):
            order = rng.permutation(len(rows))
            reference = Reference(own[order[size:]], patches.fingerprint, patches.split, "", bool(patches.synthetic))
            reports.append(reference.compare(values[order[:size]]))
        hits = sum(one.drifted for one in reports)
        alone = {test: float(np.mean([one.tests[test] <= LEVEL for one in reports])) for test in reports[0].tests}
        found.append({
            "shift": name, "strength": strength, "unit": "" if name == "none" else SHIFTS[name].unit,
            "auc": auc, "auc 95 %": np.nanpercentile(draws, [2.5, 97.5]).tolist(),
            "fall": found[0]["auc"] - auc if found else 0.0,
            "fall 95 %": np.nanpercentile(before - draws, [2.5, 97.5]).tolist(),
            "windows": len(reports), "flagged": hits / len(reports),
            "flagged 95 %": [float(bound) for bound in stats.binomtest(hits, len(reports)).proportion_ci()], **alone,
        })  # fmt: skip
        report(f"{name} {strength:g}: AUC {auc:.3f}, flagged {hits} of {len(reports)}")
    return found


def earliest(rows: Sequence[Mapping[str, Any]], share: float = 0.95) -> list[dict[str, Any]]:
    """By shift: the strength from which on at least `share` of the windows are flagged, and the AUC's fall there.

    Returns:
        A row a shift: `shift`, `unit`, `strength`, `flagged`, `fall`, `fall 95 %` (None where it is never flagged), and
        `falls by .02 at`, the first strength that does such harm (None: none of those tried).
    """
    table = []
    for name in dict.fromkeys(row["shift"] for row in rows[1:]):
        own = [row for row in rows if row["shift"] == name]
        first = next((i for i in range(len(own)) if all(row["flagged"] >= share for row in own[i:])), None)
        told = {key: None if first is None else own[first][key] for key in ("strength", "flagged", "fall", "fall 95 %")}
        harm = next((row["strength"] for row in own if row["fall"] >= HARM), None)
        table.append({"shift": name, "unit": own[0]["unit"], **told, f"falls by {HARM:g} at": harm})
    return table


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A column a shift, over its strengths: above the share of windows that is flagged, below how far the AUC falls."""
    shown = list(dict.fromkeys(row["shift"] for row in rows[1:]))
    size = (2.6 * len(shown), 4.6)
    figure, axes = plt.subplots(2, len(shown), figsize=size, squeeze=False, sharey="row", sharex="col")
    for (top, bottom), name in zip(axes.T, shown, strict=True):
        own = [rows[0], *(row for row in rows if row["shift"] == name)]
        at = range(len(own))
        for axis, key, colour, line in ((top, "flagged", "C3", LEVEL), (bottom, "fall", "C0", HARM)):
            value, (low, high) = np.array([row[key] for row in own]), np.array([row[f"{key} 95 %"] for row in own]).T
            axis.errorbar(at, value, np.maximum([value - low, high - value], 0), fmt="o-", color=colour, ms=4, lw=1)
            axis.axhline(line, color="0.7", lw=0.8, ls=":")
        top.set(title=name, ylim=(-0.05, 1.05))
        bottom.set_xticks(list(at), ["none", *(f"{row['strength']:g}" for row in own[1:])], rotation=60, fontsize=8)
        bottom.set_xlabel(own[-1]["unit"])
    axes[0, 0].set_ylabel("share of windows flagged")
    axes[1, 0].set_ylabel("fall of the AUC")
    figure.tight_layout()
    return figure
