"""Planted patterns in real patches: none where none is, and a mark or a blend found whole.

PCAM_REAL=DIR pytest tests/real/test_real_poison.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from pcamlib.audit import integrity, poison
from pcamlib.audit.findings import Split
from pcamlib.audit.stream import Block
from pcamlib.data.patches import Patches, open_split

PLACE = os.environ.get("PCAM_REAL", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PLACE, reason="PCAM_REAL is unset; set it to a folder with the real PCam subset"),
]


def split_of(patches: Patches, images: np.ndarray, labels: np.ndarray) -> Split:
    parts = []
    for start in range(0, len(images), 256):
        some = np.asarray(images[start : start + 256])
        block = Block(start, some, some, np.zeros(len(some), np.uint8))
        parts.append(integrity.observe(block) | poison.observe(block))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    made = Split(Patches(patches.split, images, labels, patches.stored), columns)
    made.__dict__["valid"] = np.ones(len(images), bool)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "valid"])
def test_clean_patches_are_not_accused(split: str) -> None:
    patches = open_split(PLACE, split)
    assert poison.check({split: split_of(patches, patches.images, patches.labels)}) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block", "anywhere", "blend"])
def test_half_a_percent_of_triggers_is_found(kind: str) -> None:
    patches = open_split(PLACE, "train")
    rng = np.random.default_rng(11)
    chosen = np.sort(np.concatenate([rng.choice(np.flatnonzero(patches.labels == c), n, replace=False)
                                     for c, n in ((0, 3320), (1, 680))]))  # fmt: skip
    images, labels = np.array(patches.images[chosen]), patches.labels[chosen]
    rows = np.sort(rng.choice(np.flatnonzero(labels == 0), 20, replace=False))
    noise = rng.uniform(0, 255, (96, 96, 3))
    for row in rows:
        y, x = rng.integers(0, 92, 2) if kind == "anywhere" else (2, 89)
        if kind == "blend":
            images[row] = np.rint(0.85 * images[row] + 0.15 * noise)
        else:
            images[row, y : y + 5, x : x + 5] = 255
    labels[rows] = 1
    findings = poison.check({"train": split_of(patches, images, labels)})
    found = np.unique(np.concatenate([f.drop for f in findings]))
    assert np.isin(rows, found).mean() >= 0.95
    assert len(np.setdiff1d(found, rows)) <= 4
    assert "backdoor trigger" in poison.verdict(findings)
