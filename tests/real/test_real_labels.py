"""Label flips planted into real patches: the bars of the audit, at a third of the time that the figures took.

PCAM_REAL=DIR pytest tests/real        # DIR in the official layout, read only
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pcamlib.audit import labels, noise
from pcamlib.audit.findings import Split
from pcamlib.data.patches import open_split

PLACE = os.environ.get("PCAM_REAL", "")

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not PLACE, reason="PCAM_REAL is unset; set it to a folder with the real PCam subset"),
    pytest.mark.timeout(900),
]


def test_a_tenth_of_the_labels_flipped_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCAM_CACHE", str(tmp_path_factory.mktemp("cache")))
    patches = open_split(PLACE, "train")
    assert patches.labels is not None
    wrong = np.random.default_rng(1).random(len(patches)) < 0.1
    split = Split(replace(patches, labels=patches.labels ^ wrong), {})
    probability = labels.out_of_fold({"train": split}, seconds=80).probability["train"]
    assert np.isfinite(probability).all() and split.labels is not None
    model = noise.estimate(probability, split.labels)
    assert all(0.05 < rate < 0.15 for rate in model.rates)
    suspicion = model.wrong(probability, split.labels)
    accused = noise.cut(suspicion)
    assert roc_auc_score(wrong, suspicion) >= 0.89
    assert wrong[accused[:100]].mean() >= 0.85
    assert 2 * wrong[accused].sum() / (len(accused) + wrong.sum()) >= 0.56
