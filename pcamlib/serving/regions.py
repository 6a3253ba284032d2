"""A region of a slide, band by band: (96, W, 3) rows of a big TIFF whose pixels need not fit into memory.

    with open("slide.tif", "rb") as file:
        for y, band in bands(Region(file, "slide.tif")): ...

Pillow decodes a TIFF whole, 1.6 GB for 20,000 x 20,000 pixels. Here the strips under a band, or each tile, become a
small TIFF of their own with the tags of the whole: every compression that Pillow knows, and memory of one band.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pcamlib.data.layout import SIDE
from pcamlib.serving import images
from pcamlib.serving.images import MOST_PIXELS, ImageError

# numbers of TIFF 6.0
_WIDTH, _LENGTH, _COMPRESSION, _ORIENTATION, _SAMPLES, _ROWS, _PLANAR = 256, 257, 259, 274, 277, 278, 284
_STRIPS, _STRIP_BYTES = 273, 279
_TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_BYTES = 322, 323, 324, 325
#: How pixels are packed: bits, compression, photometric, samples, planar, predictor, alpha, format, JPEG's, YCbCr's.
_KEPT = (258, _COMPRESSION, 262, _SAMPLES, _PLANAR, 317, 338, 339, 347, 530, 532)


class Region:
    """Strips or tiles of a TIFF, from its header.

    Attributes:
        width, height: in pixels.

    Raises:
        ImageError: as `images.decode`; or smaller than a patch, or its parts cannot be read alone.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        with images.opened(file, name) as image:
            tags: Any = getattr(image, "tag_v2", {})
            self.width, self.height = image.size
            if min(image.size) < SIDE:
                size = f"{self.width:,} x {self.height:,} pixels, less than a patch of {SIDE} x {SIDE}"
                raise ImageError(f"{name}: {size}; take a larger cut-out", 422)
            fit = image.format == "TIFF" and image.mode in ("RGB", "RGBA") and tags.get(_PLANAR, 1) == 1
            if not fit or tags.get(_ORIENTATION, 1) != 1 or not (_STRIPS in tags or _TILES in tags):
                what = f"{self.width:,} x {self.height:,} pixels; so large only an upright TIFF of 8-bit RGB is read"
                raise ImageError(f"{name}: {what}, its channels together; save it so, best in tiles", 413)
            self.tags = {tag: (tags[tag], tags.tagtype[tag]) for tag in _KEPT if tag in tags}
            self.tiled = _TILES in tags
            places = (_TILES, _TILE_BYTES) if self.tiled else (_STRIPS, _STRIP_BYTES)
            self.offsets, self.sizes = (tags[tag] for tag in places)
            self.across = tags[_TILE_WIDTH] if self.tiled else self.width
            self.rows = tags[_TILE_LENGTH] if self.tiled else min(tags.get(_ROWS, self.height), self.height)
            if tags.get(_COMPRESSION, 1) == 1 and not self.tiled:  # plain: any row can be read alone
                row = self.width * tags.get(_SAMPLES, 1)
                self.offsets = [self.offsets[y // self.rows] + y % self.rows * row for y in range(self.height)]
                self.sizes, self.rows = [row] * self.height, 1
            # a damaged type makes them text, fractions or negative; read(-1) would read all of the file
            self.across, self.rows = int(self.across), int(self.rows)
            self.offsets, self.sizes = list(map(int, self.offsets)), list(map(int, self.sizes))
            fit = min(self.across, self.rows) > 0 and min(*self.offsets, *self.sizes) >= 0
            needed = -(-self.width // self.across) * -(-self.height // self.rows)
            if not fit or min(len(self.offsets), len(self.sizes)) < needed:
                raise ImageError(f"{name}: broken TIFF (parts are missing or misplaced); save or copy it again", 422)
        if max(self.rows, SIDE) * max(self.width, self.across) > MOST_PIXELS:
            raise ImageError(f"{name}: parts of {self.rows:,} rows do not fit into memory; save it in tiles", 413)

    def parts(self) -> Iterator[np.ndarray]:
        """Consecutive rows, at least 96 of strips or one row of tiles: (R, width, 3) uint8."""
        step = 1 if self.tiled else -(-SIDE // self.rows)
        columns = -(-self.width // self.across)
        for first in range(0, -(-self.height // self.rows), step):
            rows = min(self.height - first * self.rows, step * self.rows)
            if self.tiled:
                at = range(first * columns, (first + 1) * columns)
                row = np.concatenate([self._decode([number], self.across, self.rows) for number in at], 1)
                yield row[:rows, : self.width]
            else:
                yield self._decode(range(first, first + -(-rows // self.rows)), self.width, rows)

    def _decode(self, numbers: range | list[int], width: int, height: int) -> np.ndarray:
        """Some strips, or one tile, as (height, width, 3) uint8."""
        ifd, data = ImageFileDirectory_v2(), []
        for number in numbers:
            self.file.seek(self.offsets[number])
            data.append(self.file.read(min(self.sizes[number], 8 * MOST_PIXELS)))
        ends = np.cumsum([0, *map(len, data)]).tolist()
        new = {_WIDTH: width, _LENGTH: height, _ROWS: self.rows, _STRIPS: tuple(ends[:-1])}
        for tag, value in (new | {_STRIP_BYTES: tuple(map(len, data))}).items():
            ifd.tagtype[tag], ifd[tag] = 4, value  # 32 bits
        for tag, (value, code) in self.tags.items():
            ifd.tagtype[tag], ifd[tag] = code, value
        small = io.BytesIO()
        ifd.save(small)  # counts the offsets from its own end
        with images.opened(io.BytesIO(b"".join([small.getvalue(), *data])), self.name) as image:
            return images.rgb(image, self.name)


def bands(region: Region, step: int = SIDE) -> Iterator[tuple[int, np.ndarray]]:
    """(y, (96, W, 3) uint8) for each y of `images.starts`; each part of the file is decoded once."""
    parts, held, first = region.parts(), np.empty((0, region.width, 3), np.uint8), 0
    for y in images.starts(region.height, step):
        while first + len(held) < y + SIDE:
            new = next(parts)
            if y > first:  # what lies above is done with
                held, first = held[y - first :], min(y, first + len(held))
            held = np.concatenate([held, new])
        yield y, held[y - first : y - first + SIDE]
