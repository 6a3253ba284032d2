from __future__ import annotations

import numpy as np
import pytest

from pcamlib.errors import DataError
from pcamlib.experiments import forest
from pcamlib.experiments.discovery import Discovery
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import Bound, Slice, describe
from pcamlib.training.evaluate import Predictions

DIM = Slice((Bound("brightness", high=0.5),))


def tables(n: int = 1000) -> tuple[Features, Predictions]:
    """The dim half is all tumour; every tenth patch is called wrong, and every fifth of the dim ones."""
    index = np.arange(n)
    dim = index < n // 2
    label = np.where(dim, 1, index % 2).astype(np.uint8)
    wrong = index % np.where(dim, 5, 10) == 0
    values = np.where(dim, 0.2, 0.8).astype(np.float32)[:, None]
    features = Features("valid", "f" * 64, index, (Column("brightness", "0..1", "number", ""),), values)
    return features, Predictions("valid", "f" * 64, index, label, np.where(wrong, 1 - label, label) * 0.8 + 0.1)


def found(features: Features, half: np.ndarray) -> Discovery:
    return Discovery((DIM,), [{"half": 1}], half, features, {})


def test_the_whole_comes_first_and_constants_stand_beside_each() -> None:
    features, predictions = tables()
    whole, dim = forest.beside(found(features, np.ones(1000, int)), predictions)
    assert whole["slice"] == "every patch" and whole["n"] == 1000 and whole["tumour"] == 0.75
    assert whole["accuracy"] == pytest.approx(0.85) and whole["best constant's accuracy"] == 0.75
    assert dim["recall"] == pytest.approx(0.8) and dim["recall 95 %"][0] < 0.8 < dim["recall 95 %"][1]
    assert dim["specificity"] is None and dim["best constant's accuracy"] == 1 and dim["always tumour's F2"] == 1


def test_errors_are_those_of_the_view() -> None:
    with pytest.raises(DataError, match="threshold 2"):
        forest.beside(found(tables()[0], np.ones(1000, int)), tables()[1], threshold=2)


def test_a_slice_is_measured_on_the_half_that_confirmed_it() -> None:
    features, predictions = tables()
    whole, dim = forest.beside(found(features, np.arange(1000) % 2), predictions)
    assert (whole["n"], dim["n"]) == (1000, 250)


def test_the_plot_and_its_series_hold_each_slice_once() -> None:
    features, predictions = tables()
    predictions.label[::4] = 0  # normal patches on both sides
    rows = [
        describe(DIM, features, predictions),
        describe(Slice((Bound("brightness", low=0.5),)), features, predictions),
    ]
    assert forest.series(rows)["brightness < 0.5"][:2] == [rows[0]["error"], rows[0]["rest, matched"]]
    left, right = forest.plot(rows).axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == [
        "brightness < 0.5\n(n = 500)",
        "brightness >= 0.5\n(n = 500)",
    ]
    assert len(left.containers) == len(right.containers) == 2
