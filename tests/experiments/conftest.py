"""What the tests of experiments leave behind them: closed figures, and torch's switches as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from pcamlib.config import Config, parse
from pcamlib.data.layout import split_path

#: A network of 25 thousand weights on a small square, four steps, one thread.
TINY: dict[str, Any] = {
    "loader": {"batch_size": 32},
    "model": {"name": "mlp", "crop": 32, "hidden_units": [8]},
    "train": {"steps": 4, "threads": 1, "precision": "fp32", "device": "cpu"},
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield
    plt.close("all")
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """`tiny("key=value", ...)`: the tiny configuration with overrides."""
    return lambda *items: parse(TINY, items)


@pytest.fixture
def make_split() -> Callable[..., None]:
    """`make_split(folder, split, count, seed, flip=rows, nan=rows)`: noise, 60 levels redder in the centre of tumour.

    The class is learned in a few steps. `flip` gives rows the other label; with `nan` x is float32 and those rows hold
    one NaN pixel.
    """

    def write(
        folder: Path, split: str, count: int, seed: int, flip: tuple[int, ...] = (), nan: tuple[int, ...] = ()
    ) -> None:
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(count) % 2)
        images = rng.normal(128, 25, (count, 96, 96, 3)).astype(np.float32)
        images[labels == 1, 32:64, 32:64, 0] += 60
        images = images.clip(0, 255).round()
        images[list(nan), 48, 48] = np.nan
        labels[list(flip)] ^= 1
        folder.mkdir(exist_ok=True)
        with h5py.File(split_path(folder, split, "x"), "w") as file:
            file["x"] = images if nan else images.astype(np.uint8)
        with h5py.File(split_path(folder, split, "y"), "w") as file:
            file["y"] = labels.astype(np.uint8).reshape(-1, 1, 1, 1)

    return write
