"""Scores against scikit-learn and plain loops, intervals against the truth, alarms against planted faults."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from pcamlib.files import write_json
from pcamlib.training import metrics

#: How probabilities are drawn: all different, two decimals, five values, extremes among them.
DRAWS = {
    "fine": lambda rng, n: rng.random(n),
    "two decimals": lambda rng, n: rng.random(n).round(2),
    "five values": lambda rng, n: rng.choice([0.1, 0.3, 0.5, 0.7, 0.9], n),
    "extremes": lambda rng, n: rng.choice([0.0, 1.0, 0.5, 0.2], n),
}


def by_scikit_learn(labels: np.ndarray, probability: np.ndarray, weight: np.ndarray, cut: float) -> dict[str, float]:
    called = probability >= cut
    clipped = np.clip(probability, 1e-7, 1 - 1e-7)
    return {
        "accuracy": sk.accuracy_score(labels, called, sample_weight=weight),
        "f1": sk.f1_score(labels, called, sample_weight=weight, zero_division=0),
        "f2": sk.fbeta_score(labels, called, beta=2, sample_weight=weight, zero_division=0),
        "auc": sk.roc_auc_score(labels, probability, sample_weight=weight),
        "pr_auc": sk.average_precision_score(labels, probability, sample_weight=weight),
        "nll": sk.log_loss(labels, np.stack([1 - clipped, clipped], 1), sample_weight=weight, labels=[0, 1]),
    }


def ece_by_hand(labels: np.ndarray, probability: np.ndarray, weight: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for number in range(bins):
        inside = [i for i, p in enumerate(probability) if min(int(p * bins), bins - 1) == number]
        mass = sum(weight[i] for i in inside)
        if mass:
            observed = sum(weight[i] * labels[i] for i in inside) / mass
            said = sum(weight[i] * probability[i] for i in inside) / mass
            total += mass * abs(observed - said)
    return total / sum(weight)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", DRAWS)
def test_equal_to_scikit_learn(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, cut = int(rng.integers(20, 300)), float(rng.choice([0.5, 0.3, 0.7]))
    labels = (rng.random(n) < 0.3).astype(np.uint8)
    labels[:2] = 0, 1
    probability = np.clip(DRAWS[kind](rng, n) * (0.5 + 0.5 * labels), 0, 1)
    counts = rng.multinomial(n, np.full(n, 1 / n)).astype(float)  # as in a bootstrap, zeros among them
    counts[:2] += 1
    weights = np.stack([np.ones(n), counts, rng.random(n) + 0.1])
    found = metrics.scores(labels, probability, weights, cut)
    for row, weight in enumerate(weights):
        for name, value in by_scikit_learn(labels, probability, weight, cut).items():
            assert found[name][row] == pytest.approx(value, abs=1e-9), (name, row)
        assert found["ece"][row] == pytest.approx(ece_by_hand(labels, probability, weight), abs=1e-9)


def test_the_order_of_the_patches_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    labels, probability = rng.integers(0, 2, 200), rng.random(200).round(1)
    shuffled, one = rng.permutation(200), np.ones((1, 200))
    a, b = metrics.scores(labels, probability, one), metrics.scores(labels[shuffled], probability[shuffled], one)
    assert {name: pytest.approx(float(a[name][0])) for name in a} == {name: float(b[name][0]) for name in b}


def test_a_weight_of_two_is_a_patch_twice() -> None:
    rng = np.random.default_rng(1)
    labels, probability, counts = rng.integers(0, 2, 60), rng.random(60).round(1), rng.integers(0, 4, 60)
    weighted = metrics.scores(labels, probability, counts[None].astype(float))
    twice = metrics.scores(labels.repeat(counts), probability.repeat(counts), np.ones((1, counts.sum())))
    for name in metrics.METRICS:
        assert weighted[name][0] == pytest.approx(twice[name][0]), name


def test_a_certain_and_wrong_answer_costs_16_nats() -> None:
    found = metrics.scores(np.array([0, 1]), np.array([1.0, 1.0]), np.ones((1, 2)))
    assert found["nll"][0] == pytest.approx(-math.log(1e-7) / 2, rel=1e-6)


# Intervals


@pytest.mark.parametrize("name", ["auc", "accuracy"])
def test_the_interval_covers_the_truth_about_95_times_in_100(name: str) -> None:
    """Two normal distributions at distance 1: AUC = Phi(1 / sqrt 2), accuracy at the middle = Phi(1 / 2)."""
    truth = {"auc": 0.5 * (1 + math.erf(0.5)), "accuracy": 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))}[name]
    rng, n, covered, repeats = np.random.default_rng(0), 120, 0, 200
    for number in range(repeats):
        labels = rng.integers(0, 2, n)
        score = rng.normal(labels - 0.5)
        probability = 1 / (1 + np.exp(-score))
        spread = metrics.bootstrap(labels, probability, resamples=300, seed=number)[name]
        low, high = np.nanpercentile(spread, [2.5, 97.5])
        covered += low <= truth <= high
    assert 0.90 <= covered / repeats <= 0.99


def test_the_bootstrap_repeats_itself_and_narrows_with_n() -> None:
    def width(n: int, seed: int = 0) -> float:
        rng = np.random.default_rng(7)
        labels = rng.integers(0, 2, n)
        entry = metrics.report(labels, np.clip(rng.normal(0.3 + 0.4 * labels, 0.2), 0, 1), seed=seed)["metrics"]["auc"]
        assert entry["interval"][0] < entry["value"] < entry["interval"][1]
        return entry["interval"][1] - entry["interval"][0]

    assert width(200) == width(200) != width(200, seed=1)
    assert width(3200) == pytest.approx(width(200) / 4, rel=0.5)


def test_chunks_of_resamples_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels, probability = rng.integers(0, 2, 50), rng.random(50)
    whole = metrics.bootstrap(labels, probability, resamples=25)
    monkeypatch.setattr(metrics, "_CHUNK", 200)
    pieces = metrics.bootstrap(labels, probability, resamples=25)
    for name in metrics.METRICS:
        assert len(pieces[name]) == 25
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-12)  # BLAS sums in another order


# Constants


def test_what_constants_score_on_a_balanced_split() -> None:
    table = metrics.baselines(np.arange(1000) % 2)
    assert table["f2"]["always tumour"] == pytest.approx(0.8333, abs=1e-4)
    assert table["f1"]["always tumour"] == pytest.approx(2 / 3)
    assert table["f2"]["always normal"] == 0
    assert table["accuracy"]["always normal"] == table["accuracy"]["always tumour"] == 0.5
    assert table["auc"] == pytest.approx(dict.fromkeys(("always normal", "always tumour", "prevalence"), 0.5))
    assert table["nll"] == pytest.approx({"prevalence": math.log(2)}), "a constant 0 or 1 costs infinitely much"
    assert table["pr_auc"]["prevalence"] == pytest.approx(0.5)


def test_what_constants_score_where_tumour_is_rare() -> None:
    labels = (np.arange(1000) < 100).astype(int)
    table = metrics.baselines(labels)
    assert table["accuracy"]["always normal"] == 0.9
    assert table["f2"]["always tumour"] == pytest.approx(5 * 100 / (4 * 100 + 1000))
    assert table["nll"]["prevalence"] == pytest.approx(sk.log_loss(labels, np.full(1000, 0.1)))


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only(label: int, tmp_path: Any) -> None:
    """Neither area means anything, and no baseline has a likelihood: left out, not NaN and not an error."""
    labels, probability = np.full(50, label), np.random.default_rng(0).random(50)
    assert math.isnan(metrics.scores(labels, probability, np.ones((1, 50)))["auc"][0])
    result = metrics.report(labels, probability)
    assert "auc" not in result["metrics"] and "nll" in result["metrics"]
    write_json(tmp_path / "report.json", result)  # refuses NaN


def test_the_confusion_matrix_adds_up() -> None:
    labels, probability = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.5, 0.9, 0.4, 0.5, 0.6])
    assert metrics.confusion(labels, probability) == {"tn": 1, "fp": 2, "fn": 1, "tp": 2}
    assert metrics.confusion(labels.astype(np.uint8), probability, 0.95) == {"tn": 3, "fp": 0, "fn": 3, "tp": 0}


# Alarms


def good(n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated: the label is drawn with the very probability that is said."""
    rng = np.random.default_rng(0)
    probability = rng.beta(0.3, 0.3, n)
    return (rng.random(n) < probability).astype(np.uint8), probability


