"""The size mystery: factors whose product is the file, the one that explains it, and chunks that cost too much."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pcamlib.audit import storage
from pcamlib.audit.findings import Split
from pcamlib.data.layout import Stored, inspect, split_path
from pcamlib.data.patches import open_split
from pcamlib.errors import DataError

KINDS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "float32": {"dtype": np.float32},
    "one": {"chunks": (1, 96, 96, 3)},
    "many": {"chunks": (16, 96, 96, 3)},
    "across": {"chunks": (16, 24, 24, 1), "compression": "gzip"},
    "lzf": {"chunks": (16, 48, 48, 3), "compression": "lzf"},
    "float32 gzip": {"chunks": (8, 96, 96, 3), "dtype": np.float32, "compression": "gzip", "shuffle": True},
}


def written(folder: Path, x: np.ndarray, **options: Any) -> Stored:
    with h5py.File(split_path(folder, "train", "x"), "w") as file:
        file.create_dataset("x", x.shape, options.pop("dtype", np.uint8), **options)[:] = x
    with h5py.File(split_path(folder, "train", "y"), "w") as file:
        file["y"] = (np.arange(len(x)) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
    return inspect(split_path(folder, "train", "x"), "x")


def empty(folder: Path, *, rows: int = 157_286, touch: bool) -> Stored:
    """The course's file without its pixels: 17 GB long, next to nothing on the disk."""
    path = split_path(folder, "train", "x")
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", (rows, 96, 96, 3), np.float32)
        if touch:
            x[rows - 1] = 7
    return inspect(path, "x")


def found(folder: Path) -> dict[str, Any]:
    return {f.check: f for f in storage.check({"train": Split(open_split(folder, "train"), {})})}


