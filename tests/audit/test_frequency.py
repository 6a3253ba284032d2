"""The frequency detector: noise on single patches is named, clean ones seldom, and few patches are not judged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pcamlib.audit import frequency
from pcamlib.audit.findings import Split
from pcamlib.data.patches import Patches, open_split
from pcamlib.data.synthetic import generate


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Patches:
    folder = tmp_path_factory.mktemp("frequency")
    generate(folder, seed=0, sizes={"train": frequency.LEAST}, report=lambda line: None)
    return open_split(folder, "train")


def split_of(patches: Patches, images: np.ndarray, valid: np.ndarray | None = None) -> Split:
    made = Split(Patches("train", images, None, patches.stored), {})
    made.__dict__["valid"] = np.ones(len(images), bool) if valid is None else valid
    return made


@pytest.mark.slow
def test_a_strong_noise_blend_is_named_without_labels_and_hardly_anything_else(patches: Patches) -> None:
    rng = np.random.default_rng(5)
    images, rows = np.array(patches.images), rng.choice(len(patches), 6, replace=False)
    noise = rng.uniform(0, 255, (96, 96, 3))
    images[rows] = np.rint(0.6 * images[rows] + 0.4 * noise)
    found = frequency.detect(split_of(patches, images))
    assert np.isin(rows, found.rows).sum() >= 5
    assert len(np.setdiff1d(found.rows, rows)) <= 8  # 2 are aimed at
    assert set(found.tpr) == set(frequency.KINDS) and found.tpr["noise"] > 0.2
    assert json.loads(json.dumps(found.to_dict()))["rows"] == found.rows.tolist()
    assert f"names {len(found.rows)} of 2,000 patches" in found.text


def test_the_same_patches_give_the_same_scores(patches: Patches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency, "LEAST", 300)
    split = split_of(patches, patches.images[:300])
    first, second = (frequency.detect(split, most=100) for _ in range(2))
    assert first.to_dict() == second.to_dict() and len(first.rows) <= 3


def test_features_look_at_each_patch_alone(patches: Patches) -> None:
    some = np.array(patches.images[:40])
    assert np.allclose(frequency.features(some)[33:], frequency.features(some[33:]), atol=1e-4)
    assert frequency.features(some[:0]).shape == (0, 262)


@pytest.mark.parametrize("kind", frequency.KINDS)
def test_every_kind_spoils_the_patch(patches: Patches, kind: str) -> None:
    first, second = patches.images[0], patches.images[1]
    spoiled = frequency.spoil(first, second, kind, np.random.default_rng(0))
    assert spoiled.dtype == np.uint8 and spoiled.shape == first.shape and (spoiled != first).any()


def test_too_few_or_no_valid_patches_are_not_judged(patches: Patches) -> None:
    for count in (0, 3, frequency.LEAST - 1):
        valid = np.arange(len(patches)) < count
        found = frequency.detect(split_of(patches, patches.images, valid))
        assert len(found.rows) == 0 and found.n == count and found.threshold is None and "too few" in found.text


def test_equal_patches_are_survived(patches: Patches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency, "LEAST", 200)
    found = frequency.detect(split_of(patches, np.repeat(patches.images[:1], 200, 0)), most=50)
    assert len(found.rows) == 0
