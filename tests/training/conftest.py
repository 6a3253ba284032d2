"""Tiny data in the official layout whose label can be learned in seconds, and configurations of a few steps on them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pcamlib.config import Config, parse
from pcamlib.data.layout import split_path
from pcamlib.seeding import seed_everything

#: One thread, a small square, a network of 25 thousand weights: a step takes about 3 ms.
TINY: dict[str, Any] = {
    "loader": {"batch_size": 32},
    "model": {"name": "mlp", "crop": 32, "hidden_units": [8]},
    "train": {"steps": 4, "threads": 1, "precision": "fp32", "device": "cpu"},
}


def write_split(folder: Path, split: str, labels: np.ndarray, seed: int, gap: float = 4.0) -> None:
    """One split of noise around grey (sd 25), `gap` levels redder in the centre 32x32 of a tumour patch."""
    rng = np.random.default_rng(seed)
    images = rng.normal(128, 25, (len(labels), 96, 96, 3)).astype(np.float32)
    images[labels == 1, 32:64, 32:64, 0] += gap
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(split_path(folder, split, "x"), "w") as file:
        file["x"] = images.clip(0, 255).astype(np.uint8)
    with h5py.File(split_path(folder, split, "y"), "w") as file:
        file["y"] = labels.astype(np.uint8).reshape(-1, 1, 1, 1)


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """torch imports its compiler when first asked for determinism: 2 s that no time limit here is meant to see."""
    seed_everything(0)


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Starts processes from a server that has imported what each would import again.

    The first optimiser imports torch's compiler, which took 1.4 of the 1.6 s CPU of a child that trains a few steps.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pcamlib.training.loop", "pytest", "torch._dynamo"])
    return context


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 train patches, 96 of them tumour, and 128 balanced valid ones; nobody may change them."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    write_split(folder, "train", rng.permutation(np.arange(256) < 96), seed=1)
    write_split(folder, "valid", rng.permutation(np.arange(128) < 64), seed=2)
    return folder


@pytest.fixture(scope="session")
def make_split() -> Callable[..., None]:
    """`write_split`, for data of a test's own."""
    return write_split


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """`tiny("key=value", ...)`: the tiny configuration with overrides."""

    def made(*items: str) -> Config:
        return parse(TINY, items)

    return made
