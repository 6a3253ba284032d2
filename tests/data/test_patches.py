"""One call opens a split; a bad one is refused on one line, and nothing is left behind."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pcamlib.data.layout import split_path
from pcamlib.data.patches import channel_statistics, mask_path, open_split, sample
from pcamlib.errors import DataError
from pcamlib.files import write_json

HTML = b"<!DOCTYPE html><html><body>Sign in to download</body></html>"


def test_uint8_opens_in_place(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    before = sorted(write(tmp_path, images, labels).rglob("*"))
    patches = open_split(tmp_path, "train")
    assert isinstance(patches.images, np.memmap)
    assert Path(str(patches.images.filename)) == split_path(tmp_path, "train", "x")
    assert np.array_equal(patches.images, images) and len(patches) == 30
    assert not patches.images.flags.writeable
    assert sorted(tmp_path.rglob("*")) == before, "opening writes nothing"
    assert patches.valid.all()
    assert (tmp_path / ".pcam-cache").is_dir(), "the flags are kept"


def test_rows_leave_out_what_is_flawed(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    x = images.astype(np.float32)
    x[2, 5, 5, 0], x[3, 5, 5, 0], x[4], x[5] = np.nan, 1e5, 0, 255
    patches = open_split(write(tmp_path, x, labels), "train")
    assert sorted(set(range(30)) - set(patches.rows().tolist())) == [2, 3, 4, 5]
    assert sorted(set(range(30)) - set(patches.rows(["nan", "white"]).tolist())) == [2, 5]
    assert patches.rows([]).tolist() == list(range(30))
    assert patches.rows(limit=4).tolist() == [0, 1, 6, 7] and patches.rows().dtype == np.int64
    assert sample(patches, 3).tolist() == [0, 16, 29]
    assert patches.synthetic is None


def test_raw_gives_the_values_as_stored(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    x = images.astype(np.float32)
    x[2, 5, 5, 0], x[3, 5, 5, 0] = np.nan, 1e5
    with h5py.File(split_path(write(tmp_path / "plain", images, labels), "train", "x"), "w") as file:
        file["x"] = x
    patches = open_split(tmp_path / "plain", "train")
    np.testing.assert_array_equal(patches.raw.images, x)
    assert patches.raw.labels is patches.labels and patches.images.dtype == np.uint8
    assert patches.raw.fingerprint == patches.fingerprint
    write(tmp_path / "chunked", images, labels, kind="chunked")
    with pytest.raises(DataError, match=r"data.raw needs contiguous values; leave it out for the uint8 copy"):
        _ = open_split(tmp_path / "chunked", "train").raw


def test_statistics_are_those_of_the_valid_patches(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    images[7] = 255
    found = channel_statistics(open_split(write(tmp_path, images, labels), "train"))
    kept = np.delete(images, 7, 0).reshape(-1, 3).astype(np.float64)
    assert found["n"] == 29 and found["split"] == "train"
    assert np.allclose(found["mean"], kept.mean(0)) and np.allclose(found["std"], kept.std(0))


def test_fingerprint_is_of_the_content(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    def fingerprint(name: str, x: np.ndarray, y: np.ndarray, kind: str = "") -> str:
        return open_split(write(tmp_path / name, x, y, kind=kind), "train").fingerprint

    first = fingerprint("a", images, labels)
    assert fingerprint("b", images, labels) == first
    assert all(fingerprint(kind, images, labels, kind) == first for kind in ("float32", "chunked", "h5.gz"))
    pixel, label, flag = images.copy(), labels.copy(), images.astype(np.float32)
    pixel[11, 40, 40, 1] ^= 1
    label[11] ^= 1
    spot = np.unravel_index(np.argmax(images), images.shape)
    flag[spot] = 256  # the same pixel once clipped, and out of range before
    others = [fingerprint("c", pixel, labels), fingerprint("d", images, label), fingerprint("e", flag, labels)]
    assert len({first, *others}) == 4


def test_test_split_may_lack_labels(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    folder = tmp_path / "missing"  # a folder's name decides nothing
    assert open_split(write(folder, images, None, "test"), "test").labels is None
    with pytest.raises(DataError, match=r"test_y\.h5: missing"):
        open_split(folder, "test", labels=True)
    write(folder, None, labels[:-1], "test")
    with pytest.raises(DataError, match="30 patches but 29 labels"):
        open_split(folder, "test")
    split_path(folder, "test", "y").write_bytes(HTML)
    with pytest.raises(DataError, match="a web page"):
        open_split(folder, "test")


def _rewrite(key: str, value: np.ndarray) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file[key] = value

    return spoil


def _zipped(content: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        path.with_name(path.name + ".gz").write_bytes(content)

    return spoil


X, Y = np.zeros((30, 96, 96, 3)), np.zeros((30, 1, 1, 1))
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing x": ("x", Path.unlink, "missing"),
    "missing y": ("y", Path.unlink, "missing"),
    "29 labels": ("y", _rewrite("y", Y[1:].astype(np.uint8)), "30 patches but 29 labels"),
    "31 labels": ("y", _rewrite("y", np.zeros((31, 1, 1, 1), np.uint8)), "30 patches but 31 labels"),
    "truncated": ("x", lambda path: os.truncate(path, path.stat().st_size - 1), "truncated"),
    "half": ("x", lambda path: os.truncate(path, path.stat().st_size // 2), "truncated"),
    "header only": ("x", lambda path: os.truncate(path, 512), "truncated"),
    "64x64": ("x", _rewrite("x", np.zeros((30, 64, 64, 3), np.uint8)), "shape"),
    "channels first": ("x", _rewrite("x", np.zeros((30, 3, 96, 96), np.uint8)), "shape"),
    "flat": ("x", _rewrite("x", np.zeros((30, 27648), np.uint8)), "shape"),
    "no rows": ("x", _rewrite("x", X[:0].astype(np.uint8)), "no rows"),
    "uint16": ("x", _rewrite("x", X.astype(np.uint16)), "is uint16, expected uint8 or float32"),
    "float64": ("x", _rewrite("x", X), "is float64, expected uint8 or float32"),
    "big-endian": ("x", _rewrite("x", X.astype(">f4")), "is >f4, expected uint8 or float32"),
    "labels 2": ("y", _rewrite("y", Y.astype(np.uint8) + 2), "label 2 in row 0"),
    "labels -1": ("y", _rewrite("y", Y.astype(np.int64) - 1), "label -1 in row 0"),
    "float labels": ("y", _rewrite("y", Y), "is float64"),
    "html": ("x", lambda path: path.write_bytes(HTML) and None, "a web page"),
    "html labels": ("y", lambda path: path.write_bytes(b"\n" + HTML) and None, "a web page"),
    "html as gz": ("x", _zipped(HTML), "a web page"),
    "html in gz": ("x", _zipped(gzip.compress(HTML)), "a web page"),
    "cut gz": ("x", _zipped(gzip.compress(os.urandom(9999))[:5000]), "damaged gzip|not HDF5"),
    "empty": ("x", lambda path: os.truncate(path, 0), "empty file"),
    "empty labels": ("y", lambda path: os.truncate(path, 0), "empty file"),
    "empty gz": ("x", _zipped(b""), "empty file"),
    "text": ("x", lambda path: path.write_text("404: not found") and None, "not HDF5"),
    "another key": ("x", _rewrite("images", X.astype(np.uint8)), "no array 'x'"),
}


@pytest.mark.parametrize("kind", ["", "float32"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, kind: str, tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    part, spoil, message = BAD[name]
    path = split_path(write(tmp_path, images, labels, kind=kind), "train", part)
    spoil(path)
    with pytest.raises(DataError, match=message) as caught:
        open_split(tmp_path, "train")
    text = str(caught.value)
    assert "\n" not in text
    assert "camelyonpatch_level_2_split_train_" in text and str(tmp_path) in text
    assert not list(tmp_path.glob(".pcam-cache/*")), "nothing is written for a file that is refused"


def test_clean_leaves_out_what_an_audit_found(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    images[3] = 0
    patches = open_split(write(tmp_path, images, labels), "train")
    with pytest.raises(DataError, match="not audited as it is now; run `pcam audit"):
        patches.rows(clean=True)
    rules = {"duplicates": [5, 9], "poison": [1], "near": []}
    write_json(mask_path(patches.stored), {"fingerprint": patches.fingerprint, "beside": {}, "rules": rules})
    every = set(range(30)) - {3}
    assert set(patches.rows(clean=True)) == every - {1, 5, 9}
    assert set(patches.rows(clean=["duplicates"])) == every - {5, 9}
    assert set(patches.rows(clean=["near"])) == every and set(patches.rows()) == every
    with pytest.raises(DataError, match="did not look for 'label'"):
        patches.rows(clean=["label"])


def test_a_mask_does_not_outlive_the_labels_it_was_made_for(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    patches = open_split(write(tmp_path, images, labels), "train")
    write_json(mask_path(patches.stored), {"fingerprint": patches.fingerprint, "beside": {}, "rules": {"labels": [0]}})
    assert 0 not in patches.rows(clean=True)
    write(tmp_path, None, 1 - labels)
    with pytest.raises(DataError, match="not audited as it is now"):
        open_split(tmp_path, "train").rows(clean=True)
