"""Discovery: a planted slice is found and named, chance is not, and what is reported was not part of the choice."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pcamlib.errors import DataError
from pcamlib.experiments import discovery, slices
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import Bound, Slice
from pcamlib.training.evaluate import Predictions

NUMBERS = tuple(Column(name, "", "number", "") for name in ("a", "b", "c", "d"))


def table(n: int, seed: int = 0, rate: float = 0.12) -> tuple[Features, np.ndarray, np.ndarray]:
    """Four numbers, of which a and b are correlated, labels, and mistakes by lot (more of them among tumour)."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 4)).astype(np.float32)
    values[:, 1] += values[:, 0]
    label = (rng.random(n) < 0.4).astype(np.uint8)
    wrong = rng.random(n) < rate * np.where(label == 1, 1.5, 0.7)
    return Features("valid", "f" * 64, np.arange(n) * 2, NUMBERS, values), label, wrong


def predicted(features: Features, label: np.ndarray, wrong: np.ndarray) -> Predictions:
    sure = np.random.default_rng(9).uniform(0.5, 1, len(label))
    probability = np.where((label == 1) ^ wrong, sure, 1 - sure)
    return Predictions(features.split, features.fingerprint, features.index, label, probability)


def planted(
    slice_: Slice, n: int = 6000, rate: float = 0.4, seed: int = 0
) -> tuple[Features, np.ndarray, np.ndarray, np.ndarray]:
    features, label, wrong = table(n, seed)
    inside = slice_.mask(features)
    wrong[inside] = np.random.default_rng(5).random(inside.sum()) < rate
    return features, label, wrong, inside


