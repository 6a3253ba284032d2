"""Suspect labels: the noise model, the folds, and flips planted into generated patches."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from pcamlib.audit import labels, noise, quick
from pcamlib.audit.findings import Split
from pcamlib.data.patches import Patches, open_split
from pcamlib.errors import DataError


def channel(rates: tuple[float, float], n: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of a fair classifier, labels through the channel, and which of them are wrong."""
    rng = np.random.default_rng(seed)
    tumour = rng.random(n) < 0.5
    margin = rng.normal(np.where(tumour, 2.0, -2.0), 2.0)  # so that the logit of tumour is the margin
    wrong = rng.random(n) < np.where(tumour, rates[1], rates[0])
    return expit(margin), (tumour ^ wrong).astype(np.uint8), wrong


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.02, 0.02), (0.0, 0.15), (0.2, 0.05)])
def test_the_channel_is_found_in_both_directions(rates: tuple[float, float]) -> None:
    probability, given, wrong = channel(rates)
    found = noise.estimate(probability, given)
    for rate, estimate, (low, high) in zip(rates, found.rates, found.intervals, strict=True):
        assert estimate == pytest.approx(rate, abs=0.02)
        assert low - 0.005 <= rate <= high + 0.005
    suspicion = found.wrong(probability, given)
    assert suspicion.min() >= 0 and suspicion.max() <= 1
    assert suspicion.sum() == pytest.approx(wrong.sum(), rel=0.35)
    accused = noise.cut(suspicion)
    assert (np.diff(suspicion[accused]) <= 0).all(), "most suspect first"
    assert wrong[accused].mean() == pytest.approx(suspicion[accused].mean(), abs=0.1), "the promised precision is kept"


def test_a_weak_model_on_clean_labels_accuses_almost_nobody() -> None:
    probability, given, _ = channel((0.0, 0.0))
    found = noise.estimate(probability, given)
    assert max(found.rates) < 0.01 and len(noise.cut(found.wrong(probability, given))) < 0.01 * len(given)
    mistakes = ((probability > 0.5) != given).mean()
    assert mistakes > 0.1, "which confident learning would call wrong labels"


def test_a_model_that_knows_nothing_accuses_nobody() -> None:
    given = np.arange(60) % 2
    found = noise.estimate(np.full(60, 0.5), given)
    assert len(noise.cut(found.wrong(np.full(60, 0.5), given))) == 0


def test_the_cut_makes_the_expected_f1_largest() -> None:
    suspicion = np.array([0.1, 1.0, 0.0, 0.9, 0.2])
    assert noise.cut(suspicion).tolist() == [1, 3]
    assert noise.cut(np.zeros(4)).tolist() == [] and noise.cut(np.empty(0)).tolist() == []


def test_copies_and_slides_stay_in_one_fold() -> None:
    rng = np.random.default_rng(0)
    copies, slides = rng.integers(0, 300, 1000), rng.choice(["a", "b", "c", "d", "e", "f", ""], 1000)
    slides[copies < 250] = ""  # one chain of copies and slides would be a single unit
    given = rng.integers(0, 2, 1000).astype(np.uint8)
    units = labels._units(copies, slides)
    fold = labels._folds(units, given, 2, seed=0)
    for table, members in ((copies, copies >= 0), (slides, slides != "")):
        for value in np.unique(table[members]):
            assert len(np.unique(fold[table == value])) == 1
    alone = labels._folds(np.arange(1000), given, 4, seed=0)
    counts = np.bincount(2 * alone + given, minlength=8)
    assert counts[::2].max() - counts[::2].min() <= 1 and counts[1::2].max() - counts[1::2].min() <= 1


@pytest.fixture(scope="module")
def opened(synthetic_dir: Path) -> dict[str, Patches]:
    return {split: open_split(synthetic_dir, split) for split in ("train", "valid")}


def flipped(patches: Patches, share: float, seed: int = 0) -> tuple[Split, np.ndarray]:
    assert patches.labels is not None
    wrong = np.random.default_rng(seed).random(len(patches)) < share
    return Split(replace(patches, labels=patches.labels ^ wrong), {}), wrong


