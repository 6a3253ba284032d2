"""Ways to estimate an AUC: folds that keep their promise, and what they promise where slides or noise decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from pcamlib.audit import resampling
from pcamlib.audit.findings import Split
from pcamlib.errors import DataError


class Fake:
    """As much of `Patches` as the check looks at."""

    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray | None) -> None:
        self.split, self.images, self.labels = split, images, labels
        self.valid = np.ones(len(images), bool)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self) -> np.ndarray:
        return np.flatnonzero(self.valid)


def split(name: str, labels: np.ndarray | None, means: np.ndarray, slides: np.ndarray | None = None) -> Split:
    """Patches of one grey level each, with noise."""
    noise = np.random.default_rng(len(means)).integers(-20, 21, (len(means), 96, 96, 1))
    images = np.clip(means[:, None, None, None] + noise, 0, 255).astype(np.uint8).repeat(3, 3)
    patches: Any = Fake(name, images, labels)
    return Split(patches, {}, slides)


def drawn(name: str, rows: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % 2).astype(np.uint8)
    return split(name, labels, 120 + 10 * labels + rng.normal(0, 10, rows))


@pytest.fixture(scope="module")
def pair() -> tuple[Split, Split]:
    return drawn("train", 500, 1), drawn("valid", 300, 2)


@pytest.fixture(scope="module")
def by_slide() -> Split:
    """500 patches of 25 slides: the slide has a grey level and a label, and one says nothing about the other."""
    rng = np.random.default_rng(0)
    slide = np.arange(500) % 25
    level, label = rng.permutation(np.linspace(30, 220, 25)), rng.permutation(np.arange(25) % 2)
    return split("train", label[slide].astype(np.uint8), level[slide], slide.astype(str))


def test_auc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (4, 50)), rng.integers(0, 9, (4, 50))
    expected = [roc_auc_score(y, s) for y, s in zip(labels, scores, strict=True)]
    assert resampling.auc(labels, scores) == pytest.approx(expected)
    assert np.isnan(resampling.auc(np.ones(5), np.arange(5)))


def test_ridge_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    fit, seen = rng.standard_normal((60, 7)), rng.standard_normal((9, 7))
    labels = rng.integers(0, 2, 60)
    known, new = ((x - fit.mean(0)) / fit.std(0) for x in (fit, seen))
    for alpha, scores in zip(resampling.ALPHAS, resampling.ridge(fit, labels, seen), strict=True):
        expected = Ridge(alpha=alpha * 60).fit(known, labels).predict(new)
        assert scores + labels.mean() == pytest.approx(expected, abs=1e-6)


def test_features_depend_on_their_row_alone(pair: tuple[Split, Split]) -> None:
    images = pair[0].patches.images
    rows = np.array([3, 400, 7])
    whole = resampling.features(images, np.arange(500))
    assert whole.shape == (500, 102) and whole.dtype == np.float32 and np.isfinite(whole).all()
    assert np.allclose(resampling.features(images, rows), whole[rows], atol=1e-4)
    assert resampling.features(images, rows[:0]).shape == (0, 102)


def test_folds_keep_the_class_mix() -> None:
    labels = (np.arange(103) < 20).astype(float)
    fold = resampling.folds(np.random.default_rng(0), labels, 5)
    assert set(np.bincount(fold)) <= {20, 21} and np.bincount(fold, labels).tolist() == [4] * 5


def test_folds_keep_groups_whole() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), rng.integers(1, 20, 30))
    fold = resampling.folds(rng, np.zeros(len(groups)), 5, groups)
    assert all(len(set(fold[groups == group])) == 1 for group in range(30))
    assert np.ptp(np.bincount(fold, minlength=5)) <= 20, "sizes alike"
    again = resampling.folds(np.random.default_rng(9), np.zeros(len(groups)), 5, groups)
    assert (fold != again).any(), "chance decides"


def test_the_table(pair: tuple[Split, Split]) -> None:
    table = resampling.reflection(*pair, repeats=6)
    assert [row["scheme"] for row in table][2:4] == ["5-fold", "5-fold by slide"]
    assert [row["fits"] for row in table] == [1, 5, 5, 5, 60, 305, 305, 1]
    once, several, plain, grouped, chosen, nested, _, valid = table
    assert plain["sd"] < once["sd"] and several["sd"] < once["sd"]
    assert grouped["estimate"] is grouped["bias"] is grouped["seconds"] is None
    assert chosen["estimate"] >= nested["estimate"], "the best of twelve flatters"
    assert plain["interval"][0] < 0 < plain["interval"][1] and abs(plain["bias"]) < 0.05
    assert 0.6 < valid["estimate"] < 0.9 and valid["bias"] is None
    said = resampling.recommend(table)
    assert "Slides are unknown" in said and said.endswith("report on test.")
    again = resampling.reflection(*pair, repeats=6)
    assert [row["values"] for row in again] == [row["values"] for row in table]


def test_folds_that_cut_slides_promise_too_much(by_slide: Split) -> None:
    table = resampling.reflection(by_slide, repeats=4)
    plain, grouped = table[2:4]
    assert plain["estimate"] > grouped["estimate"] + 0.1
    assert plain["bias"] is plain["rmse"] is None and len(table) == 7
    said = resampling.recommend(table)
    assert "keep slides whole" in said and said.endswith("report 5-fold by slide.")


def test_a_valid_split_of_other_tissue_is_trusted(pair: tuple[Split, Split]) -> None:
    other = drawn("valid", 300, 3)
    assert other.labels is not None
    other.patches.labels = 1 - other.labels
    assert "lies above it" in resampling.recommend(resampling.reflection(pair[0], other, repeats=3))


def test_bad_input(pair: tuple[Split, Split]) -> None:
    train, valid = pair
    with pytest.raises(DataError, match="50 usable patches of a class"):
        resampling.reflection(train, valid, most=100)
    for labels in (None, np.zeros(300, np.uint8)):
        patches: Any = Fake("valid", valid.patches.images, labels)
        with pytest.raises(DataError, match="valid: an AUC needs labels of both classes"):
            resampling.reflection(train, Split(patches, {}))


def test_patches_all_alike_teach_nothing() -> None:
    same = split("train", (np.arange(300) % 2).astype(np.uint8), np.full(300, 80))
    same.patches.images[:] = 80
    table = resampling.reflection(same, repeats=2)
    assert all(row["estimate"] == pytest.approx(0.5) for row in table if row["values"])
    assert resampling.recommend(table)


def test_slides_of_one_class_leave_the_grouped_rows_unknown() -> None:
    slide = np.arange(300) % 12
    few = split("train", (slide < 6).astype(np.uint8), 50.0 + slide, slide.astype(str))
    table = resampling.reflection(few, repeats=2)
    assert table[3]["estimate"] is None and table[2]["estimate"] is not None
