"""PNG, JPEG and TIFF files as pixels that a network can judge, or one line that says why not.

    image = decode(path.read_bytes(), "a.png")     # (H, W, 3) uint8 RGB
    patches = patch(image, "a.png", "tile")        # (K, 96, 96, 3)

What converts without loss is converted: palette, grey (three equal channels), opaque alpha. What would have to be
guessed is refused: 16 bits, CMYK, LAB, transparent pixels, several pages. EXIF orientation is applied, so that rows and
columns are those that a viewer shows. Colour profiles are ignored, as they were in PCam.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pcamlib.data.layout import SIDE
from pcamlib.errors import PcamError

#: Decoded at once: about 350 MB of memory while it lasts.
MOST_PIXELS = 1 << 25
HOW = ("refuse", "centre", "tile")

_KINDS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
_KINDS |= dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF")
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}
_TILE = 1 << 20  # pixels of a TIFF's tile that are always taken on: libtiff takes memory for all of it, 3 MB
_ENTRIES = 512  # of a TIFF's directory; they have about 20: Pillow goes through them thrice, 7 us each
_CHUNKS = 64  # of a PNG, and one more each kB; they have about 10 and one each 8 kB: 7 us each
_PACKED = 8  # chunks of a PNG with packed texts or a profile; they have about 3: up to 1 MiB and 2 ms each
_SCANS = 200  # of a progressive JPEG, which have about 10: each decodes the whole picture anew, a bomb in time

Image.MAX_IMAGE_PIXELS = None  # the limit is ours, told from the header before a pixel is decoded
warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is told once, as an error
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class ImageError(PcamError):
    """An image that cannot be judged.

    Attributes:
        status: as HTTP has it: 413 too large, 415 not a kind of image that is read, 422 broken or of another size.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def kind(head: bytes) -> str | None:
    """PNG, JPEG or TIFF by a file's first bytes."""
    return next((name for magic, name in _KINDS.items() if head.startswith(magic)), None)


@contextmanager
def opened(file: BinaryIO, name: str) -> Iterator[ImageFile.ImageFile]:
    """An image whose header was read and found fit, not a pixel of it decoded.

    Raises:
        ImageError: as `decode`, also for what Pillow says within the block.
    """
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    if not head:
        raise ImageError(f"{name}: empty file; save or copy it again", 422)
    if kind(head) is None:
        raise ImageError(f"{name}: no PNG, JPEG or TIFF (it starts with {head!r}); save it as one of them", 415)
    try:
        with Image.open(file, formats=[str(kind(head))]) as image:
            _fit(image, name)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: broken, or a rare kind of {kind(head)}; save it again as 8-bit RGB", 422) from None
    except Exception as error:  # Pillow raises a dozen kinds on damaged bytes, also SyntaxError and struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: broken {kind(head)} ({reason}); save or copy it again", 422) from None


def _fit(image: ImageFile.ImageFile, name: str) -> None:
    if getattr(image, "is_animated", False) and image.format != "MPO":  # of a phone's MPO the first is the photograph
        raise ImageError(f"{name}: holds several pictures; save the one that is meant", 415)
    if image.mode not in _MODES or any(";16" in str(part.args) for part in image.tile):  # Pillow cuts 16 bits to 8
        what = image.mode if image.mode not in _MODES else "16-bit"
        raise ImageError(f"{name}: {what} pixels; another conversion is another answer: save it as 8-bit RGB", 415)


