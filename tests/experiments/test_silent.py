from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pcamlib.errors import DataError
from pcamlib.experiments import silent
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import Bound, Slice


def patches(inside_missed: float = 0.4, rest_missed: float = 0.1, n: int = 4000) -> tuple[np.ndarray, ...]:
    """A slice of a tenth of the patches; mistakes by class and side, exactly as many as asked for."""
    label, inside = np.arange(n) % 2, np.arange(n) < n // 10
    wrong = np.zeros(n, bool)
    for side, share in ((inside, inside_missed), (~inside, rest_missed)):
        rows = np.flatnonzero(side & (label == 1))
        wrong[rows[: round(share * len(rows))]] = True
    rows = np.flatnonzero(label == 0)
    wrong[rows[: len(rows) // 10]] = True
    return inside, label, wrong


def test_the_worst_confirmed_slice_is_watched_else_what_mistakes_share() -> None:
    columns = tuple(Column(name, "", "number", "") for name in ("brightness", "blur"))
    values = np.stack([np.arange(100.0), np.arange(100.0)[::-1]], 1).astype(np.float32)
    features, none = Features("valid", "f" * 64, np.arange(100), columns, values), pd.DataFrame()
    sharp = Slice((Bound("blur", low=3.0),))
    assert silent.subject([sharp, Slice()], none, features) == (sharp, "the worst of the confirmed slices")
    by_share, why = silent.subject([], pd.DataFrame([{"feature": "blur", "higher": 0.8}]), features)
    assert set(np.flatnonzero(by_share.mask(features))) == set(range(11)) and "no slice was confirmed" in why
    assert set(np.flatnonzero(silent.subject([], none, features)[0].mask(features))) == set(range(9))


def test_the_weak_class_is_the_one_in_which_the_slice_falls_behind() -> None:
    inside, label, wrong = patches()
    wrong[label == 0] = False
    assert silent.weak(inside, label, wrong) == 1
    assert silent.weak(inside, 1 - label, wrong) == 0


def test_a_slice_without_a_class_to_compare_is_refused() -> None:
    inside, label, wrong = patches()
    with pytest.raises(DataError, match="nothing to compare"):
        silent.weak(np.ones_like(inside), label, wrong)


def test_at_its_own_share_the_mix_gives_the_scores_of_the_predictions() -> None:
    inside, label, wrong = patches()
    wrong[label == 0] = False
    own = (inside & (label == 1)).sum() / (label == 1).sum()
    row = silent.mix(inside, label, wrong, [own]).iloc[0]
    assert row["accuracy"] == pytest.approx(1 - wrong.mean())
    assert row["all"] == pytest.approx(1 - wrong[label == 1].mean())
    assert row["slice"] == pytest.approx(0.6) and row["missed"] == pytest.approx(1000 * wrong[label == 1].mean())
    assert row["slice 95 %"][0] < 0.6 < row["slice 95 %"][1]


def test_more_patches_of_the_slice_lower_the_whole_and_leave_the_slice() -> None:
    inside, label, wrong = patches()
    wrong[label == 0] = False
    table = silent.mix(inside, label, wrong, [0.1, 0.3, 0.6])
    assert (np.diff(table["accuracy"]) < 0).all() and (np.diff(table["missed"]) > 0).all()
    assert table["slice"].nunique() == 1


def test_a_slice_that_gets_harder_moves_the_whole_by_its_share_only() -> None:
    inside, label, wrong = patches()
    wrong[label == 0] = False
    table = silent.fade(inside, label, wrong, [0.6, 0.3])
    share = (inside & (label == 1)).mean()
    assert table["accuracy"][0] == pytest.approx(1 - wrong.mean())
    assert table["accuracy"][0] - table["accuracy"][1] == pytest.approx(0.3 * share)


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.8), (0.6, 0.3), (0.95, 0.94)])
def test_the_number_needed_has_the_power_promised_and_a_tenth_less_has_not(before: float, after: float) -> None:
    n = silent.needed(before, after)
    assert n is not None
    rng = np.random.default_rng(0)

    def seen(count: int, rate: float) -> float:  # by simulation, independent of the closed form
        return float(np.mean(stats.binom.cdf(rng.binomial(count, rate, 20_000), count, before) <= silent.LEVEL))

    assert seen(n, after) >= silent.POWER - 0.01
    assert seen(n, before) <= silent.LEVEL + 0.005
    assert seen(int(0.85 * n), after) < silent.POWER


def test_no_fall_and_a_fall_too_small_to_see_have_no_number() -> None:
    assert silent.needed(0.9, 0.9) is None and silent.needed(0.8, 0.9) is None
    assert silent.needed(0.9, 0.8999) is None


def test_watching_the_slice_needs_fewer_patches_than_watching_the_whole() -> None:
    inside, label, wrong = patches()
    wrong[label == 0] = False
    table = silent.monitors(inside, label, wrong, [0.1, 0.3])
    assert (table["of the slice"] < table["at random, slice watched"]).all()
    assert (table["at random, slice watched"] < table["at random, accuracy watched"]).all()
    assert table["of the slice"][1] < table["of the slice"][0]
    assert table["recall before"][0] == pytest.approx(0.6)


def test_what_is_told_of_a_slice_fits_together() -> None:
    inside, label, wrong = patches()
    wrong[label == 0] = False
    told = silent.tell(inside, label, wrong)
    assert told.rate == "recall" and told.share == pytest.approx(0.1)
    assert [len(axis.lines) for axis in told.figure.axes] == [3, 3, 3]
    assert told.series["monitors falls by"] == pytest.approx([0.05, 0.1, 0.2, 0.3])
    row = told.monitors.iloc[2]
    assert f"from 0.60 to 0.40, the accuracy of the whole falls by {0.2 * 0.1 / 2:.4f}" in told.sentence
    assert f"{row['of the slice']:,} labelled patches of the slice" in told.sentence


def test_a_slice_that_has_no_rate_left_to_lose_is_told_too() -> None:
    inside, label, wrong = patches(inside_missed=0.98)
    wrong[label == 0] = False
    told = silent.tell(inside, label, wrong)
    assert told.monitors["recall after"].tolist() == [0.0] and told.mix["slice"][0] == pytest.approx(0.02)
