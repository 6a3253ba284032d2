"""The error explorer: widgets around `view.slice_view`, for JupyterLab and, as a page of its own, `make explore`.

    Explorer(predictions, features.of(patches), patches, model, vectors, on_save=keep)  # last line of a cell

Sliders act when they are let go. What is wrong with a choice is said in the widget, never as a traceback.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, get_args

import ipywidgets as widgets
import numpy as np

from pcamlib.data.patches import Patches, take
from pcamlib.errors import DataError, PcamError
from pcamlib.experiments.embedding import neighbours, saliency
from pcamlib.experiments.features import Features
from pcamlib.experiments.slices import Bound, Slice, independent
from pcamlib.experiments.view import Show, Spec, View, claim, picture, slice_view, standing
from pcamlib.models import Classifier
from pcamlib.training.evaluate import Predictions
from pcamlib.training.runs import Run, list_runs

CLASSES = ("normal", "tumour")
NEIGHBOURS = 6

#: The button of a tile lies over its picture, so that the picture itself is clicked.
STYLE = """<style>
.pcam-explorer td, .pcam-explorer th { padding: 1px 8px; text-align: right; line-height: 1.35; font-size: 12px }
.pcam-explorer table, .pcam-explorer figure { display: inline-block; vertical-align: top; margin: 0 16px 8px 0 }
.pcam-explorer figcaption { font-size: 11px; text-align: center; line-height: 1.3 }
.pcam-matrix td { min-width: 9em; border: 1px solid #8888 }
.pcam-matrix b { font-size: 130% }
.pcam-error { color: firebrick; font-weight: bold }
.pcam-tile { position: relative; width: 116px; height: 134px; overflow: hidden }
.pcam-tile img { width: 96px; height: 96px; margin: 4px auto 0 }
.pcam-tile button { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; padding: 100px 0 0;
  line-height: 1; font-size: 11px; background: transparent }
</style>"""


class Filter(widgets.HBox):
    """A feature to choose and the range of it to keep."""

    def __init__(self, features: Features, changed: Callable[[Any], None]) -> None:
        self._features, self._whole, self._digits = features, False, 0
        self.feature = widgets.Dropdown(options=["", *features.names], description="feature")
        self.range = widgets.FloatRangeSlider(continuous_update=False, layout={"width": "28em", "visibility": "hidden"})
        self.feature.observe(self._choose, "value")
        for widget in (self.feature, self.range):
            widget.observe(changed, "value")
        super().__init__([self.feature, self.range])
        self.add_class("pcam-filter")

    def _choose(self, change: Any) -> None:
        """Give the slider the feature's range in 100 to 1,000 steps, a power of ten each; a group or flag is a step."""
        name = self.feature.value
        values = self._features[name] if name else np.zeros(1)
        spread = float(np.ptp(values))
        self._whole = any(column.name == name and column.kind != "number" for column in self._features.columns)
        self._digits = 0 if self._whole or not spread else -math.floor(math.log10(spread / 100))
        step = 10.0**-self._digits
        low, high = (round(end / step) * step for end in (values.min() - step / 2, values.max() + step / 2))
        with self.range.hold_sync(), self.range.hold_trait_notifications():  # at once: no end may pass the other
            self.range.min, self.range.max, self.range.step, self.range.value = low, high, step, (low, high)
            self.range.readout_format = f".{max(0, self._digits)}f"
            self.range.disabled = not spread
        self.range.layout.visibility = "visible" if name else "hidden"

    @property
    def bounds(self) -> list[Bound]:
        """The one bound, or none where nothing is cut off.

        Raises:
            DataError: the feature is the same in every patch.
        """
        if not self.feature.value:
            return []
        if self.range.disabled:
            value = self._features[self.feature.value][0]
            raise DataError(f"{self.feature.value} is {value:g} in every patch: it makes no slice")
        low, high, least, most = (round(x, self._digits) for x in (*self.range.value, self.range.min, self.range.max))
        low = -math.inf if low <= least else low
        high = math.inf if high >= most else high + self._whole  # group g is g to g + 1
        return [] if math.isinf(low) and math.isinf(high) else [Bound(self.feature.value, low, high)]


class Explorer(widgets.VBox):
    """Threshold, slice and two features to choose; the confusion matrix, the mistakes, and one patch in large.

    Args:
        predictions: N of them, of a split.
        features: of that split; none may be the prediction or the label.
        patches: the split itself.
        model: for the saliency of the patch in large; without it there is none.
        embedding: (N, D) float32, in the order of the predictions, for nearest neighbours; likewise.
        on_save: takes the name, the `Spec` and the row of `view.claim`, and says what was saved where; without it
            nothing can be saved.
        slices: to choose from, by name.
        spec: what is shown first, and how many patches a page.

    Raises:
        DataError: the tables are not of these patches; a feature is the prediction or the label.
    """

    def __init__(
        self,
        predictions: Predictions,
        features: Features,
        patches: Patches,
        model: Classifier | None = None,
        embedding: np.ndarray | None = None,
        on_save: Callable[[str, Spec, dict[str, Any]], str] | None = None,
        slices: Mapping[str, Slice] = {},
        spec: Spec | None = None,
    ) -> None:
        if patches.fingerprint != predictions.fingerprint:
            raise DataError(f"these patches of split {patches.split} are not those that were predicted; open their own")
        if embedding is not None and len(embedding) != len(predictions.index):
            raise DataError(f"{len(embedding):,} embedded patches, but {len(predictions.index):,} predictions")
        self.predictions, self.features = predictions, features.of(predictions)
        independent(self.features, predictions)
        self.patches, self.model, self.embedding, self.on_save = patches, model, embedding, on_save
        self.view: View | None = None
        first = spec or Spec()
        self._size = first.size

        self.threshold = widgets.FloatSlider(
            first.threshold,
            min=0,
            max=1,
            step=0.01,
            readout_format=".3f",
            description="threshold",
            continuous_update=False,
        )
        named = {"every patch": Slice(), str(first.bounds): first.bounds, **slices}
        self.slice = widgets.Dropdown(options=list(named.items()), value=first.bounds, description="slice")
        self.show = widgets.ToggleButtons(options=get_args(Show), value=first.show)
        self.filters = [Filter(self.features, self._draw) for _ in range(2)]
        self.page = widgets.BoundedIntText(1, min=1, max=1, description="page", layout={"width": "12em"})
        self.matrix, self.pages, self.large, self.said = (widgets.HTML() for _ in range(4))
        self.tiles = [self._tile(place) for place in range(first.size)]
        self.name = widgets.Text(placeholder="a name for this slice", layout={"width": "28em"})
        self.save = widgets.Button(description="Save slice", disabled=on_save is None)
        for widget in (self.threshold, self.slice, self.show):
            widget.observe(self._draw, "value")
        self.page.observe(self._turn, "value")
        self.save.on_click(self._save)
        flow = {"flex_flow": "row wrap"}
        super().__init__([
            widgets.HTML(STYLE), widgets.HBox([self.threshold, self.slice], layout=flow), *self.filters, self.matrix,
            widgets.HBox([self.show, self.page, self.pages], layout=flow), widgets.HBox(self.tiles, layout=flow),
            self.large, widgets.HBox([self.name, self.save]), self.said,
        ])  # fmt: skip
        for name, widget in {
            "explorer": self,
            "threshold": self.threshold,
            "slice": self.slice,
            "name": self.name,
        }.items():
            widget.add_class(f"pcam-{name}")
        self._draw()

    @property
    def spec(self) -> Spec:
        """What is chosen now; bounds of one feature are made one.

        Raises:
            DataError: a chosen feature is the same in every patch.
        """
        bounds: dict[str, Bound] = {}
        for name, low, high in [*self.slice.value.bounds, *self.filters[0].bounds, *self.filters[1].bounds]:
            old = bounds.get(name, Bound(name))
            bounds[name] = Bound(name, max(low, old.low), min(high, old.high))
        return Spec(self.threshold.value, Slice(tuple(bounds.values())), self.show.value, self._size)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """What is wrong within the block is said below the widgets."""
        self.said.value = ""
        try:
            yield
        except (PcamError, OSError) as error:
            self.said.value = f'<p class="pcam-error">{escape(str(error))}</p>'

    def _draw(self, change: Any = None) -> None:
        self.view, self.matrix.value, self.large.value = None, "", ""
        with self._speaking():
            self.view = slice_view(self.predictions, self.features, self.spec)
            self.matrix.value = _matrix(self.view, self.patches.synthetic is not None)
        with self.page.hold_trait_notifications():
            self.page.max, self.page.value = self.view.pages if self.view else 1, 1
        self._turn()

    def _turn(self, change: Any = None) -> None:
        """Show the page of mistakes that is chosen."""
        shown = self.view.page(self.page.value - 1) if self.view else np.empty(0, int)
        found = len(self.view.mistakes) if self.view else 0
        self.pages.value = f"of {self.page.max}: {found:,} {self.show.value}, the most confident first"
        for place, tile in enumerate(self.tiles):
            tile.layout.display = None if place < len(shown) else "none"
            if place < len(shown):
                row, probability = (
                    column[shown[place]] for column in (self.predictions.index, self.predictions.probability)
                )
                tile.children[0].value = picture(take(self.patches.images, row))
                tile.children[1].description = f"row {row}: {probability:.3f}"

    def _tile(self, place: int) -> widgets.VBox:
        button = widgets.Button(tooltip="show this patch in large")
        button.on_click(partial(self._pick, place))
        tile = widgets.VBox([widgets.Image(format="png"), button])
        tile.add_class("pcam-tile")
        return tile

    def _pick(self, place: int, button: Any) -> None:
        if self.view:
            self.enlarge(int(self.view.page(self.page.value - 1)[place]))

    def enlarge(self, position: int) -> None:
        """Show a patch in large: what it is, its features, saliency and neighbours."""
        image = take(self.patches.images, self.predictions.index[position])
        figures = [_figure(picture(image, 3), self._about(position))]
        if self.model is not None:
            figures.append(_figure(picture(image, 3, saliency(self.model, image)), "what moves the model most"))
        rows = "".join(
            f"<tr><th>{escape(row['feature'])}<td>{row['value']:.4g}<td>{escape(row['unit'])}"
            f"<td>{_number(row['percentile'], '.0f')}"
            for row in standing(self.features, position)
        )
        table = f"<table><tr><th>feature<th>value<th>unit<th>percentile{rows}</table>"
        near: Sequence[int] | np.ndarray = (
            [] if self.embedding is None else neighbours(self.embedding, position, NEIGHBOURS)
        )
        similar = [
            _figure(picture(take(self.patches.images, self.predictions.index[at])), self._about(at)) for at in near
        ]
        title = "<p>Nearest to it, as the model sees patches:</p>" if similar else ""
        self.large.value = f'<div class="pcam-large" data-row="{self.predictions.index[position]}">' + (
            f"{''.join(figures)}{table}{title}{''.join(similar)}</div>"
        )

    def _about(self, position: int) -> str:
        p = self.predictions
        called = CLASSES[int(p.probability[position] >= self.threshold.value)]
        return (
            f"row {p.index[position]}: {CLASSES[p.label[position]]}<br>called {called} ({p.probability[position]:.3f})"
        )

    def _save(self, button: Any) -> None:
        with self._speaking():
            if self.view is None or self.on_save is None:
                raise DataError("not saved: there is no slice to save")
            row = claim(self.name.value, self.view, self.predictions, self.features)
            said = self.on_save(row["name"], self.view.spec, row)
            self.said.value = f'<p class="pcam-saved">{escape(said)}</p>'


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _figure(png: bytes, caption: str) -> str:
    source = base64.b64encode(png).decode()
    return f'<figure><img src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'


def _matrix(view: View, synthetic: bool) -> str:
    """The confusion matrix, the rates, the rest and the constants; exact numbers stand in data attributes."""
    cells = [
        f'<td data-cell="{name}" data-count="{view.counts[name]}" data-low="{cell.low}" data-high="{cell.high}">'
        f"<b>{view.counts[name]:,}</b><br>{cell}"
        for name, cell in view.cells.items()
    ]
    rates = "".join(f'<tr data-rate="{name}"><th>{name}<td>{rate}' for name, rate in view.rates.items())
    if view.rest:
        rates += f"<tr><th>error of the rest,<br>at this share of tumour<td>{view.rest['matched']:.3f}"
        rates += (
            f"<tr><th>difference<td>{view.rest['excess']:+.3f} ({view.rest['low']:+.3f} to {view.rest['high']:+.3f})"
        )
    answers = "".join(
        f"<tr><th>{row['answer']}<td>{row['accuracy']:.3f}<td>{_number(row['F2'], '.3f')}" for row in view.answers
    )
    kind = "synthetic patches" if synthetic else "patches"
    warning = f'<p class="pcam-error">{view.warning}</p>' if view.warning else ""
    return (
        f'<div class="pcam-view" data-n="{view.n}" data-threshold="{view.spec.threshold}">'
        f"<p><b>{escape(str(view.spec.bounds))}</b>: {view.n:,} of {len(view.inside):,} {kind} "
        f"(95 % intervals in brackets)</p>{warning}"
        f'<table class="pcam-matrix"><tr><th><th>called normal<th>called tumour<tr><th>is normal{cells[0]}{cells[1]}'
        f"<tr><th>is tumour{cells[2]}{cells[3]}</table><table>{rates}</table>"
        f"<table><tr><th>answer<th>accuracy<th>F2{answers}</table></div>"
    )


def newest(folder: Path, fingerprint: str) -> Run | None:
    """The run below `folder` that finished last of those that predicted the validation patches with `fingerprint`."""
    done = [run for run in list_runs(folder) if run.success and run.best.is_file()]
    done = [run for run in done if run.predictions().fingerprint == fingerprint]
    return max(done, key=lambda run: (run.path / "SUCCESS").stat().st_mtime, default=None)
