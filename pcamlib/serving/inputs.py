"""What people point at, a picture, an H5 or a folder of both, as patches in order, some at a time."""

from __future__ import annotations

import os
import stat
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


def find(inputs: Sequence[Path], report: Report, refused: list[str]) -> list[Path]:
    """Files to answer, each once; of a folder those that are pictures or H5, at any depth, hidden ones left out.

    Args:
        inputs: files and folders.
        report: is told of what is left out as it should be.
        refused: gets a line for each file and folder in a folder that cannot be reached, or is a link to a folder.

    Raises:
        DataError: no such file, it cannot be reached, or a folder without any.
    """
    files: dict[Path, Path] = {}
    for given in inputs:
        try:
            folder, file = given.is_dir(), given.is_file()
        except OSError as error:  # of a name too long, and in a folder that may not be searched
            raise DataError(_unreached(given, error)) from None
        if not (folder or file):
            raise DataError(f"{given}: no such file or folder")
        for path in _inside(given, report, refused) if folder else [given]:
            if files.setdefault(path.resolve(), path) is not path:
                report(f"{path}: given twice, answered once")
    return list(files.values())


def _inside(given: Path, report: Report, refused: list[str]) -> list[Path]:
    """What `find` takes of a folder."""
    found: list[Path] = []
    lines: list[str] = []
    for at, folders, names in os.walk(given, onerror=lambda error: lines.append(_unreached(error.filename, error))):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(at, name) for name in folders):
            if os.path.islink(path):  # noqa: PTH114  Path.is_symlink raises in a folder that may not be searched
                lines.append(f"{path}: a link to a folder, which is not followed; give that folder itself")
        found += [Path(at, name) for name in names if not name.startswith(".")]
    inside = [path for path in sorted(found) if not _is_labels(path)]
    named = [path for path in inside if path.name.lower().endswith((*H5, *PICTURES))]
    fit = []
    for path in named:
        try:
            if stat.S_ISREG(path.stat().st_mode):  # is_file says no to a link to nothing
                fit.append(path)
            else:
                lines.append(f"{path}: is no file; remove it")  # opening a pipe would wait for ever
        except OSError as error:
            lines.append(_unreached(path, error))
    if not fit:
        none = f"{given}: no PNG, JPEG, TIFF or H5 in this folder ({len(found):,} files)"
        raise DataError(lines[0] if lines else none)
    if others := [path.name for path in inside if path not in set(named)]:
        report(f"{given}: {len(others):,} files of other kinds are left alone, such as {others[0]}")
    refused += lines
    return fit


def _unreached(path: str | Path, error: OSError) -> str:
    return f"{path}: cannot be reached ({error.strerror or error}); look at links and permissions on the way to it"


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
    with h5py.File(source) as file:
        places = [source] if "y" in file else []
    if not places and "_x." in path.name:  # packed or not, whatever the patches are; a link to nothing is refused
        beside = path.with_name(path.name.replace("_x.", "_y.").removesuffix(".gz"))
        places = [one for one in (beside, Path(f"{beside}.gz")) if os.path.lexists(one)]
    if places:
        count = inspect(packed := convert.unpack(places[0]), "y").shape[0]
        if count != stored.shape[0]:  # told before they are read: some kB can claim terabytes of them
            raise DataError(f"{path}: {stored.shape[0]:,} patches but {count:,} labels; they must match")
        labels = read_labels(packed)
    for first, block in convert.blocks(stored):
        # fmax, since nanmax warns of a block of nothing but NaN
        if first == 0 and stored.dtype != np.uint8 and 0 < np.fmax.reduce(block, axis=None) <= 1:
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