@pytest.mark.parametrize(
    "slice_", [Slice((Bound("c", 0.4, 0.6),)), Slice((Bound("a", -1, -0.2), Bound("d", high=-0.5)))]
)
def test_a_planted_slice_is_found_with_its_edges(slice_: Slice) -> None:
    features, label, wrong, inside = planted(slice_)
    found = discovery.discover(features, predicted(features, label, wrong))
    mask, row = found.slices[0].mask(features), found.rows[0]
    assert (mask & inside).sum() > 0.7 * (mask | inside).sum()
    assert {bound.feature for bound in found.slices[0].bounds} == {bound.feature for bound in slice_.bounds}
    assert len(row["typical"]) == 10 and inside[np.array(row["typical"]) // 2].all()
    assert row["p"] <= row["p adjusted"] <= 0.05 and row["excess 95 %"][0] > 0
    assert len(found.rows) == len(found.slices) == found.tried["reported"] <= found.tried["confirmed"]
    json.dumps([found.rows, found.tried], allow_nan=False)


def test_what_is_reported_comes_from_the_half_that_did_not_propose() -> None:
    features, label, wrong, _ = planted(Slice((Bound("c", 0.4, 0.6),)))
    predictions = predicted(features, label, wrong)
    found = discovery.discover(features, predictions)
    half, _ = discovery.halves(features, label, 0)
    rows = []
    for side in (0, 1):
        rest = features.take(half == side)
        theirs = replace(predictions, index=rest.index, label=label[half == side],
                         probability=predictions.probability[half == side])  # fmt: skip
        rows.append(slices.describe(found.slices[0], rest, theirs))
    assert any(row.items() <= found.rows[0].items() for row in rows)


def test_mistakes_by_lot_are_not_reported() -> None:
    reported = 0
    for seed in range(8):
        features, label, wrong = table(1000, seed)
        reported += bool(discovery.discover(features, predicted(features, label, wrong), seed=seed).rows)
    assert reported <= 2  # at most .05 each


def test_two_slices_are_told_apart_and_not_reported_twice() -> None:
    one, two = Slice((Bound("c", 1.0),)), Slice((Bound("d", -0.6, -0.3),))
    features, label, wrong, _ = planted(one)
    wrong |= two.mask(features) & (np.random.default_rng(6).random(len(label)) < 0.3)
    found = discovery.discover(features, predicted(features, label, wrong)).slices
    assert {slice_.bounds[0].feature for slice_ in found[:2]} == {"c", "d"}
    masks = [slice_.mask(features) for slice_ in found]
    for i, first in enumerate(masks):
        assert all((first & other).sum() < (first | other).sum() / 3 for other in masks[:i])


def test_the_worst_is_first_and_most_is_kept() -> None:
    features, label, wrong, _ = planted(Slice((Bound("c", 1.0),)), rate=0.3)
    wrong |= Slice((Bound("d", 1.2),)).mask(features) & (np.random.default_rng(6).random(len(label)) < 0.6)
    predictions = predicted(features, label, wrong)
    found = discovery.discover(features, predictions)
    assert [slice_.bounds[0].feature for slice_ in found.slices[:2]] == ["d", "c"]
    lows = [row["excess 95 %"][0] for row in found.rows]
    assert lows == sorted(lows, reverse=True)
    assert discovery.discover(features, predictions, most=1).slices == found.slices[:1]
    assert discovery.discover(features, predictions).rows == found.rows  # nothing is drawn outside the seed


def test_a_group_and_a_flag_are_taken_by_level_and_constants_left_out() -> None:
    features, label, wrong = table(4000)
    rng = np.random.default_rng(2)
    stain, flag = rng.integers(0, 5, 4000), rng.random(4000) < 0.1
    wrong |= ((stain == 3) | flag) & (rng.random(4000) < 0.3)
    more = (Column("stain", "", "group", ""), Column("flag_dark", "", "flag", ""), Column("same", "", "number", ""))
    values = np.column_stack([features.values, stain, flag, np.ones(4000)]).astype(np.float32)
    found = discovery.discover(
        replace(features, columns=NUMBERS + more, values=values), predicted(features, label, wrong)
    )
    assert {Bound("stain", 3, 4), Bound("flag_dark", 1, 2)} <= {slice_.bounds[0] for slice_ in found.slices}
    assert found.tried["left out"] == {"same": "the same everywhere"}


def test_slides_stay_whole_and_halves_even() -> None:
    features, label, wrong = table(4000)
    slide = np.random.default_rng(3).integers(0, 40, 4000) ** 2 // 40  # from 12 to 700 patches each
    of = replace(features, columns=(*NUMBERS, Column("slide", "", "group", "")),
                 values=np.column_stack([features.values, slide]).astype(np.float32))  # fmt: skip
    half, _ = discovery.halves(of, label, 0)
    assert all(len(set(half[slide == each])) == 1 for each in np.unique(slide))
    for side in (0, 1):
        assert abs(half[label == side].mean() - 0.5) < 0.05
    found = discovery.discover(of, predicted(of, label, wrong))
    assert "slide" in found.tried["left out"]


def test_clusters_of_the_embedding_are_a_feature_and_not_the_certainty() -> None:
    features, label, wrong = table(4000)
    rng = np.random.default_rng(4)
    kind = rng.integers(0, 8, 4000)
    wrong |= (kind == 5) & (rng.random(4000) < 0.4)
    predictions = predicted(features, label, wrong)
    embedding = 4 * np.eye(8)[kind] @ rng.normal(size=(8, 16)) + rng.normal(size=(4000, 16))
    embedding += 20 * np.log(predictions.probability / (1 - predictions.probability))[:, None]
    found = discovery.discover(features, predictions, embedding=embedding)
    assert found.slices[0].bounds[0].feature == "cluster" and found.features.names[-1] == "cluster"
    assert (kind[np.array(found.rows[0]["typical"]) // 2] == 5).all()
    cluster = found.features["cluster"]
    certain = [np.median(predictions.probability[cluster == each]) for each in np.unique(cluster)]
    assert np.ptp(certain) < 0.6  # k-means on the embedding as it is: above .95
    with pytest.raises(DataError, match=r"embedding \(10, 16\)"):
        discovery.discover(features, predictions, embedding=embedding[:10])


def test_typical_is_the_middle() -> None:
    features, *_ = table(2000)
    slice_ = Slice((Bound("c", 0.5, 1.5), Bound("d", high=0.0)))
    members = slice_.mask(features)
    picked = discovery.typical(slice_, features)
    assert members[picked].all() and len(set(picked)) == 10
    for name in ("c", "d"):
        low, high = np.quantile(features[name][members], [0.2, 0.8])
        assert ((features[name][picked] > low) & (features[name][picked] < high)).all()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_no_mistakes_and_nothing_but_mistakes_say_nothing(rate: float) -> None:
    features, label, _ = table(800)
    found = discovery.discover(features, predicted(features, label, np.full(800, rate > 0)))
    assert found.slices == () and found.rows == [] and found.tried["mistakes"] == rate * 800


def test_one_class_and_one_feature_serve() -> None:
    features, _, _, inside = planted(Slice((Bound("c", 1.0),)))
    alone = replace(features, columns=NUMBERS[2:3], values=features.values[:, 2:3])
    label, wrong = np.ones(6000, np.uint8), np.random.default_rng(1).random(6000) < np.where(inside, 0.4, 0.1)
    found = discovery.discover(alone, predicted(alone, label, wrong))
    assert found.slices[0].bounds[0].low == pytest.approx(1.0, abs=0.1) and found.rows[0]["specificity"] is None


def test_bad_input_is_refused() -> None:
    features, label, wrong = table(800)
    p = predicted(features, label, wrong)
    with pytest.raises(DataError, match="not of the same patches"):
        discovery.discover(features, replace(p, fingerprint="e" * 64))
    with pytest.raises(DataError, match="under another name"):
        discovery.discover(replace(features, values=np.column_stack([features.values[:, :3], p.probability])), p)
    with pytest.raises(DataError, match="threshold -1"):
        discovery.discover(features, p, threshold=-1)
    few = features.take(np.arange(100))
    with pytest.raises(DataError, match=r"100 patches in halves of .*: 80 in each"):
        discovery.discover(few, predicted(few, label[:100], wrong[:100]))
