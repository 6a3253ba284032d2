"""What the explorer shows of one slice at one threshold: pure functions, which tests and headless runs call as well.

spec = Spec(threshold=0.4, bounds=Slice((Bound("blur", high=2.0),)), show="false positives")
view = slice_view(predictions, found.of(predictions), spec)
plot_view(view)
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from pcamlib.errors import DataError, nearest
from pcamlib.experiments.features import Features
from pcamlib.experiments.slices import LEAST, Slice, check, describe, excess, wilson
from pcamlib.training import metrics
from pcamlib.training.evaluate import Predictions

FRAME = "lime"  # of the centre 32x32: no tissue is so green
Show = Literal["false negatives", "false positives"]


@dataclass(frozen=True)
class Spec:
    """What to look at: patches within `bounds`, called tumour from `threshold` on; which mistakes, how many a page.

    Raises:
        DataError: another kind of mistake, or an empty page.
    """

    threshold: float = 0.5
    bounds: Slice = field(default_factory=Slice)
    show: Show = "false negatives"
    size: int = 12

    def __post_init__(self) -> None:
        if self.show not in get_args(Show):
            raise DataError(f"no mistakes called '{self.show}'{nearest(self.show, get_args(Show))}")
        if self.size < 1:
            raise DataError(f"{self.size} patches a page; show at least one")


class Rate(NamedTuple):
    """A share of `n` patches with its 95 % interval (Wilson); of none, the value is None and the interval 0 to 1."""

    value: float | None
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return "none" if self.value is None else f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, eq=False)
class View:
    """A slice at a threshold.

    Attributes:
        spec: what was asked for.
        inside: (N,) bool, in the order of the predictions.
        counts: `tn`, `fp`, `fn`, `tp` inside.
        rates: `recall`, `specificity`, `precision` and `error` inside.
        rest: `slices.excess`: the error of the other patches, matched in their share of tumour; None where there are
            none of a class that the slice holds.
        answers: rows of `answer`, `accuracy`, `F2`: the model and both constants; F2 is None without tumour and calls.
        mistakes: (M,) int64 positions inside the predictions of what `spec.show` names, most confident first.
        warning: why nothing may be claimed of it; "" where something may.
    """

    spec: Spec
    inside: np.ndarray
    counts: dict[str, int]
    rates: dict[str, Rate]
    rest: dict[str, float] | None
    answers: list[dict[str, Any]]
    mistakes: np.ndarray
    warning: str

    @property
    def n(self) -> int:
        """Patches inside."""
        return sum(self.counts.values())

    @property
    def cells(self) -> dict[str, Rate]:
        """Each of `counts` as a share of its class."""
        tn, fp, fn, tp = self.counts.values()
        return {
            name: _rate(count, of)
            for (name, count), of in zip(self.counts.items(), [tn + fp] * 2 + [fn + tp] * 2, strict=True)
        }

    @property
    def pages(self) -> int:
        """How many pages the mistakes fill, at least one."""
        return max(1, math.ceil(len(self.mistakes) / self.spec.size))

    def page(self, number: int = 0) -> np.ndarray:
        """Positions on one page of mistakes, counted from 0."""
        return self.mistakes[number * self.spec.size :][: self.spec.size]

    @property
    def series(self) -> dict[str, list[float | None]]:
        """The numbers of `plot_view`: counts, each rate with its interval, the constants, the rest."""
        found: dict[str, list[float | None]] = {"tn, fp, fn, tp": list(self.counts.values())}
        found |= {name: list(rate[:3]) for name, rate in self.rates.items()}
        found |= {f"F2, {row['answer']}": [row["F2"]] for row in self.answers}
        return found | {"error of the rest, matched": [self.rest["matched"] if self.rest else None]}


def slice_view(predictions: Predictions, features: Features, spec: Spec) -> View:
    """Everything that a redraw needs, but for the pixels.

    Args:
        features: of the predictions' patches, in their order (`Features.of`).

    Raises:
        DataError: tables of other patches, a threshold outside 0..1, a probability that is none, an unknown feature, a
            feature that is the prediction or the label, an empty range.
    """
    check(features, predictions, spec.threshold)
    if not np.isfinite(predictions.probability).all():
        row = predictions.index[~np.isfinite(predictions.probability)][0]
        raise DataError(f"the probability of row {row} of split {predictions.split} is no number; evaluate again")
    inside, tumour = spec.bounds.mask(features), predictions.label == 1
    called = predictions.probability >= spec.threshold
    counts = metrics.confusion(predictions.label[inside], predictions.probability[inside], spec.threshold)
    tn, fp, fn, tp = counts.values()
    n = tn + fp + fn + tp
    shares = {"recall": (tp, tp + fn), "specificity": (tn, tn + fp), "precision": (tp, tp + fp), "error": (fp + fn, n)}
    rates = {name: _rate(*share) for name, share in shares.items()}
    missed = spec.show == "false negatives"
    mistakes = np.flatnonzero(inside & (tumour & ~called if missed else ~tumour & called))
    order = np.argsort(predictions.probability[mistakes] * (1 if missed else -1), kind="stable")
    rest = excess(inside, predictions.label, called != tumour) if n else {"matched": math.nan}
    answers = {"model": (tn, fp, fn, tp), "always tumour": (0, tn + fp, 0, tp + fn),
               "always normal": (tn + fp, 0, tp + fn, 0)}  # fmt: skip
    return View(
        spec, inside, counts, rates,
        None if math.isnan(rest["matched"]) else rest,
        [_answer(name, *cells) for name, cells in answers.items()] if n else [],
        mistakes[order],
        "" if n >= LEAST else f"{n} patches are too few to claim anything: at least {LEAST} are needed",
    )  # fmt: skip


def _rate(hits: int, of: int) -> Rate:
    return Rate(hits / of if of else None, *wilson(hits, of), of)


def _answer(name: str, tn: int, fp: int, fn: int, tp: int) -> dict[str, Any]:
    f2 = 5 * tp / (5 * tp + 4 * fn + fp) if tp + fn + fp else None
    return {"answer": name, "accuracy": (tp + tn) / (tn + fp + fn + tp), "F2": f2}


def claim(name: str, view: View, predictions: Predictions, features: Features) -> dict[str, Any]:
    """The slice in view as a row to keep: its name, the threshold, and `slices.describe`.

    Raises:
        DataError: no name; every patch is inside, or fewer than `LEAST` are.
    """
    if not name.strip():
        raise DataError("not saved: give the slice a name first")
    if view.inside.all():
        raise DataError("not saved: every patch is inside; choose a slice, or narrow the range of a feature")
    row = describe(view.spec.bounds, features, predictions, view.spec.threshold)
    return {"name": name.strip(), "threshold": view.spec.threshold, **row}


def standing(features: Features, position: int) -> list[dict[str, Any]]:
    """Where one patch stands in its split: rows of `feature`, `value`, `unit` and `percentile` (None without order)."""
    below = (features.values < features.values[position]).mean(0)
    same = (features.values == features.values[position]).mean(0)
    return [
        {
            "feature": column.name,
            "value": float(value),
            "unit": column.unit,
            "percentile": 100 * float(low + equal / 2) if column.kind == "number" else None,
        }
        for column, value, low, equal in zip(features.columns, features.values[position], below, same, strict=True)
    ]


def picture(image: np.ndarray, scale: int = 1, heat: np.ndarray | None = None) -> bytes:
    """A patch as PNG, with its centre 32x32 framed.

    Args:
        image: (96, 96, 3) uint8.
        scale: screen pixels a side of one of the patch's.
        heat: (96, 96) >= 0, laid over the patch, the stronger the brighter; the strongest hundredth is all one.
    """
    if heat is not None:
        top = np.quantile(heat[heat > 0], 0.99) if heat.any() else 1.0  # a few pixels would outshine the rest
        share = np.minimum(heat / top, 1)
        colour = 255 * colormaps["inferno"](share)[..., :3]
        image = (image + 0.7 * share[..., None] * (colour - image)).astype(np.uint8)
    drawn = Image.fromarray(image).resize((96 * scale, 96 * scale), Image.Resampling.NEAREST)
    ImageDraw.Draw(drawn).rectangle((32 * scale - 1, 32 * scale - 1, 64 * scale, 64 * scale), outline=FRAME)
    packed = io.BytesIO()
    drawn.save(packed, "png", compress_level=1)
    return packed.getvalue()


def plot_view(view: View) -> Figure:
    """The confusion matrix beside the rates with their intervals, the constants and the rest."""
    figure, (matrix, axis) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(1, 1.8))
    shares = [cell.value or 0.0 for cell in view.cells.values()]
    matrix.imshow(np.reshape(shares, (2, 2)), cmap="Blues", vmin=0, vmax=1)
    for place, (name, cell) in enumerate(view.cells.items()):
        matrix.text(place % 2, place // 2, f"{view.counts[name]:,}\n{cell.value or 0:.1%}\n{cell.low:.1%} to "
                    f"{cell.high:.1%}", ha="center", va="center", size=8,
                    color="white" if shares[place] > 0.6 else "black")  # fmt: skip
    matrix.set_xticks([0, 1], ["normal", "tumour"])
    matrix.set_yticks([0, 1], ["normal", "tumour"], rotation=90, va="center")
    matrix.set(xlabel="called", ylabel="is")
    for place, rate in enumerate(view.rates.values()):
        if rate.value is not None:
            axis.errorbar(rate.value, place, xerr=[[rate.value - rate.low], [rate.high - rate.value]], fmt="o",
                          color="C0", capsize=3, label="model, 95 %" if not place else None)  # fmt: skip
    for answer, mark in zip(view.answers, "oxs", strict=False):
        scores = (1 - answer["accuracy"], answer["F2"]) if mark != "o" else (None, answer["F2"])
        points = [(score, place) for place, score in enumerate(scores, len(view.rates) - 1) if score is not None]
        axis.plot(*zip(*points, strict=True), mark, color="C0" if mark == "o" else "firebrick", mfc="none",
                  label=None if mark == "o" else answer["answer"])  # fmt: skip
    if view.rest:
        axis.plot(view.rest["matched"], len(view.rates) - 1, "d", color="0.3", label="the rest, same share of tumour")
    axis.set_yticks(range(len(view.rates) + 1), [*view.rates, "F2"])
    axis.set(xlim=(-0.03, 1.03), ylim=(len(view.rates) + 0.6, -0.6), xlabel="share")
    if view.n:
        axis.legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    figure.suptitle(f"{view.spec.bounds}; threshold {view.spec.threshold:g}; {view.n:,} patches", size=10)
    if view.warning:
        figure.text(0.5, 0.0, view.warning, ha="center", va="top", color="firebrick", size=9)
    figure.tight_layout()
    return figure


def plot_gallery(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 6) -> Figure:
    """Patches in lines of `columns`, each below its title, the centre 32x32 framed; of none, a figure that says so."""
    lines = max(1, math.ceil(len(images) / columns))
    figure, axes = plt.subplots(lines, columns, figsize=(1.4 * columns, 1.7 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image)
        axis.add_patch(plt.Rectangle((31.5, 31.5), 32, 32, fill=False, color=FRAME, lw=0.8))
        axis.set_title(title, size=7, pad=2)
    if not len(images):
        figure.text(0.5, 0.5, "no such mistakes", size=9, ha="center", va="center")
    figure.tight_layout(pad=0.4)
    return figure
