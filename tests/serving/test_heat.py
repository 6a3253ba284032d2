"""A heat map has each tile's probability and pixels where the tile lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcamlib.errors import ConfigError
from pcamlib.serving.heat import Heat
from pcamlib.serving.images import patch, starts
from pcamlib.serving.inputs import Piece
from pcamlib.serving.predict import Predictor, run


def tiled(picture: np.ndarray, step: int) -> tuple[Heat, np.ndarray]:
    """A heat of a picture, whose probabilities are 0, .01, .02, ... row by row; and these."""
    heat, tiles = Heat(step), patch(picture, "a", "tile", step)
    at = [(-1, x, y) for y in starts(len(picture), step) for x in starts(picture.shape[1], step)]
    values = np.arange(len(tiles)) / 100
    for first in range(0, len(tiles), 5):  # as they come
        part = slice(first, first + 5)
        heat.add(Piece("a", np.array(at)[part], tiles[part]), values[part])
    return heat, values


def test_each_tile_lies_where_it_was_cut() -> None:
    colours = np.arange(12, dtype=np.uint8).reshape(3, 4, 1) * np.uint8([20, 10, 5])
    heat, values = tiled(np.repeat(np.repeat(colours, 96, 0), 96, 1), 96)
    picture, drawn, extent = heat.maps()
    assert extent == (0, 384, 288, 0) and picture.shape == (24, 32, 3)
    assert (picture[4::8, 4::8] == colours).all() and np.allclose(drawn[::8, ::8].ravel(), values)


def test_smaller_steps_colour_the_square_that_is_judged() -> None:
    picture = np.zeros((96, 160, 3), np.uint8)
    picture[:, 64:96] = 200  # the centre of the second tile
    small, drawn, extent = tiled(picture, 32)[0].maps()
    assert extent == (32, 128, 64, 32) and drawn.shape == (8, 24)
    assert (small[:, 8:16] == 200).all() and small[:, :8].max() == small[:, 16:].max() == 0


def test_a_last_tile_that_was_moved_back_ends_with_the_picture() -> None:
    picture, drawn, extent = tiled(np.zeros((96, 240, 3), np.uint8), 96)[0].maps()
    assert extent == (0, 240, 96, 0) and drawn.shape == picture.shape[:2] == (8, 20)
    assert np.allclose(drawn[0], [0.0] * 8 + [0.01] * 4 + [0.02] * 8)


def test_a_heat_map_is_a_png_of_one_picture(checkpoint: Path, tmp_path: Path) -> None:
    predictor = Predictor(checkpoint)
    for name in "ab":
        Image.fromarray(np.full((200, 300, 3), 180, np.uint8)).save(tmp_path / f"{name}.tif")
    run(predictor, [tmp_path / "a.tif"], out=tmp_path / "a.csv", how="tile", heat=tmp_path / "heat.png")
    with Image.open(tmp_path / "heat.png") as drawn:
        assert drawn.format == "PNG" and drawn.width > 1000
    with pytest.raises(ConfigError, match="a heat map is of one picture, not of 2 files"):
        run(predictor, [tmp_path / "a.tif", tmp_path / "b.tif"], how="tile", heat=tmp_path / "two.png")
    assert not (tmp_path / "two.png").exists()
