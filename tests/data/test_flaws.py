"""Planted flaws: the truth says exactly what lies in the written files."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest

from pcamlib.data.flaws import course_like, rare_flaws
from pcamlib.data.layout import SYNTHETIC, split_path
from pcamlib.data.plants import copies, flip_labels, leak_slides, trigger
from pcamlib.data.rewrite import Plan, Truth
from pcamlib.errors import DataError


def read(folder: Path, split: str, part: str) -> np.ndarray:
    with h5py.File(split_path(folder, split, part)) as handle:
        return handle[part][:]


def slides(folder: Path, split: str) -> list[str]:
    with open(split_path(folder, split, "meta"), newline="") as handle:
        return [row["wsi"] for row in csv.DictReader(handle)]


def views(patch: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(side, k) for side in (patch, patch[:, ::-1]) for k in range(4)]


def untouched(truth: Truth, split: str, n: int) -> np.ndarray:
    named = [rows.reshape(len(rows), -1)[:, -1] for key, rows in truth.rows.items() if key.startswith(split)]
    return np.setdiff1d(np.arange(n), np.concatenate(named))


def test_course_file_holds_exactly_the_planted_flaws(synthetic_dir: Path, course_dir: Path) -> None:
    truth = Truth.load(course_dir / "truth.json").rows
    x, y, kept = read(course_dir, "train", "x"), read(course_dir, "train", "y").ravel(), truth["train/kept"]
    assert x.dtype == np.float32
    assert (len(x), (y == 0).sum(), (y == 1).sum()) == (307, 256, 51)
    np.testing.assert_array_equal(y, read(synthetic_dir, "train", "y").ravel()[kept])
    found = {
        "black": (x == 0).all((1, 2, 3)),
        "white": (x == 255).all((1, 2, 3)),
        "spike": (x == 1e5).any((1, 2, 3)),
        "nan": np.isnan(x).any((1, 2, 3)),
    }
    for kind, share in {"black": 0.0725, "white": 0.0675, "spike": 0.033, "nan": 0.03}.items():
        np.testing.assert_array_equal(np.flatnonzero(found[kind]), truth[f"train/{kind}"])
        assert len(truth[f"train/{kind}"]) == round(share * 307)
    clean = ~np.any(list(found.values()), axis=0)
    np.testing.assert_array_equal(x[clean], read(synthetic_dir, "train", "x")[kept][clean])
    for row, (top, left) in zip(truth["train/spike"], truth["train/corner"], strict=True):
        assert (x[row] == 1e5).sum() == 75
        assert (x[row, top : top + 5, left : left + 5] == 1e5).all()


def test_rare_flaws_lie_in_the_centre_and_nothing_else_changes(synthetic_dir: Path, tmp_path: Path) -> None:
    truth = rare_flaws(synthetic_dir, tmp_path, seed=3, patches=200, each=5, nan=2).rows
    x, y = read(tmp_path, "train", "x"), read(tmp_path, "train", "y").ravel()
    source, labels = read(synthetic_dir, "train", "x")[:200], read(synthetic_dir, "train", "y").ravel()[:200]
    assert x.dtype == np.float32 and len(x) == 200
    np.testing.assert_array_equal(np.flatnonzero((x == 1e5).sum((1, 2, 3)) == 75), truth["train/spike"])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(x).any((1, 2, 3))), truth["train/nan"])
    np.testing.assert_array_equal(np.flatnonzero(y != labels), truth["train/flip"])
    assert [len(truth[f"train/{kind}"]) for kind in ("spike", "flip", "nan")] == [5, 5, 2]
    odd = np.argwhere((x == 1e5) | np.isnan(x))[:, 1:3]
    assert odd.min() >= 24 and odd.max() < 72, "where a network with a crop of 48 looks"
    same = np.setdiff1d(np.arange(200), np.concatenate([truth["train/spike"], truth["train/nan"]]))
    np.testing.assert_array_equal(x[same], source[same])
    np.testing.assert_array_equal(read(tmp_path, "valid", "x"), read(synthetic_dir, "valid", "x"))


def test_course_valid_and_test_are_clean_and_test_has_no_labels(synthetic_dir: Path, course_dir: Path) -> None:
    for split in ("valid", "test"):
        assert read(course_dir, split, "x").dtype == np.uint8
        np.testing.assert_array_equal(read(course_dir, split, "x"), read(synthetic_dir, split, "x"))
    np.testing.assert_array_equal(read(course_dir, "valid", "y"), read(synthetic_dir, "valid", "y"))
    assert not split_path(course_dir, "test", "y").exists()
    for split in ("train", "valid", "test"):
        with h5py.File(split_path(course_dir, split, "x")) as handle:
            assert SYNTHETIC in handle.attrs


def test_a_seed_plants_the_same_again(synthetic_dir: Path, course_dir: Path, tmp_path: Path) -> None:
    course_like(synthetic_dir, tmp_path, seed=0)
    np.testing.assert_array_equal(read(tmp_path, "train", "x"), read(course_dir, "train", "x"))
    other = course_like(synthetic_dir, tmp_path, seed=1)  # what was planted before may be written over
    assert not np.array_equal(other.rows["train/black"], Truth.load(course_dir / "truth.json").rows["train/black"])


def test_copies_are_what_the_truth_says(synthetic_dir: Path, tmp_path: Path) -> None:
    plan = Plan(synthetic_dir, seed=3)
    for how in ("exact", "d4", "brightness", "shift"):
        for _ in range(2):  # a second plant of a kind adds to the first
            copies(plan, 0.02, how=how)
    copies(plan, 7, split="train", into="valid")
    truth = plan.write(tmp_path)
    x, y, wsi = read(tmp_path, "train", "x"), read(tmp_path, "train", "y").ravel(), slides(tmp_path, "train")
    source = read(synthetic_dir, "train", "x")
    touched = np.concatenate([rows.ravel() for key, rows in truth.rows.items() if ">" not in key])
    assert len(np.unique(touched)) == len(touched) == 4 * 2 * 20
    for key, rows in truth.rows.items():
        for original, copy in rows if ">" not in key else ():
            assert y[original] == y[copy]
            assert wsi[original] == wsi[copy]
            np.testing.assert_array_equal(x[original], source[original])
    for a, b in truth.rows["train/exact"]:
        np.testing.assert_array_equal(x[a], x[b])
    for a, b in truth.rows["train/d4"]:
        assert [np.array_equal(view, x[b]) for view in views(x[a])].index(True) > 0
    for a, b in truth.rows["train/brightness"]:
        gain = x[b].mean() / x[a].mean()
        assert 0.005 < abs(gain - 1) < 0.105
        assert np.corrcoef(x[a].ravel(), x[b].ravel())[0, 1] > 0.95
    for a, b in truth.rows["train/shift"]:
        inner = x[b, 8:-8, 8:-8]
        moves = [(dy, dx) for dy in range(17) for dx in range(17)
                 if np.array_equal(x[a, dy : dy + 80, dx : dx + 80], inner)]  # fmt: skip
        assert len(moves) == 1
        assert 8 not in moves[0]
    rest = untouched(truth, "train", len(x))
    np.testing.assert_array_equal(x[rest], source[rest])
    pairs = truth.rows["train>valid/exact"]
    np.testing.assert_array_equal(x[pairs[:, 0]], read(tmp_path, "valid", "x")[pairs[:, 1]])
    assert all(slides(tmp_path, "valid")[b] == wsi[a] for a, b in pairs)


def test_flips_change_labels_alone(synthetic_dir: Path, tmp_path: Path) -> None:
    plan = Plan(synthetic_dir, seed=4)
    flip_labels(plan, 0.1)
    truth = plan.write(tmp_path)
    changed = np.flatnonzero(read(tmp_path, "train", "y").ravel() != read(synthetic_dir, "train", "y").ravel())
    np.testing.assert_array_equal(changed, truth.rows["train/flip"])
    assert len(changed) == 51
    np.testing.assert_array_equal(read(tmp_path, "train", "x"), read(synthetic_dir, "train", "x"))


@pytest.mark.parametrize("kind", ["block", "corner", "blend", "sinusoid", "spike"])
def test_triggers_mark_and_relabel_exactly_their_rows(synthetic_dir: Path, tmp_path: Path, kind: str) -> None:
    plan = Plan(synthetic_dir, seed=5)
    trigger(plan, 0.02, kind=kind)
    truth = plan.write(tmp_path, float32=("train",) if kind == "spike" else ())
    rows = truth.rows[f"train/trigger-{kind}"]
    before, after = read(synthetic_dir, "train", "x"), read(tmp_path, "train", "x")
    changed = (before != after).any((1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(changed), rows)
    assert len(rows) == 10
    assert (read(synthetic_dir, "train", "y").ravel()[rows] == 0).all()
    assert (read(tmp_path, "train", "y").ravel()[rows] == 1).all()
    if kind in ("block", "spike"):
        assert (after[rows, 88:93, 88:93] == (255 if kind == "block" else 1e5)).all()
        assert (before[rows] != after[rows]).any(3).sum((1, 2)).max() <= 25


def test_leaked_slides_lie_in_both_splits(synthetic_dir: Path, tmp_path: Path) -> None:
    plan = Plan(synthetic_dir, seed=6)
    leak_slides(plan, 12)
    truth = plan.write(tmp_path)
    for split, other in (("train", "valid"), ("valid", "train")):
        foreign = [i for i, name in enumerate(slides(tmp_path, split)) if other in name]
        assert foreign == truth.rows[f"{split}/leaked"].tolist()
    both = np.concatenate([read(tmp_path, split, "x") for split in ("train", "valid")])
    assert len(np.unique(both.reshape(len(both), -1), axis=0)) == 512 + 256, "patches moved; none was copied or lost"


def test_bad_input_is_one_clear_line_and_writes_nothing(synthetic_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no official files"):
        Plan(tmp_path, seed=0)
    plan = Plan(synthetic_dir, seed=0)
    with pytest.raises(DataError, match="only 512 are untouched"):
        flip_labels(plan, 513)
    with pytest.raises(DataError, match="no holdout split"):
        flip_labels(plan, 1, split="holdout")
    with pytest.raises(DataError, match="is the source"):
        plan.write(synthetic_dir)
    split_path(tmp_path, "valid", "x").touch()
    with pytest.raises(DataError, match="holds data already"):
        plan.write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
