"""Reading any form: exact flags, equal pixels, small blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pcamlib.data import convert
from pcamlib.data.layout import inspect
from pcamlib.data.patches import open_split
from pcamlib.errors import DataError

NAN, RANGE, BLACK, WHITE = convert.FLAGS.values()


def _row(fill: float, *pixels: float) -> np.ndarray:
    row = np.full((96, 96, 3), fill, np.float32)
    row.reshape(-1)[1000 : 1000 + len(pixels)] = pixels
    return row


ROWS = {
    "clean": (_row(17), 0),
    "nan": (_row(17, np.nan), NAN),
    "all nan": (_row(np.nan), NAN),
    "above": (_row(17, 255.5), RANGE),
    "below": (_row(17, -0.5), RANGE),
    "1e5": (_row(17, *[1e5] * 75), RANGE),
    "inf": (_row(17, np.inf), RANGE),
    "-inf": (_row(17, -np.inf), RANGE),
    "black": (_row(0), BLACK),
    "negative zero": (_row(-0.0), BLACK),
    "white": (_row(255), WHITE),
    "nearly black": (_row(0, 1), 0),
    "nearly white": (_row(255, 254), 0),
    "black but for a nan": (_row(0, np.nan), NAN),
    "white but for a nan": (_row(255, np.nan), NAN),
    "nan and above": (_row(17, np.nan, 256), NAN | RANGE),
    "nan and inf": (_row(17, np.nan, np.inf), NAN | RANGE),
    "nan and -inf": (_row(np.nan, -np.inf), NAN | RANGE),
    "black but for 1e5": (_row(0, 1e5), RANGE),
    "whiter than white": (_row(300), RANGE),
}


def test_flags_are_exact() -> None:
    _, flags = convert.to_uint8(np.stack([row for row, _ in ROWS.values()]))
    assert dict(zip(ROWS, flags.tolist(), strict=True)) == {name: flag for name, (_, flag) in ROWS.items()}
    for row, flag in ROWS.values():  # a row's flags do not depend on its neighbours
        assert convert.to_uint8(row[None])[1].tolist() == [flag]


def test_flags_of_uint8() -> None:
    rows = np.stack([_row(17), _row(0), _row(255), _row(0, 255)]).astype(np.uint8)
    values, flags = convert.to_uint8(rows)
    assert flags.tolist() == [0, BLACK, WHITE, 0]
    assert np.array_equal(values, rows)


def test_values_are_rounded_clipped_and_nan_is_0() -> None:
    given = [0.4, 0.6, 126.5, 127.5, 254.6, 255, 1e5, -3, np.nan, np.inf, -np.inf]
    values, _ = convert.to_uint8(_row(9, *given)[None])
    assert values.dtype == np.uint8
    assert values.reshape(-1)[1000 : 1000 + len(given)].tolist() == [0, 1, 126, 128, 255, 255, 255, 0, 0, 255, 0]


@pytest.mark.parametrize("kind", ["contiguous", "float32", "chunked", "gzip", "h5.gz"])
def test_every_form_gives_the_same(
    kind: str, tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    images[3], images[4] = 0, 255
    patches = open_split(write(tmp_path, images, labels, kind=kind), "train")
    again = open_split(tmp_path, "train")
    for one in (patches, again):
        assert one.images.dtype == np.uint8 and np.array_equal(one.images, images)
        assert np.array_equal(one.labels, labels)
        assert np.flatnonzero(one.flags).tolist() == [3, 4]
        assert one.flags[3] == BLACK and one.flags[4] == WHITE


@pytest.mark.parametrize("where", [20, 0.3, 0.9])
def test_damaged_gzip(where: float, tmp_path: Path, images: np.ndarray, write: Callable[..., Path]) -> None:
    write(tmp_path, images, np.zeros(30, np.uint8), kind="h5.gz")
    path = next(tmp_path.glob("*_x.h5.gz"))
    raw = bytearray(path.read_bytes())
    place = int(where if where >= 1 else where * len(raw))
    raw[place : place + 40] = bytes(byte ^ 0x5A for byte in raw[place : place + 40])
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"{path.name}: damaged gzip"):
        open_split(tmp_path, "train")
    assert not list(tmp_path.glob(".pcam-cache/*"))


def test_blocks_are_small_whatever_the_chunks(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:  # nothing is allocated: reads give zeros
        file.create_dataset("x", (20_000, 96, 96, 3), np.uint8, chunks=(8192, 6, 6, 1))
    stored = inspect(tmp_path / "x.h5", "x")
    start, block = next(convert.blocks(stored))
    assert start == 0 and len(block) == 8192  # whole rows of chunks, so that none is read twice
    assert block.nbytes <= convert._CHUNKED_BYTES
