"""Pictures are decoded to the pixels that they hold, or refused in one line; bombs before a pixel is decoded."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pcamlib.serving import images, regions
from pcamlib.serving.images import ImageError, decode, patch, starts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's notes on damaged files

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (96, 96, 3)).astype(np.uint8)
#: Blocks of ten pixels: they compress, and are no multiple of anything.
REGION = np.repeat(np.repeat(RNG.integers(0, 256, (60, 75, 3)), 10, 0), 10, 1)[:533, :701].astype(np.uint8)


def stored(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def with_alpha(level: int) -> Image.Image:
    image = Image.fromarray(PIXELS)
    image.putalpha(level)
    return image


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def in_tiles(pixels: np.ndarray, side: int, **options: Any) -> bytes:
    """A TIFF in tiles, which Pillow cannot write: each is taken out of a TIFF of its own."""
    tags, tiles = {}, []
    rows, columns = (-(-length // side) for length in pixels.shape[:2])
    whole = np.zeros((rows * side, columns * side, 3), np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    for y in range(0, len(whole), side):
        for x in range(0, whole.shape[1], side):
            data = stored(whole[y : y + side, x : x + side].copy(), "TIFF", strip_size=1 << 30, **options)
            with Image.open(io.BytesIO(data)) as image:
                found: Any = image.tag_v2  # type: ignore[attr-defined]
                tiles.append(data[found[273][0] :][: found[279][0]])
                tags = {tag: (found[tag], found.tagtype[tag]) for tag in found if tag not in (256, 257, 273, 278, 279)}
    ends = np.cumsum([8, *map(len, tiles)]).tolist()
    own = {256: pixels.shape[1], 257: pixels.shape[0], 322: side, 323: side}
    ifd = ImageFileDirectory_v2()
    for tag, value in (own | {324: tuple(ends[:-1]), 325: tuple(map(len, tiles))}).items():
        ifd.tagtype[tag], ifd[tag] = 4, value
    for tag, (value, code) in tags.items():
        ifd.tagtype[tag], ifd[tag] = code, value
    return b"II*\0" + struct.pack("<I", ends[-1]) + b"".join(tiles) + ifd.tobytes(ends[-1])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (stored(PIXELS, "PNG"), PIXELS),
        (stored(PIXELS, "TIFF"), PIXELS),
        (stored(PIXELS, "TIFF", compression="tiff_lzw"), PIXELS),
        (stored(with_alpha(255), "PNG"), PIXELS),
        (stored(PIXELS[..., 0], "PNG"), PIXELS[..., [0, 0, 0]]),
        (stored(Image.fromarray(PIXELS[..., 0] // 4 * 4).quantize(64), "PNG"), PIXELS[..., [0, 0, 0]] // 4 * 4),
    ],
    ids=["png", "tiff", "lzw", "opaque alpha", "grey", "palette"],
)
def test_what_loses_nothing_is_decoded(data: bytes, expected: np.ndarray) -> None:
    assert (decode(data, "a") == expected).all()


def test_jpeg_is_decoded() -> None:
    smooth = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None, None], (96, 96, 3)) + np.uint8(80)
    assert np.abs(decode(stored(smooth.copy(), "JPEG", quality=95), "a").astype(int) - smooth).max() < 4


@pytest.mark.parametrize(
    ("data", "status", "what"),
    [
        (png(96, 96, 16, 2, bytes(97 * 96 * 6)), 415, "16-bit pixels"),
        (stored(PIXELS[..., 0].astype(np.uint16), "PNG"), 415, "I;16 pixels"),
        (stored(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), 415, "CMYK pixels"),
        (stored(Image.fromarray(PIXELS).convert("LAB"), "TIFF"), 415, "LAB pixels"),
        (stored(with_alpha(128), "PNG"), 415, "transparent pixels"),
        (stored(Image.fromarray(PIXELS).quantize(9), "PNG", transparency=3), 415, "transparent pixels"),
        (stored(PIXELS, "GIF", save_all=True, append_images=[with_alpha(255)]), 415, r"no PNG, JPEG or TIFF .*GIF8"),
        (stored(PIXELS, "PNG", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]), 415, "several pictures"),
        (stored(PIXELS, "TIFF", save_all=True, append_images=[with_alpha(255)]), 415, "several pictures"),
        (b"", 422, "empty file"),
        (stored(PIXELS, "JPEG")[:-300], 422, "broken JPEG .*truncated"),
        (stored(PIXELS, "PNG")[:-300], 422, "broken PNG"),
        (stored(PIXELS, "TIFF", compression="tiff_lzw")[:2000], 422, "broken, or a rare kind of TIFF"),
    ],
)
def test_what_would_be_guessed_or_is_broken_is_refused(data: bytes, status: int, what: str) -> None:
    with pytest.raises(ImageError, match=f"^a.x: .*{what}.*; ") as caught:
        decode(data, "a.x")
    assert caught.value.status == status and "\n" not in str(caught.value)


def test_a_bomb_is_refused_from_its_header() -> None:
    bomb = png(40_000, 25_000, 8, 2, bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="40,000 x 25,000 pixels, at most 33,554,432") as caught:
        decode(bomb, "a.png")
    assert caught.value.status == 413 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    with pytest.raises(ImageError, match="at most 9,000"):
        decode(stored(PIXELS, "PNG"), "a.png", 9_000)


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = stored(PIXELS, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="over 200 scans"):
        decode(data[:last] + data[last:-2] * 1000 + data[-2:], "a.jpg")


@pytest.mark.parametrize("side", [256, 1024, 8192])
def test_a_tile_far_larger_than_the_picture_is_refused(side: int) -> None:
    data = in_tiles(PIXELS, 256, compression="tiff_lzw")
    for tag in (322, 323):  # the only tile is claimed to be larger; libtiff takes memory for all of it
        data = data.replace(struct.pack("<HHII", tag, 4, 1, 256), struct.pack("<HHII", tag, 4, 1, side))
    with pytest.raises(ImageError) if side > 256 else nullcontext() as caught:
        assert (decode(data, "a.tif", 1 << 16) == PIXELS).all()
    if caught:
        assert caught.value.status == (413 if side == 8192 else 422)  # 1024 is let through, and broken here


def extended(*chunks: bytes) -> bytes:
    """A good PNG with more chunks before its pixels."""
    data = stored(PIXELS, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def directory(order: str, big: bool, count: int) -> bytes:
    """A TIFF of nothing but `count` entries of no known type."""
    magic = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    head = struct.pack(order + "HHQQ", 8, 0, 16, count) if big else struct.pack(order + "IH", 8, count)
    entry = order + ("HHQ8s" if big else "HHI4s")
    return magic + head + b"".join(struct.pack(entry, tag, 99, 1, b"") for tag in range(400, 400 + count)) + bytes(8)


MEBIBYTE = b"k\0\0" + zlib.compress(bytes(1 << 20))
LABOUR = {
    "texts": extended(*[chunk(b"zTXt", MEBIBYTE)] * 9),
    "broken texts": extended(*[chunk(b"zTXt", MEBIBYTE[:-1])] * 9),  # which Pillow does not count
    "profiles": extended(*[chunk(b"iCCP", MEBIBYTE)] * 9),
    "chunks": extended(*[chunk(b"abCd", b"")] * 99),
    "tiles that only libtiff sees": directory("<", True, 512).replace(  # type 17: 64 bits with a sign
        struct.pack("<HHQ", 400, 99, 1), struct.pack("<HHQ", 322, 17, 1)
    ),
    "mistaken BigTIFF": b"MM\0+\0\x08\0\0".ljust(1 << 19, b"\0") + directory(">", False, 513)[8:],
    "pixels of no bytes": extended(*[chunk(b"IDAT", b"")] * 999),
}
LABOUR |= {f"TIFF {order}{big}": directory(order, big, 513) for order in "<>" for big in (False, True)}


@pytest.mark.parametrize("what", LABOUR)
def test_a_head_that_is_labour_is_refused_before_it_is_read(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *arguments, **options: pytest.fail("read"))
    with pytest.raises(ImageError, match=f"^{what}: .*more than a picture needs; ") as caught:
        decode(LABOUR[what], what)
    assert caught.value.status == 413


def test_a_head_with_a_profile_and_notes_is_none() -> None:
    notes = extended(chunk(b"iCCP", MEBIBYTE), *[chunk(b"zTXt", MEBIBYTE)] * 3, *[chunk(b"tEXt", b"k\0v")] * 20)
    assert (decode(notes, "a") == PIXELS).all()
    with pytest.raises(ImageError) as caught:
        decode(directory("<", False, 512), "a")
    assert caught.value.status == 422  # read, and nothing in it


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_applied_as_a_viewer_does(kind: str) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise
    flat = np.zeros((50, 96, 3), np.uint8)
    flat[:, :20] = 255  # left becomes top
    turned = decode(stored(flat, kind, exif=exif), "a")
    assert turned.shape == (96, 50, 3) and turned[:12].min() > 200 and turned[30:].max() < 60


def test_sizes() -> None:
    assert patch(PIXELS, "a", "refuse").shape == (1, 96, 96, 3)
    with pytest.raises(ImageError, match=r"a: 701 x 533 pixels, a patch has 96 x 96; take its centre or tile it"):
        patch(REGION, "a", "refuse")
    assert (patch(REGION, "a", "centre")[0] == REGION[218:314, 302:398]).all()
    for how in images.HOW:
        with pytest.raises(ImageError, match="701 x 95 pixels, less than a patch"):
            patch(REGION[:95], "a", how)


@pytest.mark.parametrize(("length", "step"), [(96, 96), (97, 96), (192, 96), (533, 96), (533, 32), (100, 200)])
def test_tiles_cover_a_side_to_its_end(length: int, step: int) -> None:
    at = starts(length, step)
    assert at == sorted(set(at)) and at[0] == 0 and at[-1] == length - 96 and max(np.diff(at), default=0) <= step


def test_tiles_lie_row_by_row() -> None:
    tiles = patch(REGION, "a", "tile")
    assert len(tiles) == 6 * 8 and (tiles[8 + 7] == REGION[96:192, 605:701]).all()


REGIONS = {
    "plain": stored(REGION, "TIFF"),
    "one strip": stored(REGION, "TIFF", strip_size=1 << 30),
    "lzw": stored(REGION, "TIFF", compression="tiff_lzw"),
    "differences": stored(REGION, "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}),
    "jpeg": stored(REGION, "TIFF", compression="jpeg"),
    "big tiff": stored(REGION, "TIFF", compression="tiff_lzw", big_tiff=True),
    "tiles": in_tiles(REGION, 128, compression="tiff_lzw"),
    "jpeg tiles": in_tiles(REGION, 128, compression="jpeg"),
}


@pytest.mark.parametrize("step", [96, 32])
@pytest.mark.parametrize("kind", REGIONS)
def test_bands_of_a_tiff_are_those_of_the_whole(kind: str, step: int) -> None:
    whole = decode(REGIONS[kind], kind)
    bands = list(regions.bands(regions.Region(io.BytesIO(REGIONS[kind]), kind), step))
    assert [y for y, _ in bands] == starts(533, step)
    assert all((band == whole[y : y + 96]).all() for y, band in bands)


BANDS = """
import re, sys
from pathlib import Path
from pcamlib.serving.regions import Region, bands
def peak():  # getrusage would give that of the process which started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
with open(sys.argv[1], "rb") as file:
    before = peak()
    print(sum(1 for _ in bands(Region(file, "a.tif"))), peak() - before)
