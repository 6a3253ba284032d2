"""The streaming pass: once, resumed where it was cut off, and nothing half-written whatever happens."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pcamlib.data import convert, scan
from pcamlib.data.layout import inspect, split_path
from pcamlib.data.patches import open_split
from pcamlib.errors import DataError, PcamError


def test_unpack_and_scan_happen_once(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_split(write(tmp_path, images, labels, kind="float32"), "train")
    monkeypatch.setattr(scan, "_pass", None)  # a second pass would fail
    assert np.array_equal(open_split(tmp_path, "train").images, images)


def test_changed_source_is_converted_again(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    before = open_split(write(tmp_path, images, labels, kind="float32"), "train").fingerprint
    images[5, 0, 0, 0] ^= 1
    path = split_path(write(tmp_path, images, labels, kind="float32"), "train", "x")
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution
    after = open_split(tmp_path, "train")
    assert np.array_equal(after.images, images) and after.fingerprint != before


def test_truncated_cache_is_made_again(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    open_split(write(tmp_path, images, labels, kind="float32"), "train")
    (copy,) = (tmp_path / ".pcam-cache").glob("*.u8")
    os.truncate(copy, 1000)
    assert np.array_equal(open_split(tmp_path, "train").images, images)


def test_cache_goes_where_it_is_sent(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", images, labels, kind="float32")
    monkeypatch.setenv("PCAM_CACHE", str(tmp_path / "scratch"))
    open_split(tmp_path / "data", "train")
    suffixes = sorted(path.suffix for path in (tmp_path / "scratch").iterdir())
    assert suffixes == [".flags", ".ids", ".json", ".lock", ".u8"]
    assert not (tmp_path / "data" / ".pcam-cache").exists()
    monkeypatch.delenv("PCAM_CACHE")
    monkeypatch.setattr(convert, "writable", lambda folder: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert convert.cache_dir(tmp_path / "data" / "x.h5") == tmp_path / "home" / ".cache" / "pcam"


@pytest.mark.parametrize("kind", ["contiguous", "float32", "gzip"])
def test_a_killed_pass_goes_on_where_it_was(
    kind: str,
    tmp_path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    write: Callable[..., Path],
    killed: Callable[[Callable[[], None]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, images, labels, kind=kind)
    right, blocks = convert.to_uint8, []

    def dies_at_row_21(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks.append(len(block))
        if sum(blocks) > 21:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(block)

    def remembers(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks.append(len(block))
        return right(block)

    monkeypatch.setattr(convert, "BLOCK", 7)
    monkeypatch.setattr(scan, "_SHARD", 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "to_uint8", dies_at_row_21)
        assert killed(lambda: open_split(tmp_path, "train").fingerprint) == -signal.SIGKILL
    cache = tmp_path / ".pcam-cache"
    assert {path.suffix for path in cache.iterdir()} == {".lock", ".pass"}
    monkeypatch.setattr(convert, "to_uint8", remembers)
    patches = open_split(tmp_path, "train")
    assert np.array_equal(patches.images, images) and patches.fingerprint
    assert sum(blocks) < 30, "rows of finished shards are not read again"
    assert not list(cache.glob("*.pass"))
    write(tmp_path / "whole", images, labels, kind=kind)
    assert patches.fingerprint == open_split(tmp_path / "whole", "train").fingerprint


def test_an_observer_shares_the_pass_and_is_asked_once(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images[3] = 0
    stored = inspect(split_path(write(tmp_path, images, labels, kind="float32"), "train", "x"), "x")

    def sums(start: int, raw: np.ndarray, values: np.ndarray, flags: np.ndarray) -> dict[str, np.ndarray]:
        assert raw.dtype == np.float32 and np.array_equal(raw, values)
        total = values.reshape(len(values), -1).sum(1, dtype=np.int64)
        return {"row": np.arange(start, start + len(raw)), "sum": np.where(flags, -1, total)}

    monkeypatch.setattr(convert, "BLOCK", 7)
    columns = scan.observe(stored, "sums-1", sums)
    expected = images.reshape(30, -1).sum(1, dtype=np.int64)
    expected[3] = -1
    assert np.array_equal(columns["row"], np.arange(30)) and np.array_equal(columns["sum"], expected)
    monkeypatch.setattr(convert, "blocks", None)  # neither the scan nor the columns need another read
    assert np.array_equal(open_split(tmp_path, "train").images, images)
    assert np.array_equal(scan.observe(stored, "sums-1", sums)["sum"], expected)


def test_new_code_of_an_observer_replaces_the_old_columns(
    tmp_path: Path, images: np.ndarray, write: Callable[..., Path]
) -> None:
    stored = inspect(split_path(write(tmp_path, images, None), "train", "x"), "x")
    for version in (1, 2):
        columns = scan.observe(stored, f"v-{version}", lambda s, r, v, f, n=version: {"v": np.full(len(v), n)})
        assert (columns["v"] == version).all()
    assert len(list((tmp_path / ".pcam-cache").glob("*.npz"))) == 1


def test_columns_do_not_outlive_the_pixels_they_were_copied_with(
    tmp_path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    write: Callable[..., Path],
    killed: Callable[[Callable[[], None]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An observer is cut off while the uint8 copy is there; the copy is then lost: it is made whole again."""
    stored = inspect(split_path(write(tmp_path, images, labels, kind="float32"), "train", "x"), "x")
    monkeypatch.setattr(convert, "BLOCK", 7)
    monkeypatch.setattr(scan, "_SHARD", 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    open_split(tmp_path, "train")

    def cut(start: int, *_: np.ndarray) -> dict[str, np.ndarray]:
        if start >= 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    assert killed(lambda: scan.observe(stored, "cut-1", cut)) == -signal.SIGKILL
    next((tmp_path / ".pcam-cache").glob("*.u8")).unlink()
    scan.observe(stored, "cut-1", lambda *_: {})
    assert np.array_equal(open_split(tmp_path, "train").images, images)


def test_ids_are_sha1_of_the_bytes_in_any_form(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    for kind in ("contiguous", "float32", "gzip"):
        stored = inspect(split_path(write(tmp_path / kind, images, labels, kind=kind), "train", "x"), "x")
        assert [row.tobytes().hex() for row in scan.scan(stored).ids] == [
            hashlib.sha1(image.tobytes()).hexdigest() for image in images
        ]


@pytest.mark.parametrize("suffix", [".flags", ".ids", ".json", ".h5"])
def test_full_disk_leaves_nothing(
    suffix: str,
    tmp_path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    write: Callable[..., Path],
    disk_full: Callable[[Path], None],
) -> None:
    write(tmp_path, images, labels, kind="h5.gz" if suffix == ".h5" else "float32")
    path = split_path(tmp_path, "train", "x")
    source = path.with_name(path.name + ".gz") if suffix == ".h5" else path
    target = convert.entry(source).with_suffix(suffix)
    disk_full(target)
    with pytest.raises(PcamError, match="the disk is full or over quota") as caught:
        open_split(tmp_path, "train")
    assert "\n" not in str(caught.value) and str(target) in str(caught.value)
    assert not target.exists() and not list(target.parent.glob(".*.part"))
    assert np.array_equal(open_split(tmp_path, "train").images, images)


def test_full_disk_in_mid_copy_is_told_and_gone_on_from(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    path = split_path(write(tmp_path, images, labels, kind="float32"), "train", "x")
    copy = convert.entry(path).with_suffix(".pass") / "pixels.u8"
    copy.parent.mkdir(parents=True)
    copy.symlink_to("/dev/full")
    with pytest.raises(PcamError, match="the disk is full or over quota"):
        open_split(tmp_path, "train")
    copy.unlink()
    assert np.array_equal(open_split(tmp_path, "train").images, images)


def test_damaged_chunk_names_the_rows(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("x", data=images, chunks=(10, 96, 96, 3), compression="gzip", compression_opts=1)
        offset = data.id.get_chunk_info(1).byte_offset
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 200] = bytes(200)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.h5: rows from 0 cannot be read"):
        scan.scan(inspect(path, "x"))
    assert not list((tmp_path / ".pcam-cache").glob("*.json")), "what was not read to its end is not a result"


def test_file_that_shrinks_meanwhile_is_an_error_not_a_bus_error(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["x"] = images
    stored = inspect(path, "x")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match="ended in mid-array"):
        scan.scan(stored)
