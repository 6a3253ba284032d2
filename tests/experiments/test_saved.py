from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pcamlib.errors import DataError
from pcamlib.experiments import saved
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import Bound, Slice
from pcamlib.training.evaluate import Predictions

DIM = Slice((Bound("brightness", high=0.4),))


def tables(n: int = 400) -> tuple[Features, Predictions]:
    rng, index = np.random.default_rng(0), np.arange(n)
    label = (index % 2).astype(np.uint8)
    columns = (Column("brightness", "share", "number", ""),)
    features = Features("valid", "f" * 64, index, columns, rng.random((n, 1), np.float32))
    return features, Predictions("valid", "f" * 64, index, label, rng.random(n))


def test_a_slice_comes_back_as_it_was_named(tmp_path: Path) -> None:
    box = Slice((Bound("brightness", 0.1, 0.4), Bound("blur", low=3.25)))
    saved.add(tmp_path / "slices.yaml", "dim and sharp", box, 0.3)
    saved.add(tmp_path / "slices.yaml", "dim", DIM, 0.5)
    found = saved.read(tmp_path / "slices.yaml")
    assert list(found) == ["dim and sharp", "dim"]
    assert found["dim and sharp"].slice == box and found["dim and sharp"].threshold == 0.3
    assert found["dim"].slice == DIM


def test_a_name_given_again_replaces_its_slice_only(tmp_path: Path) -> None:
    path = tmp_path / "slices.yaml"
    saved.add(path, "a", DIM, 0.5)
    saved.add(path, "b", DIM, 0.5)
    saved.add(path, "a", DIM, 0.7)
    assert [(name, one.threshold) for name, one in saved.read(path).items()] == [("a", 0.7), ("b", 0.5)]


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 61])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="name of 1 to 60"):
        saved.add(tmp_path / "slices.yaml", name, DIM, 0.5)
    assert not (tmp_path / "slices.yaml").exists()


def test_every_patch_is_no_slice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="narrow at least one feature"):
        saved.add(tmp_path / "slices.yaml", "all", Slice(), 0.5)


def test_a_cluster_of_one_model_is_no_slice_to_keep(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the next one numbers them anew"):
        saved.add(tmp_path / "slices.yaml", "odd", Slice((Bound("cluster", 3, 4),)), 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices: [", "no YAML"),
        ("slices: {a: {bounds: {probability: [0, 1]}}}", "judged by"),
        ("slices: {a: {threshold: 2, bounds: {blur: [0, 1]}}}", "threshold"),
        ("slices: {a: {bounds: {}}}", "bounds"),
        ("slice: {}", "slice"),
    ],
)
def test_a_file_that_says_something_else_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "slices.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        saved.read(tmp_path / "slices.yaml")


def test_the_table_measures_each_slice_and_says_why_not(tmp_path: Path) -> None:
    path = tmp_path / "slices.yaml"
    saved.add(path, "dim", DIM, 0.5)
    saved.add(path, "few", Slice((Bound("brightness", high=0.001),)), 0.5)
    found = saved.add(path, "elsewhere", Slice((Bound("blur", high=1),)), 0.5)
    features, predictions = tables()
    rows = {row["name"]: row for row in saved.table(found, features, predictions)}
    assert rows["dim"]["n"] == int((features["brightness"] < 0.4).sum()) and not rows["dim"]["why not"]
    assert "fewer than" in rows["few"]["why not"] and "n" not in rows["few"]
    assert "no feature 'blur'" in rows["elsewhere"]["why not"]


def test_no_file_is_no_slices(tmp_path: Path) -> None:
    assert saved.read(tmp_path / "none.yaml") == {}
