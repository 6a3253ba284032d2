"""Slices: counted right, compared with the class mix held, never defined by what they are judged by."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pcamlib.errors import DataError
from pcamlib.experiments import slices
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import Bound, Slice
from pcamlib.training.evaluate import Predictions


def table(n: int = 400, seed: int = 0, **columns: np.ndarray) -> tuple[Features, Predictions]:
    """Features `a` and `b`, uniform from 0 to 1, and `columns`; predictions that are wrong by lot for 15 %."""
    rng = np.random.default_rng(seed)
    values = {"a": rng.random(n), "b": rng.random(n)} | columns
    label = (rng.random(n) < 0.4).astype(np.uint8)
    called = label ^ (rng.random(n) < 0.15)
    probability = np.where(called, rng.uniform(0.5, 1, n), rng.uniform(0, 0.5, n))
    kinds = tuple(Column(name, "", "flag" if values[name].dtype == bool else "number", "") for name in values)
    features = Features("valid", "f" * 64, np.arange(n), kinds, np.column_stack(list(values.values())).astype("f4"))
    return features, Predictions("valid", "f" * 64, np.arange(n), label, probability)


def test_a_bound_holds_its_low_end_and_not_its_high_one() -> None:
    features, _ = table(5, a=np.array([0, 0.25, 0.5, 0.75, 1.0]), b=np.array([0, 0, 1, 1, 1.0]))
    assert Slice((Bound("a", 0.25, 0.75),)).mask(features).tolist() == [False, True, True, False, False]
    both = Slice((Bound("a", high=0.75), Bound("b", 1, 2)))
    assert both.mask(features).tolist() == [False, False, True, False, False]
    assert Slice().mask(features).all() and str(Slice()) == "every patch"
    assert str(both) == "a < 0.75 and b 1" and both == slices.named([("a", -math.inf, 0.75), ("b", 1, 2)])


def test_an_empty_range_and_an_unknown_feature_are_refused() -> None:
    features, _ = table()
    with pytest.raises(DataError, match="holds nothing"):
        Slice((Bound("a", 0.5, 0.5),)).mask(features)
    with pytest.raises(DataError, match="no feature 'brightnes'"):
        Slice((Bound("brightnes", 0.5),)).mask(features)


@pytest.mark.parametrize("name", ["label", "predicted_label", "Probability", "model.confidence", "is_error", "y"])
def test_a_slice_is_not_defined_by_what_it_is_judged_by(name: str) -> None:
    features, _ = table(**{name: np.arange(400.0)})
    with pytest.raises(DataError, match="may not be defined by"):
        Slice((Bound(name, 0.5),)).mask(features)


def test_nor_under_another_name() -> None:
    features, p = table()
    slices.independent(features, p)
    wrong = (p.probability >= 0.5) != p.label
    for what, column in {
        "label": 3.0 - p.label,
        "mistake": wrong.astype(float),
        "prediction": np.round(np.log(p.probability), 2),
        "certainty": np.abs(p.probability - 0.5) ** 2,
    }.items():
        with pytest.raises(DataError, match=f"'tone' is the {what} under another name"):
            slices.independent(table(tone=column)[0], p)
    called = np.where(p.probability >= 0.7, 1.0, 0.0)  # the prediction at another threshold than .5
    slices.independent(table(tone=called)[0], p)
    with pytest.raises(DataError, match="prediction"):
        slices.independent(table(tone=called)[0], p, 0.7)


def test_features_that_follow_the_label_a_little_and_constant_predictions_pass() -> None:
    features, p = table()
    noisy = p.label + np.random.default_rng(1).normal(size=400)
    assert np.corrcoef(noisy, p.label)[0, 1] > 0.3  # it does follow the label
    slices.independent(table(tone=noisy)[0], p)
    slices.independent(features, replace(p, probability=np.full(400, 0.7)))
    with pytest.raises(DataError, match="'tone' is the label"):  # and with less noise than the gap it is the label
        slices.independent(table(tone=p.label + 0.1 * (noisy > 0))[0], p)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1)]
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    assert slices.wilson(hits, n) == pytest.approx((low, high), abs=2e-4)
    assert slices.wilson(0, 0) == (0, 1)


def test_the_excess_of_one_class_is_fishers() -> None:
    inside = np.arange(100) < 30
    wrong = np.isin(np.arange(100), [*range(9), *range(60, 66)])
    found = slices.excess(inside, np.zeros(100, int), wrong)
    assert found["p"] == pytest.approx(stats.fisher_exact([[9, 21], [6, 64]], alternative="greater").pvalue)
    assert found["rate"] == 0.3 and found["matched"] == pytest.approx(6 / 70)
    assert found["low"] < found["excess"] == pytest.approx(0.3 - 6 / 70) and found["high"] > found["excess"]


def test_a_slice_full_of_the_harder_class_is_not_worse_for_that() -> None:
    rng = np.random.default_rng(1)
    label = (rng.random(4000) < 0.5).astype(int)
    wrong = rng.random(4000) < np.where(label == 1, 0.4, 0.05)
    inside = rng.random(4000) < np.where(label == 1, 0.3, 0.02)
    found = slices.excess(inside, label, wrong)
    assert found["rate"] > wrong[~inside].mean() + 0.1  # the plain comparison says so
    assert abs(found["excess"]) < 0.05 and found["low"] < 0 < found["high"] and found["p"] > 0.01


def test_by_lot_p_is_uniform_and_the_interval_holds_zero() -> None:
    rng = np.random.default_rng(1)
    label = np.arange(600) % 3 == 0
    small, covered = 0, 0
    for _ in range(400):
        found = slices.excess(rng.random(600) < 0.15, label, rng.random(600) < np.where(label, 0.3, 0.1))
        small += found["p"] <= 0.05
        covered += found["low"] <= 0 <= found["high"]
    assert small <= 31 and covered >= 366  # 400 times .05 and .95, three standard deviations


def test_a_row_is_what_its_patches_say() -> None:
    features, p = table(600)
    p.probability[:] = np.where(features["a"] < 0.2, 1 - p.label, p.label) * 0.9  # wrong where a < .2
    slice_ = Slice((Bound("a", high=0.4),))
    row = slices.describe(slice_, features, p)
    inside = slice_.mask(features)
    tumour, wrong = p.label[inside] == 1, (features["a"] < 0.2)[inside]
    assert row["n"] == inside.sum() and row["tumour"] == tumour.mean() and row["error"] == pytest.approx(wrong.mean())
    assert row["recall"] == pytest.approx(1 - wrong[tumour].mean())
    assert row["specificity"] == pytest.approx(1 - wrong[~tumour].mean())
    assert row["rest, matched"] == 0 and row["p"] < 1e-20 and row["best constant error"] <= 0.5
    json.dumps(row, allow_nan=False)


def test_without_tumour_accuracy_explains_itself() -> None:
    features, p = table(300)
    p.label[features["a"] < 0.5] = 0
    row = slices.describe(Slice((Bound("a", high=0.5),)), features, p)
    assert row["recall"] is None and row["always tumour F2"] is None and row["best constant error"] == 0
    everything = slices.describe(Slice(), features, p)
    assert everything["excess"] is None and everything["p"] == pytest.approx(1)
    json.dumps([row, everything], allow_nan=False)


def test_what_does_not_belong_together_is_refused() -> None:
    features, p = table()
    some = Slice((Bound("a", high=0.5),))
    with pytest.raises(DataError, match="not of the same patches"):
        slices.describe(some, features, replace(p, fingerprint="e" * 64))
    with pytest.raises(DataError, match=r"400 features and 300 predictions"):
        slices.describe(some, features, replace(p, index=p.index[:300]))
    with pytest.raises(DataError, match=r"threshold 1\.5"):
        slices.describe(some, features, p, 1.5)
    with pytest.raises(DataError, match="holds 3 of 400 patches"):
        slices.describe(Slice((Bound("a", high=float(np.sort(features["a"])[3])),)), features, p)