def test_planted_flips_rank_first(opened: dict[str, Patches]) -> None:
    """A few seconds on 768 patches; 4,000 patches in 20 s reach an AUROC of 0.93."""
    pairs = {name: flipped(patches, 0.2) for name, patches in opened.items()}
    splits = {name: split for name, (split, _) in pairs.items()}
    found = labels.check(splits, seconds=8)
    assert "train" in {finding.split for finding in found}, "256 patches of valid alone may prove nothing"
    for finding in found:
        assert finding.check == "labels.suspect" and finding.rule == "labels"
        assert np.array_equal(finding.rows, finding.drop) and (np.diff(finding.rows) > 0).all()
        wrong = pairs[finding.split][1]
        assert wrong[finding.rows].mean() > 1.7 * wrong.mean()
        ranked = finding.details["ranked"]
        assert {row for row, *_ in ranked} <= set(finding.rows.tolist())
        assert all(a[3] >= b[3] for a, b in itertools.pairwise(ranked))
        assert finding.details["judged"] == len(wrong) and finding.details["confident_learning"] > 0
        json.dumps(finding.details)


def test_equal_input_gives_equal_bits_and_flagged_rows_are_not_judged(opened: dict[str, Patches]) -> None:
    split = Split(opened["train"], {})
    split.__dict__["valid"] = np.arange(len(split)) >= 100
    first, second = (labels.out_of_fold({"train": split}, seconds=1).probability["train"] for _ in range(2))
    assert np.array_equal(first, second, equal_nan=True)
    assert np.isnan(first[:100]).all() and np.isfinite(first[100:]).all()
    thinned = labels.out_of_fold({"train": split}, seconds=0.5, limit=200).probability["train"]
    assert np.isfinite(thinned).sum() == 200


def test_copies_are_not_judged_by_each_other(opened: dict[str, Patches]) -> None:
    split = Split(opened["train"], {}, slides=np.full(len(opened["train"]), "one slide"))
    groups = {"train": np.where(np.arange(len(split)) < 10, 7, -1)}
    chosen = {"train": np.arange(len(split))}
    assert split.labels is not None
    fold = labels._assign({"train": split}, chosen, split.labels, groups, 2, seed=0)
    assert len(np.unique(fold[:10])) == 1 and np.bincount(fold).min() > 200, "one slide alone cannot be parted"


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_too_little_to_judge_is_no_finding(opened: dict[str, Patches], rows: int) -> None:
    split = Split(opened["train"], {})
    split.__dict__["valid"] = np.arange(len(split)) < rows
    assert labels.check({"train": split}, seconds=1) == []
    assert np.isnan(labels.out_of_fold({"train": split}, seconds=1).probability["train"]).all()


def test_unlabelled_and_one_class_splits_are_left_alone(opened: dict[str, Patches]) -> None:
    bare = Split(replace(opened["train"], labels=None), {})
    same = Split(replace(opened["valid"], labels=np.ones(len(opened["valid"]), np.uint8)), {})
    assert labels.check({"train": bare}, seconds=1) == [] and labels.check({}, seconds=1) == []
    assert labels.check({"train": bare, "valid": same}, seconds=1) == []


def test_the_quick_model_sees_whole_and_shrunk_patches_alike(opened: dict[str, Patches]) -> None:
    images, given = opened["train"].images, opened["train"].labels
    assert given is not None
    rows = np.arange(0, 512, 2)
    small = quick.shrink(images, np.arange(512))
    assert small.shape == (512, 32, 32, 3) and small.dtype == np.uint8
    block = images[3].astype(np.uint16).reshape(32, 3, 32, 3, 3).sum((1, 3))
    assert np.array_equal(small[3], (block + 4) // 9)
    models = [quick.fit(images, given, rows, steps=40), quick.fit(images, given.astype(float), rows, steps=40)]
    whole, shrunk = quick.predict(models[0], images), quick.predict(models[1], small)
    assert np.allclose(whole, shrunk, atol=1e-6), "0 and 1 are probabilities too"
    assert roc_auc_score(given[1::2], whole[1::2]) > 0.7
    found = quick.embed(models[0], images, np.arange(70))
    assert found.shape == (70, 64) and found.dtype == np.float32
    assert quick.embed(models[0], images, np.empty(0, np.int64)).shape == (0, 64)


def test_one_patch_teaches_nothing(opened: dict[str, Patches]) -> None:
    images, given = opened["train"].images, opened["train"].labels
    assert given is not None
    with pytest.raises(DataError, match="1 patches to learn from"):
        quick.fit(images, given, np.array([0]), steps=1)
