"""What people point at, a picture, an H5 or a folder of both, as patches in order, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from pcamlib.data import convert
from pcamlib.data.layout import SIDE, inspect, read_labels
from pcamlib.errors import DataError
from pcamlib.serving import images, regions

H5 = (".h5", ".hdf5", ".h5.gz")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Piece:
    """K patches of one file.

    Attributes:
        file: its path as it was given.
        where: (K, 3) int64: row of an H5; x and y of a tile's upper left corner; -1 where there is none.
        images: (K, 96, 96, 3) uint8.
        labels: (K,) uint8, None where they are not known.
        odd: how many hold NaN or values out of 0..255, or are all black or white.
        synthetic: the file says that it was generated.
    """

    file: str
    where: np.ndarray
    images: np.ndarray
    labels: np.ndarray | None = None
    odd: int = 0
    synthetic: bool = False


def find(inputs: Sequence[Path], report: Report) -> list[Path]:
    """Files to answer, each once; of a folder those that are pictures or H5, at any depth, hidden ones left out.

    Raises:
        DataError: no such file, or a folder without any.
    """
    files: dict[Path, Path] = {}
    for given in inputs:
        if given.is_dir():
            inside = [path for path in sorted(given.rglob("*")) if path.is_file()]
            inside = [path for path in inside if not any(p.startswith(".") for p in path.relative_to(given).parts)]
            fit = [path for path in inside if path.name.lower().endswith((*H5, *PICTURES)) and not _is_labels(path)]
            if not fit:
                raise DataError(f"{given}: no PNG, JPEG, TIFF or H5 in this folder ({len(inside):,} files)")
            others = [path.name for path in inside if path not in set(fit) and not _is_labels(path)]
            if others:
                report(f"{given}: {len(others):,} files of other kinds are left alone, such as {others[0]}")
        elif given.is_file():
            fit = [given]
        else:
            raise DataError(f"{given}: no such file or folder")
        for path in fit:
            if files.setdefault(path.resolve(), path) is not path:
                report(f"{path}: given twice, answered once")
    return list(files.values())


def _is_labels(path: Path) -> bool:
    return path.name.lower().endswith(H5) and path.name.partition(".")[0].endswith("_y")


def pieces(path: Path, how: str = "refuse", step: int = SIDE) -> Iterator[Piece]:
    """The patches of one file.

    Args:
        path: of a picture or an H5.
        how: what becomes of a picture of another size, as `images.patch`.
        step: pixels from tile to tile.

    Raises:
        ImageError, DataError: it cannot be read, or not to its end.
    """
    try:
        yield from _rows(path) if path.name.lower().endswith(H5) else _picture(path, how, step)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _rows(path: Path) -> Iterator[Piece]:
    """Streamed as stored: no copy is left in a cache, as `open_split` would for float32 or chunks."""
    source = convert.unpack(path)
    stored, labels = inspect(source, "x"), None
    beside = path.with_name(path.name.replace("_x.", "_y."))
    with h5py.File(source) as file:
        own = "y" in file
    if own or (beside != path and beside.is_file()):
        labels = read_labels(source if own else convert.unpack(beside))
        if len(labels) != stored.shape[0]:
            raise DataError(f"{path}: {stored.shape[0]:,} patches but {len(labels):,} labels; they must match")
    for first, block in convert.blocks(stored):
        if first == 0 and stored.dtype != np.uint8 and 0 < np.nanmax(block) <= 1:
            raise DataError(f"{path}: values from 0 to 1; patches have 0 to 255: multiply before you store them")
        for start in range(0, len(block), convert.BLOCK):
            values, flags = convert.to_uint8(block[start : start + convert.BLOCK])
            rows = first + start + np.arange(len(values))
            where = np.stack([rows, -np.ones_like(rows), -np.ones_like(rows)], 1)
            some = None if labels is None else labels[rows]
            yield Piece(str(path), where, values, some, int((flags != 0).sum()), stored.synthetic is not None)


def _picture(path: Path, how: str, step: int) -> Iterator[Piece]:
    name = str(path)
    with open(path, "rb") as file:
        with images.opened(file, name) as image:
            pixels, tiff = image.width * image.height, image.format == "TIFF"
        if how == "tile" and tiff and pixels > images.MOST_PIXELS:
            region = regions.Region(file, name)
            width, bands = region.width, regions.bands(region, step)
        else:
            if path.stat().st_size > 8 * images.MOST_PIXELS:
                raise images.ImageError(f"{name}: {path.stat().st_size:,} bytes, too many for one image", 413)
            file.seek(0)
            whole = images.decode(file.read(), name)
            if how != "tile":
                yield Piece(name, np.full((1, 3), -1), images.patch(whole, name, how))
                return
            width = whole.shape[1]
            bands = ((y, whole[y : y + SIDE]) for y in images.starts(len(whole), step))
        for y, band in bands:
            tiles, x = images.patch(band, name, "tile", step), np.array(images.starts(width, step))
            yield Piece(name, np.stack([np.full_like(x, -1), x, np.full_like(x, y)], 1), tiles)
