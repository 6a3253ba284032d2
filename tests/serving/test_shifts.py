"""Each shift does to pixels what its name says; the study of them tells falls from alarms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pcamlib.data.patches import open_split
from pcamlib.serving import shifts
from pcamlib.serving.drift import PIXELS, DriftError, measure
from pcamlib.serving.predict import Predictor
from pcamlib.serving.shifts import SHIFTS, earliest, plot, study


@pytest.fixture(scope="module")
def valid(synthetic_dir):
    return open_split(synthetic_dir, "valid")


@pytest.fixture(scope="module")
def images(valid):
    return np.array(valid.images[:24])


def mean(images: np.ndarray, name: str) -> float:
    return float(measure(images)[:, PIXELS.index(name)].mean())


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_grows_with_its_strength_and_spares_the_original(name, images):
    before, shift = images.copy(), SHIFTS[name]
    distances = []
    for strength in shift.strengths:
        shifted = shift(images, strength)
        assert shifted.shape == images.shape and shifted.dtype == np.uint8
        distances.append(np.abs(shifted.astype(float) - images).mean())
    assert (images == before).all() and distances[0] > 0
    assert distances == sorted(distances)


def test_patches_are_shifted_one_by_one(images, monkeypatch):
    for shift in SHIFTS.values():
        together = shift(images, shift.strengths[-1])
        monkeypatch.setattr(shifts, "_CHUNK", 5)
        assert (shift(images, shift.strengths[-1]) == together).all()
        monkeypatch.undo()
        assert (shift(images[7:8], shift.strengths[-1])[0] == together[7]).all()


@pytest.mark.parametrize(
    ("name", "strength", "feature", "sign"),
    [
        ("stain", 0.3, "haematoxylin", 1),
        ("stain", 0.3, "eosin", -1),
        ("blur", 1.0, "sharpness", -1),
        ("gamma", 1.4, "brightness", -1),
        ("light", 0.8, "brightness", -1),
        ("light", 0.8, "white_share", -1),
    ],
)
def test_a_shift_does_what_it_is_called(name, strength, feature, sign, images):
    change = mean(SHIFTS[name](images, strength), feature) - mean(images, feature)
    assert np.sign(change) == sign


def test_black_and_white_keep_their_tone_under_another_curve():
    ends = np.stack([np.zeros((96, 96, 3), np.uint8), np.full((96, 96, 3), 255, np.uint8)])
    assert (SHIFTS["gamma"](ends, 1.8) == ends).all()
    assert (SHIFTS["light"](ends, 0.8)[1] == 204).all()


def test_stain_is_a_gain_of_each_dye(images):
    """Optical density of haematoxylin grows by the share asked for, where nothing is cut off."""
    grown = mean(SHIFTS["stain"](images, 0.1), "haematoxylin") / mean(images, "haematoxylin")
    assert grown == pytest.approx(1.1, abs=0.02)


# The study


@pytest.fixture(scope="module")
def rows(checkpoint, valid):
    told = []
    found = study(
        Predictor(checkpoint), valid, strengths={"blur": (0.3, 1.0), "gamma": (1.8,)}, windows=20, shifted=4, size=100,
        report=told.append,
    )  # fmt: skip
    assert len(told) == len(found) and "gamma 1.8: AUC 0." in told[-1]
    return found


def test_a_study_counts_alarms_and_measures_the_fall(rows, valid, checkpoint):
    assert [(row["shift"], row["strength"]) for row in rows] == [
        ("none", 0), ("blur", 0.3), ("blur", 1.0), ("gamma", 1.8)
    ]  # fmt: skip
    none, _, blurred, dark = rows
    assert none["flagged"] <= 0.1 and none["fall"] == 0 and none["fall 95 %"] == [0, 0] and none["windows"] == 20
    assert blurred["flagged"] == dark["flagged"] == 1 and dark["windows"] == 4
    assert blurred["flagged 95 %"] == pytest.approx([0.398, 1.0], abs=0.001)  # of 4 windows
    for row in rows:
        low, high = row["fall 95 %"]
        assert low <= row["fall"] <= high and row["auc"] == pytest.approx(none["auc"] - row["fall"])
        assert row["auc 95 %"][0] <= row["auc"] <= row["auc 95 %"][1]
    probability = Predictor(checkpoint).probability(SHIFTS["gamma"](np.array(valid.images), 1.8))
    order, label = probability.argsort().argsort() + 1, np.asarray(valid.labels)
    positive = label.sum()
    area = (order[label == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(label) - positive))
    assert dark["auc"] == pytest.approx(area, abs=1e-3)


def test_windows_and_their_references_share_no_patch(checkpoint, valid, monkeypatch):
    seen = []

    class Known(shifts.Reference):
        def compare(self, values, probability=None):
            seen.append((self.values, values))
            return super().compare(values, probability)

    monkeypatch.setattr(shifts, "Reference", Known)
    study(Predictor(checkpoint), valid, strengths={}, windows=2, size=100)
    for reference, window in seen:
        assert len(reference) == 156 and len(window) == 100
        assert len(np.unique(np.concatenate([reference, window]), axis=0)) == 256
    assert (seen[0][1] != seen[1][1]).any()


def test_the_earliest_strength_is_flagged_from_there_on(rows):
    def row(strength, flagged, fall):
        return {"shift": "blur", "unit": "pixels", "strength": strength, "flagged": flagged, "fall": fall,
                "fall 95 %": [fall, fall]}  # fmt: skip

    none = {"shift": "none"}
    (one,) = earliest([none, row(1, 1.0, 0.0), row(2, 0.5, 0.01), row(3, 0.96, 0.015), row(4, 1.0, 0.03)])
    assert (one["strength"], one["fall"], one["falls by 0.02 at"]) == (3, 0.015, 4)
    (never,) = earliest([none, row(1, 0.9, 0.03)])
    assert never["strength"] is None and never["fall"] is None and never["falls by 0.02 at"] == 1
    assert [each["shift"] for each in earliest(rows)] == ["blur", "gamma"]


def test_the_figure_has_a_column_a_shift(rows):
    figure = plot(rows)
    assert len(figure.axes) == 4 and [axis.get_title() for axis in figure.axes[:2]] == ["blur", "gamma"]
    flagged, fall = figure.axes[0].lines[0], figure.axes[2].lines[0]
    assert flagged.get_ydata().tolist() == [row["flagged"] for row in rows[:3]]
    assert fall.get_ydata().tolist() == [row["fall"] for row in rows[:3]]
    assert [text.get_text() for text in figure.axes[2].get_xticklabels()] == ["none", "0.3", "1"]
    plt.close(figure)


def test_a_study_that_cannot_be_made_is_said(checkpoint, valid):
    predictor = Predictor(checkpoint)
    with pytest.raises(DriftError, match="no labels, so no AUC to fall"):
        study(predictor, replace(valid, labels=None))
    with pytest.raises(DriftError, match="the reference has 56 patches; give 100 or more"):
        study(predictor, valid, size=200, strengths={})
