"""The official PCam file layout: names, keys, shapes, and what is wrong with a file that does not fit.

    camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5      x: (N, 96, 96, 3)   y: (N, 1, 1, 1)

Source: https://github.com/basveeling/pcam (Veeling et al. 2018). Official x is uint8; the course's train file is
float32. `inspect` reads headers only, so it takes milliseconds at any size.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pcamlib.errors import DataError, nearest

SPLITS = ("train", "valid", "test")
SIDE = 96
PATCH_SHAPE = (SIDE, SIDE, 3)
PATCH_BYTES = SIDE * SIDE * 3
#: HDF5 attribute that generated files carry, so that nothing made from them can pass for tissue.
SYNTHETIC = "pcamlib_synthetic"

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
#: What h5py raises on damaged bytes, by the place of the damage: file, link, object header, dataspace, filter.
_DAMAGE = (OSError, KeyError, RuntimeError, TypeError, ValueError)
_DTYPES = {"x": ("uint8", "float32"), "y": ("uint8", "int64", "int32", "int8")}


def split_path(folder: str | Path, split: str, part: str) -> Path:
    """Path of one official file; `part` is "x", "y" (HDF5) or "meta" (CSV)."""
    suffix = "csv" if part == "meta" else "h5"
    return Path(folder) / f"camelyonpatch_level_2_split_{split}_{part}.{suffix}"


def find(folder: str | Path, split: str, part: str) -> Path:
    """The file of a split, `.h5` or else `.h5.gz`.

    Raises:
        DataError: unknown split, missing folder or missing file.
    """
    folder = Path(folder)
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"{folder}: may not be read; ask its owner for read permission")
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'{nearest(split, SPLITS)}")
    path = split_path(folder, split, part)
    zipped = path.with_name(path.name + ".gz")
    if path.is_file():
        return path
    if zipped.is_file():
        return zipped
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds {path.name}")
    raise DataError(
        f"{path}: missing; `pcam data fetch {folder}` downloads it, `pcam data synthetic DIR` makes a stand-in"
    )


def present(folder: str | Path) -> list[str]:
    """The splits of a folder that have an x file.

    Raises:
        DataError: none has; says what was looked for. Or one has labels without patches.
    """
    found = []
    for split in SPLITS:
        parts = {part: split_path(folder, split, part) for part in "xy"}
        x, y = (any(path.with_name(path.name + end).is_file() for end in ("", ".gz")) for path in parts.values())
        if y and not x:
            raise DataError(f"{parts['x']}: missing, while its labels {parts['y'].name} are there; add it or move them")
        if x:
            found.append(split)
    if not found:
        find(folder, SPLITS[0], "x")
    return found


@dataclass(frozen=True)
class Stored:
    """How an array lies in its HDF5 file, read from the header.

    Attributes:
        offset: byte at which a contiguous, uncompressed array starts (it can be memory-mapped); None otherwise.
        synthetic: the generator's settings when the file says that it was generated.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None
    compression: str | None
    offset: int | None
    synthetic: dict[str, Any] | None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The array memory-mapped read-only where it lies; needs `offset`."""
        assert self.offset is not None, "only a contiguous array can be mapped"
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def not_hdf5(path: Path) -> str | None:
    """What a file that does not start like HDF5 looks like, with the way out; None when it does."""
    with open(path, "rb") as handle:
        head = handle.read(512)
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as packed:
                head = packed.read(512)
        except (OSError, EOFError, zlib.error) as error:
            return f"damaged gzip ({error}); fetch it again"
    if head.startswith(_HDF5_MAGIC):
        return None
    if not head:
        return "empty file; fetch it again"
    if head.lstrip()[:1] == b"<":
        return "a web page saved under this name, not HDF5; the download link asked for something: fetch it again"
    return f"not HDF5 (it starts with {head[:8]!r}); fetch it again"


def inspect(path: str | Path, key: str) -> Stored:
    """Read the header of an official x or y file and check it.

    Raises:
        DataError: no HDF5, truncated, key missing, wrong shape or dtype; names the file and what was expected.
    """
    path = Path(path)
    try:
        problem = not_hdf5(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if problem:
        raise DataError(f"{path}: {problem}")
    try:
        with h5py.File(path, "r") as file:
            if key not in file or not isinstance(file[key], h5py.Dataset):
                raise DataError(f"{path}: no array '{key}'{nearest(key, file.keys())}")
            data = file[key]
            stored = Stored(
                path, key, data.shape or (), data.dtype, data.chunks, data.compression,
                data.id.get_offset() if data.chunks is None and data.compression is None else None,
                json.loads(file.attrs[SYNTHETIC]) if SYNTHETIC in file.attrs else None,
            )  # fmt: skip
    except _DAMAGE as error:
        raise DataError(f"{path}: truncated or damaged HDF5 ({error}); fetch or copy it again") from None
    _check(stored)
    return stored


def _check(stored: Stored) -> None:
    path, shape = stored.path, stored.shape
    tail = PATCH_SHAPE if stored.key == "x" else (1, 1, 1)
    flat = stored.key == "y" and np.prod(shape[1:], dtype=np.int64) == 1
    if len(shape) == 0 or not (shape[1:] == tail or flat):
        raise DataError(f"{path}: '{stored.key}' has shape {shape}, expected (N, {', '.join(map(str, tail))})")
    if shape[0] == 0:
        raise DataError(f"{path}: holds no rows")
    if stored.dtype.name not in _DTYPES[stored.key] or not stored.dtype.isnative:
        raise DataError(f"{path}: '{stored.key}' is {stored.dtype}, expected {' or '.join(_DTYPES[stored.key][:2])}")
    if stored.offset is not None:
        needed, size = stored.offset + shape[0] * stored.row_bytes, path.stat().st_size
        if size < needed:
            raise DataError(f"{path}: truncated: {size:,} bytes where {needed:,} are needed; fetch or copy it again")


def read_labels(path: str | Path) -> np.ndarray:
    """Labels of a y file.

    Returns:
        (N,) uint8, 0 or 1.

    Raises:
        DataError: as `inspect`; or a label other than 0 and 1, with its row.
    """
    stored = inspect(path, "y")
    try:
        with h5py.File(path, "r") as file:
            raw = file["y"][:].reshape(-1)
    except _DAMAGE as error:
        raise DataError(f"{path}: labels cannot be read ({error}); fetch or copy it again") from None
    wrong = np.flatnonzero((raw != 0) & (raw != 1))
    if len(wrong):
        raise DataError(
            f"{path}: label {raw[wrong[0]]} in row {wrong[0]} ({len(wrong):,} such rows); labels are 0 or 1"
        )
    return raw.astype(np.uint8).reshape(stored.shape[0])


def writable(folder: Path) -> bool:
    """Whether a file can be made in `folder` (which need not exist yet)."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)