@pytest.fixture
def images() -> np.ndarray:
    """(24, 96, 96, 3) uint8: smooth, so that it compresses."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 128, (24, 1, 1, 3)) + rng.integers(0, 16, (24, 96, 96, 3))).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_of_the_factors_is_the_file(tmp_path: Path, images: np.ndarray, kind: str) -> None:
    stored = written(tmp_path, images, **KINDS[kind])
    account = storage.account(stored)
    assert round(math.prod(account.factors.values())) == stored.path.stat().st_size == account.size
    compared = storage.compare(account, storage.official("train"), storage.content(stored))
    assert math.prod(entry["ratio"] for entry in compared["factors"]) == pytest.approx(compared["ratio"])
    assert compared["saves"] == account.size - images.nbytes - 2048
    factors = account.factors
    assert factors["bytes a value"] == (4 if "float32" in kind else 1)
    assert (factors["stored per raw byte"] < 1) == (account.compression is not None)


@pytest.mark.parametrize(
    ("kind", "touched", "patches"), [("contiguous", 0, 1), ("one", 1, 1), ("many", 1, 16), ("across", 48, 16)]
)
def test_what_one_patch_touches(tmp_path: Path, images: np.ndarray, kind: str, touched: int, patches: int) -> None:
    stored = written(tmp_path, images, **KINDS[kind])
    assert storage.reach(stored) == (touched, patches * 27_648)
    finding = found(tmp_path).get("storage.chunks")
    assert (finding is not None) == (patches > 4)
    if finding:
        assert f"{touched:,} chunks" in finding.what
        assert finding.details["images_per_second"]["before"] < finding.details["images_per_second"]["after"]


def test_the_course_file_is_explained_by_its_type(tmp_path: Path) -> None:
    account = storage.account(empty(tmp_path, touch=True))
    assert account.size == 157_286 * 27_648 * 4 + 2048 and account.disk < account.size / 1000
    compared = storage.compare(account, storage.official("train"))
    assert compared["ratio"] == pytest.approx(2.4, abs=0.001)
    assert "0.6 (patches) x 4 (bytes a value)" in compared["sentence"]
    assert "bytes a value, float32 for uint8; compressed in neither" in compared["sentence"]
    verdicts = {entry["claim"]: entry["verdict"] for entry in compared["explanations"]}
    assert [claim for claim, verdict in verdicts.items() if verdict != "refuted"] == ["float32 instead of uint8"]
    predicted = {entry["claim"]: entry["predicted"] for entry in compared["explanations"]}
    assert predicted["uint32 instead of uint8"] == 4 * predicted["more images"] == 17_394_573_312
    assert compared["saves"] == 3 * 157_286 * 27_648


def test_the_worst_layout_reported() -> None:
    shape, chunks = (262_144, 96, 96, 3), (8192, 6, 6, 1)
    stored = Stored(Path("x.h5"), "x", shape, np.dtype(np.uint8), chunks, "gzip", None, None)
    assert storage.reach(stored) == (768, 8192 * 27_648)


def test_an_array_that_was_never_written(tmp_path: Path) -> None:
    stored = empty(tmp_path, rows=1000, touch=False)
    account = storage.account(stored)
    assert account.stored == 0 and math.prod(account.factors.values()) == pytest.approx(account.size)
    assert "nothing was ever written" in storage.compare(account, storage.official("train"))["sentence"]
    assert storage.content(stored)["high"] == 0


def test_chunks_that_were_never_written(tmp_path: Path) -> None:
    path = split_path(tmp_path, "train", "x")
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (100, 96, 96, 3), np.uint8, chunks=(1, 96, 96, 3))[:50] = np.full((50, 96, 96, 3), 9)
    compared = storage.compare(storage.account(inspect(path, "x")), storage.official("train"))
    assert "50% of the array was never written" in compared["sentence"]


def test_an_official_file_leaves_nothing_to_explain(tmp_path: Path, images: np.ndarray) -> None:
    written(tmp_path, images)
    assert found(tmp_path) == {}
    compared = storage.compare(storage.official("valid"), storage.official("valid"))
    assert compared["ratio"] == 1 and "the same in every factor" in compared["sentence"]
    assert {entry["verdict"] for entry in compared["explanations"]} == {"nothing to explain"}


def test_float32_holding_grey_levels(tmp_path: Path, images: np.ndarray) -> None:
    x = images.astype(np.float32)
    x[0, :9], x[1, :5, :5] = np.nan, 1e5  # neither makes the rest less whole
    x[2] *= 1.05
    written(tmp_path, x, dtype=np.float32)
    (finding,) = found(tmp_path).values()
    assert finding.check == "storage.dtype" and finding.rule is None and len(finding.rows) == 0
    assert f"saves {3 * images.nbytes:,}" in finding.advice
    held = finding.details["content"]
    assert 0.9 < held["whole"] < 1 and held["nan"] > 0 and held["high"] == 1e5
    assert held["float32 gzip shuffled"] < held["uint8 gzip"] < 1


def test_compressed_float32_saves_no_disk(tmp_path: Path, images: np.ndarray) -> None:
    written(tmp_path, np.where(np.arange(96) % 2, 1, 2)[None, :, None, None] * np.ones((20, 1, 96, 3)),
            dtype=np.float32, chunks=(1, 96, 96, 3), compression="gzip")  # fmt: skip
    assert "saves no disk" in found(tmp_path)["storage.dtype"].advice


@pytest.mark.parametrize("scale", [lambda x: x / 255, lambda x: (x - 60) / 40])
def test_scaled_values_are_told_from_grey_levels(tmp_path: Path, images: np.ndarray, scale: Any) -> None:
    written(tmp_path, scale(images.astype(np.float32)), dtype=np.float32)
    (finding,) = found(tmp_path).values()
    assert finding.check == "storage.scale" and "loses the picture" in finding.what


@pytest.mark.parametrize("value", [0, np.nan, np.inf, -np.inf, 1e5])
def test_all_rows_alike(tmp_path: Path, value: float) -> None:
    written(tmp_path, np.full((3, 96, 96, 3), value, np.float32), dtype=np.float32)
    assert list(found(tmp_path)) in (["storage.dtype"], ["storage.scale"])


def test_a_file_that_went_away(tmp_path: Path, images: np.ndarray) -> None:
    stored = written(tmp_path, images)
    stored.path.unlink()
    for look in (storage.account, storage.content):
        with pytest.raises(DataError, match="train_x"):
            look(stored)
