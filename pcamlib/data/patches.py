"""Patches: one split, opened with one call, whatever its file looks like.

patches = open_split("DIR", "train")          # memory-mapped uint8 (N, 96, 96, 3), labels, flags
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pcamlib.data import convert, scan
from pcamlib.data.layout import PATCH_SHAPE, Stored, find, inspect, read_labels
from pcamlib.data.staging import near
from pcamlib.errors import DataError, nearest
from pcamlib.files import digest, read_json

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Patches:
    """One split of PCam.

    Attributes:
        images: (N, 96, 96, 3) uint8, memory-mapped read-only.
        labels: (N,) uint8, 0 or 1 (1: tumour in the centre 32x32); None where the split has no y file.
        stored: how the source lies on disk.
    """

    split: str
    images: np.ndarray
    labels: np.ndarray | None
    stored: Stored

    def __len__(self) -> int:
        return len(self.images)

    @property
    def synthetic(self) -> dict[str, Any] | None:
        """The generator's settings where the file was generated; None for real tissue."""
        return self.stored.synthetic

    @cached_property
    def _scan(self) -> scan.Scan:
        return scan.scan(self.stored, log.info)

    @property
    def flags(self) -> np.ndarray:
        """(N,) uint8, bits of `convert.FLAGS`; computed in one pass on first use, then cached on disk."""
        return self._scan.flags

    @property
    def valid(self) -> np.ndarray:
        """(N,) bool: no NaN, nothing out of 0..255, neither all black nor all white."""
        return self.flags == 0

    @property
    def ids(self) -> np.ndarray:
        """(N, 20) uint8: SHA-1 of each patch's bytes, the id of a tile in the Kaggle version of PCam."""
        return self._scan.ids

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over pixels, flags and labels: equal content, equal fingerprint, wherever the file lies."""
        labels = None if self.labels is None else digest(self.labels.tolist())
        return digest([self._scan.pixels, digest(self.flags.tolist()), labels])

    def rows(
        self, drop: Sequence[str] | None = None, limit: int | None = None, clean: bool | Sequence[str] = False
    ) -> np.ndarray:
        """Row numbers that carry none of the flags in `drop` (None: all four), the first `limit` of them.

        Args:
            drop: names of `convert.FLAGS`.
            limit: rows at most.
            clean: rules of the audit whose rows are left out as well; True: every rule that it looked for.

        Returns:
            (M,) int64, ascending.

        Raises:
            DataError: `clean` where the data were not audited, or not for such a rule.
        """
        mask = sum(convert.FLAGS[name] for name in (convert.FLAGS if drop is None else drop))
        kept = (self.flags & mask) == 0
        if clean:
            found = self.audited
            for rule in found if clean is True else clean:
                if rule not in found:
                    raise DataError(f"{self.stored.path}: the audit did not look for '{rule}'{nearest(rule, found)}")
                kept[found[rule]] = False
        return np.flatnonzero(kept)[:limit]

    @property
    def raw(self) -> Patches:
        """The same split with its values as they are stored, NaN and values out of 0..255 included.

        Raises:
            DataError: the values are chunked or compressed, so that they cannot be mapped where they lie.
        """
        if self.stored.offset is None:
            raise DataError(f"{self.stored.path}: data.raw needs contiguous values; leave it out for the uint8 copy")
        return replace(self, images=self.stored.map())

    @property
    def audited(self) -> dict[str, list[int]]:
        """Rows that an audit would leave out, by rule; `pcam audit` writes them beside the scan.

        Raises:
            DataError: these patches and labels were not audited.
        """
        path = mask_path(self.stored)
        if path.is_file():
            mask = read_json(path)
            beside = {Path(file): key for file, key in mask.get("beside", {"": ""}).items()}
            unchanged = all(file.is_file() and convert.entry(file).name == key for file, key in beside.items())
            if unchanged and mask["fingerprint"] == self.fingerprint:
                return mask["rules"]
        raise DataError(f"{self.stored.path}: not audited as it is now; run `pcam audit {self.stored.path.parent}`")


def mask_path(stored: Stored) -> Path:
    """Where an audit keeps what it would leave out of a file.

    {"fingerprint": of the split, "beside": {file of another split: its cache key}, "rules": {rule: rows}}: what is a
    leak hangs on the other splits too.
    """
    return convert.entry(stored.path).with_suffix(".mask")


def header(folder: str | Path, split: str, *, labels: bool | None = None) -> tuple[Stored, np.ndarray | None]:
    """Headers of a split and its labels, without reading a pixel; arguments and errors as `open_split`."""
    path = find(folder, split, "x")
    try:
        source = find(folder, split, "y")
    except DataError:
        if labels or (labels is None and split != "test"):
            raise
        y = None
    else:
        y = read_labels(convert.unpack(source))
    stored = inspect(convert.unpack(path), "x")
    if y is not None and len(y) != stored.shape[0]:
        raise DataError(
            f"{path}: {stored.shape[0]:,} patches but {len(y):,} labels in the y file; they must match row by row"
        )
    return stored, y


def open_split(folder: str | Path, split: str, *, labels: bool | None = None) -> Patches:
    """Open one split of the official layout.

    Args:
        folder: where the official files lie.
        split: "train", "valid" or "test".
        labels: whether a y file must exist; None: for train and valid, not for test (the course hands out none).

    Raises:
        DataError: a missing, truncated or odd file; x and y of different length; labels other than 0 and 1.
    """
    stored, y = header(folder, split, labels=labels)
    if stored.offset is not None and stored.dtype == np.uint8:
        return Patches(split, replace(stored, path=near(stored.path)).map(), y, stored)
    found = scan.scan(stored, log.info)
    assert found.converted is not None
    images = np.memmap(near(found.converted), np.uint8, "r", shape=(stored.shape[0], *PATCH_SHAPE))
    patches = Patches(split, images, y, stored)
    patches.__dict__["_scan"] = found
    return patches


def release(images: np.ndarray) -> None:
    """Give the touched pages of a memory map back: they stay in the system's cache but leave this process's memory."""
    pages = getattr(images, "_mmap", None)
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def take(images: np.ndarray, rows: Any) -> np.ndarray:
    """A copy of `images[rows]`, after which the pages are given back: resident memory does not grow with the file."""
    copy = np.array(images[rows])
    release(images)
    return copy


def sample(patches: Patches, most: int) -> np.ndarray:
    """Up to `most` valid row numbers, evenly spaced, for statistics that need not read everything."""
    rows = patches.rows()
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]


def channel_statistics(patches: Patches, most: int = 8192) -> dict[str, Any]:
    """Mean and standard deviation of each colour channel, 0..255, over up to `most` valid patches.

    Returns:
        dict with `mean` and `std` (three floats each), `n` (patches read) and `split`. Only the train split's may
        normalise a model: anything else leaks.
    """
    rows = sample(patches, most)
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(rows), 256):
        block = take(patches.images, rows[start : start + 256]).reshape(-1, 3)
        for channel in range(3):
            counts[channel] += np.bincount(block[:, channel], minlength=256)
    levels = np.arange(256)
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(counts @ levels**2 / counts.sum(1) - mean**2)
    return {"mean": mean.tolist(), "std": std.tolist(), "n": len(rows), "split": patches.split}
