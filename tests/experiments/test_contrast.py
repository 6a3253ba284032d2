from __future__ import annotations

import numpy as np
import pytest

from pcamlib.errors import DataError
from pcamlib.experiments.contrast import contrast, shared
from pcamlib.experiments.features import Column, Features
from pcamlib.training.evaluate import Predictions


def tables(seed: int = 0, n: int = 2000, shift: float = 1.5) -> tuple[Features, Predictions]:
    """Missed tumours are darker by `shift` standard deviations; nothing else has to do with mistakes."""
    rng, index = np.random.default_rng(seed), np.arange(n)
    label = (index % 2).astype(np.uint8)
    wrong = rng.random(n) < 0.1
    dark = rng.normal(size=n) - shift * (wrong & (label == 1))
    values = np.stack([dark, rng.normal(size=n), np.full(n, 3.0), label, rng.integers(0, 3, n)], 1).astype(np.float32)
    kinds = [("brightness", "number"), ("noise", "number"), ("flat", "number"), ("tint", "number"), ("slide", "group")]
    columns = tuple(Column(name, "", kind, "") for name, kind in kinds)  # type: ignore[arg-type]
    probability = np.where(wrong, 1 - label, label) * 0.8 + 0.1
    return Features("valid", "f" * 64, index, columns, values), Predictions(
        "valid", "f" * 64, index, label, probability
    )


def test_what_missed_tumours_share_comes_first_and_nothing_else_is_found() -> None:
    table = contrast(*tables(seed=1))
    assert tuple(table.iloc[0][["mistake", "feature"]]) == ("false negatives", "brightness")
    assert table.iloc[0]["higher"] < 0.25 and table.iloc[0]["95 %"][1] < 0.3 and table.iloc[0]["q"] < 1e-6
    assert (table["q"][1:] > 0.05).all()
    assert shared(table) == [
        "false negatives have less brightness than right answers of their class",
        "false positives share nothing that these features show",
    ]


def test_a_clear_difference_has_a_small_q_that_is_not_zero() -> None:
    assert 0 < contrast(*tables(n=6000, shift=3.0)).iloc[0]["q"] < 1e-60


def test_constants_groups_and_what_is_constant_within_a_class_have_no_row() -> None:
    assert set(contrast(*tables())["feature"]) == {"brightness", "noise"}


def test_without_any_effect_few_tables_of_many_find_one() -> None:
    found = sum((contrast(*tables(seed, n=600, shift=0.0))["q"] < 0.05).any() for seed in range(100))
    assert found <= 11  # 5 are expected, more than 11 come by chance once in 200


def test_too_few_mistakes_give_no_row() -> None:
    features, predictions = tables()
    sure = Predictions("valid", "f" * 64, predictions.index, predictions.label, predictions.label.astype(float))
    assert contrast(features, sure).empty and "share nothing" in shared(contrast(features, sure))[0]


def test_predictions_of_other_patches_are_refused() -> None:
    features, predictions = tables()
    with pytest.raises(DataError, match="not of the same patches"):
        contrast(features.take(np.arange(10)), predictions)