"""


def test_memory_of_bands_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    tall = np.repeat(np.repeat(RNG.integers(0, 256, (200, 60, 3), np.uint8), 50, 0), 50, 1)
    Image.fromarray(tall).save(tmp_path / "a.tif", compression="tiff_lzw")  # 10,000 x 3,000: 86 MiB
    said = subprocess.run([sys.executable, "-c", BANDS, tmp_path / "a.tif"], capture_output=True, text=True, check=True)
    count, grown = map(int, said.stdout.split())
    assert count == 105 and grown < 25  # MiB; decoded whole it takes 200


def test_a_region_that_cannot_be_read_in_parts_says_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="so large only an upright TIFF of 8-bit RGB"):
        regions.Region(io.BytesIO(stored(REGION[..., 0], "TIFF")), "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: broken"):
        list(regions.bands(regions.Region(io.BytesIO(REGIONS["lzw"][:-20_000]), "a.tif")))
    monkeypatch.setattr(regions, "MOST_PIXELS", 533 * 700)
    one = stored(REGION, "TIFF", compression="tiff_lzw", strip_size=1 << 30)
    with pytest.raises(ImageError, match="parts of 533 rows do not fit into memory; save it in tiles"):
        regions.Region(io.BytesIO(one), "a.tif")


SEEDS = [
    stored(PIXELS[:40, :50], "PNG"),
    stored(PIXELS[:40, :50], "JPEG"),
    stored(PIXELS[:40, :50], "JPEG", progressive=True),
    stored(PIXELS[:40, :50], "TIFF"),
    stored(PIXELS[:40, :50], "TIFF", compression="tiff_lzw"),
]
EDIT = st.tuples(st.integers(0, 1 << 16), st.binary(max_size=6), st.integers(0, 6))


@settings(max_examples=300, derandomize=True, deadline=5000, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SEEDS), st.lists(EDIT, min_size=1, max_size=6), st.booleans())
def test_mutated_files_are_answered_or_refused(data: bytes, edits: list[tuple[int, bytes, int]], early: bool) -> None:
    for at, new, removed in edits:
        place = at % (min(len(data), 400) if early else max(len(data), 1))  # headers are short
        data = data[:place] + new + data[place + removed :]
    try:
        assert decode(data, "a").dtype == np.uint8
    except ImageError as error:
        assert error.status in (413, 415, 422) and "\n" not in str(error)
