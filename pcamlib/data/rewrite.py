"""Writes a changed copy of a data set in one streaming pass, and remembers what was changed.

`Plan` notes for each row where it comes from, its label and what is done to its pixels; `flaws.py` holds the changes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pcamlib.data.layout import PATCH_SHAPE, SPLITS, SYNTHETIC, inspect, split_path
from pcamlib.errors import DataError
from pcamlib.files import atomic_path, read_json, write_json

BLOCK = 256  # rows in memory at a time: 27 MiB as float32
Edit = Callable[[np.ndarray, int], np.ndarray]  # (float32 (96,96,3) patch, position in the plant's rows) -> patch


@dataclass
class Truth:
    """What was planted: `split/kind` -> rows (n,), or (n, 2) pairs (original, copy), int64."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, {kind: rows.tolist() for kind, rows in self.rows.items()})

    @classmethod
    def load(cls, path: str | Path) -> Truth:
        """Read what `save` wrote."""
        return cls({kind: np.array(rows, np.int64) for kind, rows in read_json(path).items()})


class Plan:
    """A data set to be written: for each row where it comes from, its label, and what is done to its pixels.

    Attributes:
        origin: by split, (N, 2) int64: number of the source split, row in it.
        labels: by split, (N,) uint8.
        truth: grows with each plant.

    Raises:
        DataError: no split in `source`, or files that do not fit the layout.
    """

    def __init__(self, source: str | Path, *, seed: int) -> None:
        self.source, self.rng, self.truth = Path(source), np.random.default_rng(seed), Truth()
        self.origin: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}
        self.free: dict[str, np.ndarray] = {}
        self.edits: dict[str, dict[int, tuple[Edit, int]]] = {}
        for number, split in enumerate(SPLITS):
            if split_path(source, split, "x").exists():
                count = inspect(split_path(source, split, "x"), "x").shape[0]
                inspect(split_path(source, split, "y"), "y")
                with h5py.File(split_path(source, split, "y")) as handle:
                    labels = handle["y"][:].reshape(-1).astype(np.uint8)
                if len(labels) != count:
                    raise DataError(f"{source}: {split} has {count} patches but {len(labels)} labels")
                self._set(split, np.stack([np.full(count, number), np.arange(count)], 1), labels)
        if not self.origin:
            raise DataError(f"{source}: no official files here; generate or fetch them first")

    def _set(self, split: str, origin: np.ndarray, labels: np.ndarray) -> None:
        self.origin[split], self.labels[split] = origin, labels
        self.free[split], self.edits[split] = np.ones(len(labels), bool), {}

    def of(self, split: str) -> np.ndarray:
        """The labels of a split; a DataError where the source has no such split."""
        if split not in self.labels:
            raise DataError(f"{self.source}: no {split} split here; found {', '.join(self.labels)}")
        return self.labels[split]

    def keep(self, split: str, rows: np.ndarray) -> None:
        """Leave out all rows but these, before anything is planted."""
        assert self.free[split].all(), "rows would be renumbered under a plant"
        self._set(split, self.origin[split][rows], self.labels[split][rows])

    def draw(self, split: str, amount: float, label: int | None = None) -> np.ndarray:
        """Untouched rows, ascending, marked as touched: a count, or below 1 a share of all rows of the split.

        Raises:
            DataError: fewer untouched rows (of this label) are left.
        """
        labels = self.of(split)
        candidates = np.flatnonzero(self.free[split] & ((labels == label) if label is not None else True))
        count = round(amount * len(labels) if amount < 1 else amount)
        if count > len(candidates):
            raise DataError(
                f"{self.source}: {count} rows of {split} to spoil, but only {len(candidates)} are untouched"
            )
        rows = np.sort(self.rng.choice(candidates, count, replace=False))
        self.free[split][rows] = False
        return rows

    def plant(
        self, split: str, kind: str, rows: np.ndarray, edit: Edit | None = None, source: str | None = None
    ) -> None:
        """Note the truth about rows, and what happens to their pixels; of pairs the second is edited.

        The key is `split/kind`, or `source>split/kind` for copies that come from another split.
        """
        key = f"{split}/{kind}" if source in (None, split) else f"{source}>{split}/{kind}"
        self.truth.rows[key] = np.concatenate([self.truth.rows[key], rows]) if key in self.truth.rows else rows
        if edit is not None:
            self.edits[split].update({int(row): (edit, i) for i, row in enumerate(np.atleast_2d(rows.T)[-1])})

    def write(
        self, dest: str | Path, *, float32: tuple[str, ...] = (), unlabelled: tuple[str, ...] = (), meta: bool = True
    ) -> Truth:
        """Stream every split to `dest` in the official layout, then `truth.json`, which marks it as whole.

        Args:
            dest: folder without data, or one written by this function before.
            float32: splits whose x is written as float32; the others are uint8.
            unlabelled: splits without a y file.
            meta: write meta files where the source has them for every split.

        Raises:
            DataError: `dest` holds data that was not written here.
        """
        dest = Path(dest)
        if dest.resolve() == self.source.resolve():
            raise DataError(f"{dest}: is the source; choose another folder")
        if not (dest / "truth.json").exists() and any(split_path(dest, split, "x").exists() for split in SPLITS):
            raise DataError(f"{dest}: holds data already; choose another folder")
        for split in self.origin:
            dtype = np.float32 if split in float32 else np.uint8
            with h5py.File(split_path(self.source, split, "x")) as handle:
                about = {name: handle.attrs[name] for name in (SYNTHETIC,) if name in handle.attrs}
            with atomic_path(split_path(dest, split, "x")) as part, h5py.File(part, "w") as handle:
                handle.attrs.update(about)
                self._pixels(split, handle.create_dataset("x", (len(self.origin[split]), *PATCH_SHAPE), dtype))
            if split not in unlabelled:
                with atomic_path(split_path(dest, split, "y")) as part, h5py.File(part, "w") as handle:
                    handle.attrs.update(about)
                    handle["y"] = self.labels[split].reshape(-1, 1, 1, 1)
        if meta and all(split_path(self.source, split, "meta").exists() for split in self.origin):
            self._meta(dest)
        self.truth.save(dest / "truth.json")
        return self.truth

    def _pixels(self, split: str, out: Any) -> None:
        with ExitStack() as stack:
            sources = {
                SPLITS.index(name): stack.enter_context(h5py.File(split_path(self.source, name, "x")))["x"]
                for name in self.origin
            }
            for start in range(0, len(out), BLOCK):
                origin = self.origin[split][start : start + BLOCK]
                block = np.empty((len(origin), *PATCH_SHAPE), out.dtype)
                for number in np.unique(origin[:, 0]):
                    here = np.flatnonzero(origin[:, 0] == number)
                    rows, back = np.unique(origin[here, 1], return_inverse=True)
                    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)  # read neighbours together
                    block[here] = np.concatenate([sources[number][run[0] : run[-1] + 1] for run in runs])[back]
                for i in range(len(block)):
                    if start + i in self.edits[split]:
                        edit, position = self.edits[split][start + i]
                        patch = edit(block[i].astype(np.float32), position)
                        block[i] = patch if out.dtype == np.float32 else np.clip(np.rint(patch), 0, 255)
                out[start : start + len(block)] = block

    def _meta(self, dest: Path) -> None:
        tables = {}
        for split in self.origin:
            with open(split_path(self.source, split, "meta"), newline="") as handle:
                tables[SPLITS.index(split)] = list(csv.DictReader(handle))
        for split, origin in self.origin.items():
            with atomic_path(split_path(dest, split, "meta")) as part, open(part, "w", newline="") as handle:
                writer = csv.DictWriter(handle, list(tables[origin[0, 0]][0]), lineterminator="\n")
                writer.writeheader()
                for i, (number, row) in enumerate(origin):
                    label = str(bool(self.labels[split][i]))
                    writer.writerow({**tables[number][row], "": i, "center_tumor_patch": label})
