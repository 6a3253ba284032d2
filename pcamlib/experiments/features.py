"""What can be seen of a patch without a model: one row of numbers each, to define slices by.

found = features.of(open_split("DIR", "valid"))      # computed once, then kept beside the data
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.cluster.vq import kmeans2, vq

from pcamlib.data import measure
from pcamlib.data.convert import FLAGS
from pcamlib.data.patches import Patches
from pcamlib.data.slides import read_slides
from pcamlib.errors import DataError, nearest
from pcamlib.training.evaluate import Predictions

#: number: ordered; group: a class without order, such as a slide; flag: 0 or 1.
Kind = Literal["number", "group", "flag"]


@dataclass(frozen=True)
class Column:
    """One feature: its name, unit and kind, and what it is."""

    name: str
    unit: str
    kind: Kind
    about: str


@dataclass(frozen=True, eq=False)
class Features:
    """A table of features, one row a patch of a split.

    Attributes:
        split: name of the split.
        fingerprint: of the patches measured.
        index: (N,) int64, row in the split's file.
        columns: F features.
        values: (N, F) float32, finite.

    Raises:
        DataError: a NaN or an infinity, or a shape that does not fit.
    """

    split: str
    fingerprint: str
    index: np.ndarray
    columns: tuple[Column, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.index), len(self.columns)):
            raise DataError(f"features are {self.values.shape}, not {len(self.index)} rows of {len(self.columns)}")
        odd = np.argwhere(~np.isfinite(self.values))
        if len(odd):
            row, column = odd[0]
            raise DataError(
                f"feature '{self.columns[column].name}' of row {self.index[row]} of split {self.split} is "
                f"{self.values[row, column]} ({len(odd):,} such values); leave these rows out, or measure them again"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, in their order."""
        return tuple(column.name for column in self.columns)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, name: str) -> np.ndarray:
        """(N,) float32: the values of one feature.

        Raises:
            DataError: no such feature.
        """
        if name not in self.names:
            raise DataError(f"no feature '{name}'{nearest(name, self.names)}")
        return self.values[:, self.names.index(name)]

    def take(self, positions: np.ndarray) -> Features:
        """The rows at `positions` (or where a bool mask is true) of this table."""
        return Features(self.split, self.fingerprint, self.index[positions], self.columns, self.values[positions])

    def of(self, predictions: Predictions) -> Features:
        """The rows that were predicted, in the order of the predictions.

        Raises:
            DataError: the predictions are of another split, of other patches, or of rows that were not measured.
        """
        if predictions.split != self.split or predictions.fingerprint != self.fingerprint:
            raise DataError(
                f"features are of split {self.split} ({self.fingerprint[:8]}), predictions of {predictions.split} "
                f"({predictions.fingerprint[:8]}): not the same patches"
            )
        at = np.searchsorted(self.index, predictions.index)
        missing = (at >= len(self)) | (self.index[np.minimum(at, len(self) - 1)] != predictions.index)
        if missing.any():
            raise DataError(
                f"{int(missing.sum()):,} of {len(missing):,} predicted rows have no features, the first is row "
                f"{predictions.index[missing][0]}; measure the whole split"
            )
        return self.take(at)


_STAINS = 4  # clusters
_SAMPLE = 8192  # rows that the clusters are fitted to
_ON_LABELS = ("labels", "conflicts")  # rules of the audit that judge labels: no slice may be defined by those


def of(patches: Patches, slides: np.ndarray | None = None) -> Features:
    """The features of a whole split: the numbers of `measure.py`, stain cluster, slide, flags.

    The pixels are read once, in a streaming pass whose result stays in the cache beside the data.

    Args:
        patches: an opened split.
        slides: (N,) name of each row's slide; None where unknown.

    Returns:
        18 numbers, 7 of them "centre_..."; groups "stain" (k-means on the mean stain densities, numbered from the
        palest haematoxylin; each split has its own) and "slide" (numbered by name); flags "flag_..." as in
        `convert.FLAGS` and "audit_..." by the audit's rules. A group or flag that is equal in all rows is left out.

    Raises:
        DataError: the file cannot be read, or there are more or fewer slides than rows.
        PcamError: the cache cannot be written.
    """
    values, density = measure.measured(patches.stored)
    numbers = [Column(name, unit, "number", about) for name, (unit, about) in measure.MEASURED.items()]
    numbers += [
        Column(f"centre_{column.name}", column.unit, "number", f"{column.about}; centre 32x32 minus its surround")
        for column in numbers
        if column.name in measure.CENTRED
    ]
    found = list(zip(numbers, values.T, strict=True))

    def add(name: str, kind: Kind, about: str, column: np.ndarray) -> None:
        if (column != column[0]).any():
            found.append((Column(name, "", kind, about), column))

    add("stain", "group", "cluster of similar haematoxylin, eosin and residual density", _stain(density, patches.valid))
    if slides is None:
        home = patches.stored.path.parent  # of a file that was unpacked, the cache
        home = home.parent if home.name == ".pcam-cache" else home
        slides = read_slides(home, patches.split, len(patches))
    if slides is not None:
        if len(slides) != len(patches):
            raise DataError(f"{len(slides):,} slide names for {len(patches):,} patches of split {patches.split}")
        names, number = np.unique(slides, return_inverse=True)
        add("slide", "group", f"slide, from 0 ({names[0]}) to {len(names) - 1} ({names[-1]})", number)
    for name, bit in FLAGS.items():
        add(f"flag_{name}", "flag", f"flagged '{name}' when it was read", patches.flags & bit > 0)
    with suppress(DataError):  # not audited
        for rule, rows in patches.audited.items():
            if rule not in _ON_LABELS:
                add(
                    f"audit_{rule}",
                    "flag",
                    f"found by the audit's rule '{rule}'",
                    np.isin(np.arange(len(values)), rows),
                )
    columns, arrays = zip(*found, strict=True)
    table = np.stack(arrays, 1).astype(np.float32)
    return Features(patches.split, patches.fingerprint, np.arange(len(table)), columns, table)


def _stain(density: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(N,) clusters, fitted to rows evenly spaced by haematoxylin and started from equal parts of them: no drawing."""
    order = np.flatnonzero(valid)[np.argsort(density[valid, 0], kind="stable")]
    some = density[order[np.linspace(0, len(order) - 1, min(_SAMPLE, len(order))).astype(int)]]
    if len(np.unique(some, axis=0)) < _STAINS:
        return np.zeros(len(density), int)
    start = np.stack([part.mean(0) for part in np.array_split(some, _STAINS)])
    centres, _ = kmeans2(some, start, iter=50, minit="matrix")  # scikit-learn's sums hang on its threads
    return vq(density, centres[np.argsort(centres[:, 0])])[0]
