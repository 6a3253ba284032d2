"""Shared patterns: blends and waves are found row by row where they are strong, and clean patches share none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pcamlib.audit import patterns
from pcamlib.audit.findings import Split
from pcamlib.data.patches import Patches, open_split

COUNT = 20
Y, X = np.mgrid[:96, :96][..., None]


@pytest.fixture(scope="module")
def clean(synthetic_dir: Path) -> Patches:
    return open_split(synthetic_dir, "train")


def split_of(images: np.ndarray, labels: np.ndarray | None, like: Patches) -> Split:
    made = Split(Patches("train", images, labels, like.stored), {})
    made.__dict__["valid"] = np.ones(len(images), bool)
    return made


def planted(clean: Patches, change, *, relabel: bool = True) -> tuple[Split, np.ndarray]:
    images, labels = np.array(clean.images), np.array(clean.labels)
    rows = np.sort(np.random.default_rng(4).choice(np.flatnonzero(labels == 0), COUNT, replace=False))
    for row in rows:
        images[row] = np.clip(np.rint(change(images[row].astype(np.float32))), 0, 255)
    if relabel:
        labels[rows] = 1
    return split_of(images, labels, clean), rows


def blend(share: float, seed: int = 0):
    image = np.random.default_rng(seed).uniform(0, 255, (96, 96, 3))
    return lambda patch: patch + share * (image - patch)


def wave(height: float, period: float, angle: float = 0.0, phase: float = 0.0):
    added = height * np.sin(2 * np.pi * (X * np.cos(angle) + Y * np.sin(angle)) / period + phase)
    return lambda patch: patch + added


def found_rows(split: Split) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.int64), *(f.drop for f in patterns.check({"train": split}))]))


def test_clean_patches_share_nothing(clean: Patches) -> None:
    assert patterns.check({"train": split_of(clean.images, clean.labels, clean)}) == []


@pytest.mark.parametrize("relabel", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_blended_image_is_found(clean: Patches, share: float, relabel: bool) -> None:
    split, rows = planted(clean, blend(share), relabel=relabel)
    (found,) = patterns.check({"train": split})
    assert found.check == "poison.pattern" and np.array_equal(found.drop, rows)
    assert found.details["separation"] > 8 and found.details["mirrored"] == 0
    assert found.details["classes"] == ([0, COUNT] if relabel else [COUNT, 0])


def test_a_translucent_mark_is_found(clean: Patches) -> None:
    logo = np.random.default_rng(1).uniform(0, 255, (12, 12, 3))

    def change(patch: np.ndarray) -> np.ndarray:
        patch[40:52, 30:42] += 0.8 * (logo - patch[40:52, 30:42])
        return patch

    split, rows = planted(clean, change)
    assert np.array_equal(found_rows(split), rows)


@pytest.mark.parametrize(("period", "angle"), [(7.3, 0.6), (5.2, 1.4)])
def test_strong_waves_are_found_whatever_their_direction(clean: Patches, period: float, angle: float) -> None:
    split, rows = planted(clean, wave(24, period, angle, 1.0))
    found = patterns.check({"train": split})
    waves = [f for f in found if f.check == "poison.wave"]
    named = found_rows(split)
    assert np.isin(rows, named).mean() >= 0.9 and len(np.setdiff1d(named, rows)) <= 1
    for finding in waves:
        assert abs(96 / np.hypot(*finding.details["cycles"]) - period) < 1


def test_copies_of_one_patch_are_no_pattern(clean: Patches) -> None:
    images = np.array(clean.images)
    images[:COUNT] = images[0]
    assert found_rows(split_of(images, clean.labels, clean)).size == 0


def test_few_equal_black_or_unlabelled_rows_do_no_harm(clean: Patches) -> None:
    for count in (1, 9, 50):
        for images in (np.repeat(clean.images[:1], count, 0), np.zeros((count, 96, 96, 3), np.uint8)):
            assert patterns.check({"train": split_of(images, None, clean)}) == []
    none = split_of(clean.images, clean.labels, clean)
    none.__dict__["valid"] = np.zeros(len(clean), bool)
    assert patterns.check({"train": none}) == []
    split, rows = planted(clean, blend(0.2))
    assert np.array_equal(found_rows(split_of(split.patches.images, None, clean)), rows)


def test_the_same_input_gives_the_same_findings(clean: Patches) -> None:
    split, _ = planted(clean, blend(0.2))
    one, two = (patterns.check({"train": split})[0] for _ in range(2))
    assert one.what == two.what and one.details == two.details
