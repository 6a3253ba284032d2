"""The generator: repeatable, balanced, labelled by its own mask, honest about being synthetic."""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from pcamlib.data import synthetic, tissue
from pcamlib.data.layout import SPLITS, inspect, split_path
from pcamlib.errors import DataError


def quiet(line: str) -> None:
    pass


def read(folder: Path, split: str, part: str) -> np.ndarray:
    with h5py.File(split_path(folder, split, part)) as handle:
        return handle[part][:]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_layout_is_official_and_mappable(synthetic_dir: Path) -> None:
    for split, size in {"train": 512, "valid": 256, "test": 256}.items():
        x = inspect(split_path(synthetic_dir, split, "x"), "x")
        y = inspect(split_path(synthetic_dir, split, "y"), "y")
        assert (x.shape, x.dtype, x.chunks, x.compression) == ((size, 96, 96, 3), np.uint8, None, None)
        assert x.offset is not None
        assert (y.shape, y.dtype) == ((size, 1, 1, 1), np.uint8)


def test_two_calls_write_the_same_bytes(tmp_path: Path) -> None:
    sizes = {"train": 70, "valid": 1}
    for name in "ab":
        synthetic.generate(tmp_path / name, seed=0, sizes=sizes, report=quiet)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 6


def test_a_larger_file_starts_with_the_smaller(synthetic_dir: Path, tmp_path: Path) -> None:
    synthetic.generate(tmp_path, seed=0, sizes={"valid": 100}, report=quiet)
    for part in "xy":
        np.testing.assert_array_equal(read(tmp_path, "valid", part), read(synthetic_dir, "valid", part)[:100])


def test_the_bytes_do_not_hang_on_cpu_instructions() -> None:
    code = (
        "import hashlib; from pcamlib.data.tissue import chunk;"
        "c = chunk(0, 'test', 1); print(hashlib.sha256(c.x.tobytes() + c.mask.tobytes()).hexdigest())"
    )
    found = np.show_config("dicts")["SIMD Extensions"].get("found", [])
    plain = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    if platform.machine() == "x86_64":
        plain["OPENBLAS_CORETYPE"] = "Nehalem"  # SSE only
    result = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    chunk = tissue.chunk(0, "test", 1)
    assert result.stdout.strip() == hashlib.sha256(chunk.x.tobytes() + chunk.mask.tobytes()).hexdigest()


def test_another_seed_split_or_chunk_is_another_picture() -> None:
    others = [tissue.chunk(1, "train", 0), tissue.chunk(0, "valid", 0), tissue.chunk(0, "train", 1)]
    first = tissue.chunk(0, "train", 0).x
    assert not any((first == other.x).all((1, 2, 3)).any() for other in others)
    assert len(np.unique(first.reshape(64, -1), axis=0)) == 64


def test_the_label_is_tumour_in_the_centre_and_classes_are_balanced(synthetic_dir: Path) -> None:
    chunks = [tissue.chunk(0, "train", number) for number in range(4)]
    mask = np.concatenate([chunk.mask for chunk in chunks])
    y = read(synthetic_dir, "train", "y").ravel()
    assert y.sum() == 256
    y = y[: len(mask)]
    np.testing.assert_array_equal(mask[:, 32:64, 32:64].any((1, 2)), y)
    assert 0.15 < mask.any((1, 2))[y == 0].mean() < 0.35, "hard negatives hold tumour outside the centre"
    assert (mask[y == 1][:, 32:64, 32:64].mean((1, 2)) < 0.06).mean() > 0.05, "some positives hold very little"


def test_meta_names_slides_of_one_split_and_the_labels(synthetic_dir: Path) -> None:
    slides: dict[str, set[str]] = {}
    for split in SPLITS:
        with open(split_path(synthetic_dir, split, "meta"), newline="") as handle:
            rows = list(csv.DictReader(handle))
        assert list(rows[0]) == ["", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi"]
        labels = read(synthetic_dir, split, "y").ravel()
        assert [row["center_tumor_patch"] == "True" for row in rows] == labels.astype(bool).tolist()
        assert all(row["tumor_patch"] == "True" for row in rows if row["center_tumor_patch"] == "True")
        slides[split] = {row["wsi"] for row in rows}
        assert len(slides[split]) > 10
    assert len(set.union(*slides.values())) == sum(map(len, slides.values()))


def test_neither_brightness_nor_colour_gives_the_label_away(synthetic_dir: Path) -> None:
    x, y = read(synthetic_dir, "train", "x"), read(synthetic_dir, "train", "y").ravel()
    for feature in (x.mean((1, 2, 3)), *x.mean((1, 2)).T):
        lower = (feature[y == 1][:, None] < feature[y == 0]).mean()  # the AUC of "darker means tumour"
        assert 0.4 < lower < 0.76


def test_every_file_says_synthetic_and_a_whole_set_is_left_alone(tmp_path: Path) -> None:
    sizes = {"train": 64, "valid": 2}
    about = synthetic.generate(tmp_path, seed=0, sizes=sizes, report=quiet)
    assert (about["seed"], about["sizes"]) == (0, sizes)
    paths = [split_path(tmp_path, split, part) for split in sizes for part in "xy"]
    assert [synthetic.described(path) for path in paths] == [about] * 4
    before = [path.stat().st_mtime_ns for path in paths]
    lines: list[str] = []
    synthetic.generate(tmp_path, seed=0, sizes=sizes, report=lines.append)
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert lines[0] == "train: 64 synthetic patches are there"
    synthetic.generate(tmp_path, seed=1, sizes=sizes, report=quiet)
    assert synthetic.described(paths[0]) == about | {"seed": 1}


def test_a_kill_in_mid_write_leaves_no_file_and_the_next_call_cleans_up(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from pcamlib.data.synthetic import generate; generate(Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(".*.part")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("camelyon*")) == []
    synthetic.generate(tmp_path, sizes={"train": 2}, report=quiet)
    assert sorted(path.name.split("train_")[1] for path in tmp_path.iterdir()) == ["meta.csv", "x.h5", "y.h5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": {"vaild": 10}}, "unknown split 'vaild'; did you mean 'valid'"),
        ({"sizes": {"train": 0}}, "cannot write 0 patches"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthetic.generate(tmp_path, report=quiet, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_real_data_is_never_overwritten(tmp_path: Path) -> None:
    path = split_path(tmp_path, "valid", "x")
    with h5py.File(path, "w") as handle:
        handle["x"] = np.zeros((1, 96, 96, 3), np.uint8)
    with pytest.raises(DataError, match="not synthetic"):
        synthetic.generate(tmp_path, sizes={"train": 2, "valid": 2}, report=quiet)
    assert list(tmp_path.iterdir()) == [path]
