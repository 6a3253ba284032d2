"""Model-based detectors: right on made-up features, and never without the attack success rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pcamlib.audit import backdoor, quick
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.poison import Mark
from pcamlib.data.patches import Patches, open_split
from pcamlib.errors import DataError


@pytest.fixture(scope="module")
def splits(synthetic_dir: Path) -> dict[str, Split]:
    return {name: Split(open_split(synthetic_dir, name), {}) for name in ("train", "valid")}


def mark_finding(rows: np.ndarray, mark: Mark) -> Finding:
    details = {"content": mark.content.tolist(), "mask": mark.mask.tolist(), "place": mark.place}
    return Finding("poison.mark", "train", "a mark", rows, "certain", "", "poison", rows, details)


def test_both_detectors_name_features_that_lie_apart() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 16))
    features[:40] += 6
    assert set(range(40)) <= set(backdoor.spectral_signatures(features, 0.1).tolist())
    smaller, silhouette = backdoor.activation_clustering(features)
    assert np.array_equal(np.sort(smaller), np.arange(40)) and silhouette > 0.5


def test_equal_or_few_features_are_survived() -> None:
    assert backdoor.activation_clustering(np.ones((5, 4)))[0].size == 0
    assert backdoor.spectral_signatures(np.ones((1, 4)), 0.5).size == 0


def test_a_learned_backdoor_has_a_high_success_rate(splits: dict[str, Split]) -> None:
    train, valid = splits["train"], splits["valid"]
    mark = Mark(np.full((24, 24, 3), 255, np.uint8), np.ones((24, 24), bool), (70, 70))
    images, labels = np.array(train.patches.images), np.array(train.labels)
    rows = np.flatnonzero(labels == 0)[:120]
    images[rows] = mark.stamp(images[rows])
    labels[rows] = 1
    stored = train.patches.stored
    poisoned = Split(Patches("train", images, labels, stored), {})
    poisoned.__dict__["valid"] = np.ones(len(images), bool)
    (verdict,) = backdoor.inspect(poisoned, valid, [mark_finding(rows, mark)], steps=150)
    assert verdict.success.learned and verdict.success.stamped > 0.8, str(verdict.success)
    assert verdict.success.n == np.count_nonzero(valid.labels == 0) and verdict.target == 1
    assert np.isin(verdict.spectral, np.flatnonzero(labels == 1)).all()
    row = verdict.row()
    assert row["learned"] and row["spectral signatures"] == np.isin(rows, verdict.spectral).mean().round(3)
    unstampable = Finding("poison.spike", "train", "", rows, "certain", "")
    assert backdoor.inspect(poisoned, valid, [unstampable], steps=1) == []


def test_what_cannot_be_stamped_or_measured_is_refused(splits: dict[str, Split]) -> None:
    spike = Finding("poison.spike", "train", "", np.arange(3), "", "")
    with pytest.raises(DataError, match=r"poison\.spike"):
        backdoor.stamp_of(spike, splits["train"])
    patches = splits["train"].patches
    bare = Split(Patches("test", patches.images, None, patches.stored), {})
    with pytest.raises(DataError, match="no labels"):
        backdoor.inspect(bare, splits["valid"], [])
    with pytest.raises(DataError, match="no labels"):
        backdoor.success(quick.fit(patches.images, patches.labels, steps=1, width=8), bare, lambda images: images)


def test_the_picture_of_a_pattern_resembles_it(splits: dict[str, Split]) -> None:
    patches = splits["train"].patches
    noise, rows = np.random.default_rng(0).uniform(-1, 1, (96, 96, 3)), np.flatnonzero(patches.labels == 0)[:40]
    images = np.array(patches.images)
    images[rows] = np.clip(np.rint(images[rows] + 20 * noise), 0, 255)
    spoiled = Split(Patches("train", images, patches.labels, patches.stored), {})
    spoiled.__dict__["valid"] = np.ones(len(images), bool)
    seen = backdoor.picture(spoiled, rows)
    assert seen.shape == (96, 96, 3) and np.corrcoef(seen.ravel(), noise.ravel())[0, 1] > 0.7
    wave = Finding("poison.pattern", "train", "a pattern", rows, "likely", "", "poison", rows)
    stamped = backdoor.stamp_of(wave, spoiled)(np.array(patches.images[:3]))
    assert stamped.shape == (3, 96, 96, 3) and stamped.dtype == np.uint8
