"""Paired comparisons: DeLong against hand, bootstrap and chance; Holm; and what may not be compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pcamlib.errors import DataError
from pcamlib.experiments import compare
from pcamlib.training import metrics
from pcamlib.training.evaluate import Predictions


def predictions(n: int = 400, gap: float = 1.0, seed: int = 0, noise: float = 0.0) -> Predictions:
    """Scores of a model that separates the classes by `gap` standard deviations; `noise` makes it another model."""
    rng, other = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    label = (np.arange(n) % 2).astype(np.uint8)
    score = gap * label + rng.normal(size=n) + noise * other.normal(size=n)
    return Predictions("valid", "f" * 64, np.arange(n), label, 1 / (1 + np.exp(-score)))


def test_delong_by_hand() -> None:
    # ill 0.8, 0.4; well 0.6, 0.2: three of four pairs in order; of the second model a tie counts half
    labels = np.array([1, 1, 0, 0])
    auc, covariance = compare.delong(labels, np.array([[0.8, 0.4, 0.6, 0.2], [0.5, 0.5, 0.5, 0.1]]))
    assert auc.tolist() == [0.75, 0.75]
    # shares of well below each ill: (1, .5) and (.75, .75); of ill above each well: (.5, 1) and (.5, 1)
    assert np.allclose(covariance, [[0.125 / 2 + 0.125 / 2, 0.125 / 2], [0.125 / 2, 0.125 / 2]])


def test_delong_gives_the_auc_of_the_metrics_and_the_spread_of_the_bootstrap() -> None:
    a, b = predictions(seed=1), predictions(seed=1, noise=0.8)
    auc, covariance = compare.delong(a.label, np.stack([a.probability, b.probability]))
    one = np.ones((1, len(a.label)))
    assert auc == pytest.approx([metrics.scores(p.label, p.probability, one)["auc"][0] for p in (a, b)])
    draws = np.subtract(*(metrics.bootstrap(p.label, p.probability)["auc"] for p in (a, b)))
    gap, low, high, p = compare.paired(compare.judged(a), compare.judged(b), "auc")
    assert (high - low) / (2 * 1.96) == pytest.approx(draws.std(), rel=0.1)
    assert low < gap < high and p < 0.05
    assert np.sqrt(covariance[0, 0]) == pytest.approx(metrics.bootstrap(a.label, a.probability)["auc"].std(), rel=0.1)


@pytest.mark.parametrize("metric", ["auc", "nll"])
def test_without_a_difference_p_is_uniform(metric: str) -> None:
    found = []
    for seed in range(40):
        one, other = (compare.judged(predictions(120, 0.7, s), resamples=200) for s in (seed, seed + 1000))
        found.append(compare.paired(one, other, metric)[3])
    assert 0.3 < np.mean(found) < 0.7 and np.mean(np.array(found) < 0.05) < 0.19  # 40 draws of 0.05: 0.19 is 4 sd


def test_equal_models_do_not_differ() -> None:
    a = compare.judged(predictions())
    assert compare.paired(a, a, "auc") == (0.0, 0.0, 0.0, 1.0)
    assert compare.paired(a, a, "f2")[3] == 1.0


def test_holm() -> None:
    assert compare.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm(np.array([0.9, 0.6])) == pytest.approx([1.0, 1.0])


def test_the_table_knows_better_worse_and_none() -> None:
    good, bad = predictions(gap=2.0), predictions(gap=0.3)
    spread = {"auc": 0.01, "nll": 0.01, "accuracy": 0.01, "f2": 0.01}
    rows = compare.table(("mine", good), {"bad": bad, "same": good}, spread).set_index(["rival", "metric"])
    assert set(rows.index.get_level_values("rival")) == {"bad", "same", "always tumour", "always normal", "prevalence"}
    assert rows.loc[("bad", "auc"), "verdict"] == "better" and rows.loc[("bad", "auc"), "test"] == "DeLong"
    assert rows.loc[("bad", "nll"), "verdict"] == "better", "a lower NLL is better"
    assert rows.loc[("same", "auc"), "verdict"].startswith("none")
    assert rows.loc[("prevalence", "auc"), "difference"] == pytest.approx(
        metrics.scores(good.label, good.probability, np.ones((1, 400)))["auc"][0] - 0.5
    )
    assert ("always tumour", "nll") not in rows.index and ("prevalence", "f2") not in rows.index
    assert (rows["p (Holm)"] >= rows["p"]).all()
    swapped = compare.table(("bad", bad), {"good": good}, spread).set_index(["rival", "metric"])
    assert swapped.loc[("good", "auc"), "verdict"] == "worse"
    assert compare.table(("a", good), {"b": bad}, {"auc": 0.5})["verdict"][0].startswith("none: within the spread")


def test_many_rivals_do_not_hide_a_plain_difference() -> None:
    good, spread = predictions(100, gap=3.0), dict.fromkeys(set(metrics.METRICS) - {"auc"}, 0.0)
    rows = compare.table(("mine", good), {f"bad {seed}": predictions(100, 0.0, seed) for seed in range(4)}, spread)
    assert len(rows) == 33 and rows["test"].eq("paired bootstrap").all()
    plain = rows[rows["rival"].str.startswith("bad") & (rows["metric"] == "accuracy")]
    assert plain["verdict"].eq("better").all(), "1,000 resamples leave p (Holm) of .066"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "mine and other cannot be compared: split valid and test"),
        ({"fingerprint": "e" * 64}, "fingerprint of the patches f+ and e+"),
        ({"index": np.arange(400)[::-1].copy()}, "they predict other rows"),
    ],
)
def test_predictions_of_other_patches_are_refused(change: dict[str, object], message: str) -> None:
    mine = predictions()
    with pytest.raises(DataError, match=message):
        compare.table(("mine", mine), {"other": replace(mine, **change)}, {"auc": 0.0})  # type: ignore[arg-type]


def test_fewer_predictions_are_refused() -> None:
    with pytest.raises(DataError, match="rows 400 and 398"):
        compare.table(("mine", predictions()), {"other": predictions(398)}, {"auc": 0.0})
