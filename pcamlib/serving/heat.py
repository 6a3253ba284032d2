"""A heat map: where in a picture the tiles look like tumour, beside the picture itself.

Each tile colours the square that is its own, `step` pixels around its centre. A patch's label speaks of its centre
32x32, so that only steps of 32 judge every pixel, for nine times the work of steps of 96.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from pcamlib.data.layout import SIDE
from pcamlib.files import atomic_path
from pcamlib.serving.inputs import Piece

_DOTS = 8  # of the picture a tile and side: memory is 200 bytes a tile, not 27 kB


class Heat:
    """Tiles as they come.

    Args:
        step: pixels from tile to tile.
    """

    def __init__(self, step: int) -> None:
        self.step, self.at, self.values, self.small = step, [], [], []  # type: ignore[var-annotated]

    def add(self, piece: Piece, confidence: np.ndarray) -> None:
        """Tiles of one piece and (K,) calibrated probabilities."""
        dots = (SIDE - self.step) // 2 + ((np.arange(_DOTS) + 0.5) * self.step / _DOTS).astype(int)
        self.at.append(piece.where[:, 1:])
        self.values.append(confidence)
        self.small.append(piece.images[:, dots[:, None], dots])

    def maps(self) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float, float]]:
        """(H, W, 3) uint8 picture, (H, W) probability, and their left, right, bottom and top edges in pixels.

        A last row or column that was moved back covers what it shares with the one before it.
        """
        at, values, small = (np.concatenate(one) for one in (self.at, self.values, self.small))
        first, edge = at.min(0), (SIDE - self.step) // 2
        places = np.rint((at - first) * _DOTS / self.step).astype(int)
        width, height = places.max(0) + _DOTS
        picture, heat = np.full((height, width, 3), 255, np.uint8), np.full((height, width), np.nan, np.float32)
        for (x, y), value, tile in zip(places.tolist(), values.tolist(), small, strict=True):
            heat[y : y + _DOTS, x : x + _DOTS] = value
            picture[y : y + _DOTS, x : x + _DOTS] = tile
        (left, top), (right, bottom) = first + edge, at.max(0) + edge + self.step
        return picture, heat, (float(left), float(right), float(bottom), float(top))

    def draw(self, path: Path, cut: float, about: str) -> None:
        """Write the PNG, atomically.

        Args:
            path: of the PNG.
            cut: calibrated probability from which a tile is called tumour, marked in the scale.
            about: where the answers come from, written below.
        """
        from matplotlib.figure import Figure  # half a second that nobody waits for without a map

        picture, heat, extent = self.maps()
        figure = Figure(figsize=(13, 6), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        left.imshow(picture, extent=extent, interpolation="nearest")
        shown = right.imshow(heat, extent=extent, interpolation="nearest", cmap="magma", vmin=0, vmax=1)
        scale = figure.colorbar(shown, ax=right, label="calibrated probability of tumour")
        scale.ax.axhline(cut, color="deepskyblue", lw=2)
        left.set_title("picture, by samples")
        right.set_title(f"{sum(map(len, self.values)):,} tiles; blue line: threshold")
        figure.supxlabel("\n".join(textwrap.wrap(about, 140)), fontsize=8)
        with atomic_path(path) as part:
            figure.savefig(part, format="png", dpi=150)
