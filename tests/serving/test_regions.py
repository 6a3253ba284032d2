"""A big TIFF with a broken header is refused by name, whatever is broken in it."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from pcamlib.serving.images import ImageError
from pcamlib.serving.regions import Region, bands

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest takes back what `images` has set
PIXELS = np.random.default_rng(0).integers(0, 256, (200, 100, 3), np.uint8)


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "TIFF", strip_size=20 * 300, **options)
    return out.getvalue()


def entries(data: bytes) -> dict[int, int]:
    """Where the 12 bytes of each tag lie."""
    (ifd,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, ifd)
    return {struct.unpack_from("<H", data, at)[0]: at for at in range(ifd + 2, ifd + 2 + 12 * count, 12)}


def answered(data: bytes | bytearray) -> bool:
    """Or refused by name; any other exception passes."""
    try:
        return all(band.shape == (96, 100, 3) for _, band in bands(Region(io.BytesIO(data), "a.tif")))
    except ImageError as error:
        assert str(error).startswith("a.tif: ")
        return False


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_any_flipped_bit_of_a_tag_is_an_answer_or_a_refusal(compression: str | None) -> None:
    whole, refused = tiff(PIXELS, compression=compression), 0
    for at in entries(whole).values():
        for bit in range(16, 96):  # of type, count and value
            data = bytearray(whole)
            data[at + bit // 8] ^= 1 << bit % 8
            refused += not answered(data)
    assert refused > 100


@pytest.mark.parametrize("tag", [257, 273, 278, 279])
def test_a_tag_of_another_type_is_an_answer_or_a_refusal(tag: int) -> None:
    data = bytearray(tiff(PIXELS, compression="tiff_lzw"))
    at = entries(bytes(data))[tag] + 2
    (own,) = struct.unpack_from("<H", data, at)
    found = {}
    for kind in range(1, 20):  # bytes, text, signed, rational and floating point among them
        struct.pack_into("<H", data, at, kind)
        found[kind] = answered(data)
    assert found[own] and not all(found.values())


@pytest.mark.parametrize("shape", [(95, 200, 3), (200, 95, 3)])
def test_less_than_a_patch_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=rf"a\.tif: {shape[1]} x {shape[0]} pixels, less than a patch of 96 x 96"):
        Region(io.BytesIO(tiff(np.zeros(shape, np.uint8))), "a.tif")
