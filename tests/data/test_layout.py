"""The official layout: what is found, what the header says, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from pcamlib.data.layout import find, inspect, read_labels, split_path
from pcamlib.errors import DataError


def test_official_names(tmp_path: Path) -> None:
    assert split_path(tmp_path, "valid", "y").name == "camelyonpatch_level_2_split_valid_y.h5"
    assert split_path(tmp_path, "test", "meta").name == "camelyonpatch_level_2_split_test_meta.csv"


def test_find_prefers_the_unpacked_file(tmp_path: Path) -> None:
    path = split_path(tmp_path, "train", "x")
    zipped = path.with_name(path.name + ".gz")
    zipped.touch()
    assert find(tmp_path, "train", "x") == zipped
    path.touch()
    assert find(tmp_path, "train", "x") == path


def test_find_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'valid'"):
        find(tmp_path, "vaild", "x")
    with pytest.raises(DataError, match=r"split_train_x\.h5: missing; `pcam data fetch"):
        find(tmp_path, "train", "x")
    with pytest.raises(DataError, match="no such folder"):
        find(tmp_path / "nowhere", "train", "x")


def test_contiguous_array_is_mapped_in_place(tmp_path: Path, images: np.ndarray) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = images
    stored = inspect(tmp_path / "a.h5", "x")
    mapped = stored.map()
    assert (stored.shape, stored.dtype, stored.synthetic) == (images.shape, np.uint8, None)
    assert stored.offset == (tmp_path / "a.h5").read_bytes().index(images[0].tobytes())
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    assert np.array_equal(mapped, images)


def test_chunked_array_is_not_mapped(tmp_path: Path, images: np.ndarray) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=images, chunks=(8, 96, 96, 3), compression="lzf")
    stored = inspect(tmp_path / "a.h5", "x")
    assert (stored.offset, stored.chunks, stored.compression) == (None, (8, 96, 96, 3), "lzf")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64"])
@pytest.mark.parametrize("tail", [(), (1,), (1, 1, 1)])
def test_labels_in_every_form_that_is_about(tmp_path: Path, dtype: str, tail: tuple[int, ...]) -> None:
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["y"] = np.array([0, 1, 1], dtype).reshape(3, *tail)
    found = read_labels(tmp_path / "y.h5")
    assert found.dtype == np.uint8 and found.tolist() == [0, 1, 1]


def test_wrong_label_is_named_with_its_row(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["y"] = np.array([0, 1, 2, 2], np.uint8)
    with pytest.raises(DataError, match=r"y\.h5: label 2 in row 2 \(2 such rows\)"):
        read_labels(tmp_path / "y.h5")


@pytest.mark.parametrize(
    "value", [np.zeros((3, 2), np.uint8), np.uint8(1), h5py.Empty("u1"), np.zeros(3), np.zeros((0, 1, 1, 1), np.uint8)]
)
def test_labels_of_another_form_are_refused(tmp_path: Path, value: object) -> None:
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["y"] = value
    with pytest.raises(DataError, match=r"y\.h5: "):
        read_labels(tmp_path / "y.h5")


def test_another_key_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.zeros(3)
        file.create_group("x")
    with pytest.raises(DataError, match=r"no array 'x'"):
        inspect(tmp_path / "a.h5", "x")


def test_corrupt_chunk_of_labels(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "y.h5", "w") as file:
        data = np.random.default_rng(0).integers(0, 2, 5000).astype(np.uint8)
        offset = (
            file.create_dataset("y", data=data, chunks=(5000,), compression="gzip").id.get_chunk_info(0).byte_offset
        )
    raw = bytearray((tmp_path / "y.h5").read_bytes())
    raw[offset : offset + 64] = bytes(64)
    (tmp_path / "y.h5").write_bytes(raw)
    with pytest.raises(DataError, match=r"y\.h5: labels cannot be read"):
        read_labels(tmp_path / "y.h5")


@pytest.mark.parametrize("chunks", [None, (8, 96, 96, 3)])
def test_flipped_header_bytes_give_a_message_or_nothing(
    tmp_path: Path, images: np.ndarray, chunks: tuple[int, ...] | None
) -> None:
    path, rng, refused = tmp_path / "a.h5", np.random.default_rng(1), 0
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=images, chunks=chunks)
    whole = path.read_bytes()
    for _ in range(80):
        raw = bytearray(whole)
        for place in rng.integers(0, 2000, 4):
            raw[place] = rng.integers(0, 256)
        path.write_bytes(raw)
        try:
            inspect(path, "x")
        except DataError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 10
