"""Thresholds: the best one is found, chosen and judged on different halves, and flattery is visible."""

from __future__ import annotations

import numpy as np
import pytest

from pcamlib.experiments import calibration, threshold
from pcamlib.training import metrics
from pcamlib.training.evaluate import Predictions


def scored(n: int = 600, gap: float = 1.5, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < 0.4).astype(np.uint8)
    probability = 1 / (1 + np.exp(-(gap * (label - 0.5) * gap + gap * rng.normal(size=n))))
    return Predictions("valid", "f" * 64, np.arange(n), label, probability)


def test_halves_are_even_in_both_classes_and_cover_all() -> None:
    label = scored(501).label
    half = threshold.halves(label, seed=3)
    for kind in (0, 1):
        first, second = ((half[label == kind] == side).sum() for side in (0, 1))
        assert abs(first - second) <= 1
    assert (half != threshold.halves(label, seed=4)).any() and (half == threshold.halves(label, seed=3)).all()


def test_each_half_is_called_at_the_threshold_of_the_other() -> None:
    p = scored()
    called, chosen = threshold.crossed(p.label, p.probability, threshold.cost(10))
    half = threshold.halves(p.label)
    for side in (0, 1):
        own = half == side
        assert chosen[side] == threshold.choose(p.label[own], p.probability[own], threshold.cost(10))
        assert (called[own] == (p.probability[own] >= chosen[1 - side])).all()


def test_a_threshold_judged_where_it_was_chosen_flatters_itself() -> None:
    rule, kept = threshold.cost(3), []
    for seed in range(40):
        p = scored(60, seed=seed)
        called, _ = threshold.crossed(p.label, p.probability, rule, seed)
        own = p.probability >= threshold.choose(p.label, p.probability, rule)
        losses = []
        for calls in (called, own):
            n = threshold.cells(p.label, calls)
            losses.append(rule(n["tp"], n["fp"], n["tp"] + n["fn"], n["tn"] + n["fp"]))
        kept.append(losses[0] - losses[1])
    assert np.mean(kept) > 0.01


def test_the_rules_side_by_side() -> None:
    p = scored()
    calibrated, _ = calibration.crossed(p.label, p.probability)
    found = threshold.calls(p, calibrated, beta=2, ratio=10)
    assert list(found) == ["0.5", "F2", "cost 10:1", "Bayes, calibrated", "always tumour"]
    table = threshold.table(p.label, found, 2, 10).set_index("rule")
    assert table.loc["0.5", "cost minus 0.5"] == 0 and table.loc["0.5", "95 %"] == [0, 0]
    assert table.loc["cost 10:1", "sensitivity"] > table.loc["0.5", "sensitivity"]
    assert table.loc["cost 10:1", "cost minus 0.5"] < 0 and table.loc["cost 10:1", "95 %"][1] < 0
    assert table.loc["always tumour", "missed"] == 0 and table.loc["always tumour", "specificity"] == 0
    assert table.loc["Bayes, calibrated", "threshold"] == pytest.approx(1 / 11)
    counts = threshold.cells(p.label, found["0.5"].calls)
    assert counts == metrics.confusion(p.label, p.probability, 0.5)
    series = threshold.curves(p, found, most=50)
    assert len(series["precision"]) <= 50 and series["sensitivity"][0] == 0 and series["sensitivity"][-1] == 1
    assert series["F2"][0] == pytest.approx(table.loc["F2", "sensitivity"])
    assert threshold.plot_curves(series).axes[0].get_title() == "ROC"
    assert len(threshold.plot_confusion({"0.5": counts, "F2": counts}).axes) == 2