def raised(labels: np.ndarray, probability: np.ndarray) -> str:
    return "\n".join(metrics.report(labels, probability, resamples=20)["alarms"])


def test_no_alarm_on_a_good_model() -> None:
    assert raised(*good()) == ""


def test_alarm_when_one_class_is_called() -> None:
    labels, probability = good()
    assert "collapsed: all 2,000 patches are called normal" in raised(labels, probability * 0.499)
    assert "collapsed: all 2,000 patches are called tumour" in raised(labels, 0.5 + probability / 2)


def test_alarm_when_nothing_was_learned() -> None:
    labels, _ = good()
    text = raised(labels, np.full(2000, 0.5) + np.random.default_rng(1).normal(0, 1e-3, 2000))
    assert "NLL 0.693" in text and "ln 2" in text


def test_no_alarm_for_ln_2_reached_by_daring() -> None:
    """An NLL near ln 2 with confident, informative answers is a calibration problem, not a dead model."""
    labels, probability = good()
    sharp = np.clip(probability, 0.004, 0.996)
    power = np.linspace(1, 6, 400)
    odds = np.log(sharp / (1 - sharp))
    nll = [sk.log_loss(labels, 1 / (1 + np.exp(-odds * k))) for k in power]
    k = power[np.abs(np.array(nll) - math.log(2)).argmin()]
    assert min(np.abs(np.array(nll) - math.log(2))) < 0.003
    assert "learned nothing" not in raised(labels, 1 / (1 + np.exp(-odds * k)))


def test_alarm_when_a_constant_is_better() -> None:
    """The course's own case: an F2 below that of always answering tumour."""
    labels, probability = good()
    timid = probability * 0.7  # ranks as well as before, calls tumour too seldom
    text = raised(labels, timid)
    assert "f2 " in text and "is worse than the constant 'always tumour'" in text
    assert "auc" not in text
    backwards = raised(labels, 1 - probability)
    for name in ("accuracy", "f1", "f2", "auc", "pr_auc", "nll"):
        assert f"{name} " in backwards
    assert "ece" not in backwards, "a constant at the prevalence is calibrated; that is no rival"


def test_as_text_for_a_terminal() -> None:
    labels, probability = good()
    lines = metrics.text(metrics.report(labels, 1 - probability, resamples=20)).splitlines()
    assert lines[0] == f"n = 2,000 patches, {labels.sum():,} tumour, threshold 0.5"
    assert "slide" in lines[1], "what the intervals leave out is said"
    assert [line.split()[0] for line in lines[2:9]] == list(metrics.METRICS)
    assert "95 % interval" in lines[2] and "always tumour" in lines[2]
    assert lines[9].startswith("confusion  tn ") and all(line.startswith("ALARM ") for line in lines[10:])
    assert len(lines) > 10
    assert "best of 7" in metrics.text({**metrics.report(labels, probability, resamples=20), "best_of": 7})
