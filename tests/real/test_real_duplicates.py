"""Copies in real patches: the known repeats, what overlaps on its own, and planted near copies.

PCAM_REAL=DIR pytest tests/real        # DIR in the official layout, read only; what is cached goes elsewhere
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pcamlib.audit import duplicates, near
from pcamlib.audit.duplicates import Group, Member
from pcamlib.audit.findings import Split
from pcamlib.audit.stream import Block
from pcamlib.data.patches import Patches, open_split
from pcamlib.data.plants import copies
from pcamlib.data.rewrite import Plan

PLACE = os.environ.get("PCAM_REAL", "")

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not PLACE, reason="PCAM_REAL is unset; set it to a folder with the real PCam subset"),
]


def observed(patches: Patches) -> Split:
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(patches), 64):
        images = np.array(patches.images[start : start + 64])
        block = Block(start, images, images, patches.flags[start : start + 64])
        for name, column in {**duplicates.observe(block), **near.observe(block)}.items():
            columns.setdefault(name, []).append(column)
    return Split(patches, {name: np.concatenate(parts) for name, parts in columns.items()})


@pytest.fixture(scope="module", autouse=True)
def _cache_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return {name: observed(open_split(PLACE, name)) for name in ("train", "valid")}


@pytest.fixture(scope="module")
def exact(splits: dict[str, Split]) -> list[Group]:
    return duplicates.groups(splits)


def test_829_train_positives_are_repeats_and_none_crosses_into_valid(
    splits: dict[str, Split], exact: list[Group]
) -> None:
    found = {(finding.check, finding.split): finding for finding in duplicates.check(splits, exact)}
    assert set(found) == {("duplicates.exact", "train"), ("duplicates.exact", "valid")}
    train = found["duplicates.exact", "train"]
    assert splits["train"].labels is not None and splits["train"].labels[train.rows].all()
    assert (len(train.drop), train.details["groups"], train.details["turned"]) == (829, 607, 0)
    assert len(found["duplicates.exact", "valid"].drop) == 93


def test_cut_outs_overlap_by_multiples_of_16_pixels_and_none_is_a_copy(
    splits: dict[str, Split], exact: list[Group]
) -> None:
    """1,807 pairs of the 23,000 patches lie 16 pixels apart along one axis, others along both; all are upright."""
    pairs = near.search(splits, exact).pairs
    assert len(pairs) > 1800 and not any(pair.evidence.copied for pair in pairs)
    assert {abs(step) for pair in pairs for step in pair.evidence.shift} == {0, 16}
    assert {pair.evidence.view for pair in pairs} == {0}
    assert all(pair.first.split == pair.second.split for pair in pairs)


def test_planted_near_copies_are_found(tmp_path: Path) -> None:
    plan = Plan(PLACE, seed=4)
    plan.keep("train", np.arange(0, 20_000, 4))
    for kind in ("jpeg", "shift", "brightness"):
        copies(plan, 150, how=kind)  # type: ignore[arg-type]
    truth = plan.write(tmp_path)
    splits = {"train": observed(open_split(tmp_path, "train"))}
    exact = duplicates.groups(splits)
    first = {member: group.members[0] for group in exact for member in group.members}
    found = {frozenset((pair.first, pair.second)) for pair in near.search(splits, exact).pairs}
    for kind, pairs in truth.rows.items():
        wanted = {
            frozenset(first.get(m, m) for m in (Member("train", int(a)), Member("train", int(b)))) for a, b in pairs
        }
        assert len(wanted & found) >= 0.98 * len(wanted), kind
