"""Figures of an audit: pictures of the rows concerned, sizes, estimates with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pcamlib.audit.findings import Split


class Shown(NamedTuple):
    """One patch of a gallery."""

    split: Split
    row: int
    title: str


def gallery(lines: Mapping[str, Sequence[Shown]], most: int = 10) -> tuple[Figure, dict[str, list[str]]]:
    """A line of patches for each name, the centre 32x32 marked; and what was shown, as text.

    Where there is nothing to show, the figure says so.
    """
    lines = {name: list(line)[:most] for name, line in lines.items() if line}
    width = max([len(line) for line in lines.values()] or [1])
    tall = 1.7 if any("\n" in shown.title for line in lines.values() for shown in line) else 1.5
    size = (1.25 * width + 0.6, tall * max(len(lines), 1))
    figure, axes = plt.subplots(max(len(lines), 1), width, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (name, patches) in zip(axes, lines.items(), strict=False):
        for axis, shown in zip(line, patches, strict=False):
            axis.imshow(shown.split.patches.images[shown.row])
            for start, side, colour in (
                (31.5, 32, "white"),
                (-0.5, 96, "0.7"),
            ):  # the centre; a frame for white patches
                axis.add_patch(plt.Rectangle((start, start), side, side, fill=False, color=colour, lw=0.6))
            axis.set_title(shown.title, size=6, pad=2)
        line[0].text(-0.06, 0.5, name, rotation=90, size=7, ha="right", va="center", transform=line[0].transAxes)
    figure.tight_layout(pad=0.4)
    if not lines:
        axes[0, 0].text(0.5, 0.5, "nothing found", size=9, ha="center", va="center")
    told = {name: [f"{s.split.name} {s.row}: {s.title}" for s in line] for name, line in lines.items()}
    return figure, told or {"nothing found": []}


def bars(values: Mapping[str, float], unit: str, line: tuple[str, float] | None = None) -> Figure:
    """Horizontal bars with their values; `line` is a named value to compare with."""
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(values) + 0.9))
    drawn = axes.barh(list(values), list(values.values()), color="#4c78a8", height=0.6)
    axes.bar_label(drawn, fmt="{:,.2f}", fontsize=8, padding=3)
    if line:
        axes.axvline(line[1], color="firebrick", lw=1.2, ls="--")
        axes.text(line[1], 1.01, f"{line[0]}: {line[1]:,.2f}", color="firebrick", size=8, ha="center", va="bottom",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel(unit)
    figure.tight_layout()
    return figure


def forest(rows: Sequence[Mapping[str, Any]], label: str, value: str, interval: str, xlabel: str, at: float) -> Figure:
    """Values with their intervals, one line a row; `at` is where nothing would be wrong."""
    rows = [row for row in rows if row[value] is not None]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 0.9))
    places = np.arange(len(rows))
    for place, row in zip(places, rows, strict=True):
        if row[interval] is not None:
            axes.plot(row[interval], [place, place], color="#4c78a8", lw=2)
        axes.plot(row[value], place, "o", color="#4c78a8")
    axes.axvline(at, color="0.4", lw=0.8, ls=":")
    axes.set_yticks(places, [str(row[label]) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    figure.tight_layout()
    return figure
