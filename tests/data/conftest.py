"""Small files in the official layout, in every form in which people have them."""

from __future__ import annotations

import gzip
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pcamlib.data.layout import split_path

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_cache_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PCAM_CACHE", raising=False)


@pytest.fixture
def images() -> np.ndarray:
    """(30, 96, 96, 3) uint8 noise, no row flawed."""
    return np.random.default_rng(7).integers(0, 256, (30, 96, 96, 3), np.uint8)


@pytest.fixture
def labels() -> np.ndarray:
    """(30,) uint8, 12 positives."""
    return np.random.default_rng(8).permutation(np.arange(30) < 12).astype(np.uint8)


@pytest.fixture
def write() -> Write:
    """`write(folder, x, y, split="train", kind="contiguous")` writes a split; returns the folder."""

    def written(folder: Path, x: np.ndarray | None, y: np.ndarray | None, split: str = "train", kind: str = "") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {}
        if kind in ("chunked", "gzip"):
            options["chunks"] = (7, 96, 96, 3)
        if kind == "gzip":
            options["compression"] = "gzip"
            options["compression_opts"] = 1
        if x is not None:
            path = split_path(folder, split, "x")
            with h5py.File(path, "w") as file:
                file.create_dataset("x", data=x.astype(np.float32) if kind == "float32" else x, **options)
            if kind == "h5.gz":
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), 1))
                path.unlink()
        if y is not None:
            with h5py.File(split_path(folder, split, "y"), "w") as file:
                file.create_dataset("y", data=y.reshape(-1, 1, 1, 1))
        return folder

    return written


@pytest.fixture
def killed() -> Callable[[Callable[[], None]], int]:
    """`killed(function)` runs it in a forked process, which must end by itself; returns its exit code."""

    def run(function: Callable[[], None]) -> int:
        def body() -> None:
            torch.set_num_threads(1)  # a forked OpenMP pool would hang
            function()
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        process.join(60)
        assert process.exitcode is not None, "the forked process hangs"
        return process.exitcode

    return run


@pytest.fixture
def disk_full() -> Callable[[Path], None]:
    """`disk_full(path)`: this process's next write of `path` meets a full disk, by the kernel's own error."""

    def arrange(path: Path) -> None:
        from pcamlib.files import _part_name

        path.parent.mkdir(parents=True, exist_ok=True)
        _part_name(path).symlink_to("/dev/full")

    return arrange