def rgb(image: Image.Image, name: str) -> np.ndarray:
    """The pixels of an opened image, (H, W, 3) uint8.

    Raises:
        ImageError: some are transparent, and what lies behind them is not known.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            raise ImageError(f"{name}: has transparent pixels; save it without an alpha channel", 415)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _laboured(data: bytes) -> str | None:
    """What would take seconds or hide its size before a pixel is decoded."""
    if kind(data) == "TIFF":
        order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        # 8 bytes at 8 in BigTIFF, else 4 at 4; Pillow takes a big-endian BigTIFF for the latter
        for place in {b"II+\0": (8,), b"MM\0+": (8, 4)}.get(data[:4], (4,)):
            at, (width, step) = int.from_bytes(data[place : 2 * place], order), (8, 20) if place == 8 else (2, 12)
            count = int.from_bytes(data[at : at + width], order)
            if count > _ENTRIES:
                return f"over {_ENTRIES} tags"
            for entry in range(at + width, at + width + count * step, step):
                tag, code = (int.from_bytes(data[byte : byte + 2], order) for byte in (entry, entry + 2))
                if tag in (322, 323) and code not in (3, 4):  # a tile's side in a type that libtiff reads, Pillow not
                    return "tags of rare types"
    if kind(data) == "PNG":
        at, left = 8, _CHUNKS + len(data) // 1024
        while at < len(data) and left >= 0:
            at, left = at + 12 + int.from_bytes(data[at : at + 4]), left - 1
        if left < 0 or sum(map(data.count, (b"zTXt", b"iTXt", b"iCCP"))) > _PACKED:
            return "chunks and texts"
    return None


def decode(data: bytes, name: str, most: int = MOST_PIXELS) -> np.ndarray:
    """The bytes of a PNG, JPEG or TIFF file as (H, W, 3) uint8 RGB.

    Args:
        data: of the whole file.
        name: of the file, for errors.
        most: pixels; a service takes fewer than a command.

    Raises:
        ImageError: more than `most` pixels (told from the header), another kind of file or of pixels, or broken.
    """
    if what := _laboured(data):
        raise ImageError(f"{name}: {what}, more than a picture needs; save it again without notes", 413)
    with opened(io.BytesIO(data), name) as image:
        if image.width * image.height > most:
            size = f"{image.width:,} x {image.height:,} pixels"
            raise ImageError(f"{name}: {size}, at most {most:,} are decoded at once; cut it into parts", 413)
        tags: Any = getattr(image, "tag_v2", {})  # strips need no such limit: libtiff cuts them to the picture's height
        if tags.get(322, 0) * tags.get(323, 0) > max(most, _TILE):
            raise ImageError(f"{name}: tiles of {tags[322]:,} x {tags[323]:,} pixels; save it in smaller ones", 413)
        if image.format != "TIFF" and data.count(b"\xff\xda") > _SCANS and kind(data) == "JPEG":
            raise ImageError(f"{name}: over {_SCANS} scans in a JPEG; save it again as a baseline JPEG", 413)
        return rgb(ImageOps.exif_transpose(image), name)


def starts(length: int, step: int = SIDE) -> list[int]:
    """First pixels of the tiles that cover a side of `length` pixels; the last is moved back to end with it."""
    last = max(length - SIDE, 0)
    return [*range(0, last, step), last]


def patch(image: np.ndarray, name: str, how: str, step: int = SIDE) -> np.ndarray:
    """(H, W, 3) -> (K, 96, 96, 3): itself, its centre, or tiles at `starts` of both sides, row by row.

    Args:
        image: decoded.
        name: of the file, for errors.
        how: "refuse" any other size, "centre" or "tile".
        step: pixels from tile to tile.

    Raises:
        ImageError: smaller than a patch, or of another size and `how` is "refuse".
    """
    height, width = image.shape[:2]
    size = f"{name}: {width:,} x {height:,} pixels"
    if min(height, width) < SIDE:
        raise ImageError(f"{size}, less than a patch of {SIDE} x {SIDE}; take a larger cut-out", 422)
    if how == "tile":
        rows, columns = starts(height, step), starts(width, step)
        return np.stack([image[y : y + SIDE, x : x + SIDE] for y in rows for x in columns])
    if how == "refuse" and (height, width) != (SIDE, SIDE):
        raise ImageError(f"{size}, a patch has {SIDE} x {SIDE}; take its centre or tile it", 422)
    y, x = (height - SIDE) // 2, (width - SIDE) // 2
    return image[None, y : y + SIDE, x : x + SIDE]
